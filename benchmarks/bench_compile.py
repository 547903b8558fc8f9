"""Does `torch.compile` take every objective whole? Graph breaks of its forward, and whether the compiled one is equal.

`torch._dynamo.explain` counts the places where the graph is cut and says why; then the objective is compiled with the
backend "aot_eager", which traces the backward pass too but needs no C++ compiler, and value and gradient are compared.
"""
import warnings
from pathlib import Path

import torch

from benchmarks.common import machine_lines, pipe_table, write_text

SIZE = 32


def first_line(text: object) -> str:
    "What a table can hold."
    return " ".join(str(text).strip().splitlines()[:1])[:160].replace("|", "/")


def value_and_slope(loss, z, y) -> tuple[torch.Tensor, torch.Tensor]:
    "Seeded, since some objectives draw."
    torch.manual_seed(0)
    z.grad = None
    value = loss(z, y)
    value.backward()
    return value.detach(), z.grad.clone()


def measure(label: str, size: int) -> dict:
    "Breaks, the first reason, and whether compiled and plain agree."
    from benchmarks.contenders import CONTENDERS, make_batch
    (z, y), row = make_batch(size), dict(objective=label, batch=size, graphs=None, breaks=None, equal="no", why="")
    loss = CONTENDERS[label].make().eval()                       # the same step twice: no annealing, no running centres
    torch._dynamo.reset()
    try:
        seen = torch._dynamo.explain(loss)(z, y)
        row |= dict(graphs=seen.graph_count, breaks=seen.graph_break_count)
        if seen.break_reasons: row["why"] = first_line(seen.break_reasons[0].reason)
    except Exception as e: row["why"] = first_line(f"{type(e).__name__}: {e}")
    torch._dynamo.reset()
    try:
        plain, compiled = value_and_slope(loss, z, y), value_and_slope(torch.compile(loss, backend="aot_eager"), z, y)
        equal = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, compiled))
        row["equal"] = "yes" if equal else "no"
    except Exception as e:
        row["equal"], row["why"] = "fails", row["why"] or first_line(f"{type(e).__name__}: {e}")
    return row


def markdown(table) -> str:
    "The unbroken counted, then one line an objective."
    show = lambda v: "" if v != v or v is None else f"{v:g}"
    whole = int((table.breaks == 0).sum())
    return "\n\n".join([
        "# torch.compile",
        f"{whole} of {len(table)} forwards are one graph without a break; "
        f"{(table.equal == 'yes').sum()} of {len(table)} give the same value and gradient when compiled. "
        f"B = {table.batch.iloc[0]}, on a CPU.",
        pipe_table(["objective", "graphs", "breaks", "equal", "first reason"],
                   [[r.objective, show(r.graphs), show(r.breaks), r.equal, r.why] for r in table.itertuples()]),
        "Breaks by `torch._dynamo.explain`; equal: value and gradient of the plain and of the compiled objective "
        "(backend `aot_eager`, in evaluation mode, same seed).", "\n".join(machine_lines())])


def main(out_folder: str | Path = "figures/bench", # csv and md go here
         size: int = SIZE, # B
         labels: tuple[str, ...] | None = None, # of contenders.CONTENDERS; default: all
        ) -> None:
    "Count and write compile.{csv,md}."
    import logging
    import pandas as pd
    import torch._dynamo
    from benchmarks.contenders import CONTENDERS
    from dml_companion.reproduction import output_folder
    folder, rows, loud = output_folder(out_folder), [], logging.getLogger("torch._dynamo").level
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for label in labels or CONTENDERS:
                rows.append(measure(label, size))
                print(f"compile: {rows[-1]}", flush=True)
    finally:
        logging.getLogger("torch._dynamo").setLevel(loud)
        torch._dynamo.reset()
    table = pd.DataFrame(rows)
    table.to_csv(folder / "compile.csv", index=False)
    write_text(folder / "compile.md", markdown(table))


if __name__ == "__main__": main()
