"""CONTRIBUTING, CHANGELOG and the GitHub workflow: what they name exists, and they agree with the rest of the project."""
import re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dml_companion
from test_house import NOTEBOOKS, pyproject

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
WORKFLOW = ROOT / ".github/workflows/tests.yml"
INVENTED = re.compile(r"15_angles|01c_blobs|angles|alignment|blobs|my_photos|out\.ipynb")     # the examples' own names


def quoted(text): return [q for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for q in block.splitlines()] + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


# ---------------------------------------------------------------- CONTRIBUTING

@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lines_of_the_guide_name_real_targets():
    lines = {q.split("#")[0].strip() for q in quoted(GUIDE) if q.startswith("make ")}
    assert {line.split()[1] for line in lines} >= {"setup", "lab", "export", "test", "status", "reproduce"}
    for line in lines:
        done = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        if profile := re.search(r"PROFILE=(\w+)", line): assert (ROOT / f"workflow/profiles/{profile[1]}.yaml").is_file(), line
        if tests := re.search(r"ARGS=(tests/\S+)", line): assert (ROOT / tests[1]).is_file(), line


def test_commands_of_the_guide_exist():
    from typer.testing import CliRunner
    from dml_companion.cli import app
    words = [q.split()[1:] for q in quoted(GUIDE) if q.startswith("dml-companion ")]
    assert words
    for line in words:
        result = CliRunner().invoke(app, [*line, "--help"])
        assert result.exit_code == 0, (line, result.output)


def test_files_of_the_guide_exist():
    names = {w for q in quoted(GUIDE) for w in re.findall(r"[\w./-]+", q) if re.search(r"\.(py|ipynb|yaml|toml|ini|yml|md|txt)$|^(nbs|tests|workflow|figures)/", w)}
    names |= set(re.findall(r"\]\((?!http)([^)]+)\)", GUIDE))
    real = sorted(n for n in names if not INVENTED.search(n))
    assert len(real) >= 12
    assert not [n for n in real if not (ROOT / n).exists()]
    taken = sorted(n for n in names if n.endswith(".ipynb") and INVENTED.search(n) and (ROOT / n).exists())
    assert not taken, f"{taken} exist now: the examples need other numbers"


def test_names_of_the_guide_are_where_it_says():
    from dml_companion import benchmarks, datasets, objective, reproduction
    assert hasattr(objective, "register") and hasattr(objective.Objective, "split") and reproduction.STYLE
    assert datasets.PROVIDERS and datasets.dataset and benchmarks.FACTS and benchmarks.LAYOUTS
    text = (ROOT / "tests/test_objectives.py").read_text()
    assert re.search(r"^OTHER = \{", text, re.M) and "_loop(Z, y" in text
    assert {"after:", "notebooks:"} <= set(re.findall(r"`(\w+:)`", GUIDE))


def test_one_page():
    assert len(GUIDE.splitlines()) <= 80

# ---------------------------------------------------------------- CHANGELOG


def test_the_changelog_knows_the_version():
    versions = re.findall(r"^## \[([^]]+)\](?: - (\d{4}-\d\d-\d\d))?$", CHANGES, re.M)
    assert versions[0] == ("Unreleased", "") and versions[1][0] == dml_companion.__version__
    assert all(date for _, date in versions[1:])
    assert sorted((Version(v) for v, _ in versions[1:]), reverse=True) == [Version(v) for v, _ in versions[1:]]
    assert set(re.findall(r"^### (\w+)$", CHANGES, re.M)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

# ---------------------------------------------------------------- the GitHub workflow


def workflow(): return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
def rows(): return {r["name"]: r for r in workflow()["jobs"]["tests"]["strategy"]["matrix"]["include"]}


def lower(requirement): return next(s.version for s in requirement.specifier if s.operator == ">=")


def test_the_matrix_is_what_we_say_we_support():
    project = pyproject()["project"]
    wanted = {r.name: r for r in map(Requirement, project["dependencies"])}
    oldest, newest = rows()["oldest"], rows()["newest"]
    assert project["requires-python"] == f">={oldest['python']}"
    pythons = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert pythons == sorted(pythons, key=Version) and (pythons[0], pythons[-1]) == (oldest["python"], newest["python"])
    for name in ("torch", "torchvision"):
        assert Version(oldest[name].removeprefix("==")) == Version(lower(wanted[name]))
        assert Requirement(name + newest[name]).specifier == wanted[name].specifier


def test_the_workflow_is_sound():
    says = workflow()
    assert set(says[True]) >= {"push", "pull_request"} and says["permissions"] == {"contents": "read"}    # YAML reads `on` as true
    for name, job in says["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 90 and isinstance(job["runs-on"], str)
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step: assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step
            if "run" in step: assert subprocess.run(["bash", "-n"], input=re.sub(r"\$\{\{.*?\}\}", "x", step["run"]), text=True).returncode == 0
    used = set(re.findall(r"\$\{\{ *matrix\.(\w+)", WORKFLOW.read_text()))
    assert used == set(rows()["oldest"]) == set(rows()["newest"])
    text = WORKFLOW.read_text()
    assert "cache: pip" in text and "if: failure()" in text and "upload-artifact" in text and ".failed.ipynb" in text
    (extras,) = re.findall(r'-e "\.\[([\w,]+)\]"', text)
    assert set(extras.split(",")) == set(pyproject()["project"]["optional-dependencies"])


def test_torch_and_torchvision_come_from_one_index():
    (line,) = [s["run"] for s in workflow()["jobs"]["tests"]["steps"] if "--index-url" in s.get("run", "")]
    assert "torch${{ matrix.torch }}" in line and "torchvision${{ matrix.torchvision }}" in line and line.count("--index-url") == 1


def test_the_lines_that_hold_torch_give_constraints():
    "The workflow's one-liner, run here."
    (block,) = [s["run"] for s in workflow()["jobs"]["tests"]["steps"] if "torch.txt" in s.get("run", "")]
    line = block.splitlines()[0].split(" > ")[0].replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    found = [Requirement(x) for x in done.stdout.split()]
    assert done.returncode == 0 and [r.name for r in found] == ["torch", "torchvision"], done.stderr
