"""On the device: every loss of the bench against its matrix products up to B = 16,384, cross-entropy up to a million classes, exact search at SOP's size.

Not among the parts that run by default. `make bench-gpu` runs it after the ladder of a training step; on a machine without a GPU the same command is small:

    python -m benchmarks device                                                        # what fits the machine: a GPU, or a CPU in minutes
    python -m benchmarks device --batches 512 16384 --classes 1000 1000000 --dim 512 --exact 60502 2048 --rounds 10

Float32 at torch's precision "highest": no TF32, nothing compiled, no autocast. Embeddings, labels, weights and floors lie on the device before the clock starts.
Floors are those of `losses`: bare products of ready matrices. In-batch losses take the same batches, classes of four; classifiers have 1,024 classes, or as many as the batch.
A contender runs once by itself for its memory, then all of them run one after the other in each round, in random order, and the clock waits for the device.
What does not fit is an entry of its own. A GPU says so by itself; on a CPU, which would swap or be killed, what B beyond 512 needs is forecast from three small batches.
"""
import gc
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_classes import make_forms
from benchmarks.bench_losses import COLOURS, MARKERS, floor_of, floors, three_products
from benchmarks.bench_search import K, measure_exact
from benchmarks.common import available_bytes, grid, interleaved, machine_lines, pipe_table, ratio, waited, write_text
from benchmarks.contenders import CLASSES, CONTENDERS, DIM, PAIRWISE, PANELS, PER_CLASS, make_batch, step
from dml_companion.memory import peak_bytes

SIZES = {"cuda": dict(batches=(512, 2_048, 8_192, 16_384), classes=(1_000, 10_000, 100_000, 1_000_000), exact=(60_502, 2_048), rounds=10),
         "cpu": dict(batches=(256, 1_024), classes=(1_000, 10_000, 100_000), exact=(5_000, 512), rounds=10)}
PARTS = ("losses", "classes", "search")
KIND = {"cuda": "gpu", "cpu": "cpu"}                             # in the names of files
ROWS = {"cuda": 1_024, "cpu": 256}                               # of the batch over many classes
PROBES, ROOM = (128, 256, 512), .4                               # B from which a CPU's need is forecast; share of the free memory it may take: seen within a factor 2.5
FORMS = {"plain": "all logits", "chunks": "chunks of classes"}
SOP = 60_502                                                     # images that are judged there
REACH = {"losses": 4_096, "classes": 1_000_000}                  # largest B of losses.md and C of classes.md beside it
NO_ROOM, MEASURED = "out of memory", "measured"


# what fits, and what does not

def no_memory(error: RuntimeError) -> bool:
    "Whether an error says that memory ran out, in one of the words for it."
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ("not enough memory", "out of memory", "ALLOC_FAILED"))


def attempt(call: Callable[[], Any], device: str, fits: bool = True) -> tuple[Any, str]: # what the call gives, or None; "measured", or why not
    "A call that may want more memory than there is."
    try: return (call(), MEASURED) if fits else (None, NO_ROOM)
    except RuntimeError as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        state = NO_ROOM if no_memory(error) else f"failed: {told}"
    if device != "cpu": torch.cuda.empty_cache()
    return None, state


def forecast(call: Callable[[int], Any], size: int) -> float: # call: of B, builds and runs; bytes
    "What a CPU would hold at B: a parabola through three small batches."
    parabola = np.polyfit(PROBES, [peak_bytes(lambda: call(probe)) for probe in PROBES], 2)
    return float(np.polyval(parabola, size))


def has_room(call: Callable[[int], Any], size: int, device: str) -> bool: # call: as in `forecast`
    "Whether a batch may be tried: a GPU refuses by itself, small batches always fit."
    return device != "cpu" or size <= PROBES[-1] or forecast(call, size) <= ROOM * available_bytes()


def one_backward(z: torch.Tensor) -> None: # z: a leaf with gradient
    "A product through autograd, whose thread sets its own workspace up on a GPU: once, and not within a loss's peak. Among the floors of `loss_rows` is one already."
    (z @ z.T).sum().backward()
    z.grad = None


def first_step(loss: torch.nn.Module, z: torch.Tensor, y: torch.Tensor, device: str) -> tuple[Callable[[], None], int]:
    "A step to be timed, and the most memory in bytes that its first run held beyond weights and batch."
    for leaf in (z, *loss.parameters()): leaf.grad = None
    run = step(loss, z, y)
    return run, peak_bytes(run, device)


def timed(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]: # seconds a round, of all that fitted in all
    "Rounds of all; what runs out of memory beside the others is left out from there on."
    lost = set()
    def guarded(name, run):
        def call():
            if name in lost: return
            try: run()
            except RuntimeError as error:
                if not no_memory(error): raise
                lost.add(name)
        return waited(call, device)
    seconds = interleaved({name: guarded(name, run) for name, run in runs.items()}, rounds, warmup=1)
    return {name: taken for name, taken in seconds.items() if name not in lost}


def entry(about: dict, state: str, peak: float, mine: list[float] | None, products: list[float] | None) -> dict: # peak: bytes; seconds a round
    "A row: how long, how many times the floor, how much memory; or why there is none."
    middle = lambda seconds: statistics.median(seconds) if seconds else math.nan
    return about | dict(state=NO_ROOM if state == MEASURED and not mine else state, seconds=middle(mine), floor_seconds=middle(products),
                        times_floor=ratio(mine, products) if mine and products else math.nan,
                        best_times_floor=min(mine) / min(products) if mine and products else math.nan, peak_gb=peak / 1e9 if mine else math.nan)


# the three parts

def loss_rows(size: int, dim: int, rounds: int, device: str) -> tuple[list[dict], dict[str, list[float]]]: # rows, seconds a round
    "Every loss of the bench at one batch size."
    classes = max(CLASSES, -(-size // PER_CLASS))
    make = lambda c: c.make(classes, dim).to(device)
    def products(n):
        made = floors(make_batch(n, dim=dim, device=device)[0], classes)
        for run in made.values(): run()
        return {f"floor: {name}": run for name, run in made.items()}
    bare, state = attempt(lambda: products(size), device, has_room(products, size, device))
    tried = {label: (None, state) for label in CONTENDERS}
    if bare: z, y = make_batch(size, dim=dim, device=device)
    for label, c in CONTENDERS.items() if bare else ():
        alone = lambda n: step(make(c), *make_batch(n, dim=dim))()
        tried[label] = attempt(lambda: first_step(make(c), z, y, device), device, has_room(alone, size, device))
    seconds = timed((bare or {}) | {label: made[0] for label, (made, _) in tried.items() if made}, rounds, device)
    rows = []
    for label, (made, state) in tried.items():
        about = dict(part="losses", name=label, panel=CONTENDERS[label].panel, size=size, batch=size, dim=dim, floor=floor_of(label))
        mine, torchs = seconds.get(label), seconds.get("floor: autograd")
        rows.append(entry(about, state, made[1] if made else math.nan, mine, seconds.get(f"floor: {floor_of(label)}")))
        rows[-1]["times_autograd"] = ratio(mine, torchs) if mine and torchs and label in PAIRWISE else math.nan
    return rows, seconds


def class_bytes(form: str, rows: int, classes: int, dim: int) -> int: # form: "plain", "chunks" or "floor: classes"
    "What a CPU holds at least: weights and gradient, and as many (B, C) as each form has at once."
    return 4 * (2 * classes * dim + {"plain": 4, "chunks": 0, "floor: classes": 2}[form] * rows * classes)


def class_rows(classes: int, dim: int, rounds: int, device: str) -> tuple[list[dict], dict[str, list[float]]]: # rows, seconds a round
    "Linear cross-entropy over many classes: all logits at once, and chunks."
    n = ROWS[device]
    fits = lambda form: device != "cpu" or class_bytes(form, n, classes, dim) <= ROOM * available_bytes()
    z, y = torch.randn(n, dim, device=device, requires_grad=True), torch.randint(classes, (n,), device=device)
    bare = attempt(lambda: three_products(z.detach(), classes), device, fits("floor: classes"))[0]
    if bare: attempt(bare, device)
    attempt(lambda: one_backward(z), device)
    forms, state = attempt(lambda: make_forms(classes, dim, device=device), device, fits("chunks"))
    tried = {form: attempt(lambda: first_step(forms[form], z, y, device), device, fits(form)) if forms else (None, state) for form in FORMS}
    seconds = timed(({"floor: classes": bare} if bare else {}) | {form: made[0] for form, (made, _) in tried.items() if made}, rounds, device)
    about = dict(part="classes", size=classes, batch=n, dim=dim, floor="classes")
    rows = [entry(about | dict(name=FORMS[form]), state, made[1] if made else math.nan, seconds.get(form), seconds.get("floor: classes"))
            for form, (made, state) in tried.items()]
    return rows, {FORMS.get(name, name): taken for name, taken in seconds.items()}


def search_rows(n: int, dim: int, rounds: int, device: str) -> list[dict]:
    "Exact search, all against all."
    found, state = attempt(lambda: measure_exact(n, dim, rounds, device), device, device != "cpu" or 16 * n * dim <= ROOM * available_bytes())
    kept = ("seconds", "floor_seconds", "times_floor", "best_times_floor", "peak_gb")
    about = dict(part="search", size=n, batch=n, dim=dim, floor="product", state=state)
    return [about | dict(name=row["way"]) | {k: row[k] for k in kept} for row in found or ()] or [about | dict(name=way) for way in ("cosine", "euclidean")]


# what is written

def cell(column: str, form: str) -> Callable[[Any], str]:
    "A number of a row, or why there is none."
    return lambda row: form.format(row[column]) if row["state"] == MEASURED and row[column] == row[column] else "" if row["state"] == MEASURED else row["state"]


def family_lines(losses) -> str: # the rows of that part
    "One line a family: the middle loss and both ends."
    batches = sorted(losses["size"].unique())
    def told(rows):
        known, missing = rows.times_floor.dropna(), rows.times_floor.isna().sum()
        if known.empty: return NO_ROOM if (rows.state == NO_ROOM).all() else "not measured"
        return f"{known.median():.2f} ({known.min():.2f} to {known.max():.2f}{f'; {missing} not measured' if missing else ''})"
    rows = [[f"{PANELS[panel].lower()}, {mine.name.nunique()}", *(told(mine[mine["size"] == b]) for b in batches)] for panel, mine in losses.groupby("panel", sort=False)]
    return pipe_table(["family, losses", *(f"B = {b:,}" for b in batches)], rows)


def loss_text(losses) -> list[str]: # the rows of that part
    "Times the floor first, then milliseconds and memory."
    table = losses.rename(columns=dict(name="objective")).assign(ms=losses.seconds * 1e3, peak_mb=losses.peak_gb * 1e3)
    floor = losses[losses.floor == "pairs"].groupby("size").floor_seconds.first().dropna() * 1e3
    torchs = (losses.times_floor / losses.times_autograd).groupby(losses["size"]).median().dropna()
    say = lambda series, form: ", ".join(f"{v:{form}} at B = {b:,}" for b, v in series.items()) or "not measured"
    classes = "; ".join(f"{max(CLASSES, -(-b // PER_CLASS)):,} at B = {b:,}" for b in sorted(losses["size"].unique()))
    return ["## Losses over a batch, forward + backward",
            f"D = {losses.dim.iloc[0]}, batches of classes of four; classifiers and proxies over as many classes as the batch has, {CLASSES:,} at least ({classes}).",
            "**Times the floor, by family: the middle loss (lowest to highest)**", family_lines(losses),
            f"The two products alone take, in milliseconds: {say(floor, '.3g')}. Torch's own similarity matrix of normalised embeddings and its backward pass take, in floors: "
            f"{say(torchs, '.2f')}. Where the products take less than what starting a few kernels costs, the ratio is that of fixed costs. "
            "N-pair takes one pair of each class, so its own products are smaller than these and it can be below one.",
            "**Times the floor (pairs: two matrix products; classification and proxies: three)**", grid(table, "times_floor", cell("times_floor", "{:.2f}")),
            "**The same from the quickest run of each** (clearly below one, N-pair aside: other work never left the products alone)", grid(table, "best_times_floor", cell("best_times_floor", "{:.2f}")),
            "**Milliseconds, median**", grid(table, "ms", cell("ms", "{:,.2f}")),
            "**Memory: the most that torch held at once beyond weights and batch, MB**", grid(table, "peak_mb", cell("peak_mb", "{:,.0f}"))]


def class_text(classes) -> list[str]: # the rows of that part
    "One line for each number of classes and form."
    columns = dict(ms="{:,.2f}", floor_ms="{:,.2f}", times_floor="{:.2f}", best_times_floor="{:.2f}", peak_gb="{:.3f}")
    rows = [[f"{r['size']:,}", r["name"], *(cell(c, form)(r) for c, form in columns.items()), f"{4 * r['size'] * r['dim'] / 1e9:.3f}"]
            for r in classes.assign(ms=classes.seconds * 1e3, floor_ms=classes.floor_seconds * 1e3).to_dict("records")]
    return ["## Linear cross-entropy over many classes, forward + backward",
            f"B = {classes.batch.iloc[0]:,}, D = {classes.dim.iloc[0]}, no bias, random labels; both forms train the same weights. "
            "Chunks compute the logits twice, so their floor would be four products.",
            pipe_table(["classes", "form", "ms", "three products, ms", "times the products", "quickest runs", "peak, GB", "of it the weights' gradient, GB"], rows),
            "Peak: the most that torch held at once beyond weights and batch."]


def search_text(search) -> list[str]: # the rows of that part
    "One line a way."
    columns = dict(seconds="{:.3f}", floor_seconds="{:.3f}", times_floor="{:.2f}", best_times_floor="{:.2f}", peak_gb="{:.2f}")
    rows = [[r["name"], f"{r['size']:,}", f"{r['dim']:,}", *(cell(c, form)(r) for c, form in columns.items())] for r in search.to_dict("records")]
    return ["## Exact search, all against all", pipe_table(["way", "n", "d", "seconds", "product, seconds", "times the product", "quickest runs", "peak, GB"], rows),
            f"{K} neighbours, self left out, normal vectors. Peak: the most that torch held above the embeddings themselves."]


def not_measured(table) -> str:
    "What larger sizes are missing, and where a CPU's are; then what else."
    missing = []
    for part, letter in (("losses", "B"), ("classes", "C")):
        sizes = table[(table.part == part) & (table.state == MEASURED)]["size"]
        if len(sizes): missing.append(f"{letter} above {sizes.max():,}{f' (on a CPU {part}.md goes to {REACH[part]:,})' if sizes.max() < REACH[part] else ''}")
    searched = table[(table.part == "search") & (table.state == MEASURED)]["size"]
    if len(searched) and searched.max() < SOP: missing.append(f"search above {searched.max():,} (on a CPU search.md goes to {SOP:,} of 2,048 numbers)")
    return f"Not measured here: {', '.join([*missing, 'bf16', 'TF32', 'compiled losses', 'other libraries', 'several devices', 'indexes'])}."


def markdown(table, rounds: int, device: str) -> str:
    "What was measured where, the three parts, what was not measured."
    where = f"On {torch.cuda.get_device_name()}." if device == "cuda" else "**No GPU here: the same measurements on the CPU, small.** They say nothing about a GPU."
    parts = [(loss_text, "losses"), (class_text, "classes"), (search_text, "search")]
    refuses = ("A GPU says so itself." if device == "cuda" else
               f"On a CPU that is forecast from three small batches, and what would take more than {ROOM} of the free memory is not started.")
    return "\n\n".join([
        "# Speed on the device, against matrix products", f"{where} Float32 at torch's precision \"highest\" (no TF32); median of {rounds} rounds.",
        *(line for text, part in parts if (table.part == part).any() for line in text(table[table.part == part])),
        "## How, and what is not here",
        f"Everything lies on the device before the clock starts, and the clock waits for the device. All contenders of a size run one after the other in each "
        f"round, in random order; ratios are medians over rounds of ratios within a round. *{NO_ROOM}*: it does not fit beside the matrices of the floor. {refuses}",
        *(["On a GPU no loss looks at its labels, since that would make the host wait: angular multiplies whole (B, B) matrices there, and losses with a table of positives keep B - 1 columns."] if device == "cuda" else []),
        *([f"Left out of this run: {', '.join(absent)}."] if (absent := [part for part in PARTS if not (table.part == part).any()]) else []),
        not_measured(table), "\n".join(machine_lines())])


def draw_panel(ax, table, losses: bool) -> None: # losses: families against B; otherwise forms against C
    "A thick line a family or form, in a colour and with a marker that all can tell apart; a thin one a loss."
    for i, (group, rows) in enumerate(table.groupby("panel" if losses else "name", sort=False), 0 if losses else len(PANELS)):
        for _, line in rows.groupby("name") if losses else (): ax.plot(line["size"], line.times_floor, color=COLOURS[i], lw=.7, alpha=.45, zorder=1)
        middle = rows.groupby("size").times_floor.median()
        ax.plot(middle.index, middle, color=COLOURS[i], marker=MARKERS[i], ms=6, lw=2, label=PANELS[group].lower() if losses else group)
    sizes = sorted(table["size"].unique())
    ax.axhline(1, color="black", lw=1, ls="--", zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="batch size B" if losses else "classes C", title="Losses over a batch" if losses else "Cross-entropy")
    ax.set_xticks(sizes, [f"{s:,}" if losses else f"$10^{{{math.log10(s):.3g}}}$" for s in sizes]); ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend(loc="upper center", bbox_to_anchor=(.5, -.16), ncols=1 + losses, handlelength=1.4, columnspacing=1)


def draw(table):
    "Times the floor: families of losses against B, both forms of cross-entropy against C."
    import matplotlib.pyplot as plt
    from dml_companion.reproduction import use_house_style
    use_house_style()
    parts = [part for part in ("losses", "classes") if (table.part == part).any()]
    with plt.rc_context({"font.size": 12, "axes.titlesize": 12, "axes.labelsize": 12, "xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 11}):
        fig, axes = plt.subplots(1, len(parts), figsize=(4.4 * len(parts), 5.4), sharey=True, squeeze=False)
        for ax, part in zip(axes[0], parts): draw_panel(ax, table[table.part == part], part == "losses")
        axes[0, 0].set_ylabel("time / matrix products")
        fig.text(0, -.09, "Forward + backward, float32, medians. Dashed: the products alone.\nThin: one loss; thick: the family's middle.", size=11)
    return fig


def as_table(rows: list[dict]) -> "pd.DataFrame":
    "All rows as one table, columns in reading order."
    import pandas as pd
    columns = ["part", "name", "panel", "size", "batch", "dim", "floor", "state", "seconds", "floor_seconds", "times_floor", "best_times_floor", "times_autograd", "peak_gb"]
    return pd.DataFrame(rows, columns=columns)


def write_tables(rows: list[dict], raw: list[dict], rounds: int, folder: Path, device: str) -> "pd.DataFrame": # the table
    "What is measured so far: a row for each contender and size, the seconds of each round, and Markdown."
    import pandas as pd
    name, table = f"device_{KIND[device]}", as_table(rows)
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    pd.DataFrame(raw, columns=["part", "size", "name", "round", "seconds"]).to_csv(folder / f"{name}_rounds.csv", index=False, float_format="%.6g")
    write_text(folder / f"{name}.md", markdown(table, rounds, device))
    return table


def measure(use: dict, dim: int, device: str, only: tuple[str, ...] = PARTS): # use: one of SIZES, or what was asked instead; yields rows and seconds a round by part, size and name
    "Part by part, size by size, smallest first."
    for part, of, sizes in (("losses", loss_rows, use["batches"]), ("classes", class_rows, use["classes"])):
        for size in sorted(sizes) if part in only else ():
            gc.collect()
            if device != "cpu": torch.cuda.empty_cache()
            rows, seconds = of(size, dim, use["rounds"], device)
            yield rows, [dict(part=part, size=size, name=name, round=i, seconds=s) for name, taken in seconds.items() for i, s in enumerate(taken)]
    if use["exact"][0] and "search" in only: yield search_rows(*use["exact"], use["rounds"], device), []


def main(out_folder: str | Path = "figures/bench", # csv, md, svg and png go here
         batches: tuple[int, ...] | None = None, # sizes of batches; these and the next two: default by device
         classes: tuple[int, ...] | None = None, # numbers of classes
         exact: tuple[int, int] | None = None, # vectors and dimension of exact search; 0 0: leave it out
         dim: int = DIM, # of embeddings, but for exact search
         rounds: int | None = None,
         threads: int | None = None, # of torch
         only: tuple[str, ...] = PARTS, # for a machine that is lent by the minute; give each its own folder
        ) -> None:
    "Measure and write device_gpu or device_cpu: .csv, _rounds.csv, .md, .svg, .png; tables again after every size."
    from dml_companion.reproduction import output_folder, save_figure
    device, before, precision = "cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads(), torch.get_float32_matmul_precision()
    if {*only} != {*PARTS} and Path(out_folder) == Path("figures/bench"): raise ValueError("a part alone would replace the whole table in figures/bench: give it a folder of its own with --out")
    use = SIZES[device] | {k: v for k, v in dict(batches=batches, classes=classes, exact=exact, rounds=rounds).items() if v is not None}
    if {*only} == {"search"} and not use["exact"][0]: raise ValueError("--only search with --exact 0 0 leaves nothing to measure")
    if min(use["exact"]) < 0 or 0 < use["exact"][0] <= K or (use["exact"][0] and not use["exact"][1]):
        raise ValueError(f"exact search needs more than {K} vectors and a dimension, got {use['exact'][0]} {use['exact'][1]}; 0 0 leaves it out")
    folder, rows, raw = output_folder(out_folder), [], []
    torch.set_num_threads(threads or before)
    torch.set_float32_matmul_precision("highest")
    try:
        for more, seconds in measure(use, dim, device, only):
            rows, raw = rows + more, raw + seconds
            table = write_tables(rows, raw, use["rounds"], folder, device)
            print(f"device: {more[0]['part']}, {more[0]['size']:,}: {sum(r['state'] == MEASURED for r in more)} of {len(more)} measured on the {device}", flush=True)
        if table[table.part != "search"].times_floor.notna().any(): save_figure(draw(table), f"device_{KIND[device]}", folder)
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


if __name__ == "__main__": main()
