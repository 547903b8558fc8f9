"""Run identity, records, tables and figures (06_reproduction)."""
import json, math, os, re, subprocess, sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from dml_companion import reproduction as R

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"__init__": "", "geometry": "SCALE = 2\ndef norm(x):\n    return SCALE * x\ndef other(x): return x\n",
           "losses/__init__": "", "losses/pairwise": "from ..geometry import norm\n\nclass SNCA:\n    'Doc.'\n    def f(self, x): return norm(x)\n"
                                                     "\nclass Contrastive:\n    def f(self, x): return norm(x) + 1\n"}


@pytest.fixture
def package(tmp_path):
    "A small package whose files a test may edit."
    folder = tmp_path / R.PACKAGE
    for name, text in MODULES.items(): R.write_atomic(folder / f"{name}.py", text)
    return folder


def loss_digests(package):
    return [R.code_digest(f"{R.PACKAGE}.losses.pairwise:{name}", folder=package) for name in ("SNCA", "Contrastive")]


@pytest.mark.parametrize("file, old, new, changed", [
    ("losses/pairwise", "return norm(x)\n", "return norm(x)  # a comment\n", (False, False)),
    ("losses/pairwise", "'Doc.'", "'Another docstring, longer.'", (False, False)),
    ("losses/pairwise", "return norm(x)\n", "return norm(x) * 2\n", (True, False)),
    ("losses/pairwise", "norm(x) + 1", "norm(x) + 2", (False, True)),
    ("geometry", "SCALE = 2", "SCALE = 3", (True, True)),
    ("geometry", "def other(x): return x", "def other(x): return -x", (False, False)),
    ("geometry", "SCALE * x", "SCALE  *  (x)", (False, False))])
def test_an_edit_changes_the_digests_that_depend_on_it_and_no_others(package, file, old, new, changed):
    before = loss_digests(package)
    path = package / f"{file}.py"
    assert old in path.read_text()
    R.write_atomic(path, path.read_text().replace(old, new))
    assert tuple(a != b for a, b in zip(before, loss_digests(package))) == changed


def test_a_former_text_stands_in_for_what_replaced_it_and_for_nothing_else(package):
    "A helper is written anew: with its former text the names stay, until either is touched."
    import ast
    before, path = loss_digests(package), package / "geometry.py"
    anew = "def norm(x):\n    y = help(x)\n    return y\n"
    R.write_atomic(path, path.read_text().replace("def norm(x):\n    return SCALE * x\n", anew + "def help(x): return SCALE * x\n"))
    assert all(a != b for a, b in zip(loss_digests(package), before))
    former = package.parent / R.FORMER / "geometry.norm.py"
    head = f"# stands for {R.digest(R.shape(ast.parse(anew).body))}\n"
    R.write_atomic(former, head + "def norm(x):\n    return SCALE * x  # as it was\n")
    assert loss_digests(package) == before
    R.write_atomic(path, path.read_text().replace("SCALE = 2", "SCALE = 3"))                    # what the former text uses still counts
    assert all(a != b for a, b in zip(loss_digests(package), before))
    R.write_atomic(path, path.read_text().replace("SCALE = 3", "SCALE = 2").replace("return y", "return y + 0"))
    assert all(a != b for a, b in zip(loss_digests(package), before))                           # rewritten once more, and not vouched for
    R.write_atomic(path, path.read_text().replace("return y + 0", "return y"))
    assert loss_digests(package) == before
    R.write_atomic(former, head + "def norm(x):\n    return SCALE * x + 0\n")
    assert all(a != b for a, b in zip(loss_digests(package), before))
    R.write_atomic(former, head + "def other(x): return x\n")
    with pytest.raises(ValueError, match="does not define 'norm'"): loss_digests(package)
    R.write_atomic(former, "def norm(x): return x\n")
    with pytest.raises(ValueError, match="must begin with '# stands for ' and the digest of what replaced it, [0-9a-f]{64} today"): loss_digests(package)


def test_a_former_text_of_a_training_notebook(tmp_path):
    "Its deciding cells written anew: the digest stays while the former text vouches for them, and ends with the next edit."
    folder = tmp_path / R.PACKAGE
    R.write_atomic(folder / "__init__.py", ""), R.write_atomic(folder / "net.py", "def embed(x): return x\ndef other(x): return x\n")
    def notebook(code): R.write_atomic(tmp_path / "nbs/30_train.ipynb", json.dumps({"cells": [
        {"cell_type": "code", "source": "a = 1", "metadata": {"tags": ["parameters"]}}, {"cell_type": "code", "source": code, "metadata": {}}]}))
    def now(): return R.results_digest(tmp_path / "nbs/30_train.ipynb", folder)
    old, new = "from dml_companion.net import embed\nz = embed(a)", "from dml_companion.net import embed, other\nz = other(embed(a))"
    notebook(old); before = now()
    notebook(new); assert now() != before
    former = tmp_path / R.FORMER / "30_train.py"
    R.write_atomic(former, f"# stands for {R.digest(R.shape(R.statements(new)))}\n{old}\n")
    assert now() == before
    R.write_atomic(folder / "net.py", "def embed(x): return x + 1\ndef other(x): return x\n"); assert now() != before
    R.write_atomic(folder / "net.py", "def embed(x): return x\ndef other(x): return x + 1\n"); assert now() == before      # the new text alone uses it
    notebook(new + " + 1"); assert now() != before
    R.write_atomic(former, old)
    with pytest.raises(ValueError, match="30_train.py in workflow/former must begin with"): now()


def test_every_former_text_of_the_project_is_in_force():
    "One whose successor was edited without a word vouches for nothing: show anew that no number changed, or delete it."
    files = sorted((ROOT / R.FORMER).glob("*.py"))
    for file in files:
        module, _, name = file.stem.rpartition(".")
        if not module:                                                    # the deciding cells of a training notebook
            assert R.deciding_code(next(ROOT.glob(f"nbs/*/{name}.ipynb")), ROOT / R.PACKAGE)[1] == file.read_text(); continue
        assert R.definition(R.find_source(f"{R.PACKAGE}.{module}", ROOT / R.PACKAGE), name, ROOT / R.PACKAGE)[1] == R.digest(file.read_text()), file.name
    assert files and (ROOT / R.FORMER / "README.md").is_file()


def test_digest_follows_aliases_reexports_and_imports_inside_functions(package):
    R.write_atomic(package / "losses/__init__.py", "from .pairwise import SNCA\n")
    R.write_atomic(package / "train.py", "import dml_companion.geometry as g\nfrom . import losses\n"
                                         "def a(): return g.norm(1)\ndef b(): return losses.SNCA\ndef c():\n    from .geometry import norm\n    return norm\n")
    def now(): return [R.code_digest(f"{R.PACKAGE}.train:{n}", folder=package) for n in "abc"]
    before = now()
    R.write_atomic(package / "geometry.py", MODULES["geometry"].replace("SCALE * x", "SCALE + x"))
    assert all(a != b for a, b in zip(before, now()))


def test_digest_of_an_unknown_root_says_how_to_write_one(package):
    with pytest.raises(ValueError, match="module:name"): R.code_digest(f"{R.PACKAGE}.losses.pairwise:SNAC", folder=package)


def notebook(path, *cells):
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "outputs": [],
              "execution_count": None, "source": text} for i, text in enumerate(cells)]
    return R.write_atomic(path, json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def test_plots_and_parameters_do_not_decide_a_training_notebook_but_its_code_does(package, tmp_path):
    cells = ["lr = 1", "from dml_companion.losses.pairwise import SNCA", "loss = SNCA().f(2)", "#| echo: false\nprint(loss)"]
    path = tmp_path / "train.ipynb"
    def results(*c): return R.results_digest(notebook(path, *c), package)
    def whole(*c): return R.notebook_digest(notebook(path, *c), package)
    same = [["lr = 2", *cells[1:]], [*cells[:3], "#| echo: false\nprint('nicer')"], [*cells[:2], "loss = SNCA().f(2)  # why", cells[3]]]
    for edited in same: assert results(*edited) == results(*cells) and whole(*edited) != whole(*cells)
    assert results(*cells[:2], "loss = SNCA().f(3)", cells[3]) != results(*cells)
    before = results(*cells)
    R.write_atomic(package / "losses/pairwise.py", MODULES["losses/pairwise"].replace("norm(x) + 1", "norm(x) + 2"))
    assert results(*cells) == before
    R.write_atomic(package / "geometry.py", MODULES["geometry"].replace("SCALE = 2", "SCALE = 5"))
    assert results(*cells) != before


def test_the_real_objectives_have_runs_of_their_own(tmp_path, monkeypatch):
    "An edit to SNCA in a copy of the project makes SNCA's runs stale, and no others."
    import shutil
    for part in ("dml_companion", "nbs/04_experiments"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("DML_ROOT", str(tmp_path))
    names = ("snca", "contrastive", "cross_entropy")
    def ids(): return [R.identify({"objective": n, "dataset": "glyphs"}, n, 0, "d", root=tmp_path).id for n in names]
    before, path = ids(), tmp_path / "dml_companion/losses/pairwise.py"
    text = path.read_text()
    head, tail = text.split("class SNCALoss", 1)
    first = tail.index("    def ")
    path.write_text(f"{head}class SNCALoss{tail[:first]}    edited = True\n\n{tail[first:]}")
    assert [a != b for a, b in zip(before, ids())] == [True, False, False]
    path.write_text(text.replace("class SNCALoss", "# a comment\nclass SNCALoss"))
    assert before == ids()


def test_shape_is_the_same_on_every_python():
    "Digests of two texts, computed once and written down: other Python versions must agree."
    text = "def f(x: int, *a, k=1) -> str:\n    'Doc.'\n    return f'{x!r:>{k}} {a}' if x else [y async for y in x]\nclass C(B, m=1): z: int = 1\n"
    import ast
    assert R.digest(R.shape(ast.parse(text)), 12) == "1de9488adb89"


def test_run_id_depends_on_everything_in_it_and_on_nothing_else():
    given = dict(recipe={"lr": .1, "b": (1, 2)}, seed=0, data="d", code="c")
    assert R.run_id(**given) == R.run_id(**given | {"recipe": {"b": [1, 2], "lr": .1}})
    for other in ({"recipe": {"lr": .2}}, {"seed": 1}, {"data": "e"}, {"code": "e"}): assert R.run_id(**given | other) != R.run_id(**given)


def test_project_root(tmp_path, monkeypatch):
    monkeypatch.delenv("DML_ROOT", raising=False)
    (tmp_path / "a/b").mkdir(parents=True); (tmp_path / "settings.ini").write_text("")
    assert R.project_root(tmp_path / "a/b") == tmp_path.resolve()
    with pytest.raises(ValueError, match="settings.ini"): R.project_root("/")
    monkeypatch.setenv("DML_ROOT", str(tmp_path / "a"))
    assert R.project_root() == (tmp_path / "a").resolve()


def write_many(path, value):
    for i in range(200): R.write_json_atomic(path, {"value": [value] * 2000, "i": i})


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, context = tmp_path / "x.json", get_context("fork")
    R.write_json_atomic(path, {"value": [0] * 2000})
    writers = [context.Process(target=write_many, args=(path, k)) for k in (1, 2)]
    for w in writers: w.start()
    seen = 0
    while any(w.is_alive() for w in writers): assert len(set(json.loads(path.read_text())["value"])) == 1; seen += 1
    assert seen > 10 and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def record(folder, **changes):
    base = dict(run="0" * 12, row="snca", seed=0, recipe={"lr": .1}, data={"name": "glyphs", "digest": "d"}, code="c",
                metrics={"cosine/recall@1": .5}, timings={"train_seconds": 2.}, provenance={"cpu": "x"})
    return R.write_record(folder, **base | changes)


def test_record_round_trip_nan_and_files(tmp_path):
    (tmp_path / "embeddings.npz").write_bytes(b"1234")
    made = record(tmp_path, metrics={"nmi": math.nan, "r": 1}, files=["embeddings.npz"])
    read = R.load_record(tmp_path)
    assert read == made and read.metrics == {"nmi": None, "r": 1.} and read.files["embeddings.npz"] == R.file_digest(tmp_path / "embeddings.npz")
    assert read.label == "snca-s0-000000000000"


def test_bad_records_are_refused_with_a_reason(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'metrics'"): record(tmp_path, metrisc={})
    with pytest.raises(ValueError, match="no run record"): R.load_record(tmp_path / "nothing")
    for text, why in (("{", "not JSON"), ("[]", "JSON object"), ('{"run": "a"}', "'row' is missing")):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(ValueError, match=why): R.load_record(tmp_path)


def test_interval_is_students(tmp_path):
    from scipy import stats
    values = [.70, .72, .75, .71]
    mean, half = R.mean_interval(values)
    low, high = stats.t.interval(.95, 3, np.mean(values), stats.sem(values))
    assert mean - half == pytest.approx(low) and mean + half == pytest.approx(high)
    assert math.isnan(R.mean_interval([1.])[1])
    with pytest.raises(ValueError): R.mean_interval([])


def test_table_says_what_was_not_run(tmp_path):
    records = [record(tmp_path / str(s), seed=s, metrics={"cosine/recall@1": .5 + s / 100, "nmi": None}) for s in range(3)]
    columns = {"R@1": "cosine/recall@1", "NMI": "nmi", "s": "timings/train_seconds"}
    table = R.result_table(records + [record(tmp_path / "c", row="center")], columns, {"snca": "SNCA", "center": "center", "other": "other"})
    text = R.table_markdown(table)
    assert "| SNCA | 3 | 0.510 ± 0.025 | none | 2.000 ± 0.000 |" in text and "(n=1)" in text
    assert "| other | 0 | not run | not run | not run |" in text
    assert table.loc[0, "R@1"] == pytest.approx(.51) and len(table.loc[0, "runs"].split()) == 3
    paths = R.save_table(table, "t", tmp_path / "out")
    assert [p.name for p in paths] == ["t.csv", "t.md"] and paths[1].read_text() == text


DRAW = """
import sys, matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
from dml_companion import reproduction as R
R.use_house_style()
fig, ax = plt.subplots()
ax.plot([0, 1], [1, 0], label="$x^2$"); ax.legend(); ax.fill_between([0, 1], [0, 1], alpha=.2); ax.set_title("Title")
R.save_figure(fig, "same", sys.argv[1])
"""


def test_figures_are_the_same_bytes_in_another_process(tmp_path):
    for i in range(2):
        environment = os.environ | {"PYTHONHASHSEED": str(i), "DML_ROOT": str(ROOT)}
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / str(i))], check=True, env=environment, cwd=ROOT)
    for kind in ("svg", "png"):
        a, b = ((tmp_path / f"{i}/same.{kind}").read_bytes() for i in range(2))
        assert a == b and str(tmp_path).encode() not in a and b"<dc:date>" not in a


def test_every_save_is_announced(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt, pandas as pd
    monkeypatch.setenv("DML_MANIFEST", str(tmp_path / "list"))
    fig, ax = plt.subplots()
    R.save_figure(fig, "f", tmp_path, data=pd.DataFrame({"x": [1.5]}))
    R.save_table(pd.DataFrame({"x": [1]}), "t", tmp_path)
    plt.close(fig)
    assert [Path(p).name for p in (tmp_path / "list").read_text().split()] == ["f.svg", "f.png", "f.csv", "t.csv", "t.md"]


def test_provenance_names_no_machine_user_or_folder():
    import getpass, platform
    text = json.dumps(R.provenance(R.now(), "cpu", "nbs/01_foundations/06_reproduction.ipynb"))
    for secret in (platform.node(), str(Path.home()), str(ROOT)): assert len(secret) < 4 or secret not in text
    assert getpass.getuser() not in text or getpass.getuser() in ("root", "user")
    assert json.loads(text)["versions"]["numpy"] == np.__version__


def test_every_row_of_a_profile_has_a_style_of_its_own():
    import yaml
    rows = yaml.safe_load((ROOT / "workflow/profiles/quick.yaml").read_text())["rows"]
    looks = [(R.style_of(r)["color"], R.style_of(r)["marker"]) for r in rows]
    assert len(set(looks)) == len(rows) and set(rows) <= set(R.STYLE)


# ---------------------------------------------------------------- claims

def claim(folder="", **changes):
    fields = dict(id="12.1", claim="a claim", source="a paper", checked="random points", cases=10, violations=0, tolerance=1e-9,
                  notebook="nbs/02_theory/12_tightness.ipynb")
    return R.write_claim(folder, **{**fields, **changes})


def test_the_verdict_follows_from_the_counts():
    under = dict(conditions="balanced", conditional_cases=5)
    assert claim().status == "holds" and claim(**under).status == "holds"
    assert claim(violations=1).status == claim(violations=1, **under, conditional_violations=1).status == "fails as stated"
    assert claim(violations=1, **under).status == "holds with conditions"


@pytest.mark.parametrize("changes, words", [
    (dict(cases=0), "tried on no case"), (dict(violations=11), "11 violations in 10 cases"), (dict(violations=-1), "-1 violations"),
    (dict(conditions="balanced"), "go together"), (dict(conditional_cases=3), "go together"), (dict(instead="a | b"), "mid"), (dict(source="a | b"), "mid"),
    (dict(conditions="a\nb", conditional_cases=1), "line breaks"), (dict(claim=" "), "claim is empty"), (dict(tolerance=-1.), "got -1.0"),
    (dict(id="10b.1"), "notebook.counter"), (dict(id="../../x"), "notebook.counter"),
    (dict(conditions="x", conditional_cases=1, conditional_violations=2), "2 violations in 1 cases"), (dict(verdict="holds"), "unknown key 'verdict'")])
def test_counts_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)): claim(**changes)


def test_claims_are_kept_in_the_order_of_the_book(tmp_path):
    for id in ("12.10", "9.2", "12.9"): claim(tmp_path, id=id, worst=float("nan"))
    found = R.load_claims(tmp_path)
    assert [c.id for c in found] == ["9.2", "12.9", "12.10"] and found[0].worst is None
    before = (tmp_path / "claims/9.2.json").read_bytes()
    claim(tmp_path, id="9.2", worst=float("nan"))
    assert (tmp_path / "claims/9.2.json").read_bytes() == before
    assert R.claim_table(found).status.tolist() == ["**holds**"] * 3 and "10 cases" in R.claim_table(found).checked[0]
