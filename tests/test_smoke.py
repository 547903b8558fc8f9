"""The smoke profile from a fresh copy of the project to published figures, through the command line (minutes)."""
import json, os, shutil, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import pytest

from dml_companion import reproduction as R

ROOT = Path(__file__).resolve().parents[1]
STATES = """import json
from dml_companion.profiles import plan
print("STATES" + json.dumps({j.title: [j.state, j.why] for j in plan("smoke").jobs}))"""

pytestmark = pytest.mark.slow


def environment(): return {k: v for k, v in os.environ.items() if k not in ("DML_ROOT", "PYTHONPATH")}


def call(root, *words):
    "Run Python in the copy; its own package comes first on the path."
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment(), capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout, done.stderr


def reproduce(root, *words): return call(root, "-m", "dml_companion.cli", "reproduce", "--profile", "smoke", *words)


def states(root):
    code, out, err = call(root, "-c", STATES)
    assert code == 0, err
    return json.loads(out.split("STATES")[1])


@contextmanager
def edited(root, path, change):
    "A file changed for a while."
    text = (root / path).read_text()
    assert change(text) != text
    (root / path).write_text(change(text))
    try: yield
    finally: (root / path).write_text(text)


def edit_class(name):
    "A change to one class, below its decorators."
    def change(text):
        head, tail = text.split(f"class {name}", 1)
        return f"{head}class {name}" + tail.replace("    def ", "    edited = True\n\n    def ", 1)
    return change


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the sources, committed, on which `reproduce` ran once."
    root = tmp_path_factory.mktemp("copy") / "companion"
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for part in ("dml_companion", "nbs", "workflow"): shutil.copytree(ROOT / part, root / part, ignore=ignore)
    for part in ("settings.ini", ".gitignore"): shutil.copy(ROOT / part, root / part)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]): subprocess.run([*git, *words], cwd=root, check=True)
    start = time.monotonic()
    code, out, err = reproduce(root)
    assert code == 0, out + err
    return root, out, time.monotonic() - start


def test_progress_is_told_and_it_ends_in_time(project):
    root, out, seconds = project
    assert "missing; running" in out and "left" in out and "to go" in out and "notebooks are done" in out
    assert "rule " not in out and "Traceback" not in out                # Snakemake's own words stay in its log
    assert list((root / "runs/logs/smoke").glob("snakemake-*.log"))
    assert seconds < 600


def test_figures_tables_and_records_are_there(project):
    figures = project[0] / "figures/smoke"
    table = (figures / "retrieval_cosine.md").read_text()
    assert "cross-entropy" in table and "SNCA" in table and "±" in table and "not run" not in table
    records = R.load_records(figures)
    assert {r.row for r in records} == {"untrained", "cross_entropy", "snca"} and {r.seed for r in records} == {0, 1}
    for r in records:
        assert 0 < r.metrics["cosine/recall@1"] <= 1 and r.provenance["device"] and r.provenance["commit"]
        assert len(r.history) == (1 if r.row == "untrained" else 3)
        if r.row == "untrained": continue
        path = [e["test/cosine/recall@1"] for e in r.history[1:]]                # the paper's reading, from the epochs as they were
        assert r.metrics["best_on_test/cosine/recall@1"] == max(path) and path[-1] == r.metrics["cosine/recall@1"]
        chosen = r.history[int(r.metrics["best_on_test/epoch"])]
        assert chosen["test/euclidean/recall@1"] == r.metrics["best_on_test/euclidean/recall@1"] and chosen["test/cosine/recall@1"] == max(path)
        by_validation = max(range(3), key=lambda e: (r.history[e]["validation/recall@1"], e))
        assert r.metrics["selected/cosine/recall@1"] == r.history[by_validation]["test/cosine/recall@1"]
        assert .1 < r.timings["step_megabytes"] < 100 and 0 < r.timings["step_seconds"] < 10
    assert len(list(figures.glob("*.svg"))) == len(list(figures.glob("*.png"))) >= 2
    for svg in figures.glob("*.svg"): assert any(r.run in svg.read_text() for r in records)


def test_provenance_vouches_for_every_file_and_names_no_machine(project):
    root, figures = project[0], project[0] / "figures/smoke"
    told = json.loads((figures / "provenance.json").read_text())
    assert told["dirty"] is False and len(told["commits"]) == 1 and told["cpu"] and "torch" in told["versions"][0]
    on_disk = {p.relative_to(figures).as_posix() for p in figures.rglob("*") if p.is_file()} - {"provenance.json"}
    assert on_disk == set(told["files"])
    for name, sha in told["files"].items(): assert R.file_digest(figures / name) == sha
    assert set(told["runs"]) == {r.run for r in R.load_records(figures)}
    for path in figures.rglob("*"):
        if path.is_file(): assert str(root).encode() not in path.read_bytes(), path.name


def test_reading_copies_are_small_executed_and_complete(project):
    copies = sorted((project[0] / "figures/smoke/notebooks").glob("*.ipynb"))
    assert {"31_retrieval_table.ipynb", "30_train-snca-s0.ipynb", "04_objective.ipynb"} <= {p.name for p in copies}
    assert sum(p.stat().st_size for p in copies) < 12e6
    for path in copies:
        cells = json.loads(path.read_text())["cells"]
        assert any("image/png" in o.get("data", {}) for c in cells if c["cell_type"] == "code" for o in c["outputs"]) or path.name[:3] in ("04_", "ind")
        assert any(c["cell_type"] == "markdown" for c in cells)


def test_a_second_run_changes_nothing_and_takes_seconds(project):
    root = project[0]
    def stamps(): return {p: p.stat().st_mtime_ns for f in ("figures", "runs") for p in (root / f).rglob("*")
                          if p.suffix in (".ipynb", ".svg", ".png", ".csv", ".md", ".json", ".npz", ".pt")}
    before, start = stamps(), time.monotonic()
    code, out, err = reproduce(root)
    assert code == 0 and "running" not in out, out + err
    assert stamps() == before and time.monotonic() - start < 60


def test_status_after_edits_names_just_what_depends_on_them(project):
    root = project[0]
    assert {s for s, _ in states(root).values()} == {"finished"}
    def stale(): return {title for title, (state, _) in states(root).items() if state != "finished"}

    with edited(root, "nbs/04_experiments/31_retrieval_table.ipynb", lambda t: t.replace("R.use_house_style()", "R.use_house_style();")):
        assert stale() == {"31_retrieval_table", "index"}                    # the index gathers its claims
    with edited(root, "dml_companion/losses/pairwise.py", lambda t: t + "\nclass Unused: pass  # and a comment\n"): assert stale() == set()
    with edited(root, "dml_companion/losses/pairwise.py", edit_class("SNCALoss")):
        assert stale() == {"snca, seed 0", "snca, seed 1", "31_retrieval_table", "33_two_views_in_training", "index"}
        assert states(root)["snca, seed 0"] == ["stale", "the code changed"]
    with edited(root, "workflow/profiles/smoke.yaml", lambda t: t.replace("lr: 0.1,", "lr: 0.12,")):
        assert states(root)["snca, seed 0"] == ["stale", "recipe changed: lr 0.1 -> 0.12"]


def test_one_run_alone_with_papermill(project, tmp_path):
    "Anyone can execute a training notebook without Snakemake; it writes the same kind of record."
    root, out = project[0], tmp_path / "out.ipynb"
    words = ["-p", "objective", "snca", "-p", "epochs", "1", "-p", "sampler", "balanced", "-p", "per_class", "4", "-p", "folder", str(tmp_path / "run"),
             "-y", "{data_options: {max_train_classes: 32, max_test_classes: 24}, encoder_options: {width: 8}}"]
    done = subprocess.run([sys.executable, "-m", "papermill", "nbs/04_experiments/30_train.ipynb", str(out), *words], cwd=root,
                          env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    record = R.load_record(tmp_path / "run")
    assert record.recipe["objective"] == "snca" and record.row == "snca" and record.seed == 0 and out.exists()


def test_a_trial_that_collapses_is_a_result_of_a_search_and_never_sees_test_classes(project, tmp_path):
    words = ["-p", "lr", "1e12", "-p", "epochs", "3", "-p", "batch_size", "32", "-p", "evaluate_on", "validation", "-p", "folder", str(tmp_path / "run"),
             "-y", "{data_options: {max_train_classes: 32, max_test_classes: 24}, encoder_options: {width: 8}, validation: 0.25, warmup: 0}"]
    done = subprocess.run([sys.executable, "-m", "papermill", "nbs/04_experiments/30_train.ipynb", str(tmp_path / "out.ipynb"), *words], cwd=project[0],
                          env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    record = R.load_record(tmp_path / "run")
    assert any(n.startswith("collapsed: the loss is not finite") for n in record.notes) and record.recipe["lr"] == 1e12
    assert record.metrics and all(k.startswith("validation/") for k in record.metrics)
    assert not any(k.startswith("test/") for e in record.history for k in e)
