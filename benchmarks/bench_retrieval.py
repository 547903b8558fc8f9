"""Exact neighbours of all against all, beside the matrix product of the same size, in one process, interleaved.

The floor is the product alone, in blocks of 256 queries into one buffer, on rows that are already normalised: no normalisation,
no selection, nothing kept. "torch.topk" is the product followed by torch.topk on every block: the simple program, whose ties are left to chance.
"""
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import interleaved, machine_lines, ratio, write_text
from dml_companion.geometry import chunks, normalize
from dml_companion.retrieval import nearest

DIM, SIZES, KS, TARGET = 512, (5_000, 20_000), (10, 100), 1.3
WAYS = { # label -> options of `nearest`; colour
    "torch, cosine": (dict(), "#0072B2"),
    "torch, Euclidean": (dict(metric="euclidean"), "#56B4E9"),
    "faiss, cosine": (dict(backend="faiss"), "#D55E00"),
}


def product(unit: torch.Tensor, # (n, d)
            k: int = 0, # also take torch.topk of every block
            chunk: int = 256, # queries a block
           ) -> Callable[[], None]:
    "The floor, or with `k` the simple program."
    buffer = torch.empty(chunk, len(unit))
    def run():
        for rows in chunks(len(unit), chunk):
            scores = torch.mm(unit[rows], unit.T, out=buffer[:rows.stop - rows.start])
            if k: scores.topk(k)
    return run


def measure(n: int, rounds: int, warmup: int = 1) -> list[dict]:
    "One gallery size: a row for each way and k."
    x = torch.randn(n, DIM, generator=torch.Generator().manual_seed(0))
    unit = normalize(x)
    contenders = {("product", 0): product(unit)}
    for k in KS:
        contenders["torch.topk", k] = product(unit, k)
        for label, (options, _) in WAYS.items(): contenders[label, k] = lambda k=k, options=options: nearest(x, k, **options)
    seconds = interleaved(contenders, rounds, warmup)
    floor = seconds["product", 0]
    return [dict(way=way, k=k, n=n, seconds=statistics.median(s), best_seconds=min(s), floor_seconds=statistics.median(floor),
                 times_floor=ratio(s, floor), best_times_floor=min(s) / min(floor)) for (way, k), s in seconds.items() if k]


def markdown(table, rounds: dict[int, int]) -> str:
    "One line for each way, k and n."
    lines = [f"| {r.n:,} | {r.k} | {r.way} | {r.seconds:.2f} | {r.floor_seconds:.2f} | {r.times_floor:.2f} | {r.best_times_floor:.2f} |"
             for r in table.sort_values(["n", "k"], kind="stable").itertuples()]
    return "\n\n".join([
        "# Exact neighbours, all against all", f"D = {DIM}, float32, normal points, self left out; everything included (checks, normalisation, index of faiss).",
        "| n | k | way | seconds | product, seconds | times the product | the same, quickest runs |\n|---:|---:|---|---:|---:|---:|---:|\n" + "\n".join(lines),
        "The product is chunked, on ready unit vectors, into one buffer. `torch.topk` is the product and torch.topk of every block, self not left out and ties left to chance. "
        "All contenders run in one process, one after the other in each round; ratios are medians over rounds of ratios within a round; the last column divides the "
        "quickest run by the quickest product. Rounds: " + ", ".join(f"{r} at n = {n:,}" for n, r in rounds.items()) + ".",
        "\n".join(machine_lines())])


def draw(table):
    "Times the product, a panel for each k, the largest n."
    import matplotlib.pyplot as plt
    from dml_companion.reproduction import use_house_style
    use_house_style()
    n = table.n.max()
    fig, axes = plt.subplots(1, len(KS), figsize=(8.4, 2.4), sharex=True, sharey=True)
    for ax, k in zip(axes, KS):
        rows = table[(table.n == n) & (table.k == k)].iloc[::-1]
        colours = [WAYS[way][1] if way in WAYS else "#999999" for way in rows.way]
        ax.barh(rows.way, rows.times_floor, color=colours, height=.6)
        for y, value in enumerate(rows.times_floor): ax.text(value + .02, y, f"{value:.2f}", va="center", size=8, bbox=dict(facecolor="white", edgecolor="none", pad=1))
        for x, style in ((1, "-"), (TARGET, "--")): ax.axvline(x, color="black", lw=.8, ls=style)
        ax.set(title=f"k = {k}", xlabel="time / matrix product")
        ax.grid(False, axis="y")
    axes[0].set_xlim(0, max(1.6, table[table.n == n].times_floor.max() * 1.12))
    fig.text(0, -.12, f"{n:,} x {n:,}, D = {DIM}, float32. Line: the product alone; dashed: the target, {TARGET}. Medians of ratios within a round.", size=8)
    return fig


def main(out_folder: str | Path = "figures/bench", # csv, md, svg and png go here
         sizes: tuple[int, ...] = SIZES, # gallery sizes
         threads: int = 2, # torch threads
         seconds: float = 90., # rough time for each size
        ) -> None:
    "Measure and write retrieval.{csv,md,svg,png}."
    import time
    import pandas as pd
    from dml_companion.reproduction import output_folder, save_figure
    before, rows, rounds = torch.get_num_threads(), [], {}
    torch.set_num_threads(threads)
    try:
        for n in sizes:
            start = time.perf_counter()
            measure(n, 1, warmup=0)
            rounds[n] = max(5, min(25, int(seconds / (time.perf_counter() - start)) - 1))
            rows += measure(n, rounds[n], warmup=0)              # warmed up by the line above
            print(f"retrieval: n = {n}, {rounds[n]} rounds", flush=True)
        table, folder = pd.DataFrame(rows), output_folder(out_folder)
        save_figure(draw(table), "retrieval", folder, data=table)
        write_text(folder / "retrieval.md", markdown(table, rounds))
    finally: torch.set_num_threads(before)


if __name__ == "__main__": main()
