"The profile `paper`: the released code's recipes, field by field, and a walk through it on tiny trees in the official layouts."
import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from dml_companion import objectives, reproduction as R
from dml_companion.benchmarks import expecting
from dml_companion.datasets import Split
from dml_companion.device import DevicePack, training_batches
from dml_companion.engine import run_cells
from dml_companion.profiles import checked_recipes, load_profile, plan
from dml_companion.training import Recipe, epoch_batches
from test_benchmarks import TINY, TREES, grow

ROOT = Path(__file__).parents[1]
COMMANDS = { # README of the paper's code
    "cub": dict(epochs=30, lr=.02, momentum=0, nesterov=False, norm="none"), "cars196": dict(epochs=100, lr=.05, momentum=0, nesterov=False, norm="batch"),
    "sop": dict(epochs=100, lr=.003, momentum=.99, nesterov=True, norm="batch"), "inshop": dict(epochs=100, lr=.003, momentum=.99, nesterov=True, norm="batch")}
DEFAULTS = dict(encoder="resnet50", pretrained=True, freeze_bn=True, dim=None, dropout=.5, optimizer="sgd", weight_decay=5e-4, schedule="warmcos", warmup=100,
                batch_size=128, sampler="random", size=256, crop=224, objective="cross_entropy", objective_options={"label_smoothing": .1, "smoothing": "paper"},
                classifier_lr=1., clip=None, encoder_options={}, data_options={"official": True})
JITTER = {"cub": (.25, .25, .25, 0), "cars196": (.3, .3, .3, .1)}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_recipe_is_the_command_with_the_codes_defaults(name):
    recipe = Recipe(**checked_recipes(load_profile("paper"))[name])
    assert {k: getattr(recipe, k) for k in {**DEFAULTS, **COMMANDS[name]}} == {**DEFAULTS, **COMMANDS[name]}
    assert recipe.dataset == name and recipe.validation == 0
    a = recipe.augment
    assert a.crop_scale == (.16, 1) and a.flip and not a.affine and a.crop_ratio == ((1, 1) if name == "cars196" else (3 / 4, 4 / 3))
    assert a.jitter == JITTER.get(name, (0, 0, 0, 0)) and a.jitter_first == (name in JITTER)


def test_the_fair_rows_differ_by_protocol_alone():
    profile, recipes = load_profile("paper"), checked_recipes(load_profile("paper"))
    for name in COMMANDS:
        fair = recipes[f"{name}_fair"]
        assert {k: v for k, v in fair.items() if recipes[name].get(k) != v} == {"validation": .1} and profile.rows[f"{name}_fair"].seeds == [0, 1, 2, 3, 4]
    assert {row: spec.expected for row, spec in profile.rows.items() if spec.expected} == dict.fromkeys(("cars196", "cars196_fair"), {"cosine": 45.28, "euclidean": 43.39})


@pytest.mark.parametrize("seen, message", [
    ({"test/cosine/recall@1": .4528 + .0099, "test/euclidean/recall@1": .4339}, None), ({"test/cosine/recall@1": .4659, "test/euclidean/recall@1": .4339}, "cosine. is 46.59"),
    ({"test/cosine/recall@1": .4528, "test/euclidean/recall@1": .3}, "euclidean. is 30.00 here and 43.39 in print"), ({"test/cosine/recall@1": float("nan"), "test/euclidean/recall@1": .4339}, "cosine"),
    ({"test/cosine/recall@1": .4528}, "names the metric 'euclidean'; known: cosine")])
def test_a_wrong_start_is_refused(seen, message):
    expected = {"cosine": 45.28, "euclidean": 43.39}
    if message is None: R.check_start(expected, seen); return
    with pytest.raises(ValueError, match=message): R.check_start(expected, seen)


@pytest.fixture
def trees(tmp_path):
    "All four benchmarks, tiny, in one folder; counts as required of them."
    with ExitStack() as stack:
        for name in TREES:
            grow(tmp_path / "data" / name, TREES[name]())
            stack.enter_context(expecting(name, TINY[name]))
        yield tmp_path / "data"


def small(name, **changes):
    "A row's recipe in a size that a test can pay."
    recipe = checked_recipes(load_profile("paper"))[name]
    return {**recipe, "size": 40, "crop": 32, "encoder": "resnet18", "pretrained": False, "batch_size": 4, "epochs": 2, "lr": .001, **changes}


def execute(notebook, **parameters):
    "All code cells in one namespace, as papermill would, in this process: the trees are known here only."
    matplotlib.use("Agg")
    return run_cells(ROOT / notebook, parameters)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_and_its_table(name, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "packs"))
    paths = []
    for row, more in ((name, {}), (f"{name}_fair", dict(validation=.5, batch_size=2))):
        ran = execute("nbs/04_experiments/30_train.ipynb", **small(name, **more), data=str(trees), row=row, folder=str(tmp_path / row), device="cpu")
        paths.append(str(tmp_path / row / "record.json"))
    record = R.load_record(paths[0])
    known = {int(k.rpartition("@")[2]) for k in record.metrics if k.startswith("cosine/recall@")}
    room = len(ran["query"]) - 1 if ran["gallery"] is None else len(ran["gallery"])
    assert known == {k for k in {"sop": (1, 10, 100, 1000), "inshop": (1, 10, 20, 30, 40, 50)}.get(name, (1, 2, 4, 8, 16, 32)) if k <= room}
    assert "best_on_test/cosine/recall@1" in record.metrics and record.recipe["pipeline"] == "device" and ran["run"].encoder.crop == 32
    assert (ran["benchmark"].train.frames is not None) == (name == "cub") and record.recipe["data_options"] == {"official": True}
    table = execute("nbs/04_experiments/31c_paper_and_ours.ipynb", records=paths, figures=str(tmp_path / "figures"))["table"]
    full = {"cub": "CUB-200-2011", "cars196": "Cars196", "sop": "SOP", "inshop": "In-Shop"}[name]
    mine, others = table[table.benchmark == full], table[table.benchmark != full]
    first = mine[(mine.metric == "cosine") & (mine.K == 1)].iloc[0]
    assert float(first["ours, last"]) == round(100 * record.metrics["cosine/recall@1"], 1)
    assert float(first["ours, best on test"]) == round(100 * record.metrics["best_on_test/cosine/recall@1"], 1) and first["fair, selected"] not in ("", "-")
    assert others["ours, last"].str.fullmatch("not run: needs the images of .*").all() and (tmp_path / "figures/paper_and_ours.md").exists()


def test_rows_that_were_not_asked_for_are_told_from_those_without_images(tmp_path):
    table = execute("nbs/04_experiments/31c_paper_and_ours.ipynb", figures=str(tmp_path), labels={"cub": "CUB"})["table"]
    said = {name: set(rows["ours, last"]) for name, rows in table.groupby("benchmark")}
    assert said["CUB-200-2011"] == {"not run: needs the images of CUB-200-2011"} and said["SOP"] == {"not run: not asked for"} and set(table["fair, last"]) == {"not run: not asked for"}


def test_a_run_that_starts_elsewhere_ends_before_training(trees, tmp_path, monkeypatch):
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "packs"))
    with pytest.raises(ValueError, match="before training Recall@1"):
        execute("nbs/04_experiments/30_train.ipynb", **small("cars196"), expected={"cosine": 200.}, data=str(trees), row="cars196", folder=str(tmp_path / "run"), device="cpu", watch_test=False)
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not (tmp_path / "run" / "record.json").exists()


def test_rows_without_images_are_left_out_and_named(trees, tmp_path, monkeypatch):
    "Two of four sets are there; without any, the first one's error says what to do."
    import shutil
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "packs"))
    for name in ("sop", "inshop"): shutil.rmtree(trees / name)
    profile = load_profile("paper")
    profile.base |= dict(size=40, crop=32, encoder="resnet18", pretrained=False, batch_size=4)
    made = plan(profile, str(trees), "cpu", root=ROOT)
    assert {j.row for j in made.jobs if j.kind == "train"} == {"cub", "cub_fair", "cars196", "cars196_fair"}
    assert made.not_run() == {f"needs the images of {name}, see dml-companion data list": [name, f"{name}_fair"] for name in ("sop", "inshop")}
    assert [j.parameters.get("expected") for j in made.jobs if j.row == "cars196"] == [{"cosine": 45.28, "euclidean": 43.39}]
    with pytest.raises(FileNotFoundError, match="To have it"): plan(profile, str(tmp_path / "nothing"), "cpu", root=ROOT)
    only = plan(profile, str(trees), "cpu", root=ROOT, rows=["cub", "cars196"])
    assert [(j.row, j.seed) for j in only.jobs if j.kind == "train"] == [("cub", 0), ("cars196", 0)] and {j.run for j in only.jobs if j.run} <= {j.run for j in made.jobs}
    profile.as_available = False
    with pytest.raises(FileNotFoundError, match="sop"): plan(profile, str(trees), "cpu", root=ROOT)
    profile.as_available = True
    (trees / "cars196/car_ims/000001.jpg").unlink()
    cut = plan(profile, str(trees), "cpu", root=ROOT).not_run()
    assert cut["lacks some images of cars196, see dml-companion data list"] == ["cars196", "cars196_fair"]


def test_missing_weights_are_told_before_anything_is_packed(trees, tmp_path, monkeypatch):
    "And missing images before missing weights: a machine without either shows the plan that was kept."
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "packs"))
    profile = load_profile("paper")
    profile.base |= dict(size=40, crop=32, encoder="resnet18", batch_size=4)
    weights = tmp_path / "none.pth"
    with pytest.raises(ValueError, match=f"row 'cub': no weights for resnet18 at {weights}"): plan(profile, str(trees), "cpu", root=ROOT, weights=str(weights))
    assert not list((tmp_path / "packs").glob("*"))
    weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="row 'cub': .* is damaged"): plan(profile, str(trees), "cpu", root=ROOT, weights=str(weights))
    assert not list((tmp_path / "packs").glob("*"))
    with pytest.raises(FileNotFoundError, match="To have it"): plan(profile, str(tmp_path / "nothing"), "cpu", root=ROOT, weights=str(weights))


def test_the_table_without_any_run(tmp_path):
    table = execute("nbs/04_experiments/31c_paper_and_ours.ipynb", figures=str(tmp_path))["table"]
    assert len(table) == 2 * (6 + 6 + 4 + 6) and table["ours, last"].str.startswith("not run").all() or (ROOT / "figures/paper/records").exists()


@pytest.mark.parametrize("name, n, classes, side, steps", [("cub", 5_864, 100, 512, 45), ("cars196", 8_054, 98, 256, 62), ("sop", 59_551, 11_318, 256, 465), ("inshop", 25_882, 3_997, 256, 202)])
def test_packs_of_the_published_sizes(name, n, classes, side, steps, tmp_path):
    "Empty packs as large as the real ones: an epoch has the paper's number of steps, batches the recipe's shape, and all four fit on a card of 139 GB."
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (n, 3, side, side))     # a file with a hole: no byte is written
    frames = np.tile([86, 128, 341, 256], (n, 1)) if name == "cub" else None
    split = Split(images, np.arange(n) % classes, [str(k) for k in range(classes)], frames)
    recipe = Recipe(**checked_recipes(load_profile("paper"))[name])
    pack = DevicePack(split, "cpu", free=10**9)
    assert not pack.resident and images.nbytes <= .5 * 139 * 2**30 and f"streamed: {images.nbytes / 1e9:.3g} GB" in pack.why
    generators = {k: torch.Generator().manual_seed(i) for i, k in enumerate(("sampler", "augment"))}
    assert len(epoch_batches(recipe, split.labels, torch.Generator().manual_seed(0))) == steps
    batch, labels = next(iter(training_batches(pack, recipe, generators)))
    assert batch.shape == (128, 3, 224, 224) and labels.shape == (128,) and not batch.any()
    make = partial(objectives.make, "cross_entropy", label_smoothing=.1)
    assert make(num_classes=classes, dim=2048).parts(torch.zeros(128, 2048), labels).total.item() == pytest.approx(math.log(classes), rel=1e-4)   # a classifier of zeros


def test_every_result_table_waits_for_the_papers_records():
    "31 fills its row `ours` from them, so their coming must make it a new job."
    for path in sorted((ROOT / "workflow/profiles").glob("*.yaml")):
        tasks = [t for t in load_profile(path.stem).notebooks if Path(t.notebook).stem == "31_retrieval_table"]
        assert all(t.against == "paper" for t in tasks), path.stem
