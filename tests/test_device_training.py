"The run on the device: what it shares with the run of 05, what waits, and what a batch of several processes is."
import json, os, random, subprocess, sys, time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch.testing import assert_close

import dml_companion.device_training as D
from dml_companion import objectives, reproduction as R
from dml_companion.datasets import load
from dml_companion.device import waits
from dml_companion.encoders import embed
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
from dml_companion.training import Recipe, fit
recipe, folder = Recipe(**json.loads(sys.argv[1])), sys.argv[2]
data = load("glyphs", progress=False, max_train_classes=40, max_test_classes=20)
class Stop(Exception): pass
class Cut(objectives.find(recipe.objective)):
    left = int(sys.argv[3])
    def split(self, z, y):
        Cut.left -= 1
        if Cut.left == 0: raise Stop
        return super().split(z, y)
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


@pytest.mark.parametrize("kind", KINDS, ids=[k["objective"] for k in KINDS])
def test_two_processes_are_one(kind, tmp_path):
    for n in (1, 2): assert (done := together(tmp_path / str(n), n, **kind)).returncode == 0, done.stderr[-3000:]
    one, two = kept(tmp_path / "1"), kept(tmp_path / "2")
    assert [(tmp_path / "2" / f"rank{r}").read_text() for r in (0, 1)] == ["2", "2"] and one["step"] == two["step"] >= 20
    for part in ("encoder", "objective"):
        for a, b in zip(one[part].values(), two[part].values(), strict=True): assert_close(a, b, atol=1e-5, rtol=0)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert set(a) == set(b) and (not a["epoch"] or abs(a["loss"] - b["loss"]) < 1e-5)


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
    (dict(batch_size=33), "batch_size 33 is no multiple of the 2 processes"), (dict(freeze_bn=None), "cannot join the statistics"),
    (dict(norm="batch"), "cannot join the statistics"), (dict(pipeline="host"), "trains in one process"),
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
