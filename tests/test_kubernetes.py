"""The Kubernetes profile: the manifest, what is refused, states, and jobs that really go through a pretended kubectl."""
import json, os, re, shutil, signal, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

import fake_kubectl
from dml_companion import datasets, engine as E, reproduction as R
from test_cluster import shipped, wants_gpu
from test_engine import begin, command, edit, root, states, until

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "workflow/cluster/kubernetes"
needs_plugin = pytest.mark.skipif(sys.version_info < (3, 11) or not find_spec("snakemake_executor_plugin_cluster_generic"),
                                  reason="snakemake-executor-plugin-cluster-generic is not installed")
MARK = "0123456789abcdef"
PACKS = datasets.cache_folder()                             # made once, however many projects


def fill_in(folder, at, **changes):
    "A pod.yaml without placeholders; the volume is mounted at `at`."
    says = yaml.safe_load((SHIPPED / "pod.yaml").read_text()) | {"image": "us/python:3.11", "claim": "shared", "mount": str(at), "namespace": "lab"}
    R.write_atomic(folder / "pod.yaml", yaml.safe_dump(says | changes))


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    "A pretended kubectl on the PATH, before a real one."
    home = fake_kubectl.install(tmp_path / "kubernetes")
    monkeypatch.setenv("PATH", os.pathsep.join([str(home), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "packs"))
    for name in ("DML_DATA", "DML_ROOT", "SNAKEMAKE_CLUSTER_SIDECAR_VARS"): monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def here(kubectl, tmp_path, monkeypatch):
    "A project, with the profile filled in, in which `pod` is called by hand."
    here = tmp_path / "a project"
    shutil.copytree(SHIPPED, here / "workflow/cluster/kubernetes", ignore=shutil.ignore_patterns("__pycache__"))
    fill_in(here / "workflow/cluster/kubernetes", tmp_path)
    monkeypatch.chdir(here)
    return here


def pod(*words, env={}):
    "Call a command as Snakemake does; exit code, output, what it said."
    done = subprocess.run([f"workflow/cluster/kubernetes/{words[0]}", *words[1:]], capture_output=True, text=True, timeout=60, env=os.environ | env)
    return done.returncode, done.stdout.strip(), done.stderr


def script(rule="train", run="snca/s0-0a1b", text="true", **resources):
    "A job script as Snakemake writes it."
    asked = {"mem_mb": 16000, "runtime": 240, "gpus": int(rule == "train")} | resources
    says = {"type": "single", "rule": rule, "wildcards": {"run": run}, "log": [f"runs/logs/{rule}.log"], "threads": 3, "resources": asked}
    path = R.write_atomic(Path(f".snakemake/tmp.x/snakejob.{rule}.sh"), f"#!/bin/sh\n# properties = {json.dumps(says)}\n{text}\n")
    return str(path)


def submitted(**asked):
    "The name of a Job that was created, without its namespace."
    code, out, err = pod("submit", script(**asked))
    assert code == 0 and re.fullmatch(r"lab/dml-[a-z0-9-]{1,59}", out), err
    return out.partition("/")[2]


def state(name):
    "What `pod status` prints, and says; it never fails, or Snakemake would give up on all jobs."
    code, out, err = pod("status", f"lab/{name}")
    assert code == 0
    return out, err

# ---------------------------------------------------------------- what a Job looks like


def test_the_manifest_is_what_a_training_run_needs(here, kubectl, tmp_path, monkeypatch):
    monkeypatch.setenv("DML_DATA", str(tmp_path / "data"))
    code, out, err = pod("submit", script(), env={"SNAKEMAKE_CLUSTER_SIDECAR_VARS": MARK})
    (made,) = fake_kubectl.manifests(kubectl)
    name, spec = out.removeprefix("lab/"), made["spec"]
    assert code == 0 and made["metadata"]["name"] == name and name.startswith("dml-train-snca-s0-0a1b-"), err
    assert made["apiVersion"] == "batch/v1" and made["kind"] == "Job" and spec["backoffLimit"] == 0 and spec["ttlSecondsAfterFinished"] > 0
    labels = {"app": "dml-companion", "dml-job": name, "dml-run": MARK}
    assert made["metadata"]["labels"] == labels == spec["template"]["metadata"]["labels"] and made["metadata"]["namespace"] == "lab"
    inside = spec["template"]["spec"]
    assert inside["restartPolicy"] == "Never" and inside["activeDeadlineSeconds"] == 240 * 60 and "activeDeadlineSeconds" not in spec
    assert inside["securityContext"] == {"runAsUser": os.getuid(), "runAsGroup": os.getgid()}
    (box,) = inside["containers"]
    assert box["image"] == "us/python:3.11" and box["command"] == ["sh", str(here / ".snakemake/tmp.x/snakejob.train.sh")] and box["workingDir"] == str(here)
    assert box["resources"] == {"requests": {"cpu": "3", "memory": "16000M"}, "limits": {"cpu": "3", "memory": "16000M", "nvidia.com/gpu": "1"}}
    (claim,) = [v["name"] for v in inside["volumes"] if v.get("persistentVolumeClaim") == {"claimName": "shared"}]
    assert {"name": claim, "mountPath": str(tmp_path)} in box["volumeMounts"]
    env = {e["name"]: e["value"] for e in box["env"]}
    assert env["DML_ROOT"] == str(here) and env["DML_CACHE"] == str(tmp_path / "packs") and env["DML_DATA"] == str(tmp_path / "data")
    assert env["HOME"] in {m["mountPath"] for m in box["volumeMounts"]} and "PATH" not in env and "TORCH_HOME" not in env


def test_pretrained_weights_and_the_compiler_s_switch_reach_the_pod(here, kubectl, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    submitted()
    (made,) = fake_kubectl.manifests(kubectl)
    env = {e["name"]: e["value"] for e in made["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert (env["TORCH_HOME"], env["TORCH_COMPILE_DISABLE"]) == (str(tmp_path / "torch"), "1")


def test_a_notebook_asks_for_no_gpu_and_sees_none(here, kubectl):
    fill_in(here / "workflow/cluster/kubernetes", here.parent, pod={"priorityClassName": "low", "securityContext": {"runAsUser": 7}},
            gpu_pod={"nodeSelector": {"a": "b"}})
    for rule in ("train", "notebook"): submitted(rule=rule)
    train, notebook = (m["spec"]["template"]["spec"] for m in fake_kubectl.manifests(kubectl))
    assert train["nodeSelector"] == {"a": "b"} and "nodeSelector" not in notebook
    assert train["priorityClassName"] == notebook["priorityClassName"] == "low" and notebook["securityContext"] == {"runAsUser": 7}
    assert not [k for k in notebook["containers"][0]["resources"]["limits"] if "gpu" in k]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in notebook["containers"][0]["env"]
    assert not [e for e in train["containers"][0]["env"] if e["name"] == "NVIDIA_VISIBLE_DEVICES"]


def test_names_are_valid_and_differ(here, kubectl):
    names = [submitted(run=run) for run in ("x" * 200, "x" * 200, "Émile_ß/s0.1--", "_", "a/" + "-" * 80)]
    assert len(set(names)) == 5 and all(len(n) <= 63 and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", n) for n in names)

# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("changes, words", [
    ({"image": "<image>"}, "image is '<image>'; write a container image"), ({"claim": "<claim>"}, "claim is '<claim>'; write the name of a Persistent"),
    ({"mount": "<mount>"}, "mount is '<mount>'; write the absolute path"), ({"mount": "shared"}, "mount is 'shared'; write the absolute path"),
    ({"image": None}, "image is None"), ({"imgae": "x"}, "unknown field 'imgae'; known: image, claim"), ({"pod": ["x"]}, "pod is ['x']; write fields"),
    ({"gpu_pod": {"containers": []}}, "none of containers"), ({"mount": "/elsewhere"}, "not below /elsewhere, the `mount` of")])
def test_what_is_not_filled_in_is_named(here, kubectl, changes, words):
    fill_in(here / "workflow/cluster/kubernetes", here.parent, **changes)
    code, out, err = pod("submit", script())
    assert code == 1 and out == "" and words in err and "pod.yaml" in err and "Traceback" not in err, err
    assert words in Path("runs/logs/train.log").read_text()                  # which the front end shows
    assert not fake_kubectl.manifests(kubectl)


def test_as_shipped_every_placeholder_is_refused(here):
    shutil.copy(SHIPPED / "pod.yaml", here / "workflow/cluster/kubernetes/pod.yaml")
    assert set(re.findall(r"^(\w+): <\w+>$", (SHIPPED / "pod.yaml").read_text(), re.M)) == {"image", "claim", "mount"}
    code, _, err = pod("submit", script())
    assert code == 1 and "image is '<image>'" in err


@pytest.mark.parametrize("asked, words", [({"mem_mb": "16 GB"}, "mem_mb of train snca/s0-0a1b is '16 GB'"), ({"gpus": -1}, "gpus of train snca/s0-0a1b is -1"),
                                          ({"runtime": 0}, "runtime of train snca/s0-0a1b is 0; write a whole number from 1 on")])
def test_a_resource_that_is_no_number_is_named(here, asked, words):
    code, _, err = pod("submit", script(**asked))
    assert code == 1 and words in err and "set-resources" in err


def test_paths_that_a_pod_would_not_find_are_refused(here, monkeypatch):
    monkeypatch.setenv("DML_CACHE", "/elsewhere/packs")
    assert "the packs (DML_CACHE) is at /elsewhere/packs, not below" in pod("submit", script())[2]
    monkeypatch.delenv("DML_CACHE"); monkeypatch.setenv("HOME", "/elsewhere")
    assert "the packs (DML_CACHE) is at /elsewhere/.cache/dml-companion" in pod("submit", script())[2]


def test_what_the_cluster_refuses_is_said_at_once_and_silence_is_tried_again(here, kubectl):
    (kubectl / "deaf").write_text("1")
    name = submitted()
    assert [m["metadata"]["name"] for m in fake_kubectl.manifests(kubectl)] == [name]
    fill_in(here / "workflow/cluster/kubernetes", here.parent, namespace="forbidden")
    (kubectl / "calls").unlink()
    code, out, err = pod("submit", script())
    assert code == 1 and out == "" and "Error from server (Forbidden)" in err and (kubectl / "calls").read_text().count("create") == 1


@pytest.mark.parametrize("words", [(), ("submit",), ("delete", "x")])
def test_a_wrong_call_names_the_right_ones(words):
    done = subprocess.run([sys.executable, SHIPPED / "pod", *words], capture_output=True, text=True)
    assert done.returncode == 1 and "use: submit SCRIPT, status JOB" in done.stderr

# ---------------------------------------------------------------- how a Job fares, and its end


def test_every_state(here, kubectl):
    name = submitted(text="sleep 60")
    assert state(name)[0] == "running"
    fake_kubectl.end(kubectl, name)
    assert state(name) == ("success", "")
    fake_kubectl.end(kubectl, name, 137)
    out, err = state(name)
    assert out == "failed" and "OOMKilled" in err and f"pod: lab/{name} failed: OOMKilled" in Path("runs/logs/train.log").read_text()
    fake_kubectl.lose(kubectl, name)
    assert state(name)[0] == "failed" and "is gone" in state(name)[1]
    assert state("never-was")[0] == "failed" and pod("status", "nonsense")[:2] == (0, "failed")
    pod("cancel", f"lab/{name}")


def age(name, seconds):
    "Pretend that the trouble of a job began earlier."
    began = Path(f".snakemake/pods/{name}")
    os.utime(began, (time.time() - seconds,) * 2)


def test_a_kubectl_that_fails_is_waited_for_but_not_for_ever(here, kubectl):
    name = submitted()
    until(lambda: state(name)[0] == "success")
    (kubectl / "down").write_text("Unable to connect to the server")
    assert state(name)[0] == "running" and "Unable to connect" in state(name)[1]
    age(name, 500)
    assert state(name)[0] == "running"
    (kubectl / "down").rename(kubectl / "up")
    assert state(name)[0] == "success" and not list(Path(".snakemake/pods").iterdir())     # the clock starts anew
    (kubectl / "up").rename(kubectl / "down")
    assert state(name)[0] == "running"
    age(name, 700)
    out, err = state(name)
    assert out == "failed" and "given up after 12 minutes" in err


def test_an_image_that_cannot_be_had_is_waited_for_but_not_for_ever(here, kubectl):
    (kubectl / "stuck").write_text("ImagePullBackOff")
    name = submitted()
    assert state(name)[0] == "running"
    age(name, 700)
    assert state(name)[0] == "failed" and "ImagePullBackOff" in Path("runs/logs/train.log").read_text()
    assert not fake_kubectl.manifests(kubectl)                                # nor does it start later, beside its successor


def test_cancel_deletes_the_given_jobs_and_no_others(here, kubectl):
    names = [submitted(text="sleep 60") for _ in range(3)]
    alive = [int((kubectl / "jobs" / n / "process").read_text()) for n in names]
    assert pod("cancel", *(f"lab/{n}" for n in names[:2]), "lab/gone")[0] == 0
    assert [m["metadata"]["name"] for m in fake_kubectl.manifests(kubectl)] == names[2:]
    gone = lambda p: not psutil.pid_exists(p) or psutil.Process(p).status() == psutil.STATUS_ZOMBIE
    until(lambda: gone(alive[0]) and gone(alive[1]), 10)
    assert not gone(alive[2])
    (kubectl / "down").write_text("Unable to connect to the server")
    code, _, err = pod("cancel", f"lab/{names[2]}")
    assert code == 1 and "Unable to connect" in err
    (kubectl / "down").unlink()
    pod("cancel", f"lab/{names[2]}")


@pytest.mark.parametrize("how", ["terminated", "orphaned"])
def test_watch_deletes_what_still_runs_when_snakemake_ends(here, kubectl, how):
    starter = "import subprocess, sys; p = subprocess.Popen(['workflow/cluster/kubernetes/watch']); print(p.pid, flush=True); sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (mark,) = [line for line in lines if len(line) == 16]
    watching = int(*(lines - {mark}))
    for text in ("true", "sleep 60"): assert pod("submit", script(text=text), env={"SNAKEMAKE_CLUSTER_SIDECAR_VARS": mark})[0] == 0
    done, running = (m["metadata"]["name"] for m in fake_kubectl.manifests(kubectl))
    other = submitted(text="sleep 60")                                        # of another Snakemake
    until(lambda: state(done)[0] == "success")
    os.kill(watching, signal.SIGINT)                                          # Ctrl-C in a terminal reaches it, too
    time.sleep(.7)
    assert state(running)[0] == "running"
    (kubectl / "deaf").write_text("1")
    if how == "orphaned": parent.kill()
    else: os.kill(watching, signal.SIGTERM)
    until(lambda: {m["metadata"]["name"] for m in fake_kubectl.manifests(kubectl)} == {done, other}, 20)
    pod("cancel", f"lab/{other}")
    parent.kill(); parent.communicate()

# ---------------------------------------------------------------- what is shipped, and jobs that go through


def test_the_shipped_profile_is_complete_and_agrees_with_slurm():
    says, slurm = shipped("kubernetes"), shipped("slurm-gpu")
    ours = {k: v for k, v in says.items() if not k.startswith("cluster-generic-")}
    assert {**ours, "executor": "slurm", "set-resources": slurm["set-resources"]} == slurm
    resources = {rule: {**asked, **({"gpus": asked["gpu"]} if "gpu" in asked else {"gpus": 0})} for rule, asked in slurm["set-resources"].items()}
    for asked in resources.values(): asked.pop("gpu", None)
    assert says["set-resources"] == resources
    for name in ("submit", "status", "cancel", "sidecar"):
        file = SHIPPED / says[f"cluster-generic-{name}-cmd"]
        assert os.access(file, os.X_OK) and f"/pod\" {file.name} " in file.read_text()
    assert os.access(SHIPPED / "pod", os.X_OK)


@needs_plugin
def test_load_cluster_finds_the_plugin():
    assert E.load_cluster("kubernetes", ROOT) == E.Cluster(SHIPPED, "cluster-generic", 16)


@pytest.fixture
def cluster(root, kubectl, tmp_path):
    "The toy project of the Slurm tests with the shipped profile, looked after sooner; no process stays behind."
    (tmp_path / "packs").symlink_to(PACKS)
    folder = root / "workflow/cluster/kubernetes"
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("__pycache__"))
    edit(folder / "config.yaml", "latency-wait: 120", "seconds-between-status-checks: 1\nlatency-wait: 9")
    fill_in(folder, tmp_path)
    wants_gpu(root)
    yield kubectl
    for p in psutil.process_iter():
        try:
            if str(tmp_path) in " ".join([p.cwd(), *p.cmdline()]) and p.pid != os.getpid(): p.kill()
        except psutil.Error: pass


RUN = ("reproduce", "--profile", "toy", "--cluster", "kubernetes", "--device", "cuda")


@needs_plugin
def test_from_one_command_to_published_tables_through_kubernetes(root, cluster):
    code, out, err = command(root, *RUN)
    logs = "\n".join(p.read_text() for p in [*(root / "runs/logs").rglob("*.log"), *(cluster / "jobs").glob("*/log")])
    assert code == 0, out + err + logs
    assert "on cluster-generic (kubernetes), up to 16 at once" in out and "figures, tables and provenance are in figures/toy" in out
    train, table = fake_kubectl.manifests(cluster)
    limits = [m["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] for m in (train, table)]
    assert limits == [{"cpu": "3", "memory": "16000M", "nvidia.com/gpu": "1"}, {"cpu": "3", "memory": "8000M"}]
    assert [m["spec"]["template"]["spec"]["activeDeadlineSeconds"] for m in (train, table)] == [240 * 60, 60 * 60]
    assert train["metadata"]["labels"]["dml-run"] == table["metadata"]["labels"]["dml-run"]
    env = json.loads((root / "small.env").read_text())
    assert env["CUDA_VISIBLE_DEVICES"] == "0" and env["DML_ROOT"] == str(root) and "DML_FRONT" not in env
    assert set(states(root).values()) == {"finished"} and (root / "figures/toy/table.csv").is_file()
    assert "delete" not in (cluster / "calls").read_text()                   # what has finished can be looked at


@needs_plugin
def test_ctrl_c_takes_back_what_was_submitted(root, cluster):
    R.write_atomic(root / "hold", "")
    front = begin(root, *RUN)
    until((root / "small.env").exists, 240)
    (made,) = fake_kubectl.manifests(cluster)
    job = psutil.Process(int((cluster / "jobs" / made["metadata"]["name"] / "process").read_text()))
    family = [job, *job.children(recursive=True)]
    assert states(root)["small, seed 0"] == "running"
    front.send_signal(signal.SIGINT)
    out, err = front.communicate(timeout=240)
    assert front.returncode == 130 and "taking back" in err and "Traceback" not in out + err
    until(lambda: not fake_kubectl.manifests(cluster), 15)
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 15)
    assert states(root)["small, seed 0"] == "interrupted"
    (root / "hold").unlink()
    code, out, err = command(root, *RUN)                                     # goes on from the checkpoint, with a Job of its own
    assert code == 0 and (root / "small-0.log").read_text().split() == list("1234"), out + err


@needs_plugin
def test_a_job_killed_for_memory_is_submitted_again_with_more(root, cluster):
    R.write_atomic(root / "hold", "")
    front = begin(root, *RUN)
    until((root / "small.env").exists, 240)
    (made,) = fake_kubectl.manifests(cluster)
    job = cluster / "jobs" / made["metadata"]["name"]
    os.killpg(int((job / "process").read_text()), signal.SIGKILL)
    (root / "hold").unlink()
    fake_kubectl.end(cluster, job.name, 137)
    out, err = front.communicate(timeout=240)
    assert front.returncode == 0, out + err
    asked = [m["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] for m in fake_kubectl.manifests(cluster)]
    assert asked == ["16000M", "32000M", "8000M"]


@needs_plugin
def test_what_is_not_filled_in_reaches_the_user(root, cluster):
    shutil.copy(SHIPPED / "pod.yaml", root / "workflow/cluster/kubernetes/pod.yaml")
    code, out, err = command(root, *RUN)
    assert code == 1 and "image is '<image>'; write a container image" in err and "not run because of that: table" in err, out + err
