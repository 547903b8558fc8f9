"""Profiles, the engine and the command line (07_profiles, 08_engine, 09_cli), on a toy project of tiny notebooks."""
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from dml_companion import cli, engine as E, profiles as P, reproduction as R
from dml_companion.training import Recipe

ROOT = Path(__file__).resolve().parents[1]

# A stand-in for 30_train: epochs that sleep, a checkpoint after each, a log of the epochs that were really computed.
TRAIN = """import json, time
from pathlib import Path
from dml_companion import reproduction as R
root = R.project_root()
here, log, start = root / folder, root / f"{row}-{seed}.log", R.now()
here.mkdir(parents=True, exist_ok=True)
recipe = {name: globals()[name] for name in json.loads((root / "fields.json").read_text()) if name in globals()}
job = next(j for j in json.loads((root / "runs/plans/toy.json").read_text())["jobs"] if j["row"] == row and j["seed"] == seed)
done = int((here / "checkpoint.pt").read_text()) if (here / "checkpoint.pt").exists() else 0
for epoch in range(done, 4):
    while epoch == 2 and (root / "hold").exists(): time.sleep(.1)
    R.write_atomic(here / "checkpoint.pt", str(epoch + 1))
    R.write_json_atomic(here / "progress.json", {"epoch": epoch + 1, "epochs": 4})
    with open(log, "a") as f: f.write(f"{epoch + 1}\\n")"""
RECORD = """run = R.identify(recipe, row, seed, job["data"], "nbs/train.ipynb")
R.write_record(here, run=run.id, row=row, seed=seed, recipe=recipe, data={"name": "toy", "digest": job["data"]}, code=run.code,
               metrics={"cosine/recall@1": encoder_options["width"] / 100}, provenance=R.provenance(start, "cpu"))"""
TABLE = """from dml_companion import reproduction as R
runs = R.load_records(records)
R.save_table(R.result_table(runs, {"R@1": "cosine/recall@1"}, labels), "table", figures)"""


def write_notebook(path, *cells):
    "Code cells; a first line `# params` tags the cell."
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    for i, text in enumerate(cells):
        tags = {"tags": ["parameters"]} if text.startswith("# params") else {}
        nb.cells.append(nbformat.v4.new_code_cell(text, id=f"c{i}", metadata=tags))
    return R.write_atomic(path, nbformat.writes(nb))


def write_profile(root, **changes):
    rows = {"small": {"recipe": {"epochs": 0, "encoder_options": {"width": 8}}}, "large": {"recipe": {"epochs": 0, "encoder_options": {"width": 16}}}}
    profile = {"name": "toy", "data": {"name": "glyphs", "options": {"max_train_classes": 4, "max_test_classes": 4}}, "seeds": [0],
               "rows": rows, "train": "nbs/train.ipynb", "notebooks": [{"notebook": "nbs/table.ipynb"}, {"notebook": "nbs/alone.ipynb"}]}
    R.write_atomic(root / "workflow/profiles/toy.yaml", yaml.safe_dump({k: v for k, v in (profile | changes).items() if v is not None}))


@pytest.fixture
def root(tmp_path, monkeypatch):
    "A project with a training notebook, one that tabulates its runs, and one that stands alone."
    monkeypatch.delenv("DML_ROOT", raising=False)
    root = tmp_path / "a project"                           # a blank in the path, as people have
    R.write_atomic(root / "settings.ini", "")
    R.write_json_atomic(root / "fields.json", list(Recipe.model_fields))
    R.write_atomic(root / "workflow/Snakefile", (ROOT / "workflow/Snakefile").read_text())
    fields = "\n".join(f"{k} = {v!r}" for k, v in Recipe().model_dump(mode="json").items())
    write_notebook(root / "nbs/train.ipynb", f"# params\nrow, seed = '', 0\nrow = ''\nseed = 0\ndata = ''\ndevice = ''\nfolder = ''\n{fields}", TRAIN, RECORD)
    write_notebook(root / "nbs/table.ipynb", "# params\nrecords = []\nlabels = {}\nfigures = ''", TABLE)
    write_notebook(root / "nbs/alone.ipynb", "# params\nx = 1", "print(x)", "assert x < 5, 'x is too large'")
    write_profile(root)
    return root


def environment():
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))     # a plugin may be tried from a folder of its own
    return {k: v for k, v in os.environ.items() if k != "DML_ROOT"} | {"PYTHONPATH": paths, "COLUMNS": "200"}


def begin(root, *words):
    "Start the command in the background, with Ctrl-C working even where the tests' own shell ignores it."
    return subprocess.Popen([sys.executable, "-m", "dml_companion.cli", *words], cwd=root, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def command(root, *words):
    "Run the command; exit code, standard output, standard error."
    process = begin(root, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def command_here(root, monkeypatch, *words):
    "The same in this process, without the price of another interpreter."
    monkeypatch.chdir(root)
    monkeypatch.setenv("DML_ROOT", str(root))
    monkeypatch.setattr(cli.out, "width", 200)
    result = CliRunner().invoke(cli.app, words)
    return result.exit_code, result.output


def until(condition, seconds=90):
    "Wait for something to become true."
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(.05)
    return value


def outputs(root): return {p: p.stat().st_mtime_ns for p in (root / "runs").rglob("*.ipynb")}
def states(root): return {j.title: j.state for j in P.plan("toy", root=root).jobs}
def edit(path, old, new): assert old in path.read_text(); R.write_atomic(path, path.read_text().replace(old, new))

# ---------------------------------------------------------------- the whole way


def test_a_project_from_nothing_to_published_and_after_edits(root, monkeypatch):
    code, out, err = command(root, "reproduce", "--profile", "toy", "--cores", "2")
    assert code == 0, out + err
    assert "4 missing; running 4 of 4 notebooks on 2 cores" in out and "all 4 notebooks are done" in out
    figures = root / "figures/toy"
    assert "| large | 1 | 0.160 (n=1) |" in (figures / "table.md").read_text()
    names = {p.relative_to(figures).as_posix() for p in figures.rglob("*.*")}
    assert {"table.csv", "table.md", "README.md", "provenance.json", "notebooks/table.ipynb", "notebooks/alone.ipynb",
            "notebooks/train-small-s0.ipynb"} <= names and len([n for n in names if n.startswith("records/")]) == 2
    text = (figures / "provenance.json").read_text()
    found = json.loads(text)
    assert len(found["runs"]) == 2 and found["versions"][0]["torch"] and str(root) not in text
    for name, sha in found["files"].items(): assert R.file_digest(figures / name) == sha
    for copy in figures.glob("notebooks/*.ipynb"): assert str(root) not in copy.read_text()

    before, published = outputs(root), {p: p.stat().st_mtime_ns for p in figures.rglob("*.*")}
    start = time.monotonic()
    code, out, err = command(root, "reproduce", "--profile", "toy")
    assert code == 0 and "running" not in out and time.monotonic() - start < 30
    assert outputs(root) == before and {p: p.stat().st_mtime_ns for p in figures.rglob("*.*")} == published

    edit(root / "nbs/table.ipynb", "R.save_table", "print(len(runs));R.save_table")                        # a plotting edit
    assert states(root) == {"small, seed 0": "finished", "large, seed 0": "finished", "table": "stale", "alone": "finished"}
    assert "1 of 4 notebooks would run" in command_here(root, monkeypatch, "reproduce", "--profile", "toy", "--dry-run")[1]
    assert outputs(root) == before                                                                            # a dry run runs nothing
    assert command(root, "reproduce", "--profile", "toy")[0] == 0
    after = outputs(root)
    assert {p.parent.name for p in set(after) - set(before)} == {"toy"} and all(after[p] == t for p, t in before.items())

    (figures / "table.csv").write_text("edited by hand")
    assert states(root)["table"] == "changed"
    write_profile(root, rows={"small": {"recipe": {"epochs": 0, "encoder_options": {"width": 4}}},
                              "large": {"recipe": {"epochs": 0, "encoder_options": {"width": 16}}}})
    jobs = {j.title: (j.state, j.why) for j in P.plan("toy", root=root).jobs}
    assert jobs["small, seed 0"] == ("stale", "recipe changed: encoder_options") and jobs["large, seed 0"][0] == "finished"
    assert jobs["table"][0] == "stale" and jobs["alone"][0] == "finished"
    code, out = command_here(root, monkeypatch, "status", "--profile", "toy")
    assert code == 0 and "2 finished, 2 stale" in out


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_published_runs_are_repeated_and_compared_number_by_number(root, monkeypatch):
    assert command(root, "reproduce", "--profile", "toy")[0] == 0
    repeat = lambda *words: command_here(root, monkeypatch, "repeat", "--profile", "toy", *words)
    before = outputs(root)
    code, out = repeat("--runs", "1", "--row", "small")
    assert code == 0 and "small, seed 0: all 1 numbers are equal" in out and "0.0800" in out
    assert {p: t for p, t in outputs(root).items() if "repeat" not in p.parts} == before             # the runs themselves are left alone
    record = next((root / "figures/toy/records").glob("small*.json"))
    edit(record, '"cosine/recall@1": 0.08', '"cosine/recall@1": 0.081')
    edit(record, '"cpu": ', '"cpu": "another one", "was": ')
    code, out = repeat("--runs", "5")                                                               # more than there are
    assert code == 1 and "small, seed 0: 1 of 1 numbers differ, metrics/cosine/recall@1 first" in out and "0.001" in out
    assert "large, seed 0: all 1 numbers are equal" in out and "processor another one there" in out
    code, out = repeat("--row", "smal")
    assert code == 2 and "unknown row 'smal', did you mean 'small'? Known: large, small" in out
    shutil.rmtree(root / "figures/toy/records")
    code, out = repeat()
    assert code == 2 and "no run of profile 'toy' is published in figures/toy/records" in out


def test_what_is_published_need_not_be_run_again(root, monkeypatch):
    "In a fresh checkout the records and outputs of the figures folder count as done, but for what has changed since."
    figures, logs = root / "figures/toy", [root / "small-0.log", root / "large-0.log"]
    assert command(root, "reproduce", "--profile", "toy")[0] == 0
    before, trained = contents(figures), [log.read_text() for log in logs]

    shutil.rmtree(root / "runs")
    code, out = command_here(root, monkeypatch, "reproduce", "--profile", "toy", "--published")
    assert code == 0 and "took over 4 of 4" in out and "running" not in out, out
    assert contents(figures) == before and [log.read_text() for log in logs] == trained
    assert "took over 0 of 4" in command_here(root, monkeypatch, "reproduce", "--profile", "toy", "--published")[1]     # nothing in runs/ is replaced

    shutil.rmtree(root / "runs")
    edit(root / "nbs/table.ipynb", "R.save_table", "print(len(runs));R.save_table")                                     # another figure: no training
    code, out = command_here(root, monkeypatch, "reproduce", "--profile", "toy", "--published", "--dry-run")
    assert code == 0 and "took over 3 of 4" in out and "1 of 4 notebooks would run" in out
    code, out, err = command(root, "reproduce", "--profile", "toy", "--published")
    assert code == 0 and [log.read_text() for log in logs] == trained, out + err
    now_ = contents(figures)
    assert {n for n in before if now_[n] != before[n]} == {"notebooks/table.ipynb", "provenance.json"} and '"text": "2' in now_["notebooks/table.ipynb"].decode()

    for name, what in (("records/small-s0-", "small, seed 0"), ("notebooks/alone", "alone")):                           # edited by hand, or gone
        for change in (lambda p: p.write_bytes(p.read_bytes() + b" "), lambda p: p.unlink()):
            shutil.rmtree(root / "runs")
            path = next(figures / n for n in now_ if n.startswith(name))
            change(path)
            plan = P.plan("toy", root=root)
            E.adopt(plan, root)
            left = {j.title for j in P.refresh(plan, root).left()}
            assert left == {what} | ({"table"} if what != "alone" else set())
            R.write_atomic(path, now_[path.relative_to(figures).as_posix()])


def test_publications_that_say_less_give_their_runs_only(root, monkeypatch):
    "Those made before notebooks were named by their job, and a folder without any."
    plan = P.plan("toy", root=root)
    assert E.adopt(plan, root) == 0 and not list((root / "runs").rglob("*.ipynb"))
    assert command(root, "reproduce", "--profile", "toy")[0] == 0
    path = root / "figures/toy/provenance.json"
    said = json.loads(path.read_text())
    for entry in said["notebooks"].values(): del entry["job"], entry["wrote"]
    R.write_json_atomic(path, said)
    shutil.rmtree(root / "runs")
    assert E.adopt(P.plan("toy", root=root), root) == 2
    assert states(root) == {"small, seed 0": "finished", "large, seed 0": "finished", "table": "missing", "alone": "missing"}


def test_kill_in_the_middle_then_the_same_command(root):
    R.write_atomic(root / "hold", "")
    front = begin(root, "reproduce", "--profile", "toy", "--cores", "2")
    log = root / "small-0.log"
    until(lambda: log.exists() and log.read_text().count("\n") == 2)
    family = psutil.Process(front.pid).children(recursive=True)
    assert "running" in states(root).values() and len(family) >= 4

    code, out, err = command(root, "reproduce", "--profile", "toy")                                           # a second at once
    assert code == 2 and f"process {front.pid}" in err and "another reproduce" in err

    front.kill()
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 15)       # no orphans
    assert front.wait() == -signal.SIGKILL
    small = [j for j in P.plan("toy", root=root).jobs if j.title == "small, seed 0"][0]
    assert small.state == "interrupted" and not (root / small.output).exists()

    (root / "hold").unlink()
    code, out, err = command(root, "reproduce", "--profile", "toy", "--cores", "2")
    assert code == 0, out + err
    assert log.read_text().split() == ["1", "2", "3", "4"]                                                    # no epoch twice
    assert set(states(root).values()) == {"finished"}


def test_a_failing_notebook_is_named_and_the_others_finish(root, monkeypatch):
    edit(root / "nbs/train.ipynb", "done = int", "assert row != 'small', 'small is not [supported]'\\ndone = int")
    code, out, err = command(root, "reproduce", "--profile", "toy", "--cores", "2")
    assert code == 1
    assert re.search(r"FAILED small, seed 0: nbs/train.ipynb, cell 2 of 3, line 9", err)
    assert "AssertionError: small is not [supported]" in err and "> assert row != 'small'" in err
    assert "not run because of that: table" in err and "2 of 4 notebooks are done" in err
    copy = root / re.search(r"executed copy: (\S+)", err)[1]
    assert copy.name == "notebook.failed.ipynb" and "small is not [supported]" in copy.read_text()
    assert (root / re.search(r"    log: (\S+)", err)[1]).is_file()
    assert states(root) == {"small, seed 0": "failed", "large, seed 0": "finished", "table": "missing", "alone": "finished"}
    assert "small is not [supported]" in command_here(root, monkeypatch, "status", "--profile", "toy")[1]

    edit(root / "nbs/train.ipynb", "assert row != 'small', 'small is not [supported]'\\n", "")
    code, out, err = command(root, "reproduce", "--profile", "toy", "--cores", "2")
    assert code == 0 and not list((root / "runs").rglob("*.part*"))


def test_ctrl_c_stops_everything_and_keeps_what_is_done(root):
    write_notebook(root / "nbs/slow.ipynb", "import time", "time.sleep(60)")
    write_profile(root, rows=None, seeds=None, data=None, notebooks=[{"notebook": "nbs/alone.ipynb"}, {"notebook": "nbs/slow.ipynb"}])
    front = begin(root, "reproduce", "--profile", "toy", "--cores", "2")
    until(lambda: states(root) == {"alone": "finished", "slow": "running"})
    family = psutil.Process(front.pid).children(recursive=True)
    front.send_signal(signal.SIGINT)
    out, err = front.communicate(timeout=30)
    assert front.returncode == 130 and "the same command goes on" in err and "Traceback" not in out + err
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 15)
    assert states(root) == {"alone": "finished", "slow": "missing"}


def test_code_that_changes_under_a_run_is_not_sealed(root):
    "The record carries the id of the code that ran; under another name it must not count as finished."
    plan = P.plan("toy", root=root)
    R.write_json_atomic(root / plan.path(), plan.model_dump())
    edit(root / "nbs/train.ipynb", "done = int", "surprise = 1\\ndone = int")
    done = subprocess.run([sys.executable, "-m", "dml_companion.cli", "job", plan.path(), plan.jobs[0].id], cwd=root,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "changed while the run went on" in done.stderr
    assert P.judge(plan.jobs[0], root)[0] == "failed"

# ---------------------------------------------------------------- input that is wrong


@pytest.mark.parametrize("change, words", [
    ({"sedes": [0]}, "unknown key 'sedes', did you mean 'seeds'"),
    ({"resources": {"runs_per_gpus": 1}}, "did you mean 'runs_per_gpu'"),
    ({"rows": {"a": {"recipe": {"epochs": 0, "encodr": "convnet"}}}}, "row 'a': unknown Recipe key 'encodr'"),
    ({"rows": {"a": {"recipe": {"objective": "sncaa"}}}}, "did you mean 'snca'"),
    ({"rows": {"a": {"recipe": {"objective": "snca", "objective_options": {"tau": 1}}}}}, "row 'a': unknown option of snca"),
    ({"rows": {"a": {"recipe": {"lr": -1}}}}, "row 'a': lr"),
    ({"rows": {"a": {"recipe": {"encoder": "resnet19"}}}}, "row 'a': unknown encoder 'resnet19'"),
    ({"rows": {"a": {"recipe": {"encoder_options": {"widht": 8}}}}}, "did you mean 'width'"),
    ({"rows": {"a": {"recipe": {"augment": {"flip": True}}}}}, "row 'a': augment.flip"),
    ({"minutes": -1}, "minutes: Input should be greater than 0"),
    ({"rows": {"a b": {}}}, "letters, digits and _"),
    ({"seeds": []}, "needs seeds"), ({"seeds": [1, 1]}, "given twice"), ({"data": None}, "rows need data"),
    ({"base": {"threads": 2}}, "resources.threads_per_run"),
    ({"notebooks": [{"notebook": "nbs/alone.ipynb", "parameters": {"y": 1}}]}, "has no parameter 'y' It has: x"),
    ({"notebooks": [{"notebook": "nbs/alone.ipynb", "parameters": {"x": "1"}}]}, "is str, but must be NoneType or int"),
    ({"notebooks": [{"notebook": "nbs/none.ipynb"}]}, "there is no notebook"),
    ({"notebooks": [{"notebook": "nbs/table.ipynb", "rows": ["smal"]}]}, "did you mean 'small'"),
    ({"notebooks": [{"notebook": "nbs/alone.ipynb"}] * 2}, "asks twice"),
    ({"train": "nbs/alone.ipynb"}, "alone.ipynb has no parameter"),
    ({"search": {"trials": 2, "own": {"small": {"lr": [.1, 1, "log"]}}}}, "'large' is in one only"),
    ({"search": {"own": {"small": {"lr": [.1, 1, "log"]}, "large": {}}}}, "as many parameters of its own, got {'large': 0, 'small': 1}"),
    ({"search": {"shared": {"lr": [.1, 1, "log"]}, "own": {"small": {"lr": [.1, 1, "log"]}, "large": {"lr": [.1, 1, "log"]}}}}, "'lr' is shared already"),
    ({"search": {"own": {"small": {"lr": [1, .1, "log"]}, "large": {"lr": [.1, 1, "log"]}}}}, "low < high, got [1, 0.1, 'log']"),
    ({"search": {"own": {"small": {"lr": [1, float("inf"), "log"]}, "large": {"lr": [.1, 1, "log"]}}}}, "two finite numbers"),
    ({"search": {"own": {"small": {"foo": [1, 2, "log"]}, "large": {"foo": [1, 2, "log"]}}}, "base": {"validation": .25}}, "unknown Recipe key 'foo'"),
    ({"search": {"own": {"small": {}, "large": {}}}}, "judged on validation classes; add `validation: 0.25` to base"),
    ({"search": {"own": {"small": {"validation": [.1, .3, "linear"]}, "large": {"validation": [.1, .3, "linear"]}}},
      "rows": {row: {"recipe": {"objective": "snca"}} for row in ("small", "large")}}, "the same validation; large_t0 and large_t1 differ"),
    ({"search": {"own": {"small": {"dropout": [.1, .3, "linear"]}, "large": {"dropout": [.1, .3, "linear"]}}},
      "rows": {"small": {"recipe": {"objective": "snca"}}, "large": {"recipe": {"objective": "snca", "epochs": 60}}}}, "the same epochs; large_t0 and small_t0 differ"),
    ({"search": {"shared": {"lr": [.1, 1, "log"]}, "own": {"small": {}, "large": {}}},
      "rows": {"small": {"recipe": {"objective": "snca"}}, "large": {"recipe": {"objective": "snca", "lr": .1}}}}, "row 'large': lr is both given and searched"),
    ({"search": {"own": {"small": {"lr": [0, 1, "log"]}, "large": {"lr": [.1, 1, "log"]}}}}, "a log scale needs low > 0"),
    ({"search": {"own": {"small": {"lr": [0, 1, "lin"]}, "large": {"lr": [.1, 1, "log"]}}}}, "ends in log, linear or choice"),
    ({"search": {"own": {"small": {"lr": [.1, "choice"]}, "large": {"lr": [.1, 1, "log"]}}}}, "a choice needs different values"),
    ({"lr_follows_batch": True}, "no effect without batch_size in vary"),
    ({"warmup_follows_steps": True, "vary": {"dim": [8]}}, "no effect without batch_size or epochs in vary"),
    ({"vary": {"epochs": [8]}, "warmup_follows_steps": True}, "needs warmup and epochs, in the row or in base"),
    ({"vary": {"batch_size": [8]}, "lr_follows_batch": True}, "needs lr and batch_size, in the row or in base"),
    ({"vary": {"dim": [8, 8]}}, "'large_dim8' twice"), ({"vary": {"dmi": [8]}}, "row 'large_dmi8'")])
def test_a_bad_profile_is_refused_before_any_work(root, change, words, capsys):
    write_profile(root, **change)
    words = re.sub(r" It has", ". It has", words)
    with pytest.raises(ValueError, match=re.escape(words)): P.plan("toy", root=root)
    assert not (root / "runs").exists()


def test_bad_input_ends_the_command_with_code_2_and_one_sentence(root):
    for words, says in ((["status", "--profile", "tox"], "unknown profile 'tox', did you mean 'toy'? Known: toy"),
                        (["reproduce", "--profile", "toy", "--device", "tpu"], "unknown device 'tpu'")):
        code, out, err = command(root, *words)
        assert code == 2 and err.startswith("error: ") and says in err and err.count("\n") == 1
    code, out, err = command(root.parent, "status")
    assert code == 2 and "settings.ini" in err


def test_tune_finds_the_search_of_a_profile(root):
    search = {"trials": 2, "shared": {"lr": [.1, 1, "log"]}, "own": {"small": {}, "large": {}}}
    rows = {row: {"recipe": {"objective": "snca"}} for row in ("small", "large")}
    R.write_atomic(root / "workflow/profiles/hunt.yaml", yaml.safe_dump({"name": "hunt", "seeds": [0], "search": search, "rows": rows, "data": {"name": "glyphs"}}))
    assert P.search_of("hunt", root) == "hunt"
    with pytest.raises(ValueError, match="'toy' names no search: give it `tuned_by`"): P.search_of("toy", root)
    write_profile(root, tuned_by="hunt")
    assert P.search_of("toy", root) == "hunt"
    write_profile(root, tuned_by="toy")
    with pytest.raises(ValueError, match="tuned_by 'toy', which has no `search`"): P.search_of("toy", root)
    code, out, err = command(root, "tune", "--profile", "toy")
    assert code == 2 and "which has no `search`" in err


def test_yaml_with_a_key_twice_is_refused(tmp_path):
    path = R.write_atomic(tmp_path / "x.yaml", "a: 1\nb: {c: 1, c: 2}\n")
    with pytest.raises(ValueError, match="'c' is given twice"): P.read_yaml(path)
    R.write_atomic(path, "a: [")
    with pytest.raises(ValueError, match="not YAML"): P.read_yaml(path)


def test_every_profile_of_the_project_is_valid():
    for name in P.profile_names(ROOT):
        profile = P.load_profile(name, ROOT)
        P.check_notebooks(profile, P.checked_recipes(profile), {}, ROOT)


def test_parameters_are_read_from_the_cell(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "# params\na = 1\nb: float = 2\nc: list[int] | None = None\nd = None\ne = -1.5\nf = 2 ** 3\ng = {}")
    kinds = {k: p.kinds for k, p in P.parameters_of(path).items()}
    assert kinds == {"a": ("NoneType", "int"), "b": ("float", "int"), "c": ("NoneType", "list"), "d": (),
                     "e": ("NoneType", "float"), "f": (), "g": ("NoneType", "dict")}
    P.check_parameters(path, {"a": None, "b": 1, "c": [1], "d": "x", "e": 2, "f": "y", "g": {"k": 1}})
    for bad in ({"a": 1.5}, {"a": True}, {"b": None}, {"c": 1}, {"g": []}):
        with pytest.raises(ValueError, match="must be"): P.check_parameters(path, bad)


def test_a_search_gives_every_row_the_same_points():
    space = {"objective_options.margin": [0., 1., "linear"]}
    profile = P.Profile(name="s", rows={"a": P.Row(recipe={"objective_options": {"squared": True}}), "b": P.Row()},
                        search=P.Search(trials=6, shared={"lr": [.01, 1., "log"]}, own={"a": space, "b": space}))
    rows = P.with_trials(profile).rows
    assert list(rows) == [f"{r}_t{k}" for r in "ab" for k in range(6)]
    for k in range(6): assert rows[f"a_t{k}"].recipe["lr"] == rows[f"b_t{k}"].recipe["lr"]
    lrs = [rows[f"a_t{k}"].recipe["lr"] for k in range(6)]
    assert .01 < min(lrs) < .05 and .2 < max(lrs) < 1 and len(set(lrs)) == 6
    assert rows["a_t0"].recipe["objective_options"]["squared"] is True and profile.rows["a"].recipe == {"objective_options": {"squared": True}}


@pytest.mark.parametrize("design", ["r_d", "halton"])
def test_a_design_is_fixed_inside_and_grows_by_adding_points(design):
    points = P.design_points(12, 3, design)
    assert all(0 < x < 1 for p in points for x in p) and points[:5] == P.design_points(5, 3, design)
    assert len({round(p[0], 9) for p in points}) == 12
    if design == "halton": assert [round(x, 6) for x in points[5]] == [.375, .222222, .24]        # 6 is 110, 20 and 11: read backwards


def test_a_choice_takes_one_of_its_values_and_every_value_is_tried():
    search = P.Search(trials=12, own={"a": {"per_class": [2, 4, 8, "choice"]}})
    tried = [r.recipe["per_class"] for r in P.with_trials(P.Profile(name="s", rows={"a": P.Row()}, search=search)).rows.values()]
    assert set(tried) == {2, 4, 8} and min(map(tried.count, (2, 4, 8))) >= 3


def test_vary_repeats_rows_with_one_field_changed():
    profile = P.Profile(name="s", rows={"a": P.Row(label="A", recipe={"lr": .1}), "b": P.Row(vary=False), "c": P.Row(control=True)},
                        vary={"dim": [8, 16], "epochs": [2]})
    rows = P.with_variants(profile).rows
    assert list(rows) == ["a", "a_dim8", "a_dim16", "a_epochs2", "b", "c"]
    assert rows["a_dim8"].recipe == {"lr": .1, "dim": 8} and rows["a"].recipe == {"lr": .1} and rows["a_dim8"].label == "A, dim 8"
    rows = P.with_variants(profile.model_copy(update=dict(vary={"batch_size": [8], "dim": [8]}, base={"batch_size": 32, "lr": 1.}, lr_follows_batch=True))).rows
    assert rows["a_batch_size8"].recipe == {"batch_size": 8, "lr": .025} and rows["a_dim8"].recipe == {"lr": .1, "dim": 8}
    rows = P.with_variants(profile.model_copy(update=dict(vary={"batch_size": [8, 64], "epochs": [2, 16]}, warmup_follows_steps=True,
                                                          base={"batch_size": 32, "epochs": 8, "warmup": 100}))).rows
    assert [rows[f"a_{end}"].recipe.get("warmup") for end in ("batch_size8", "batch_size64", "epochs2", "epochs16")] == [None, 50, 25, None]

# ---------------------------------------------------------------- single parts


def test_execute_reports_the_cell_the_line_and_the_error(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "# params\nx = 0", "import os, signal", "if x: os.kill(os.getpid(), signal.SIGKILL)\ny = 1\n1 / x")
    with pytest.raises(E.NotebookFailed) as failed: E.execute(path, tmp_path / "out.ipynb", {"x": 0}, tmp_path)
    error = R.read_json(tmp_path / "out.error.json")
    assert error == failed.value.args[0] and (error["cell"], error["cells"], error["line"], error["ename"]) == (3, 3, 3, "ZeroDivisionError")
    assert error["code"] == "1 / x" and (tmp_path / "out.failed.ipynb").is_file() and not (tmp_path / "out.ipynb").exists()
    with pytest.raises(E.NotebookFailed, match="Kernel died"): E.execute(path, tmp_path / "out.ipynb", {"x": 1}, tmp_path)
    with pytest.raises(ValueError, match="no parameter 'z'"): E.execute(path, tmp_path / "out.ipynb", {"z": 1}, tmp_path)


def test_locks_vanish_with_their_process(tmp_path):
    code = f"import time; from dml_companion.engine import locked\nwith locked(__import__('pathlib').Path({str(tmp_path / 'l')!r})): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n" and P.is_locked(tmp_path / "l") and R.read_json(tmp_path / "l")["pid"] == holder.pid
    holder.kill(); holder.wait()
    assert not P.is_locked(tmp_path / "l")


def toy_plan(**changes):
    base = dict(parameters={}, notebook="n.ipynb", log="")
    jobs = [P.Job(id=f"t{i}", kind="train", title=f"row, seed {i}", output=f"runs/train/d/row/s{i}-0123456789ab/notebook.ipynb", **base) for i in range(4)]
    jobs += [P.Job(id="n", kind="notebook", title="n", output="runs/notebooks/p/n-0123456789ab.ipynb", after=[j.output for j in jobs], **base)]
    return P.Plan(**dict(profile="p", jobs=jobs, device="cpu", gpus=0, runs_per_gpu=2, threads=1, figures="f", minutes=5.) | changes)


def test_time_left_learns_from_what_jobs_took(tmp_path):
    plan = toy_plan()
    assert E.time_left(plan, tmp_path, 2, plan.jobs, {}) == pytest.approx(300)                            # the profile's own word
    assert E.time_left(toy_plan(minutes=None), tmp_path, 2, plan.jobs, {}) is None
    R.write_json_atomic(P.beside(tmp_path / plan.jobs[0].output, "manifest.json"), {"seconds": 20})
    assert E.time_left(plan, tmp_path, 2, plan.jobs[1:4], {}) == pytest.approx(30)                        # three of 20 s on two cores
    assert E.time_left(plan, tmp_path, 2, [], {"t1": 15.}) == pytest.approx(5)
    R.write_json_atomic((tmp_path / plan.jobs[1].output).parent / "progress.json", {"epoch": 1, "epochs": 4})
    (tmp_path / P.beside(plan.jobs[0].output, "manifest.json")).unlink()
    assert E.time_left(plan, tmp_path, 2, [], {"t1": 10.}) == pytest.approx(30)                           # one epoch of four took 10 s
    assert E.time_left(toy_plan(gpus=1, runs_per_gpu=3), tmp_path, 16, plan.jobs[:3], {}) == pytest.approx(120)


def test_the_command_line_for_snakemake_keeps_gpus_to_their_slots():
    assert "gpu_slots=6" in E.snakemake_command(toy_plan(gpus=2, runs_per_gpu=3), 8, ROOT)
    assert "--resources" not in E.snakemake_command(toy_plan(), 8, ROOT)


def test_failures_without_an_error_file_quote_the_log(tmp_path):
    plan = toy_plan()
    for job in plan.jobs: job.log = f"{job.id}.log"
    R.write_atomic(tmp_path / "t0.log", "a\nKilled\n")
    broken, never = E.failures(plan, tmp_path)
    assert len(broken) == 1 and "ended without a word" in broken[0] and "| Killed" in broken[0] and "t0.log" in broken[0]
    assert never == ["row, seed 1", "row, seed 2", "row, seed 3", "n"]


def test_a_job_that_had_no_room_for_a_word(tmp_path, monkeypatch):
    from collections import namedtuple
    plan = toy_plan()
    for job in plan.jobs: job.log = f"{job.id}.log"
    R.write_atomic(tmp_path / "t0.log", "a\n")
    assert "is full" not in E.failures(plan, tmp_path)[0][0]
    monkeypatch.setattr(E.shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(3 * 2**20))
    assert "is full (3 MB free): make room, then start again" in E.failures(plan, tmp_path)[0][0]


def test_reading_copies_hold_no_folders_progress_bars_or_kernel_chatter(tmp_path):
    secrets = {"/home/me/project": "./", "/home/me": "~/"}
    stream = {"output_type": "stream", "name": "stderr", "text": "[IPKernelApp] WARNING | x\n 50%|█████     | 1/2\nat /home/me/project/a.py and /home/men\n"}
    assert E.clean_output(stream, secrets)["text"] == "at ./a.py and /home/men\n"
    assert E.clean_output({**stream, "text": "[IPKernelApp] WARNING | x\n"}, secrets) is None
    tqdm = "/x/tqdm/auto.py:21: TqdmWarning: IProgress not found. Please update jupyter\n  from .autonotebook import tqdm as notebook_tqdm\nkept\n"
    assert E.clean_output({**stream, "text": tqdm}, secrets)["text"] == "kept\n"
    data = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": ["/home/me/x"]}, "metadata": {"a": 1}}
    assert E.clean_output(data, secrets) == {"output_type": "display_data", "data": {"text/plain": "~/x"}, "metadata": {}}


def test_readers_get_the_first_seed_of_a_row_and_no_varied_rows_or_trials():
    def job(kind, **more): return P.Job(id="x", kind=kind, title="x", notebook=f"nbs/{kind}.ipynb", output="x", log="x", **{"parameters": {}, **more})
    varied = [job("train", row="a_dim8", seed=0, recipe={"dim": 8}), job("train", row="a_lr0.5", seed=0, recipe={"dim": 4, "lr": .5})]
    own = [job("train", row=row, seed=seed, recipe={"dim": 8}) for row in ("a", "a_dim4", "b_dim8") for seed in (0, 1)] # named like variants, and none
    trial = job("train", row="a_t0", seed=0, recipe={"t": 0}, parameters={"evaluate_on": "validation"})
    plan = P.Plan(profile="p", jobs=[*varied, *own, trial, job("table")], device="cpu", gpus=0, runs_per_gpu=1, threads=1, figures="f")
    assert list(E.readable(plan)) == ["train-a-s0", "train-a_dim4-s0", "train-b_dim8-s0", "table"]


def test_prose_may_change_without_running_again(root):
    source = root / "nbs/alone.ipynb"
    E.execute("nbs/alone.ipynb", "ran.ipynb", {"x": 3}, root)
    digest = R.notebook_digest(source)
    nb = nbformat.read(source, 4)
    nb.cells.insert(1, nbformat.v4.new_markdown_cell("Now explained.", id="prose"))
    nbformat.write(nb, source)
    assert R.notebook_digest(source) == digest
    cells = json.loads(E.reading_copy(source, root / "ran.ipynb", root))["cells"]
    assert [c["cell_type"] for c in cells] == ["code", "code", "markdown", "code", "code"] and cells[3]["outputs"][0]["text"] == "3\n"


def test_reading_copies_do_not_name_the_data_folder(tmp_path):
    write = lambda name, source, tags: R.write_atomic(tmp_path / name, json.dumps({"cells": [
        {"cell_type": "code", "id": t, "metadata": {"tags": [t]}, "source": source, "outputs": [], "execution_count": 1} for t in tags], "metadata": {}}))
    source = write("a.ipynb", "data = ''", ["parameters"])
    ran = write("b.ipynb", "data = '/disk/sets/'", ["parameters", "injected-parameters"])
    text = E.reading_copy(source, ran, tmp_path, "/disk/sets/")
    assert "/disk" not in text and "<data>/" in text


def test_two_notebooks_that_write_the_same_figure_are_an_error(tmp_path):
    plan = toy_plan()
    plan.jobs = [plan.jobs[-1].model_copy(update={"title": t, "output": f"runs/{t}.ipynb"}) for t in "ab"]
    for t in "ab": R.write_json_atomic(tmp_path / f"runs/{t}.manifest.json", {"files": {"f/x.svg": "0"}})
    with pytest.raises(ValueError, match="a and b both wrote x.svg"): E.figure_files(plan, tmp_path)


def test_help_is_quick_and_leaves_torch_alone():
    code = "import sys; from dml_companion import cli; print(*[m for m in ('torch', 'numpy', 'pandas', 'papermill', 'snakemake') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == ""
    for word, shown in (("--help", "reproduce"), ("--version", "dml-companion 0.")):
        assert shown in subprocess.run([sys.executable, "-m", "dml_companion.cli", word], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_objectives_are_listed_with_their_options(root, monkeypatch):
    code, out = command_here(root, monkeypatch, "objectives")
    assert code == 0 and "natural" in out
    assert "temperature=0.1" in command_here(root, monkeypatch, "objectives", "snca")[1]
    for name in ("cross_entropy", "normalized_softmax", "center", "contrastive", "snca", "multi_similarity", "spce"): assert name in out


def test_the_snakefile_is_short():
    assert len((ROOT / "workflow/Snakefile").read_text().splitlines()) <= 60


def test_a_notebook_waits_for_the_notebooks_that_it_reads(root):
    def tasks(*after): return [dict(notebook="nbs/table.ipynb"), dict(notebook="nbs/alone.ipynb", after=list(after))]
    write_profile(root, notebooks=tasks("nbs/table.ipynb"))
    jobs = {j.title: j for j in P.plan("toy", root=root).jobs}
    assert jobs["alone"].after == [jobs["table"].output]
    edit(root / "nbs/table.ipynb", "R.save_table", "print(len(runs));R.save_table")       # another table, another reader of it
    assert {j.title: j.id for j in P.plan("toy", root=root).jobs}["alone"] != jobs["alone"].id
    write_profile(root, notebooks=tasks("nbs/tabel.ipynb"))
    with pytest.raises(ValueError, match="'nbs/tabel.ipynb', which is not listed above it, did you mean 'nbs/table.ipynb'"): P.plan("toy", root=root)
    write_profile(root, notebooks=tasks("nbs/alone.ipynb"))
    with pytest.raises(ValueError, match="not listed above it"): P.plan("toy", root=root)


def test_what_is_redone_is_redone_all_the_way_down(root):
    "A spoilt run spoils the table that reads it and the notebook that reads the table."
    write_profile(root, notebooks=[dict(notebook="nbs/table.ipynb"), dict(notebook="nbs/alone.ipynb", after=["nbs/table.ipynb"])])
    code, out, err = command(root, "reproduce", "--profile", "toy", "--cores", "2")
    assert code == 0, out + err
    assert set(states(root).values()) == {"finished"}
    run = next(j for j in P.plan("toy", root=root).jobs if j.kind == "train")
    (root / run.output).unlink()
    now = states(root)
    assert now["table"] == now["alone"] == "changed"


def test_quoted_tables_are_brought_up_to_date(tmp_path):
    page, table = tmp_path / "README.md", tmp_path / "t.md"
    page.write_text("a\n<!-- table: t.md -->\nold\n<!-- end -->\nb \\d\n<!-- table: t.md -->\n<!-- end -->\n")
    table.write_text("| \\alpha | 1 |\n\n")
    E.refresh_quotes(page, tmp_path)
    quote = "<!-- table: t.md -->\n| \\alpha | 1 |\n<!-- end -->\n"
    assert page.read_text() == f"a\n{quote}b \\d\n{quote}"
    broken = "<!-- table: t.md -->\nmy words\n## Heading\n<!-- table: t.md -->\nold\n<!-- end -->\n"           # an end was forgotten
    page.write_text(broken)
    E.refresh_quotes(page, tmp_path)
    assert page.read_text() == "<!-- table: t.md -->\nmy words\n## Heading\n" + quote
    stamp = page.stat().st_mtime_ns
    E.refresh_quotes(page, tmp_path); E.refresh_quotes(tmp_path / "none.md", tmp_path)
    assert page.stat().st_mtime_ns == stamp


def test_a_claim_that_a_notebook_no_longer_makes_is_dropped(root):
    "Also when the notebook that gathers claims runs before anything is published."
    def says(*ids):
        calls = "\n".join(f"write_claim(figures, id='{i}', claim='c', source='s', checked='k', cases=1, violations=0, tolerance=0, notebook='nbs/alone.ipynb')" for i in ids)
        write_notebook(root / "nbs/alone.ipynb", "# params\nfigures = ''", f"from dml_companion.reproduction import write_claim\n{calls}")
        code, out, err = command(root, "reproduce", "--profile", "toy", "--cores", "2")
        assert code == 0, out + err
        return sorted(p.name for p in (root / "figures/toy/claims").glob("*.json"))
    R.write_claim(root / "figures/toy", id="9.9", claim="c", source="s", checked="k", cases=1, violations=0, tolerance=0, notebook="nbs/elsewhere.ipynb")
    assert says("1.1", "1.2") == ["1.1.json", "1.2.json", "9.9.json"]
    assert says("1.1") == ["1.1.json", "9.9.json"]


def test_runs_share_the_gpus_that_are_visible(tmp_path):
    "Two of a machine's GPUs are to be used, four runs want one: two run, one on each, and the others wait for them."
    script = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from dml_companion.engine import one_gpu
root = Path(sys.argv[1])
with one_gpu(SimpleNamespace(gpus=2, runs_per_gpu=1), root):
    (root / f"{os.getpid()}.at").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    while not (root / "go").exists(): time.sleep(.02)
"""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "3, GPU-5"}
    started = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=env) for _ in range(4)]
    at = lambda: [file.read_text() for file in tmp_path.glob("*.at")]
    until(lambda: len(at()) >= 2 and all(at()))
    time.sleep(1.5)                                                      # those who wait look once a second
    assert sorted(at()) == ["3", "GPU-5"]
    (tmp_path / "go").touch()
    assert [p.wait(timeout=120) for p in started] == [0] * 4 and len(at()) == 4 and set(at()) == {"3", "GPU-5"}
    alone = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env | {"CUDA_VISIBLE_DEVICES": "1"})
    assert alone.returncode == 0 and sorted(at())[0] == "1"


def test_only_training_takes_a_gpu(root, monkeypatch):
    "Snakemake lets as many runs start as there are slots; a notebook that took one would have a run wait that was let in."
    made, seen = P.plan("toy", root=root).model_copy(update={"gpus": 2}), []
    R.write_json_atomic(root / made.path(), made.model_dump())
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"})
    monkeypatch.setattr(E, "free_gpu", lambda slots, held: "1")
    monkeypatch.setattr(E, "do_job", lambda job, root: seen.append((job.kind, os.environ.pop("CUDA_VISIBLE_DEVICES", None))))
    assert [E.run_job(made.path(), job.id, root) for job in made.jobs] == [0] * 4
    assert seen == [("train", "1")] * 2 + [("notebook", None)] * 2


def test_some_rows_of_a_profile(root, monkeypatch):
    "Asked for by name: their runs, the notebooks that show no others, and no loss of what was published."
    write_profile(root, notebooks=[{"notebook": "nbs/table.ipynb"}, {"notebook": "nbs/alone.ipynb", "rows": ["large"]}])
    code, said = command_here(root, monkeypatch, "reproduce", "-p", "toy", "--row", "smal")
    assert code == 2 and "profile 'toy' has no row 'smal', did you mean 'small'? Its rows: large, small" in said
    assert command(root, "reproduce", "-p", "toy", "--row", "small")[0] == 0
    lines = (root / "figures/toy/table.csv").read_text().splitlines()
    assert len(lines) == 2 and not list((root / "runs/train/glyphs").glob("large")) and not list((root / "runs/notebooks/toy").glob("alone*"))
    assert "Not run: alone (shows rows that were not asked for)." in (root / "figures/toy/README.md").read_text()
    code, said = command_here(root, monkeypatch, "status", "-p", "toy", "--row", "small")
    assert code == 0 and "2 finished" in said and "large" not in said
    code, said = command_here(root, monkeypatch, "reproduce", "-p", "toy", "--row", "large")
    assert code == 2 and "figures/toy holds published runs of small, which --row would remove from it: add --figures runs/figures/some" in said
    code, said = command_here(root, monkeypatch, "reproduce", "-p", "toy", "--row", "large", "-n")
    assert code == 0 and "3 of 3 notebooks would run" in said                          # a dry run removes nothing
    shutil.rmtree(root / "runs")
    code, said = command_here(root, monkeypatch, "reproduce", "-p", "toy", "--row", "small", "--figures", "runs/figures/some", "--published", "-n")
    assert code == 0 and "took over 1 of 2 notebooks" in said                          # from figures/toy: nothing is trained
    code, said = command_here(root, monkeypatch, "reproduce", "-p", "toy", "--row", "large", "--figures", "runs/figures/some", "-n")
    assert code == 0 and "3 of 3 notebooks would run" in said
    assert command(root, "reproduce", "-p", "toy")[0] == 0 and len((root / "figures/toy/table.csv").read_text().splitlines()) == 3


def test_status_where_the_images_are_not(root, monkeypatch):
    "A login node without the images shows the jobs of the plan that was kept; without one it says what is missing."
    from dml_companion import datasets
    assert command(root, "reproduce", "-p", "toy", "--row", "small")[0] == 0
    def missing(*_, **__): raise datasets.MissingData("glyphs: looked for them in /nowhere.\nTo have it, ...")
    monkeypatch.setattr(datasets, "load", missing)
    code, said = command_here(root, monkeypatch, "status", "-p", "toy")
    assert code == 0 and "glyphs: looked for them in /nowhere." in said and "runs/plans/toy.json" in said and "3 finished" in said
    code, said = command_here(root, monkeypatch, "status", "-p", "toy", "--row", "small")
    assert code == 0 and "toy: 1 finished" in said and "table" not in said             # the training alone
    code, said = command_here(root, monkeypatch, "status", "-p", "toy", "--row", "large")
    assert code == 2 and "To have it" in said                                           # was not planned
    (root / "runs/train/glyphs/small").rename(root / "runs/elsewhere")
    code, said = command_here(root, monkeypatch, "status", "-p", "toy")
    assert code == 0 and "1 missing" in said
    assert command_here(root, monkeypatch, "reproduce", "-p", "toy", "-n")[0] == 2
    R.write_json_atomic(root / "runs/plans/toy.json", {"another": "form"})
    code, said = command_here(root, monkeypatch, "status", "-p", "toy")
    assert code == 2 and "To have it" in said


def test_a_drawing_from_embeddings_has_them_trained_again(root, monkeypatch):
    "Embeddings are not published: runs that were taken over go again where a changed notebook is drawn from those, and no other run does."
    kept = "R.write_atomic(here / 'epochs.npz', 'a cloud')\n" + RECORD.replace("provenance=", "files=['epochs.npz'], provenance=")
    fields = "\n".join(f"{k} = {v!r}" for k, v in Recipe().model_dump(mode="json").items())
    write_notebook(root / "nbs/train.ipynb", f"# params\nrow, seed = '', 0\nrow = ''\nseed = 0\ndata = ''\ndevice = ''\nfolder = ''\n{fields}", TRAIN, kept)
    write_notebook(root / "nbs/clouds.ipynb", "# params\nrecords = []", "from dml_companion import reproduction as R", "[(R.project_root() / r).with_name('epochs.npz').read_text() for r in records]")
    write_profile(root, notebooks=[{"notebook": "nbs/table.ipynb"}, {"notebook": "nbs/clouds.ipynb", "rows": ["small"], "embeddings": True}])
    assert command(root, "reproduce", "-p", "toy")[0] == 0
    trained = {row: (root / f"{row}-0.log").read_text() for row in ("small", "large")}

    shutil.rmtree(root / "runs")
    edit(root / "nbs/table.ipynb", "R.save_table", "print(len(runs));R.save_table")          # reads records: no training
    assert "1 of 4 notebooks would run" in command_here(root, monkeypatch, "reproduce", "-p", "toy", "--published", "-n")[1]
    edit(root / "nbs/clouds.ipynb", "'epochs.npz').read_text()", "'epochs.npz').read_text()[0]")
    code, said = command_here(root, monkeypatch, "status", "-p", "toy")
    assert "clouds is drawn from its embeddings, which are not published" in said and [line.split()[3] for line in said.splitlines() if "seed 0" in line] == ["finished", "changed"]
    code, out, err = command(root, "reproduce", "-p", "toy", "--published")
    assert code == 0 and "'a'" in (root / "figures/toy/notebooks/clouds.ipynb").read_text(), out + err
    assert (root / "large-0.log").read_text() == trained["large"] and (root / "small-0.log").read_text() == 2 * trained["small"]
    assert "4 finished" in command_here(root, monkeypatch, "status", "-p", "toy")[1]


def test_what_belongs_together_is_asked_for_together():
    "A row brings its variants or trials; a variant, a trial or controls alone are no table."
    sweeps, search, family = map(P.load_profile, ("sweeps", "tune_glyphs", "family"))
    assert all(base in names and set(names) <= set(sweeps.rows) for base, names in P.kin(sweeps).items()) and sorted(sum(P.kin(sweeps).values(), [])) == sorted(sweeps.rows)
    assert P.kin(search)["spce"] == [f"spce_t{k}" for k in range(12)] and sorted(sum(P.kin(search).values(), [])) == sorted(search.rows)
    assert {*P.chosen(search, ["spce"])[1]} == {*search.rows} - {*P.kin(search)["spce"]}
    for profile, row in ((sweeps, "snca_dim16"), (search, "spce_t0")):
        with pytest.raises(ValueError, match=f"has no row '{row}', did you mean"): P.chosen(profile, [row])
    with pytest.raises(ValueError, match="raw_pixels: controls are shown beside something that was trained"): P.chosen(family, ["raw_pixels"])
    two = P.Profile(name="two", rows={"snca": P.Row(), "circle": P.Row()}, notebooks=[P.Task(notebook="a.ipynb", rows=["snca"]), P.Task(notebook="b.ipynb", after=["a.ipynb"]), P.Task(notebook="c.ipynb")])
    tasks, why = P.chosen(two, ["circle"])
    assert why == {"snca": "not asked for", "a": "shows rows that were not asked for", "b": "reads what is left out"} and [t.rows for t in tasks] == [["circle"]]


def test_the_figures_of_another_profile_are_not_replaced(root, monkeypatch):
    R.write_json_atomic(root / "figures/theirs/provenance.json", {"profile": "family", "runs": {}})
    code, said = command_here(root, monkeypatch, "reproduce", "-p", "toy", "--figures", "figures/theirs")
    assert code == 2 and "figures/theirs holds the figures of the profile 'family': choose another folder with --figures" in said
