"Training: recipes, samplers, augmentation, exact resume, and stops that say why."
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from dml_companion import objectives
from dml_companion.datasets import load
from dml_companion.encoders import build_encoder, embed
from dml_companion.objective import Objective, Parts
from dml_companion.training import (Augment, Collapsed, Recipe, TRAINING, augment_batch, balanced_batches, build_optimizer, crop_boxes,
                                    Snapshots, fit, kept_epochs, parameter_groups, random_batches, rate_factor, step_bytes, warmup_cosine)

ROOT = Path(__file__).parents[1]
SMALL = dict(max_train_classes=24, max_test_classes=12)
BASE = dict(encoder_options={"width": 4}, epochs=2, batch_size=32, lr=.1, warmup=3, dropout=.1, validation=.25,
            augment={"degrees": 5., "translate": .05, "crop_scale": [.6, 1.]})
CORE = "cross_entropy", "normalized_softmax", "center", "contrastive", "snca", "multi_similarity", "spce"


@pytest.fixture(scope="module")
def data():
    return load("glyphs", progress=False, **SMALL)


def make(recipe):
    return partial(objectives.make, recipe.objective, **recipe.objective_options) if recipe.objective else None


def run(data, folder=None, seed=0, **changes):
    recipe = Recipe(**{**BASE, **changes})
    return fit(recipe, data, make(recipe), seed=seed, folder=folder, device="cpu", progress=False)


def numbers(result):
    "Everything a run computed, without its timings."
    history = [{k: v for k, v in e.items() if k != "seconds"} for e in result.history]
    return history, [t.clone() for t in result.encoder.state_dict().values()]


def same(a, b):
    (ha, wa), (hb, wb) = numbers(a), numbers(b)
    return ha == hb and len(wa) == len(wb) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(wa, wb))


@pytest.fixture(scope="module")
def reference(data):
    return run(data)


def test_same_recipe_same_numbers_twice(data, reference):
    assert same(reference, run(data))


def test_seed_changes_the_run(data, reference):
    assert not same(reference, run(data, seed=1))


# One value for every field. A field that is added to Recipe without one fails `test_every_field_is_tried`.
CHANGED = dict(
    data_options=None, dataset=None, size=dict(size=24), validation=dict(validation=.5), validation_seed=dict(validation_seed=3),
    augment=dict(augment={"degrees": 5., "translate": .05}), encoder=dict(encoder="resnet18", encoder_options={}, epochs=1),
    encoder_options=dict(encoder_options={"width": 5}), dim=dict(dim=7), norm=dict(norm="batch"), dropout=dict(dropout=.3),
    freeze_bn=dict(freeze_bn=True), pretrained=None, objective=dict(objective="normalized_softmax"),
    objective_options=dict(objective_options={"label_smoothing": .2}), optimizer=dict(optimizer="adamw", lr=.01), lr=dict(lr=.05),
    classifier_lr=dict(classifier_lr=3.), proxy_lr=dict(objective="normalized_softmax", proxy_lr=3.), momentum=dict(momentum=.5),
    nesterov=dict(nesterov=True), weight_decay=dict(weight_decay=.05), schedule=dict(schedule="constant"), warmup=dict(warmup=1),
    epochs=dict(epochs=1), batch_size=dict(batch_size=24), sampler=dict(sampler="balanced", per_class=4), per_class=dict(sampler="balanced", per_class=8),
    clip=dict(clip=.01), precision=dict(precision="bf16"), threads=None, patience=None,
    epsilon=dict(optimizer="adam", lr=.01, epsilon=.1), milestones=dict(schedule="step", milestones=(1,)),
    decay=dict(schedule="step", milestones=(1,), decay=.5), crop=dict(pipeline="device", crop=24), pipeline=dict(pipeline="device"))


def test_every_field_is_tried():
    assert set(CHANGED) == set(Recipe.model_fields)


@pytest.mark.parametrize("field", [k for k, v in CHANGED.items() if v])
def test_every_field_changes_the_run(field, data, reference):
    changes = dict(CHANGED[field])
    source = load("glyphs", progress=False, size=24, **SMALL) if field == "size" else data
    stairs = {k: v for k, v in BASE.items() if k != "warmup"}
    if "schedule" in changes:
        recipe = Recipe(**stairs, **changes)
        without = Recipe(**stairs, **(dict(changes, decay=.1) if field == "decay" else dict(schedule="constant")))
        base = fit(without, source, make(without), device="cpu", progress=False) if field != "schedule" else reference
        assert not same(base, fit(recipe, source, make(recipe), device="cpu", progress=False))
        return
    base = reference
    if field == "epsilon": base = run(data, optimizer="adam", lr=.01)
    if field == "crop": base = run(data, pipeline="device")
    if field == "proxy_lr": base = run(data, objective="normalized_softmax")
    if field == "per_class": base = run(data, sampler="balanced", per_class=4)
    assert not same(base, run(source, **changes))


def test_data_fields_reach_the_loader_and_pretrained_the_encoder(data):
    other = load("glyphs", progress=False, **{**SMALL, "max_train_classes": 20})
    assert other.digest != data.digest                                         # dataset, data_options: the loader's, and in the run's name
    with pytest.raises(ValueError, match="pretrained"): run(data, pretrained=True)


def test_threads_and_patience_act(data, monkeypatch):
    seen = []
    before = torch.get_num_threads()
    monkeypatch.setattr("dml_companion.training.train_epoch", lambda *a, **k: seen.append(torch.get_num_threads()) or dict(loss=0., tightness=0., contrast=0., iterations=1))
    recalls = iter([.5, .4, .4, .4, .4])
    monkeypatch.setattr("dml_companion.training.monitor", lambda *a: {"recall@1": next(recalls)})
    with pytest.raises(Collapsed, match="stayed below"): run(data, epochs=4, threads=2, patience=2)
    assert seen == [2, 2] and torch.get_num_threads() == before                # two evaluations below the start, then the stop


@pytest.mark.parametrize("bad, words", [
    (dict(learning_rate=.1), "unknown Recipe key 'learning_rate'"), (dict(optimiser="sgd"), "did you mean 'optimizer'"),
    (dict(optimizer="adamw", momentum=.5), "momentum and nesterov belong to sgd"), (dict(nesterov=True, momentum=0.), "nesterov needs momentum"),
    (dict(per_class=4), "per_class goes with"), (dict(sampler="balanced"), "per_class goes with"),
    (dict(sampler="balanced", per_class=3, batch_size=32), "no multiple"), (dict(schedule="constant", warmup=5), "warmup belongs"),
    (dict(validation_seed=1), "validation_seed has no effect"), (dict(epochs=0), "objective = None goes with"),
    (dict(epochs=0, objective=None, lr=.5), "trains nothing"), (dict(augment={"degree": 3}), "did you mean 'degrees'"),
    (dict(augment={"crop_ratio": [1., 1.]}), "no effect without"), (dict(augment={"jitter": [0, 0, 0, .7]}), "hue"),
    (dict(epsilon=.1), "epsilon belongs to"), (dict(schedule="step"), "milestones go with"), (dict(milestones=(3,)), "milestones go with"),
    (dict(schedule="constant", decay=.5), "decay belongs"), (dict(schedule="step", milestones=(3, 2)), "milestones are epochs"),
    (dict(schedule="step", milestones=(10,), epochs=10), "milestones are epochs"), (dict(schedule="step", milestones=(0,)), "milestones are epochs"),
    (dict(schedule="step", milestones=(2,), warmup=5), "warmup belongs"), (dict(crop=24), "crop belongs to pipeline"),
    (dict(crop=40, size=32, pipeline="device"), "larger than size"), (dict(augment={"jitter_first": True}), "no effect without augment.jitter"),
    (dict(augment={"jitter": [.1, 0, 0, 0], "jitter_first": True}), "jitter_first belongs to pipeline"), (dict(pipeline="gpu"), "pipeline"),
    (dict(lr=-1), "lr"), (dict(dropout=1.), "dropout"), (dict(precision="fp16"), "precision")])
def test_recipe_refuses(bad, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")): Recipe(**bad)


def test_fields_that_came_later_are_written_only_where_they_say_something():
    later = {"crop", "epsilon", "milestones", "decay", "pipeline"}
    assert not later & set(Recipe().model_dump()) and "jitter_first" not in Recipe().model_dump()["augment"]
    said = Recipe(optimizer="radam", epsilon=.01, schedule="step", milestones=(2,), decay=.5, pipeline="device", crop=24).model_dump(mode="json")
    assert later <= set(said) and Recipe(**said).milestones == (2,)


@pytest.mark.parametrize("name, kind", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("radam", torch.optim.RAdam)])
def test_optimizers_are_torch_s(name, kind):
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer([dict(params=[p], lr=.1, peak=.1, weight_decay=.3)], Recipe(optimizer=name, epsilon=.01))
    assert type(optimizer) is kind and optimizer.param_groups[0]["eps"] == .01 and optimizer.param_groups[0]["weight_decay"] == .3


def test_a_step_schedule_is_torch_s_multistep():
    recipe, p = Recipe(schedule="step", milestones=(2, 5), decay=.3, epochs=7), torch.nn.Parameter(torch.ones(1))
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer := torch.optim.SGD([p], lr=1.), [2, 5], .3)
    for epoch in range(7):
        for i in range(9): assert rate_factor(recipe, epoch * 9 + i, 63) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step(); theirs.step()


def test_recipe_from_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("objective: snca\nlr: 0.2\nobjective_options: {temperature: 0.1}\n")
    assert Recipe.load(path) == Recipe(objective="snca", lr=.2, objective_options={"temperature": .1})
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"): Recipe.load(path)
    assert Recipe.load(Recipe(lr=.3).model_dump()) == Recipe(lr=.3)


@pytest.mark.parametrize("changes, words", [
    (dict(augment={"flip": True}), "flip"), (dict(augment={"jitter": [0., 0., .2, 0.]}), "grey"), (dict(batch_size=100_000), "larger than"),
    (dict(proxy_lr=2.), "proxies"), (dict(objective="snca", classifier_lr=2.), "classifier"),
    (dict(sampler="balanced", per_class=16, batch_size=32), "have fewer")])
def test_fit_refuses_before_training(changes, words, data):
    with pytest.raises(ValueError, match=words): run(data, **changes)


def test_fit_refuses_devices(data):
    with pytest.raises(ValueError, match="unknown device"): fit(Recipe(), data, None, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"): fit(Recipe(), data, None, device="cuda")
    with pytest.raises(ValueError, match="make_objective"): fit(Recipe(), data, None)


@pytest.mark.parametrize("name", CORE)
def test_every_parameter_moves(name, data):
    changes = dict(objective=name, epochs=1)
    if name not in ("cross_entropy", "normalized_softmax", "center"): changes |= dict(sampler="balanced", per_class=4)
    before = fit(Recipe(epochs=0, objective=None, encoder_options={"width": 4}), data, None, progress=False)
    after = run(data, **changes)
    start = dict(before.encoder.named_parameters())
    assert all(not torch.equal(p, start[k]) for k, p in after.encoder.named_parameters())
    fresh = make(Recipe(**changes if "per_class" in changes else dict(objective=name)))(num_classes=18, dim=32)
    torch.manual_seed(0)
    for k, p in after.objective.named_parameters():
        assert p.abs().sum() > 0 and not torch.equal(p, dict(fresh.named_parameters())[k])
    assert all(np.isfinite(e["loss"]) for e in after.history[1:])


def test_groups_cover_everything_once_and_spare_thin_parameters(data):
    recipe = Recipe(**{**BASE, "classifier_lr": 5., "weight_decay": .1})
    objective = objectives.make("cross_entropy", 10, 32)
    from dml_companion.encoders import build_encoder
    encoder = build_encoder("convnet", in_channels=1, size=32, width=4)
    groups = parameter_groups(encoder, objective, recipe)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for m in (encoder, objective) for p in m.parameters())
    for g in groups:
        assert g["weight_decay"] == (0 if g["params"][0].ndim < 2 else .1)
        assert g["lr"] == pytest.approx(.5 if g["name"] == "classifier" else .1)
    assert isinstance(build_optimizer(groups, recipe), torch.optim.SGD)


def test_warmup_cosine_is_the_paper_s():
    import math
    for i, total in ((0, 500), (37, 500), (99, 500), (250, 500), (499, 500)):
        assert warmup_cosine(i, total) == pytest.approx(min((i + 1) / 100, .5 * (1 + math.cos(math.pi * i / total))), abs=1e-15)


def test_bf16_run_is_finite_and_close(data, reference):
    other = run(data, precision="bf16")
    assert all(t.isfinite().all() for t in other.encoder.state_dict().values())
    assert abs(other.history[1]["loss"] - reference.history[1]["loss"]) < .1     # bf16 has eight bits: the loss is near log 18 = 2.9


# ---- samplers

@settings(derandomize=True, deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(4, 30), min_size=5, max_size=20), per_class=st.integers(2, 4), classes=st.integers(2, 5), seed=st.integers(0, 99))
def test_balanced_batches(sizes, per_class, classes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    batches = balanced_batches(labels, classes * per_class, per_class, torch.Generator().manual_seed(seed))
    seen = torch.cat(batches)
    assert len(seen.unique()) == len(seen)                                   # without replacement
    for b in batches:
        counts = np.bincount(labels[b], minlength=len(sizes))
        assert set(counts[counts > 0]) == {per_class} and (counts > 0).sum() == classes
    used = np.bincount(labels[seen], minlength=len(sizes)) // per_class
    assert (np.asarray(sizes) // per_class - used > 0).sum() < classes       # what is left cannot fill a batch
    again = balanced_batches(labels, classes * per_class, per_class, torch.Generator().manual_seed(seed + 1))
    assert len(again) == len(batches)                                        # an epoch's length does not depend on chance


def test_random_batches_are_a_permutation():
    batches = random_batches(np.zeros(103), 10, torch.Generator().manual_seed(0))
    assert len(batches) == 10 and len(torch.cat(batches).unique()) == 100


def test_every_image_of_a_balanced_set_gets_its_turn():
    labels, gen, seen = np.repeat(np.arange(8), 7), torch.Generator().manual_seed(0), set()
    for _ in range(12): seen |= set(torch.cat(balanced_batches(labels, 8, 2, gen)).tolist())
    assert len(seen) == 56


# ---- augmentation: the definitions are checked against torchvision in the notebook; here on fresh seeds and through the front door

def test_augmentation_off_is_the_identity():
    x = torch.rand(4, 3, 16, 16)
    assert torch.equal(augment_batch(x, Augment(), torch.Generator()), x)


@pytest.mark.parametrize("seed", range(3))
def test_affine_and_crop_equal_torchvision(seed):
    from torchvision.transforms.v2 import InterpolationMode, functional as V
    from dml_companion.training import affine_batch, crop_batch
    gen = torch.Generator().manual_seed(100 + seed)
    x = F.interpolate(torch.rand(8, 3, 9, 9, generator=gen), (40, 40), mode="bilinear")
    a, s, g = torch.rand(8, generator=gen) * 90 - 45, torch.rand(8, generator=gen) * .6 + .7, torch.rand(8, generator=gen) * 30 - 15
    t = torch.randint(-5, 6, (8, 2), generator=gen).float()
    oracle = [V.affine(i, p.item(), q.int().tolist(), r.item(), [h.item(), 0.], interpolation=InterpolationMode.BILINEAR) for i, p, q, r, h in zip(x, a, t, s, g)]
    assert_close(affine_batch(x, a, t, s, g), torch.stack(oracle), atol=5e-4, rtol=0)   # float32 grid of 40 pixels: 40 * 2^-23 * slope
    boxes = crop_boxes(8, (40, 40), (.1, 1.), (.5, 2.), gen)
    oracle = [V.resized_crop(i, int(b[1]), int(b[0]), int(b[3]), int(b[2]), [40, 40]) for i, b in zip(x, boxes)]
    assert_close(crop_batch(x, boxes), torch.stack(oracle), atol=2e-5, rtol=0)


def test_images_are_augmented_independently():
    x = torch.rand(1, 3, 24, 24).expand(64, -1, -1, -1)
    for config in (Augment(degrees=20), Augment(translate=.2), Augment(scale=(.7, 1.3)), Augment(shear=20), Augment(crop_scale=(.3, .9)),
                   Augment(jitter=(.5, 0, 0, 0)), Augment(jitter=(0, .5, 0, 0)), Augment(jitter=(0, 0, .5, 0)), Augment(jitter=(0, 0, 0, .3))):
        y = augment_batch(x, config, torch.Generator().manual_seed(0)).flatten(1)
        assert len(torch.unique(y, dim=0)) > 48, config
    flipped = augment_batch(x, Augment(flip=True), torch.Generator().manual_seed(0))
    share = (flipped == x).flatten(1).all(1).float().mean()
    assert .3 < share < .7


def test_crop_boxes_stay_inside():
    boxes = crop_boxes(2000, (20, 30), (.08, 1.), (.3, 3.), torch.Generator().manual_seed(0))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 0] + boxes[:, 2] <= 30).all() and (boxes[:, 1] + boxes[:, 3] <= 20).all() and (boxes[:, 2:] >= 1).all()


# ---- resume

CHILD = """
import sys, time, torch
from functools import partial
from dml_companion import objectives, training
from dml_companion.datasets import load
from dml_companion.encoders import embed
recipe = training.Recipe(**{base!r}, objective="center")
slow = training.augment_batch
def augment(*a):
    time.sleep(.03)
    return slow(*a)
training.augment_batch = augment
training.fit(recipe, load("glyphs", progress=False, **{small!r}), partial(objectives.make, "center"), seed=5, folder=sys.argv[1], device="cpu", progress=False)
"""


def test_kill_9_and_resume_is_bit_exact(tmp_path, data):
    base = {**BASE, "epochs": 6}
    recipe = Recipe(**base, objective="center")
    whole = fit(recipe, data, make(recipe), seed=5, device="cpu", progress=False)
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(base=base, small=SMALL), str(tmp_path)])
    deadline = time.time() + 120
    while time.time() < deadline and child.poll() is None:
        progress = tmp_path / "progress.json"
        if progress.exists() and json.loads(progress.read_text())["epoch"] >= 2: break
        time.sleep(.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"]
    assert 2 <= done < 6, f"the run was to be killed in its middle, it had done {done} epochs"
    resumed = fit(recipe, data, make(recipe), seed=5, folder=tmp_path, device="cpu", progress=False)
    assert same(whole, resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.objective.state_dict().values(), resumed.objective.state_dict().values()))


def test_random_states_come_back(tmp_path, data):
    import random
    run(data, folder=tmp_path, epochs=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    from dml_companion.training import restore_random_states
    gens = {k: torch.Generator() for k in ("sampler", "augment")}
    draws = []
    for _ in range(2):
        restore_random_states(state["random"], gens)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=gens["sampler"]).item(), torch.rand(1, generator=gens["augment"]).item()))
    assert draws[0] == draws[1]


def test_a_checkpoint_of_another_run_is_refused(tmp_path, data):
    run(data, folder=tmp_path)
    with pytest.raises(ValueError, match="differs in recipe"): run(data, folder=tmp_path, lr=.2)
    with pytest.raises(ValueError, match="differs in seed"): run(data, folder=tmp_path, seed=3)
    for file in tmp_path.glob("checkpoint*.pt"): file.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="delete it"): run(data, folder=tmp_path)


def test_a_finished_run_does_not_train_again(tmp_path, data):
    first = run(data, folder=tmp_path)
    stamp = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    again = run(data, folder=tmp_path)
    assert same(first, again) and (tmp_path / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, data):
    with pytest.raises(Collapsed, match="not finite"): run(data, folder=tmp_path, lr=1e8, epochs=3, clip=None)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(t.isfinite().all() for t in state["encoder"].values())


# ---- the notebook that runs it

class Linear(nn.Module):
    "Twelve weights, and a batch norm whose statistics must survive being measured."
    def __init__(self):
        super().__init__()
        self.map, self.norm = nn.Linear(4, 3, bias=False), nn.BatchNorm1d(4, affine=False, track_running_stats=True)
    def forward(self, x): return self.map(x.float())


class Sum(Objective):
    def split(self, embeddings, labels): return Parts(embeddings.sum(), embeddings.sum() * 0)


@pytest.mark.parametrize("changes, moments", [({}, 1), ({"momentum": 0.}, 0), ({"optimizer": "adamw"}, 2)])
def test_the_bytes_of_a_step_are_counted_exactly(changes, moments):
    "Autograd keeps the input of a linear map (4 floats an image) and nothing else; weights, gradients and moments come to 12 floats each."
    for n in (8, 16):
        counted = step_bytes(Linear(), Sum(), Recipe(**changes), torch.rand(n, 4), torch.zeros(n, dtype=torch.int64))
        assert counted == 4 * (4 * n + (2 + moments) * 12)


def test_counting_the_bytes_of_a_step_changes_nothing():
    net, loss = build_encoder("convnet", width=8, norm="batch"), Sum()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    few, many = (step_bytes(net.eval(), loss, Recipe(), torch.rand(n, 1, 32, 32), torch.zeros(n, dtype=torch.int64)) for n in (8, 16))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net.training
    weights = 3 * 4 * sum(p.numel() for p in net.parameters())
    assert 1.9 < (many - weights) / (few - weights) < 2.1


def test_the_parameters_cell_of_30_train_is_the_recipe():
    import ast
    cells = json.loads((ROOT / "nbs/04_experiments/30_train.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    values = {(a.target if isinstance(a, ast.AnnAssign) else a.targets[0]).id: ast.literal_eval(a.value) for a in ast.parse("".join(cell["source"])).body}
    assert set(values) - set(Recipe.model_fields) == {"row", "seed", "data", "device", "folder", "weights", "watch_test", "snapshots", "evaluate_on", "expected"}
    assert set(Recipe.model_fields) <= set(values)
    recipe = Recipe(**{k: values[k] for k in Recipe.model_fields})
    assert recipe.changed <= {"augment"}, "the notebook's defaults are the recipe's, but for the glyphs' augmentation"


def test_control_fields_are_refused_by_name():
    assert TRAINING < set(Recipe.model_fields)


# ---------------------------------------------------------------- observers

def observed(data, observe, folder=None):
    recipe = Recipe(**BASE)
    return fit(recipe, data, make(recipe), seed=0, folder=folder, device="cpu", progress=False, observe=observe)


def test_a_watched_run_is_the_same_run(data, reference):
    modes = []
    def curious(epoch, encoder, objective):
        torch.rand(100), np.random.rand(100), random.random()
        modes.append((epoch, encoder.training, objective.training))
        return {"mine": float(epoch)}
    watched = observed(data, curious)
    assert modes == [(0, False, False), (1, False, False), (2, False, False)]
    assert [e["mine"] for e in watched.history] == [0., 1., 2.]
    for e in watched.history: e.pop("mine")
    assert same(reference, watched)


def test_an_observer_may_not_overwrite_the_loop(data):
    with pytest.raises(ValueError, match="'epoch'.*choose another name"): observed(data, lambda *a: {"epoch": 7})


def test_snapshots_survive_a_kill_and_hold_what_the_encoder_gives(tmp_path, data):
    class Cut(Exception): pass
    keep = Snapshots(tmp_path, kept_epochs(2), seen=data.train, unseen=data.query)
    def cut(epoch, *rest):
        keep(epoch, *rest)
        if epoch == 1: raise Cut
    with pytest.raises(Cut): observed(data, cut, tmp_path)
    with pytest.raises(ValueError, match="0002.npz is missing"): keep.merge()
    result = observed(data, keep, tmp_path)
    path = dict(np.load(keep.merge(seen_labels=data.train.labels)))
    assert path["epoch"].tolist() == [0, 1, 2] and path["seen"].shape[:2] == (3, len(data.train)) and path["weight"].shape[0] == 3
    assert np.array_equal(path["unseen"][-1], embed(result.encoder, data.query).numpy())
    assert not np.array_equal(path["unseen"][0], path["unseen"][1])
    assert keep.merge() == tmp_path / "epochs.npz" and not (tmp_path / "epochs").exists()          # a second time: nothing to do


@pytest.mark.parametrize("epochs, most", [(0, 16), (1, 16), (16, 16), (17, 16), (100, 16), (7, 3)])
def test_kept_epochs(epochs, most):
    kept = kept_epochs(epochs, most)
    assert kept[0] == 0 and kept[-1] == epochs and kept == sorted(set(kept)) and len(kept) <= most + 1
