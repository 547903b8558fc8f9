"The run on the device: what it shares with the run of 05, what waits, and what a batch of several processes is."
import copy, json, os, random, subprocess, sys, time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

import dml_companion.device_training as D
from dml_companion import objectives, reproduction as R
from dml_companion.datasets import load
from dml_companion.device import waits
from dml_companion.encoders import build_encoder, embed
from dml_companion.objective import catalogue
from dml_companion.training import Recipe, alone_in, fit

SMALL = dict(max_train_classes=40, max_test_classes=20)
BASE = dict(encoder_options={"width": 4}, epochs=2, batch_size=32, lr=.1, warmup=5, validation=.25, pipeline="device",
            augment={"degrees": 5., "translate": .05})


@pytest.fixture(scope="module")
def data(): return load("glyphs", progress=False, **SMALL)


def make(recipe): return partial(objectives.make, recipe.objective, **recipe.objective_options)
def run(data, seed=0, **changes):
    recipe = Recipe(**{**BASE, **changes})
    return fit(recipe, data, make(recipe), seed=seed, progress=False, device="cpu")
def states(r): return [*r.encoder.state_dict().values(), *r.objective.state_dict().values()]
def same(a, b): return all(torch.equal(x, y) for x, y in zip(states(a), states(b), strict=True))


def test_it_is_another_run_of_the_same_recipe(data):
    one = run(data)
    assert same(one, run(data)) and not same(one, run(data, seed=1)) and not same(one, run(data, pipeline="host"))
    assert one.history[0] == run(data, pipeline="host").history[0]                         # the untrained encoder is the same


@pytest.mark.parametrize("objective", ["cross_entropy", "multi_similarity", "mined", "proxy_anchor"])
@pytest.mark.parametrize("more", [{}, dict(sampler="balanced", per_class=4, clip=.5)])
def test_without_augmentation_it_is_the_loop_of_05(data, objective, more):
    pair = [run(data, objective=objective, augment={}, lr=.01, pipeline=p, **more) for p in ("device", "host")]
    for a, b in zip(*map(states, pair)): assert_close(a, b, atol=2e-4, rtol=2e-4)          # bytes times 1/255, bytes over 255
    assert [e["iterations"] for e in pair[0].history[1:]] == [e["iterations"] for e in pair[1].history[1:]]
    assert set(pair[0].history[-1]) == set(pair[1].history[-1])


def test_a_crop_is_seen_at_evaluation_too(data):
    one = run(data, crop=24)
    images = data.query.batch([0, 1, 2])
    assert torch.equal(embed(one.encoder, images), embed(one.encoder, images[..., 4:28, 4:28])) and one.encoder.crop == 24
    with pytest.raises(ValueError, match="crop 40 is larger than the images, 32 x 32"): run(data, crop=40)


def test_bf16_stays_near(data):
    full, half = run(data), run(data, precision="bf16")
    assert not same(full, half) and abs(full.history[-1]["loss"] - half.history[-1]["loss"]) < .1


def test_bf16_augments_in_bf16(data, monkeypatch):
    seen = []
    monkeypatch.setattr(D, "augment", lambda images, *a: seen.append(a[-1]) or D.training_batches.__globals__["augment"](images, *a))
    run(data, precision="bf16", epochs=1)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("objective", ["cross_entropy", "multi_similarity", "proxy_anchor", "snca", "sphereface", "triplet"])
def test_captured_it_is_the_same_run(data, objective, monkeypatch):
    "Augmentation, encoder and loss as graphs; the second batch must fit the first one's."
    plain = run(data, objective=objective, lr=.01, epochs=1)
    monkeypatch.setattr(D.DeviceRun, "backend", "aot_eager")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True): captured = run(data, objective=objective, lr=.01, epochs=1)
    finally: torch._dynamo.reset()
    for a, b in zip(states(plain), states(captured)): assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_compiles_once_and_never_waits(data, monkeypatch):
    "Inductor, bf16, cudnn's search: from the second epoch on no step asks the device anything."
    plain, before = D.DeviceRun.batches, torch.cuda.get_sync_debug_mode()
    def guarded(self):
        torch.cuda.set_sync_debug_mode("error" if self.epoch else before)
        try: yield from plain(self)
        finally: torch.cuda.set_sync_debug_mode(before)
    monkeypatch.setattr(D.DeviceRun, "batches", guarded)
    recipe = Recipe(**BASE, precision="bf16", dropout=.5)
    with torch._dynamo.config.patch(error_on_recompile=True): one = fit(recipe, data, make(recipe), progress=False, device="cuda")
    assert one.summary["device"] == "cuda" and one.history[2]["loss"] < one.history[1]["loss"] and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_no_objective_waits(name):
    "Default options, forward and backward; what a GPU does inside an operator is not seen."
    loss = objectives.make(name, num_classes=8, dim=16).to("meta")
    def step(z, y):
        z = z.detach().requires_grad_()
        parts = loss.parts(z, y)
        (parts.tightness + parts.contrast).backward()
        return z.grad
    assert waits(step, torch.randn(32, 16), torch.arange(32) // 4) == []


def test_the_pipeline_is_in_the_name_of_a_run():
    root, host = R.project_root(), dict(objective="snca")
    device = host | {"pipeline": "device"}
    assert R.train_digest(host, root=root) == R.train_digest(host | {"pipeline": "host"}, root=root) != R.train_digest(device, root=root)
    found = {name for _, name in R.reachable([("dml_companion.device_training", "DeviceRun")], R.package_folder(root))}
    assert {"DeviceRun", "draw_table", "augment", "resample"} <= found


# ---- several processes

SCRIPT = '''
import json, os, sys
from functools import partial
from dml_companion import objectives
from dml_companion.datasets import load
from dml_companion.device_training import DeviceRun
from dml_companion.training import Recipe, fit
recipe, folder = Recipe(**json.loads(sys.argv[1])), sys.argv[2]
data = load("glyphs", progress=False, max_train_classes=40, max_test_classes=20)
class Stop(Exception): pass
class Cut(objectives.find(recipe.objective)):
    left = int(sys.argv[3])
    def parts(self, z, y): return super().parts(z.float(), y)           # as several processes hand it over
    def split(self, z, y):
        Cut.left -= 1
        if Cut.left == 0: raise Stop
        return super().split(z, y)
batches = DeviceRun.batches
def unsent(run):
    assert not getattr(run.encoder, "broadcast_buffers", False), "buffers are sent at each step"
    yield from batches(run)
DeviceRun.batches = unsent
if recipe.norm == "batch":                          # in float32 rounding moves a value over a ReLU's kink, in one process as in two
    joint = DeviceRun.joint
    DeviceRun.joint = lambda run, encoder: joint(run, encoder).double()
fit(recipe, data, partial(Cut, **recipe.objective_options), seed=0, folder=folder, device="cpu", progress=False)
open(f"{folder}/rank{os.environ['RANK']}", "w").write(os.environ["WORLD_SIZE"])
'''
CALM = dict(encoder_options={"width": 4}, norm="layer", freeze_bn=True, dropout=.5, epochs=3, batch_size=32, lr=.02, warmup=0, validation=.2, pipeline="device",
            augment={"degrees": 5., "translate": .05})


def launched(folder, n, cut=-1, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    return dict(args=[sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", str(folder / "script.py"),
                      json.dumps({**CALM, **changes}), str(folder), str(cut)], env={**os.environ, "OMP_NUM_THREADS": "1"})


def together(folder, n, cut=-1, **changes): return subprocess.run(**launched(folder, n, cut, **changes), capture_output=True, text=True, timeout=300)


def kept(folder): return torch.load(folder / "checkpoint.pt", weights_only=True)


KINDS = [dict(objective="multi_similarity", sampler="balanced", per_class=4), dict(objective="mined", sampler="balanced", per_class=2),
         dict(objective="normalized_softmax", proxy_lr=3., clip=1.)]
NORMED = [dict(KINDS[0], norm="batch"), dict(KINDS[0], norm="batch", freeze_bn=None)]      # the paper's setting, and the ConvNet's own layers with it


@pytest.mark.parametrize("kind", KINDS + NORMED, ids=[k["objective"] for k in KINDS] + ["norm", "all_norms"])
def test_two_processes_are_one(kind, tmp_path):
    for n in (1, 2): assert (done := together(tmp_path / str(n), n, **kind)).returncode == 0, done.stderr[-3000:]
    one, two = kept(tmp_path / "1"), kept(tmp_path / "2")
    assert [(tmp_path / "2" / f"rank{r}").read_text() for r in (0, 1)] == ["2", "2"] and one["step"] == two["step"] >= 20
    for part in ("encoder", "objective"):
        for a, b in zip(one[part].values(), two[part].values(), strict=True): assert_close(a, b, atol=1e-5, rtol=0)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert set(a) == set(b) and (not a["epoch"] or abs(a["loss"] - b["loss"]) < 1e-5)


LAYERS = [(nn.BatchNorm1d, (12, 5), dict(affine=False)), (nn.BatchNorm1d, (12, 5), dict(momentum=.3, eps=.01)), (nn.BatchNorm1d, (12, 5), dict(momentum=None)),
          (nn.BatchNorm2d, (12, 3, 4, 5), {}), (nn.BatchNorm2d, (12, 3, 4, 5), dict(track_running_stats=False))]


def layer(kind, shape, options):
    "A batch norm with weights of its own."
    torch.manual_seed(0)
    made = kind(shape[1], **options)
    for p in made.parameters(): nn.init.normal_(p)
    return made


def normalise(rank, meet):
    "One of two processes with half of a batch; every process knows the whole one, and what nn.BatchNorm makes of it."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    def mine(x): return x.detach().chunk(2)[rank]
    for kind, shape, options in LAYERS:
        whole = layer(kind, shape, options).double()
        part = D.JointBatchNorm(copy.deepcopy(whole))
        assert part.state_dict().keys() == whole.state_dict().keys()
        for step in range(3):
            x, pull = 5 + torch.randn(2, *shape, dtype=torch.float64)
            x[6:] += 3 + step                                                              # the parts differ in mean
            own, x = mine(x).clone().requires_grad_(), x.requires_grad_()
            ours, theirs = part(own), whole(x)
            (theirs * pull).sum().backward(); (ours * mine(pull)).sum().backward()
            for p in part.parameters(): dist.all_reduce(p.grad)
            assert_close(ours, mine(theirs), rtol=0, atol=1e-12)
            assert_close([own.grad, *(p.grad for p in part.parameters())], [mine(x.grad), *(p.grad for p in whole.parameters())], rtol=0, atol=1e-11)
            part.zero_grad(); whole.zero_grad()
        assert_close(part.state_dict(), whole.state_dict(), rtol=0, atol=1e-12)
        whole.load_state_dict(part.state_dict())
        assert torch.equal(part.eval()(x), whole.eval()(x))
    # far from zero, in float32; bf16 in the layout of the encoder; captured whole: what asks for a value would break the graph
    x = 1e4 + torch.randn(64, 3, 8, 8)
    exact = layer(nn.BatchNorm2d, x.shape, {}).double()(x.double()).float()
    assert_close(D.JointBatchNorm(layer(nn.BatchNorm2d, x.shape, {}))(mine(x)), mine(exact), rtol=0, atol=3e-3)          # x itself is rounded to 1e-3
    x = torch.randn(64, 3, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    whole = layer(nn.BatchNorm2d, x.shape, {})
    part = D.JointBatchNorm(copy.deepcopy(whole))
    with torch.autocast("cpu", torch.bfloat16): ours, theirs = part(mine(x)), whole(x)
    assert ours.is_contiguous(memory_format=torch.channels_last) and not ours.is_contiguous()
    assert_close(ours, mine(theirs), rtol=.01, atol=.01)                                   # and the dtype
    assert part.running_var.dtype == torch.float32 and (part.running_var - whole.running_var).abs().max() < 1e-5
    plain, captured = (copy.deepcopy(part) for _ in range(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(captured, backend="aot_eager", dynamic=False, fullgraph=True)
        for x in torch.randn(3, 64, 3, 8, 8):
            own, twin = (mine(x).float().requires_grad_() for _ in range(2))
            for f, z in ((plain, own), (compiled, twin)): f(z).pow(3).sum().backward()
            assert_close(own.grad, twin.grad, rtol=0, atol=1e-4)
    assert_close(captured.state_dict(), plain.state_dict(), rtol=0, atol=1e-6)
    dist.barrier(); dist.destroy_process_group()


def test_the_batch_norm_of_parts_is_that_of_the_batch(tmp_path): mp.spawn(normalise, (str(tmp_path / "meet"),), nprocs=2)


def test_alone_it_is_the_layer_in_whose_place_it_stands():
    for kind, shape, options in LAYERS:
        plain = layer(kind, shape, options)
        ours, x = D.JointBatchNorm(copy.deepcopy(plain)), torch.randn(shape)
        assert torch.equal(ours(x), plain(x)) and torch.equal(ours.eval()(x), plain.eval()(x))
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True))


class Activated(nn.BatchNorm2d):
    "As timm's: more than its class says."
    def forward(self, x): return super().forward(x).relu()


def test_which_norms_are_joined():
    "Those that estimate; what a frozen one does is nobody's business, and what another class does would be lost."
    def run(parts=2): return SimpleNamespace(accelerator=SimpleNamespace(num_processes=parts, process_index=0))
    def norms(parts, **options):
        encoder = build_encoder("convnet", in_channels=1, size=32, width=4, norm="batch", **options)
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        D.DeviceRun.joint(run(parts), encoder)
        after = encoder.state_dict()
        assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
        return [type(m).__name__ for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms(2) == 5 * ["JointBatchNorm"] and norms(1) == 4 * ["BatchNorm2d"] + ["BatchNorm1d"]
    assert norms(2, freeze_bn=True) == 4 * ["BatchNorm2d"] + ["JointBatchNorm"]
    for frozen in (True, False):
        encoder = build_encoder("convnet", in_channels=1, size=32, width=4, freeze_bn=frozen)
        encoder.trunk[0][1] = Activated(4)
        if frozen: D.DeviceRun.joint(run(), encoder); continue
        with pytest.raises(ValueError, match="1, a Activated, is no plain batch norm .*: set freeze_bn=True, or train in one process"): D.DeviceRun.joint(run(), encoder)


def test_two_processes_that_were_stopped_go_on(tmp_path):
    kind = KINDS[1]
    assert together(tmp_path / "whole", 2, **kind).returncode == 0
    assert (stopped := together(tmp_path / "cut", 2, 2 * kept(tmp_path / "whole")["history"][1]["iterations"] + 2, **kind)).returncode != 0
    assert "Stop" in stopped.stderr and kept(tmp_path / "cut")["epoch"] == 2
    assert together(tmp_path / "cut", 2, **kind).returncode == 0
    for a, b in zip(kept(tmp_path / "whole")["encoder"].values(), kept(tmp_path / "cut")["encoder"].values()): assert torch.equal(a, b)


def kill_within(folder, seconds, one, **kind):
    "Start two processes and kill both, or the second alone, some seconds after they saved an epoch; the epochs that are kept."
    saved = lambda: (folder / "checkpoint.pt").stat().st_mtime_ns if (folder / "checkpoint.pt").exists() else 0
    before, launcher = saved(), subprocess.Popen(**launched(folder, 2, **kind), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while saved() == before and launcher.poll() is None: time.sleep(.01)
    time.sleep(seconds)
    ranks = sorted((p for p in psutil.Process(launcher.pid).children(recursive=True) if str(folder) in " ".join(p.cmdline())), key=lambda p: p.environ()["RANK"])
    assert len(ranks) == 2
    for p in ranks[1:] if one else [psutil.Process(launcher.pid), *ranks]: p.kill()
    assert launcher.wait(timeout=120) != 0
    psutil.wait_procs(ranks, timeout=30)
    return kept(folder)["epoch"]


def test_two_processes_killed_at_random_moments(tmp_path):
    "Both at once, as by a failing machine, or one of them, whose death the launcher tells the other."
    kind, rng = dict(KINDS[0], epochs=20, lr=.002, dropout=.05), random.Random(0)
    assert together(tmp_path / "whole", 2, **kind).returncode == 0
    whole, cut = kept(tmp_path / "whole"), tmp_path / "cut"
    epoch = sum(e.get("seconds", 0) for e in whole["history"]) / 20
    reached = [kill_within(cut, rng.uniform(0, 2 * epoch), one=bool(i % 2), **kind) for i in range(4)]
    assert reached == sorted(set(reached)) and reached[-1] < 20, reached               # each got further than the one before
    assert together(cut, 2, **kind).returncode == 0
    for a, b in zip(whole["encoder"].values(), kept(cut)["encoder"].values(), strict=True): assert torch.equal(a, b)
    untimed = lambda history: [{k: v for k, v in e.items() if k != "seconds"} for e in history]
    assert untimed(kept(cut)["history"]) == untimed(whole["history"])


@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=33), "batch_size 33 is no multiple of the 2 processes"), (dict(pipeline="host"), "trains in one process"),
    (dict(lr=1e6), "Collapsed")])
def test_what_two_processes_refuse_ends_both(changes, words, tmp_path):
    done = together(tmp_path, 2, **changes)
    assert done.returncode != 0 and words in done.stderr and not list(tmp_path.glob("rank*"))


def test_a_run_of_a_profile_is_trained_together_and_judged_by_reproduce(tmp_path):
    "Two processes train it; plain `reproduce` finds it trained, judges it and writes the record of an ordinary run."
    import shutil
    from test_engine import environment
    root = tmp_path / "companion"
    for part in ("dml_companion", "nbs", "workflow"): shutil.copytree(Path(__file__).parents[1] / part, root / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(Path(__file__).parents[1] / "settings.ini", root / "settings.ini")
    R.write_atomic(root / "workflow/profiles/pair.yaml", """name: pair
data: {name: glyphs, options: {max_train_classes: 24, max_test_classes: 24}}
seeds: [0]
base: {encoder: convnet, encoder_options: {width: 4}, norm: layer, freeze_bn: true, epochs: 2, batch_size: 32, lr: 0.02, warmup: 0, validation: 0.2, pipeline: device}
rows:
  snca: {recipe: {objective: snca, sampler: balanced, per_class: 4}}
  alone: {recipe: {objective: snca, sampler: balanced, per_class: 4, pipeline: host}}
""")
    env = environment() | {"PYTHONPATH": str(root), "DML_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    def run(*words, n=None):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m"] if n else ["-m"]
        return subprocess.run([sys.executable, *launch, "dml_companion.cli", *words], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    from dml_companion.profiles import plan
    (job,) = [j for j in plan("pair", device="cpu", root=root).jobs if j.row == "snca"]
    with alone_in((root / job.output).parent):                                           # another process trains it
        (seen,) = [j for j in plan("pair", device="cpu", root=root).jobs if j.row == "snca"]
        done = run("together", "snca", "--profile", "pair", "--device", "cpu")
        assert seen.state == "running" and done.returncode == 2 and "Traceback" not in done.stderr and "another process" in done.stderr, done.stderr
    done = run("together", "snca", "--profile", "pair", "--device", "cpu", n=2)
    assert done.returncode == 0 and "trained by 2 processes" in done.stdout, done.stderr[-3000:]
    (folder,) = (root / "runs/train/glyphs/snca").iterdir()
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 2 and not (folder / "record.json").exists() and (folder / "epochs").is_dir()
    done = run("reproduce", "--profile", "pair", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    record = R.load_record(folder)
    assert record.history == kept["history"] and record.metrics["cosine/recall@1"] == record.history[-1]["test/cosine/recall@1"]
    for words, message in ((("snca", "--seed", "3"), "has no seed 3; known: 0"), (("alone",), "pipeline: device; known: snca"), (("sncaa",), "known: snca")):
        done = run("together", *words, "--profile", "pair", "--device", "cpu")
        assert done.returncode == 2 and message in done.stderr, done.stderr
