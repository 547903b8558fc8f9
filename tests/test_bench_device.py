"Losses, cross-entropy and search on the device: its files and their arithmetic, what does not fit, which options it has."
import re
import statistics
from pathlib import Path

import pytest
import torch

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
from benchmarks import bench_device as D
from benchmarks.__main__ import LONG, OPTIONS, main
from benchmarks.bench_classes import make_forms
from benchmarks.bench_losses import floors
from benchmarks.contenders import CONTENDERS, PAIRWISE, make_batch

ROOT = Path(__file__).parents[1]
FEW = {label: CONTENDERS[label] for label in ("contrastive", "triplet, plain", "histogram", "cross-entropy", "SoftTriple", "regularised softmax", "intra-batch")}
WORDS = "device --batches 32 16 --classes 50 900 --exact 70 16 --dim 64 --rounds 3 --threads 1".split()


@pytest.fixture(autouse=True)
def few(monkeypatch): monkeypatch.setattr(D, "CONTENDERS", FEW)


@pytest.fixture
def on_cpu(monkeypatch): monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def check_ratios(table, raw):
    "Every ratio and median of a table is that of its rounds."
    taken = {key: rows.sort_values("round").seconds.tolist() for key, rows in raw.groupby(["part", "size", "name"])}
    for r in table[(table.part != "search") & (table.state == "measured")].itertuples():
        mine, floor = taken[r.part, r.size, r.name], taken[r.part, r.size, f"floor: {r.floor}"]
        assert r.seconds == pytest.approx(statistics.median(mine), rel=1e-4) and r.floor_seconds == pytest.approx(statistics.median(floor), rel=1e-4)
        assert r.times_floor == pytest.approx(statistics.median(a / b for a, b in zip(mine, floor)), rel=1e-4)
        assert r.best_times_floor == pytest.approx(min(mine) / min(floor), rel=1e-4)
        if r.part == "losses" and r.name in PAIRWISE:
            assert r.times_autograd == pytest.approx(statistics.median(a / b for a, b in zip(mine, taken[r.part, r.size, "floor: autograd"])), rel=1e-4)


def test_a_small_run_writes_its_files_and_its_arithmetic_holds(tmp_path, on_cpu):
    threads = torch.get_num_threads()
    main([*WORDS, "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads
    assert {f.name for f in tmp_path.iterdir()} == {*(f"device_cpu.{kind}" for kind in ("csv", "md", "svg", "png")), "device_cpu_rounds.csv"}
    table, raw = pd.read_csv(tmp_path / "device_cpu.csv"), pd.read_csv(tmp_path / "device_cpu_rounds.csv")
    losses = table[table.part == "losses"]
    assert list(losses.name) == [*FEW] * 2 and losses["size"].unique().tolist() == [16, 32] and (table.dim[table.part != "search"] == 64).all()
    assert (table.state == "measured").all() and (table.peak_gb >= 0).all() and losses.times_autograd.notna().tolist() == [label in PAIRWISE for label in FEW] * 2
    assert table[table.part == "classes"].name.tolist() == ["all logits", "chunks of classes"] * 2 and table[table.part == "search"].name.tolist() == ["cosine", "euclidean"]
    assert raw.groupby(["part", "size", "name"])["round"].apply(list).map(lambda r: r == [0, 1, 2]).all()
    check_ratios(table, raw)
    text = (tmp_path / "device_cpu.md").read_text()
    assert "No GPU here" in text and "small" in text and "torch 2." in text and "cores" in text and "Not measured here" in text and str(tmp_path) not in text
    for r in losses[losses["size"] == 32].itertuples():                                  # the csv has six digits, the text two decimals
        assert float(re.search(rf"\| {re.escape(r.name)} \| [\d.]+ \| ([\d.]+) \|", text)[1]) == pytest.approx(r.times_floor, abs=.011), r.name


def test_a_part_alone(tmp_path, on_cpu):
    main([*WORDS, "--only", "classes", "--out", str(tmp_path)])
    assert set(pd.read_csv(tmp_path / "device_cpu.csv").part) == {"classes"}
    assert "Left out of this run: losses, search." in (tmp_path / "device_cpu.md").read_text()
    for words in (["--only", "ranks"], ["--only", "losses"], ["--only", "search", "--exact", "0", "0", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit): main(["device", *words])


@pytest.mark.parametrize("error, out", [(torch.OutOfMemoryError("x"), True), (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
                                        (RuntimeError("DefaultCPUAllocator: not enough memory"), True), (RuntimeError("shapes differ"), False)])
def test_memory_runs_out_in_several_words(error, out): assert D.no_memory(error) == out


def test_what_does_not_fit_is_an_entry(tmp_path, on_cpu, monkeypatch):
    "A loss that runs out of memory, one that does so only beside the others, one that fails, and one that a CPU refuses beforehand."
    class Full(torch.nn.Module):
        def __init__(self, good, how): super().__init__(); self.good, self.how = good, how
        def forward(self, z, y):
            self.good -= 1
            if self.good < 0: raise self.how
            return z.sum()
    class Made:
        panel, products, centers = "pairs", "pairs", 1
        def __init__(self, *how): self.how = how
        def make(self, classes, dim): return Full(*self.how)
    full = torch.OutOfMemoryError("no room")
    monkeypatch.setattr(D, "CONTENDERS", {"contrastive": FEW["contrastive"], "full": Made(0, full), "later": Made(2, full), "broken": Made(0, RuntimeError("an odd shape\nand more"))})
    monkeypatch.setattr("benchmarks.bench_losses.CONTENDERS", D.CONTENDERS)
    monkeypatch.setattr("dml_companion.reproduction.save_figure", lambda *drawn: None)
    D.main(tmp_path, batches=(16,), classes=(50,), exact=(0, 0), dim=16, rounds=2)
    table = pd.read_csv(tmp_path / "device_cpu.csv").set_index("name")
    assert table.state[["contrastive", "full", "later", "broken"]].tolist() == ["measured", "out of memory", "out of memory", "failed: an odd shape"]
    assert table.times_floor.isna().tolist() == [False, True, True, True, False, False] and (table.part != "search").all()
    text = (tmp_path / "device_cpu.md").read_text()
    assert text.count("| full | out of memory |") == 4 and "| broken | failed: an odd shape |" in text and "3 not measured" in text


def test_a_cpu_refuses_beforehand(tmp_path, on_cpu, monkeypatch):
    "Without memory nothing beyond the probes is started; the whole is still written, without a plot."
    monkeypatch.setattr(D, "PROBES", (4, 8, 16))
    monkeypatch.setattr(D, "available_bytes", lambda: 0)
    D.main(tmp_path, batches=(16, 32), classes=(50,), exact=(70, 16), dim=16, rounds=1)
    table = pd.read_csv(tmp_path / "device_cpu.csv")
    assert (table.state == "out of memory").tolist() == (table["size"] != 16).tolist() and len(table) == 2 * len(FEW) + 4
    assert "| contrastive |" in (tmp_path / "device_cpu.md").read_text()
    monkeypatch.setattr(D, "PROBES", (2, 4, 8))
    D.main(tmp_path / "none", batches=(16,), classes=(50,), exact=(0, 0), dim=16, rounds=1)
    assert "png" not in {f.suffix[1:] for f in (tmp_path / "none").iterdir()} and "out of memory" in (tmp_path / "none/device_cpu.md").read_text()


def test_the_forecast_is_near_what_was_measured():
    measured = pd.read_csv(ROOT / "figures/bench/memory.csv").set_index("objective").torch_gb
    for label in ("contrastive", "histogram", "triplet, all semi-hard"):
        found = D.forecast(lambda n: D.step(CONTENDERS[label].make(), *make_batch(n))(), 4096) / 1e9
        assert 1 / 2.5 < found / measured[label] < 2.5, (label, found)


def test_nothing_is_left_on_the_host():
    "On the meta device a product with a tensor of the host is an error."
    z, y = make_batch(16, dim=8, device="meta")
    assert z.is_leaf and y.device == z.device
    for run in floors(z, 20).values(): run()
    assert z.grad.device.type == "meta" and all(form.weight.device.type == "meta" for form in make_forms(50, 8, device="meta").values())
    D.three_products(z.detach(), 50)()


@pytest.mark.parametrize("words", ["device --rounds 0", "device --threads -1", "device --batches 16 0", "training --steps 0", "search --queries 0", "paths --epochs 0"])
def test_a_count_below_one_is_refused_before_anything_is_measured(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop: main([*words.split(), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "must be 1 or more" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_part_that_fails_does_not_stop_the_next(monkeypatch, capsys):
    "Whatever its error is; all are told at the end. Only who stops it himself stops it."
    from types import SimpleNamespace
    import benchmarks.__main__ as M
    def ran(**errors):
        done = []
        def main(part):
            done.append(part)
            if part in errors: raise errors[part]
        monkeypatch.setattr(M, "import_module", lambda name: SimpleNamespace(main=lambda out, **options: main(name.rpartition("_")[2])))
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop: M.main(["training", "device", "search"])
        return done, getattr(stop.value, "code", None), capsys.readouterr().err
    done, code, said = ran(training=torch.OutOfMemoryError("no room"), device=ValueError("too few"))
    assert done == ["training", "device", "search"] and code == 1 and "Traceback" in said
    assert said.endswith("python -m benchmarks training: OutOfMemoryError: no room\npython -m benchmarks device: too few\n")
    assert ran(device=OSError("no disk")) == (["training", "device", "search"], 2, "python -m benchmarks device: no disk\n")
    assert ran(training=KeyboardInterrupt())[:2] == (["training"], None)


def test_options_belong_to_a_part():
    assert "device" in LONG and {"batches", "classes"} <= {*OPTIONS["device"]}
    for words in (["training", "--batches", "3"], ["device", "--steps", "3"], ["device", "--sizes", "3"], ["losses", "--exact", "70", "8"], ["device", "--batches"]):
        with pytest.raises(SystemExit): main(words)


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_committed_tables_are_those_of_their_rounds(kind):
    found = ROOT / f"figures/bench/device_{kind}.csv"
    if not found.exists(): pytest.skip(f"no {kind} was measured yet")
    table = pd.read_csv(found)
    check_ratios(table, pd.read_csv(found.with_name(f"device_{kind}_rounds.csv")))
    assert {*table[table.part == "losses"].name} == {*CONTENDERS}
    text = found.with_suffix(".md").read_text()
    for r in table[table.part == "losses"].itertuples():
        if r.state == "measured": assert re.search(rf"\| {re.escape(r.name)} \|.* {r.times_floor:.2f} ", text), (r.name, r.size)


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_larger_sizes_that_are_missing_are_named(kind):
    "And the larger ones on a CPU, in the tables beside."
    found = ROOT / f"figures/bench/device_{kind}.csv"
    if not found.exists(): pytest.skip(f"no {kind} was measured yet")
    told = D.not_measured(pd.read_csv(found))
    assert f"\n{told}\n" in found.with_suffix(".md").read_text()
    assert kind == "gpu" or "B above 1,024 (on a CPU losses.md goes to 4,096), C above 100,000 (on a CPU classes.md goes to 1,000,000), search above 5,000 (on a CPU search.md goes to 60,502 of 2,048 numbers), bf16," in told
    assert pd.read_csv(ROOT / "figures/bench/losses.csv").batch.max() == D.REACH["losses"] and pd.read_csv(ROOT / "figures/bench/classes.csv").classes.max() == D.REACH["classes"]


def test_what_did_not_fit_is_not_measured():
    rows = [dict(part="losses", size=8_192, state="measured"), dict(part="losses", size=16_384, state="out of memory")]
    assert D.not_measured(pd.DataFrame(rows)) == "Not measured here: B above 8,192, bf16, TF32, compiled losses, other libraries, several devices, indexes."


@pytest.mark.parametrize("measure", [lambda: D.class_rows(50, 16, 1, "cpu"), lambda: D.loss_rows(16, 16, 1, "cpu")])
def test_autograd_has_worked_before_memory_is_measured(measure, monkeypatch):
    "On a GPU its thread sets a workspace up at its first product, which is not the first loss's memory."
    seen, backward, peak = [], torch.Tensor.backward, D.peak_bytes
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: (seen.append("backward"), backward(self, *a, **k))[1])
    monkeypatch.setattr(D, "peak_bytes", lambda *a: (seen.append("peak"), peak(*a))[1])
    measure()
    assert "backward" in seen[:seen.index("peak")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_loss_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "CONTENDERS", CONTENDERS)
    main([*WORDS, "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "device_gpu.csv")
    assert (table.state == "measured").all() and (table[table.part != "search"].peak_gb > 0).all()
    check_ratios(table, pd.read_csv(tmp_path / "device_gpu_rounds.csv"))
    text = (tmp_path / "device_gpu.md").read_text()
    assert torch.cuda.get_device_name() in text and "No GPU here" not in text
