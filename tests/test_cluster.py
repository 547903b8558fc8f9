"""The shipped cluster profiles: planned on a machine without GPU, dry runs, and jobs that really go through (a pretended) Slurm."""
import configparser, errno, fcntl, json, os, re, shutil, signal, subprocess, sys
from pathlib import Path

import psutil
import pytest
import yaml

import fake_slurm
from dml_companion import engine as E, profiles as P, reproduction as R
from test_engine import RECORD, TRAIN, begin, command, edit, environment, root, states, until, write_notebook, write_profile

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ("slurm", "slurm-gpu")
needs_slurm = pytest.mark.skipif(sys.version_info < (3, 11), reason="Snakemake's executors need Python 3.11")


def shipped(name): return yaml.safe_load((ROOT / f"workflow/cluster/{name}/config.yaml").read_text())


def snakemake(root, *words, path=""):
    env = environment() | {"PATH": os.pathsep.join([*([str(path)] if path else []), os.environ["PATH"]])}
    done = subprocess.run([sys.executable, "-m", "snakemake", *words], cwd=root, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def listed(text):
    "Rule, wildcard and resources of each job in a dry run; threads are printed where there are several."
    found = []
    for block in re.split(r"^rule ", text, flags=re.M)[1:]:
        says = dict(re.findall(r"^    (\w+): (.*)$", block, re.M))
        if "wildcards" not in says: continue
        resources = dict(r.split("=", 1) for r in says["resources"].split(", "))
        found.append((block.split(":")[0], says["wildcards"].removeprefix("run="), resources, int(says.get("threads", 1))))
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the project, in which the smoke profile was planned for GPUs that this machine need not have."
    root = tmp_path_factory.mktemp("cluster") / "companion"
    for part in ("dml_companion", "nbs", "workflow"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", root / "settings.ini")
    edit(root / "workflow/profiles/smoke.yaml", "notebooks:\n", "resources: {threads_per_run: 3}\nnotebooks:\n")
    return root


def plan_there(root, cluster, *words):
    "Write the plan on the login node and give it back, with what was printed."
    env = environment() | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-m", "dml_companion.cli", "reproduce", "--profile", "smoke", "--dry-run", "--cluster", cluster, *words],
                          cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "runs/plans/smoke.json").read_text()), done.stdout


@needs_slurm
def test_a_dry_run_lists_every_job_with_its_resources(project):
    plan, said = plan_there(project, "slurm-gpu", "--device", "cuda")        # a login node has no GPU
    assert plan["gpus"] == 0 and plan["python"] == sys.executable
    devices = {j["kind"]: {x["parameters"]["device"] for x in plan["jobs"] if x["kind"] == j["kind"] and "device" in x["parameters"]} for j in plan["jobs"]}
    assert devices["train"] == {"cuda"} and devices["notebook"] <= {"auto"}
    (line,) = re.findall(r"^by hand: snakemake (.*)$", said, re.M)
    for cluster, gpu, memory in (("slurm", None, "8000"), ("slurm-gpu", "1", "16000")):
        code, text = snakemake(project, *line.replace("slurm-gpu", cluster).split(), "--dry-run", "--cores", "8")      # else a dry run caps threads
        assert code == 0, text
        jobs = listed(text)
        assert sorted(f"{'train' if rule == 'train' else 'notebooks'}/{run}" for rule, run, *_ in jobs) == sorted(j["id"] for j in plan["jobs"])
        assert {rule for rule, *_ in jobs} == {"train", "notebook"} and len(jobs) == len(plan["jobs"])
        for rule, run, resources, threads in jobs:
            assert threads == 3, run                                          # from threads_per_run
            got = [resources.get(r) for r in ("gpu", "mem_mb", "runtime")]
            assert got == ([gpu, memory, "240"] if rule == "train" else [None, "8000", "60"]), run


@needs_slurm
def test_a_changed_output_runs_again_by_hand(root):
    "By hand nobody deletes it first: the plan, newer than the output, has to do that."
    write_profile(root, rows=None, seeds=None, data=None, notebooks=[{"notebook": "nbs/alone.ipynb"}])
    job = P.plan("toy", root=root).jobs[0]
    R.write_atomic(root / job.output, "{}")                                  # an output without its manifest is a changed one
    R.write_atomic(root / "workflow/cluster/slurm/config.yaml", (ROOT / "workflow/cluster/slurm/config.yaml").read_text())
    code, out, err = command(root, "reproduce", "--profile", "toy", "--cluster", "slurm", "--dry-run")
    assert code == 0 and "changed" in out, err
    code, text = snakemake(root, *re.search(r"by hand: snakemake (.*)", out)[1].split(), "--dry-run")
    assert code == 0 and len(listed(text)) == 1, text

# ---------------------------------------------------------------- jobs that go through


def wants_gpu(root):
    "The toy project's training wants a GPU and three threads, and writes down the environment of its job."
    note = 'import os\nassert device == "cuda"\n(root / f"{row}.env").write_text(json.dumps(dict(os.environ)))\ndone = int'
    fields = "\n".join(f"{k} = {v!r}" for k, v in P.checked_recipes(P.load_profile("toy", root))["small"].items())
    write_notebook(root / "nbs/train.ipynb", f"# params\nrow = ''\nseed = 0\ndata = ''\ndevice = ''\nfolder = ''\n{fields}",
                   TRAIN.replace("done = int", note), RECORD)
    write_profile(root, rows={"small": {"recipe": {"epochs": 0, "encoder_options": {"width": 8}}}}, notebooks=[{"notebook": "nbs/table.ipynb"}],
                  resources={"threads_per_run": 3})


@pytest.fixture
def slurm(root, tmp_path, monkeypatch):
    "The toy project, the shipped GPU profile asked to look after its jobs sooner, and a Slurm on the PATH."
    bin = fake_slurm.install(tmp_path / "slurm/bin")
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    quick = "latency-wait: 120", "slurm-init-seconds-before-status-checks: 10\nlatency-wait: 9"
    R.write_atomic(root / "workflow/cluster/slurm-gpu/config.yaml", (ROOT / "workflow/cluster/slurm-gpu/config.yaml").read_text().replace(*quick))
    wants_gpu(root)
    return bin


@needs_slurm
def test_from_one_command_to_published_tables_through_slurm(root, slurm):
    code, out, err = command(root, "reproduce", "--profile", "toy", "--cluster", "slurm-gpu", "--device", "cuda")
    logs = "\n".join(p.read_text() for p in (root / "runs/logs").rglob("*.log"))
    assert code == 0, out + err + logs
    assert "on slurm (slurm-gpu), up to 16 at once" in out and "figures, tables and provenance are in figures/toy" in out
    train, table = fake_slurm.calls(slurm)
    shown = [fake_slurm.value(train, w) for w in ("--gpus", "--mem", "-t", "--cpus-per-task", "-D")]
    assert shown == ["1", "16000", "240", "3", str(root)]
    assert [fake_slurm.value(table, w) for w in ("--gpus", "--mem", "-t")] == [None, "8000", "60"]
    env = json.loads((root / "small.env").read_text())
    assert env["SLURM_JOB_ID"] == "1" and env["CUDA_VISIBLE_DEVICES"] == "0"
    assert "DML_FRONT" not in env                                            # no process of this machine to follow on a node
    assert set(states(root).values()) == {"finished"} and (root / "figures/toy/table.csv").is_file()
    assert not list((root / ".snakemake/slurm_logs").rglob("*.log"))         # kept of failed jobs only

    shutil.rmtree(root / "figures/toy/records")
    code, out, err = command(root, "reproduce", "--profile", "toy")          # afterwards, anywhere: publishes only
    assert code == 0 and "running" not in out and list((root / "figures/toy/records").glob("*.json"))
    assert len(fake_slurm.ids(slurm)) == 2


@needs_slurm
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_end_takes_back_what_was_submitted(root, slurm, how):
    "Ctrl-C, or a front end that is killed outright: Snakemake notices and cancels."
    R.write_atomic(root / "hold", "")
    front = begin(root, "reproduce", "--profile", "toy", "--cluster", "slurm-gpu", "--device", "cuda")
    until(lambda: (root / "small.env").exists())
    job = psutil.Process(int((slurm / "jobs/1/pid").read_text()))
    family = [job, *job.children(recursive=True)]
    assert states(root)["small, seed 0"] == "running"                        # seen through its lock, without asking Slurm
    front.send_signal(how)
    out, err = front.communicate(timeout=120)
    if how == signal.SIGINT: assert front.returncode == 130 and "taking back" in err and "Traceback" not in out + err
    until((slurm / "jobs/1/cancelled").exists)
    assert len(fake_slurm.ids(slurm)) == 1
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 15)
    assert states(root)["small, seed 0"] == "interrupted"


@needs_slurm
def test_what_sbatch_refuses_is_shown(root, slurm):
    edit(root / "workflow/cluster/slurm-gpu/config.yaml", "# slurm_partition: gpu ", "slurm_partition: nowhere ")
    edit(root / "workflow/cluster/slurm-gpu/config.yaml", "restart-times: 1", "restart-times: 0")
    code, out, err = command(root, "reproduce", "--profile", "toy", "--cluster", "slurm-gpu", "--device", "cuda")
    assert code == 1 and "sbatch: error: invalid partition specified: nowhere" in err and "not run because of that: table" in err, out + err


def test_what_the_scheduler_said_is_found_in_the_log(tmp_path):
    log = R.write_atomic(tmp_path / "snakemake.log", """Error in rule train:
    message: SLURM-job '7' failed, SLURM status is: 'TIMEOUT'. Reason: Unknown.
For further error details see the cluster/cloud log and the log files of the involved rule(s).
    jobid: 2
    output: runs/train/a/notebook.ipynb
[Sat Nov 21 08:46:47 2026]
Error in rule notebook:
    message: None
    jobid: 3
    output: runs/notebooks/b.ipynb
Error in rule notebook:
    jobid: 4
    output: runs/notebooks/c.ipynb
""")
    assert E.scheduler_says(log) == {"runs/train/a/notebook.ipynb": "SLURM-job '7' failed, SLURM status is: 'TIMEOUT'. Reason: Unknown."}
    assert E.scheduler_says(tmp_path / "none.log") == {}

# ---------------------------------------------------------------- what is shipped, and what is refused


@pytest.mark.parametrize("name", CLUSTERS)
def test_shipped_profiles_are_complete_and_agree(name):
    says, other = shipped(name), shipped("slurm")
    assert says["executor"] == "slurm" and says["keep-going"] and says["rerun-incomplete"] and says["restart-times"] >= 1
    assert says["latency-wait"] >= 60 and says["rerun-triggers"] == ["mtime"] and says["nolock"]
    rules = set(re.findall(r"^rule (\w+)", (ROOT / "workflow/Snakefile").read_text(), re.M)) - {"all"}
    assert set(says["set-resources"]) == rules and {"mem_mb", "runtime"} <= set(says["default-resources"])
    assert ("gpu" in says["set-resources"]["train"]) == (name == "slurm-gpu")
    assert says.keys() == other.keys() and says["set-resources"]["notebook"] == other["set-resources"]["notebook"]


@pytest.mark.parametrize("text, words", [
    (None, "unknown cluster 'slrum', did you mean 'slurm'? Known: slurm"),
    ("jobs: 3\n", "must say `executor: slurm`"), ("executor: slurm\njobs: many\n", "jobs 'many'"),
    ("executor: abacus\njobs: 3\n", "executor 'abacus' is not installed"), ("executor: slurm\njobs: 1\njobs: 2\n", "'jobs' is given twice")])
def test_a_bad_cluster_is_one_sentence(tmp_path, text, words):
    R.write_atomic(tmp_path / "workflow/cluster/slurm/config.yaml", "executor: slurm\njobs: 3\n")
    if text: R.write_atomic(tmp_path / "mine/config.yaml", text)
    with pytest.raises(ValueError, match=re.escape(words)): E.load_cluster(str(tmp_path / "mine") if text else "slrum", tmp_path)


def test_devices_of_a_cluster_are_not_looked_for_here(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert P.gpu_count("cuda", here=False) == P.gpu_count("auto", here=False) == 0
    with pytest.raises(ValueError, match="torch sees no GPU"): P.gpu_count("cuda")
    with pytest.raises(ValueError, match="unknown device 'cuda:1'; use auto, cpu or cuda, and for some GPUs of several CUDA_VISIBLE_DEVICES"): P.gpu_count("cuda:1", here=False)
    with pytest.raises(ValueError, match="unknown device 'tpu'"): P.gpu_count("tpu", here=False)

# ---------------------------------------------------------------- locks on shared file systems


def flock_of(error=None, nfs=False):
    "An flock like that of a file system without locks, or of NFS, which wants files open for writing."
    real = fcntl.flock
    def flock(file, how):
        if error: raise OSError(error, os.strerror(error))
        if nfs and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY: raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, how)
    return flock


def test_locks_on_nfs_are_taken_and_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(P.fcntl, "flock", flock_of(nfs=True))
    with E.locked(tmp_path / "a.lock"): assert P.is_locked(tmp_path / "a.lock")
    assert not P.is_locked(tmp_path / "a.lock")


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_work_goes_on(tmp_path, monkeypatch, error):
    monkeypatch.setattr(P.fcntl, "flock", flock_of(error))
    with E.locked(tmp_path / "a.lock"): assert not P.is_locked(tmp_path / "a.lock")
    monkeypatch.setattr(P.fcntl, "flock", flock_of(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), E.locked(tmp_path / "a.lock"): pass
