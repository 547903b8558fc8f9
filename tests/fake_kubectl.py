"""Just enough of Kubernetes to run Jobs on this machine: install(folder) puts a kubectl there.

A Job is a folder <folder>/jobs/<name> with `manifest`, `process` (the id), `log`, and `rc` once it has ended. It has the
variables of its manifest and no others, sees a GPU only if its limits name one, and an emptyDir is a folder of its own.
Files in <folder> make trouble: `down` (the text of it: every call fails), `deaf` (so many calls still fail), `stuck` (why
containers do not start). `calls` has one line of arguments a call.
"""
import json, os, re, signal, subprocess, sys
from pathlib import Path


def install(folder):
    "Write the command; put `folder` on the PATH to have it."
    folder.mkdir(parents=True)
    (folder / "kubectl").write_text(f"#!{sys.executable} -SE\n{Path(__file__).read_text()}")
    (folder / "kubectl").chmod(0o755)
    return folder


def manifests(folder):
    "The Jobs that were created and not deleted since, oldest first."
    found = sorted((folder / "jobs").glob("*/manifest"), key=lambda p: p.stat().st_mtime_ns)
    return [json.loads(p.read_text()) for p in found if not (p.parent / "deleted").exists()]


def lose(folder, name): (folder / "jobs" / name / "deleted").touch()


def end(folder, name, rc=0): (folder / "jobs" / name / "rc").write_text(str(rc))


def option(words, name): return words[words.index(name) + 1]


def container(made): return made["spec"]["template"]["spec"]["containers"][0]


def check(made):
    "What an API server refuses."
    name, limits = made["metadata"]["name"], container(made)["resources"]["limits"]
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name): sys.exit(f"Error from server (Invalid): name {name}")
    if made["metadata"]["namespace"] == "forbidden": sys.exit("Error from server (Forbidden): jobs.batch is forbidden")
    if not all(isinstance(v, str) for v in limits.values()): sys.exit(f"Error from server (BadRequest): limits {limits}")


def create(home, words):
    "Start a Job."
    made = json.load(sys.stdin)
    check(made)
    job, box = home / "jobs" / made["metadata"]["name"], container(made)
    job.mkdir(parents=True)
    (job / "manifest").write_text(json.dumps(made))
    print(f"job.batch/{job.name} created")
    if (home / "stuck").exists(): return
    empty = {v["name"] for v in made["spec"]["template"]["spec"]["volumes"] if "emptyDir" in v}
    env = {e["name"]: e["value"] for e in box["env"]} | {"PATH": "/usr/bin:/bin"}
    for mount in box["volumeMounts"]:
        if mount["name"] in empty:
            (job / mount["name"]).mkdir()
            env = {k: str(job / mount["name"]) if v == mount["mountPath"] else v for k, v in env.items()}
    if gpus := int(box["resources"]["limits"].get("nvidia.com/gpu", 0)): env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
    script = '"$@" >"$LOG" 2>&1; echo $? >"$JOB/part"; mv "$JOB/part" "$JOB/rc"'
    process = subprocess.Popen(["sh", "-c", script, "sh", *box["command"]], cwd=box["workingDir"], stdin=subprocess.DEVNULL, start_new_session=True,
                               env=env | {"LOG": str(job / "log"), "JOB": str(job)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (job / "process").write_text(str(process.pid))


def objects(home, job):
    "A Job and its pod, as kubectl shows them."
    made, rc = json.loads((job / "manifest").read_text()), (job / "rc").read_text().strip() if (job / "rc").exists() else None
    state, holds = {"running": {}}, []
    if rc is not None:
        reason = {"0": "Completed", "137": "OOMKilled"}.get(rc, "Error")
        state, holds = {"terminated": {"reason": reason, "exitCode": int(rc)}}, [{"type": "Complete" if rc == "0" else "Failed", "status": "True"}]
    elif (home / "stuck").exists(): state = {"waiting": {"reason": (home / "stuck").read_text()}}
    yield made | {"status": {"conditions": holds} if holds else {}}
    yield {"kind": "Pod", "metadata": {"labels": made["metadata"]["labels"]}, "status": {"containerStatuses": [{"state": state}]}}


def get(home, words):
    "A list of what carries the label."
    key, _, value = option(words, "-l").partition("=")
    alive = [p.parent for p in (home / "jobs").glob("*/manifest") if not (p.parent / "deleted").exists()]
    items = [x for job in alive for x in objects(home, job) if x["metadata"]["labels"].get(key) == value
             and x["kind"].lower() + "s" in words[1].split(",") and json.loads((job / "manifest").read_text())["metadata"]["namespace"] == option(words, "-n")]
    print(json.dumps({"kind": "List", "items": items}))


def delete(home, words):
    "Kill Jobs."
    for job in map((home / "jobs").joinpath, words[2:words.index("-n")]):
        if not job.is_dir(): continue
        (job / "deleted").touch()
        try: os.killpg(int((job / "process").read_text()), signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError): pass


if __name__ == "__main__":
    home, words = Path(sys.argv[0]).resolve().parent, [w for w in sys.argv[1:] if not w.startswith("--request-timeout")]
    with open(home / "calls", "a") as file: file.write(" ".join(words) + "\n")
    if (home / "down").exists(): sys.exit((home / "down").read_text())
    if (home / "deaf").exists():
        (home / "deaf").write_text(str(left := int((home / "deaf").read_text()) - 1))
        if left <= 0: (home / "deaf").unlink()
        sys.exit("Unable to connect to the server: dial tcp: i/o timeout")
    {"create": create, "get": get, "delete": delete}[words[0]](home, words)
