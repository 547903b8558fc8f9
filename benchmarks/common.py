"""Shared by the benchmarks: interleaved timing, and one way to write results with the machine they came from."""
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")   # of the last minute, before we begin


def round_by_round(contenders: dict[str, Callable[[], object]], # name -> what to time
                   rounds: int, # every contender runs once a round
                   warmup: int = 2, # rounds not counted
                   before: dict[str, Callable[[], object]] | None = None, # name -> what to do first, not timed
                  ) -> Iterator[dict[str, list[float]]]: # seconds, one a round, after each round
    "Time all contenders in turn, in another order each round, so that a busy moment or a bad neighbour hits them all."
    names, seconds, order = list(contenders), {name: [] for name in contenders}, random.Random(0)
    for r in range(-warmup, rounds):
        for name in order.sample(names, len(names)):
            if before: before[name]()
            start = time.perf_counter()
            contenders[name]()
            if r >= 0: seconds[name].append(time.perf_counter() - start)
        if r >= 0: yield seconds


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]: # seconds, one a round
    "All rounds of `round_by_round` at once."
    *_, seconds = round_by_round(contenders, rounds, warmup)
    return seconds


def waited(call: Callable[[], object], device: str) -> Callable[[], None]: # device: "cpu" or "cuda"
    "A call that ends when the device has done it."
    import torch
    def run():
        call()
        if device != "cpu": torch.cuda.synchronize()
    return run


def ratio(a: list[float], b: list[float]) -> float:
    "Median over rounds of a / b: both were measured in the same round."
    return statistics.median(x / y for x, y in zip(a, b))


def available_bytes() -> int:
    "Memory that can be had now; 16 GiB where the system does not say."
    try: lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError: return 16 * 2**30
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 16 * 2**30)


def pipe_table(head: list[str], rows: list[list[str]]) -> str:
    "Markdown: names to the left, the rest to the right."
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grid(table: "pd.DataFrame", # columns objective, batch and the one to show
         column: str,
         say: Callable | None = None, # row -> text; two digits if none is given
        ) -> str:
    "One line an objective, one column a batch size; objectives of which nothing is known are left out."
    batches = sorted(table.batch.unique())
    text = {(r["objective"], r["batch"]): say(r) if say else "" if r[column] != r[column] or r[column] is None
            else f"{r[column]:.2f}" for _, r in table.iterrows()}
    names = [n for n in dict.fromkeys(table.objective) if any(text.get((n, b)) for b in batches)]
    rows = [[n, *(text.get((n, b), "") for b in batches)] for n in names]
    return pipe_table(["objective", *(f"B = {b}" for b in batches)], rows)


def machine_lines() -> list[str]:
    "Hardware, versions, commit and date, for the foot of a table: no names of machines, users or folders."
    from dml_companion.reproduction import provenance
    p = provenance()
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    shown = ("torch", "numpy", "faiss-cpu", "pytorch-metric-learning")
    versions = ", ".join(f"{name} {installed[name]}" for name in shown if name in installed)
    return [f"- {p['cpu']}, {p['cores']} cores seen, {p['threads']} torch threads; {', '.join(p['gpus']) or 'no GPU'}",
            f"- Python {p['python']}, {versions}",
            f"- {p['end'][:10]}, commit {str(p.get('commit', ''))[:12]}; load average before: {LOAD:.1f}"
            f"{', so other work disturbed these numbers' if LOAD > 1 else ''}"]


def kept_lines(path: Path, # a table that was written with `machine_lines` at its foot
              ) -> list[str]:
    "The machine of a table that is written anew without measuring; ValueError if it names none."
    lines = [line for line in path.read_text().split("\n\n")[-1].splitlines() if line.startswith("- ")]
    if not lines: raise ValueError(f"{path} does not end with lines about a machine: measure anew, without --render")
    return lines


def write_text(path: Path, text: str) -> Path:
    "Write atomically, with one newline at the end."
    from dml_companion.reproduction import write_atomic
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomic(path, (text.rstrip() + "\n").encode())
