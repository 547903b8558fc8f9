"""Does `torch.compile` take every objective whole? Graph breaks of its forward, and whether the compiled one is equal.

`torch._dynamo.explain` counts the places where the graph is cut and says why; then the objective is compiled with the
backend "aot_eager", which traces the backward pass too but needs no C++ compiler, and value and gradient are compared.
So graph capture and tracing are tried, and not the default backend, inductor, which generates code.
"""
import warnings
from pathlib import Path
from unittest import mock

import torch

from benchmarks.common import kept_lines, machine_lines, pipe_table, write_text

SIZE, BACKEND = 32, "aot_eager"
DRAWS = ("it draws, and a compiled graph draws other numbers from the same seed: sizes may not depend on labels there, so its miner fills "
         "a wider rectangle; drawing as many, plain and compiled agree")


CHECKED = ("Each data-dependent branch is a part of one check, that labels are in range (`objective.check_labels`), which objectives make of labels on a CPU only and without which "
           "each of these forwards is one graph: the breaks do not tell what happens on a GPU, and notebook 05c has a count of its own, of encoder and loss.")


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


def agree(one, other) -> bool: # of `value_and_slope`
    "Value and gradient, up to rounding."
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, other))


def why_unequal(label: str, size: int) -> str:
    "DRAWS if another seed changes the plain objective and it equals the compiled one when it draws as many numbers; else nothing."
    from benchmarks.contenders import CONTENDERS, make_batch
    (z, y), loss = make_batch(size), CONTENDERS[label].make().eval()
    def seeded(seed):
        torch.manual_seed(seed)
        return loss(z, y)
    if torch.equal(seeded(0), seeded(1)): return ""
    torch._dynamo.reset()
    compiled = value_and_slope(torch.compile(loss, backend=BACKEND), z, y)
    with mock.patch("torch.compiler.is_compiling", lambda: True): as_many = value_and_slope(loss, z, y)
    return DRAWS if agree(as_many, compiled) else ""


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
        plain, compiled = value_and_slope(loss, z, y), value_and_slope(torch.compile(loss, backend=BACKEND), z, y)
        row["equal"] = "yes" if agree(plain, compiled) else "no"
        if row["equal"] == "no": row["why"] = row["why"] or why_unequal(label, size)
    except Exception as e:
        row["equal"], row["why"] = "fails", row["why"] or first_line(f"{type(e).__name__}: {e}")
    return row


def markdown(table, machine: list[str] | None = None) -> str: # machine: lines for the foot; default: this one
    "The unbroken counted, then one line an objective."
    show = lambda v: "" if v != v or v is None else f"{v:g}"
    whole = int((table.breaks == 0).sum())
    return "\n\n".join([
        "# torch.compile",
        f"{whole} of {len(table)} forwards are one graph without a break; "
        f"{(table.equal == 'yes').sum()} of {len(table)} give the same value and gradient when compiled. "
        f"B = {table.batch.iloc[0]}, on a CPU.",
        pipe_table(["objective", "graphs", "breaks", "equal", "why"],
                   [[r.objective, show(r.graphs), show(r.breaks), r.equal, r.why] for r in table.itertuples()]),
        "Breaks by `torch._dynamo.explain`, why: the first of them; equal: value and gradient of the plain and of the compiled "
        f"objective (backend `{BACKEND}`, in evaluation mode, same seed). Graph capture and the tracing of the backward pass are "
        "tried here; the default backend, inductor, which generates code, is not. " + CHECKED, "\n".join(machine or machine_lines())])


def render(out_folder: str | Path = "figures/bench") -> None: # with compile.{csv,md}
    "Both anew from what was counted, the machine kept; what differs and has no reason yet is asked for it."
    import pandas as pd
    folder = Path(out_folder)
    table = pd.read_csv(folder / "compile.csv", keep_default_na=False, na_values={"graphs": [""], "breaks": [""]})
    for i, row in table.iterrows():
        if row.equal == "no" and not row.why: table.loc[i, "why"] = why_unequal(row.objective, row.batch)
    table.to_csv(folder / "compile.csv", index=False)
    write_text(folder / "compile.md", markdown(table, kept_lines(folder / "compile.md")))


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
