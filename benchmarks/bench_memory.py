"""Peak memory of forward + backward for every loss over a batch, each in a process of its own, against 4 GB.

The verdict is on resident memory: the process's high-water mark less what it held before the step (torch, the batch,
the weights), so that work spaces of libraries and what the allocator keeps count too. The high-water mark is Linux's
VmHWM, which starts anew with each program; `resource.getrusage` would hand down the parent's, and serves only where
there is no /proc. What torch itself allocated, by its profiler, stands beside it.
"""
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import machine_lines, pipe_table, write_text

SIZE, LIMIT_GB, SECONDS = 4096, 4., 120.                         # B; the target; patience with one process


def status_bytes(field: str) -> int | None:
    "VmRSS or VmHWM of this process; None where there is no /proc."
    try: lines = Path("/proc/self/status").read_text().splitlines()
    except OSError: return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def high_water() -> int:
    "Most memory this process ever held, in bytes."
    if (seen := status_bytes("VmHWM")) is not None: return seen
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_here(label: str, size: int, threads: int) -> dict:
    "One step in this very process: call it in a fresh one."
    from benchmarks.contenders import CONTENDERS, make_batch, step
    from dml_companion.memory import peak_bytes
    torch.set_num_threads(threads)
    (z, y), loss = make_batch(size), CONTENDERS[label].make()
    run = step(loss, z, y)
    try: Path("/proc/self/clear_refs").write_text("5")           # forget a higher mark from the imports
    except OSError: pass
    before = status_bytes("VmRSS") or high_water()
    run()
    resident, z.grad = high_water() - before, None
    for weight in loss.parameters(): weight.grad = None
    return dict(resident_gb=resident / 1e9, torch_gb=peak_bytes(run) / 1e9)


def measure(label: str, size: int, threads: int, patience: float) -> dict:
    "The same in a process of its own; a process that dies or hangs has not met the target."
    command = [sys.executable, "-m", "benchmarks.bench_memory", label, str(size), str(threads)]
    row, why = dict(objective=label, batch=size, limit_gb=LIMIT_GB), ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience,
                              cwd=Path(__file__).parents[1])
        if done.returncode == 0: row |= json.loads(done.stdout.splitlines()[-1])
        else: why = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1][:120]
    except subprocess.TimeoutExpired: why = f"took more than {patience:g} s"
    return row | dict(verdict=verdict(row), why=why)


def verdict(row: dict) -> str:
    "Met only by a measured number."
    return "failed" if "resident_gb" not in row else "met" if row["resident_gb"] <= row["limit_gb"] else "not met"


def markdown(table) -> str:
    "One line a loss, the hungriest first."
    show = lambda v: "" if v != v else f"{v:.2f}"
    rows = [[r.objective, show(r.resident_gb), show(r.torch_gb), r.verdict, r.why]
            for r in table.sort_values("resident_gb", ascending=False, na_position="first").itertuples()]
    from benchmarks.contenders import DIM
    return "\n\n".join([
        "# Peak memory, forward + backward",
        f"B = {table.batch.iloc[0]:,}, D = {DIM}, float32; target: at most {LIMIT_GB:g} GB.",
        pipe_table(["objective", "resident, GB", "torch's allocations, GB", "verdict", "why"], rows),
        "Each loss in a process of its own. Resident: the high-water mark less what the process held before the step; "
        "the verdict is on it. Beside it what torch's profiler saw allocated at once.", "\n".join(machine_lines())])


def main(out_folder: str | Path = "figures/bench", # csv and md go here
         size: int = SIZE, # B
         labels: tuple[str, ...] | None = None, # of contenders.PAIRWISE; default: all
         threads: int = 2, # torch threads
         patience: float = SECONDS, # seconds for one process
        ) -> None:
    "Measure and write memory.{csv,md}."
    import pandas as pd
    from benchmarks.contenders import PAIRWISE
    from dml_companion.reproduction import output_folder
    folder, rows = output_folder(out_folder), []
    for label in labels or PAIRWISE:
        rows.append(measure(label, size, threads, patience))
        print(f"memory: {rows[-1]}", flush=True)
    table = pd.DataFrame(rows, columns=["objective", "batch", "resident_gb", "torch_gb", "limit_gb", "verdict", "why"])
    table.to_csv(folder / "memory.csv", index=False, float_format="%.4g")
    write_text(folder / "memory.md", markdown(table))


if __name__ == "__main__": print(json.dumps(measure_here(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
