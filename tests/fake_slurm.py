"""Just enough of Slurm to run jobs on this machine: install(folder) puts sbatch, srun, sacct, ... there.

A job is a folder <folder>/jobs/<id> with `call` (the arguments of sbatch), `log`, and `rc` once it has ended. As on a
cluster, a job keeps the submitter's environment (--export=ALL) and sees the GPUs that it asked for, and no others.
"""
import json, os, signal, subprocess, sys
from pathlib import Path

TOOLS = ("sbatch", "srun", "sacct", "squeue", "scancel", "sinfo", "scontrol", "sacctmgr", "sshare")


def install(folder):
    "Write the commands; put `folder` on the PATH to have them."
    folder.mkdir(parents=True)
    for tool in TOOLS:
        (folder / tool).write_text(f"#!{sys.executable} -SE\n{Path(__file__).read_text()}")
        (folder / tool).chmod(0o755)
    return folder


def calls(folder):
    "What sbatch was asked, job by job."
    return [json.loads((folder / "jobs" / str(n) / "call").read_text()) for n in range(1, len(ids(folder)) + 1)]


def ids(folder): return sorted(p.name for p in (folder / "jobs").glob("*")) if (folder / "jobs").exists() else []


def value(words, *names):
    "The value of an option, written `--name value` or `--name=value`."
    for i, w in enumerate(words):
        if w in names: return words[i + 1]
        if w.partition("=")[0] in names: return w.partition("=")[2]


def state(job):
    if (job / "cancelled").exists(): return "CANCELLED"
    if not (job / "rc").exists(): return "RUNNING"
    return "COMPLETED" if (job / "rc").read_text().strip() == "0" else "FAILED"


def sbatch(home, words):
    if value(words, "-p", "--partition") == "nowhere":
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    (home / "jobs").mkdir(exist_ok=True)
    job = home / "jobs" / str(len(ids(home)) + 1)
    job.mkdir()                                                          # two at once: the later one fails loudly
    (job / "call").write_text(json.dumps(words))
    log = value(words, "--output").replace("%j", job.name)
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"SLURM_JOB_ID": job.name}
    if gpus := int(value(words, "--gpus") or 0): env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
    script = '(eval "$0") >"$1" 2>&1; echo $? >"$2/part"; mv "$2/part" "$2/rc"'
    process = subprocess.Popen(["sh", "-c", script, value(words, "--wrap"), log, str(job)], env=env, stdin=subprocess.DEVNULL,
                               cwd=value(words, "-D"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    (job / "pid").write_text(str(process.pid))
    print(job.name)


def srun(home, words):
    start = next(i for i, w in enumerate(words) if not w.startswith("-"))
    os.execvp(words[start], words[start:])


def sacct(home, words):
    for job in map((home / "jobs").joinpath, ids(home)):
        call = json.loads((job / "call").read_text())
        if value(words, "--name") == value(call, "--job-name"): print(f"{job.name}|{state(job)}")


def scancel(home, words):
    for job in map((home / "jobs").joinpath, words):
        (job / "cancelled").touch()
        try: os.killpg(int((job / "pid").read_text()), signal.SIGKILL)
        except ProcessLookupError: pass


if __name__ == "__main__":
    tool, home = Path(sys.argv[0]).name, Path(sys.argv[0]).resolve().parent
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "squeue": sacct, "scancel": scancel}.get(tool, lambda *_: None)(home, sys.argv[1:])
