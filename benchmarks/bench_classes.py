"""Linear cross-entropy over very many classes: all logits at once against chunks of classes.

Peak memory is counted from torch's own allocations, weights included, in units of (weights + their gradient): what
nobody can avoid. Targets: below 1.5 of them, in at most 1.5 times the plain one's time.
"""
import statistics
from pathlib import Path

import torch

from benchmarks.common import interleaved, machine_lines, ratio, write_text
from benchmarks.contenders import step
from dml_companion.losses.classification import CrossEntropy
from dml_companion.memory import ChunkedCrossEntropy, peak_bytes

DIM, BATCH, COUNTS = 128, 256, (1_000, 10_000, 100_000, 1_000_000)


def make_forms(num_classes: int, dim: int, plain: bool = True, device: str = "cpu") -> dict[str, torch.nn.Module]:
    "Chunks, and all logits at once if wanted; both train the same weights."
    with torch.device(device):
        forms = {"chunks": ChunkedCrossEntropy(num_classes, dim, bias=False)}
        if plain: forms["plain"] = CrossEntropy(num_classes, dim, bias=False)
    if plain: forms["plain"].weight = forms["chunks"].weight
    return forms


def measure(num_classes: int, rounds: int, plain: bool) -> dict:
    "Peaks and seconds of both forms, or of chunks alone."
    z, y = torch.randn(BATCH, DIM, requires_grad=True), torch.randint(num_classes, (BATCH,))
    forms = make_forms(num_classes, DIM, plain)
    size = forms["chunks"].weight.numel() * forms["chunks"].weight.element_size()
    row = dict(classes=num_classes, batch=BATCH, dim=DIM, weights_mb=size / 2**20)
    for name, loss in forms.items():
        run = step(loss, z, y)
        run(); z.grad = loss.weight.grad = None
        row[f"{name}_peak"] = (peak_bytes(run) + size) / (2 * size)
        z.grad = loss.weight.grad = None
    seconds = interleaved({name: step(loss, z, y) for name, loss in forms.items()}, rounds, warmup=1)
    row |= {f"{name}_ms": statistics.median(s) * 1e3 for name, s in seconds.items()}
    return row | dict(times_plain=ratio(seconds["chunks"], seconds["plain"]) if plain else None)


def markdown(table) -> str:
    "One line for each number of classes."
    names = ["plain_peak", "chunks_peak", "plain_ms", "chunks_ms", "times_plain"]
    lines = [["classes", "peak, all logits", "peak, chunks", "ms, all logits", "ms, chunks", "chunks / all logits"], ["---:"] * 6]
    lines += [[f"{row['classes']:,}", *("" if (v := row.get(n)) is None or v != v else f"{v:.2f}" for n in names)]
              for row in table.to_dict("records")]
    return "\n\n".join(["# Linear cross-entropy over many classes, forward + backward",
                        f"B = {BATCH}, D = {DIM}, float32. Peak in units of (weights + their gradient); medians.",
                        "\n".join("| " + " | ".join(line) + " |" for line in lines), "\n".join(machine_lines())])


def main(out_folder: str | Path = "figures/bench", # csv and md go here
         counts: tuple[int, ...] = COUNTS, # numbers of classes
         threads: int = 2, # torch threads
         rounds: int = 5, # of timing
         plain_up_to: int = 1_000_000, # classes; there all logits need 4 GB
        ) -> None:
    "Measure and write classes.{csv,md}."
    import pandas as pd
    from dml_companion.reproduction import output_folder
    before, rows = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for count in counts:
            rows.append(measure(count, rounds, count <= plain_up_to))
            print(f"classes: {rows[-1]}", flush=True)
        table, folder = pd.DataFrame(rows), output_folder(out_folder)
        table.to_csv(folder / "classes.csv", index=False, float_format="%.4g")
        write_text(folder / "classes.md", markdown(table))
    finally: torch.set_num_threads(before)


if __name__ == "__main__": main()
