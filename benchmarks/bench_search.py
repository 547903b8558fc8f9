"""Search at scale: exact search at SOP's size beside its matrix product, and recall against time of three indexes.

Not among the parts that run by default: exact search alone is some minutes of two cores for each round, and at a million
vectors the indexes take about ten minutes to build. Say `python -m benchmarks search`, with smaller sizes if need be:

    python -m benchmarks search --exact 60502 2048 --sizes 20000 100000 1000000 --dim 128 --queries 1000 --rounds 5 --threads 2
    python -m benchmarks search --exact 0 0 --sizes 20000 --embeddings mine.npy        # no exact part; your own embeddings, too
    python -m benchmarks search --run runs/train/omniglot/cross_entropy/s0-...         # and views of a finished run's images, as many as the largest size

The floor is the product alone, as in `retrieval`. A curve is one index asked at several settings, all queries at once, the
quickest of the rounds. What exact search does once for a gallery (normalising, looking for equal rows) counts as its building.
"""
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import interleaved, machine_lines, pipe_table, ratio, waited, write_text
from dml_companion.geometry import chunks, normalize
from dml_companion.indexes import Stack, break_even, make_index, open_embeddings, quickest, sweep, synthetic_embeddings
from dml_companion.memory import peak_bytes
from dml_companion.retrieval import nearest

EXACT, SIZES, DIM, QUERIES, K, WANTED = (60_502, 2_048), (20_000, 100_000, 1_000_000), 128, 1_000, 10, .95
CELLS, KEPT = (1, 2, 4, 8, 16, 32, 64, 128, 256), (10, 20, 40, 80, 160, 320, 640)
LOOKS = {"ivf_flat": ("#0072B2", "o"), "ivf_pq": ("#D55E00", "s"), "ivf_pq, refined": ("#E69F00", "D"), "hnsw": ("#009E73", "^")}


# exact search beside its product

def product(unit: torch.Tensor): # (n, d)
    "The floor: scores of blocks of queries, in one buffer."
    size = 256 if unit.device.type == "cpu" else 4096
    buffer = torch.empty(size, len(unit), device=unit.device)
    def run():
        for rows in chunks(len(unit), size): torch.mm(unit[rows], unit.T, out=buffer[:rows.stop - rows.start])
    return run


def measure_exact(n: int, d: int, rounds: int, device: str) -> list[dict]:
    "All against all on one device: seconds, times the floor, and the most memory above the embeddings."
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device)
    ways = {metric: waited(lambda metric=metric: nearest(x, K, metric=metric), device) for metric in ("cosine", "euclidean")}
    peaks = {way: peak_bytes(run, device) for way, run in ways.items()}                     # also the warm-up
    unit = normalize(x)
    seconds = interleaved({"product": waited(product(unit), device), **ways}, rounds, warmup=int(device != "cpu"))
    floor = seconds["product"]
    return [dict(device=device, way=way, n=n, d=d, k=K, rounds=rounds, seconds=statistics.median(seconds[way]), floor_seconds=statistics.median(floor),
                 times_floor=ratio(seconds[way], floor), best_times_floor=min(seconds[way]) / min(floor), peak_gb=peak / 1e9,
                 embeddings_gb=4 * n * d / 1e9, matrix_gb=4 * n * n / 1e9) for way, peak in peaks.items()]


# recall against time

def divisor(dim: int, most: int) -> int:
    "The largest divisor of `dim` up to `most`."
    return max(m for m in range(1, max(1, most) + 1) if dim % m == 0)


def curves(gallery: np.ndarray, queries: np.ndarray, data: str, rounds: int, threads: int) -> list[dict]:
    "Exact search and three indexes of one gallery: a row for each setting."
    import faiss
    n, dim = gallery.shape
    truth, once = nearest(queries, K, gallery)[1], quickest(lambda: nearest(queries[:1], K, gallery), rounds)
    each = max(1e-9, (quickest(lambda: nearest(queries, K, gallery), rounds) - once) / max(1, len(queries) - 1))
    about = dict(data=data, n=n, d=dim, queries=len(queries), k=K)
    rows = [about | dict(index="exact", built="", build_seconds=once, gb=4 * n * dim / 1e9, setting=0, recall=1., seconds=each, visited=1.)]
    for kind, options in (("ivf_flat", {}), ("ivf_pq", dict(m=divisor(dim, dim // 4))), ("hnsw", dict(threads=threads))):
        index = make_index(gallery, index=kind, **options)
        built = dict(built=" ".join(f"{name}={value}" for name, value in index.options.items()), build_seconds=index.seconds,
                     gb=len(faiss.serialize_index(index.handle)) / 1e9)
        for label, where in ((kind, None), *([(f"{kind}, refined", gallery)] if kind == "ivf_pq" else [])):
            found = sweep(index, queries, truth, KEPT if kind == "hnsw" else CELLS, where, rounds=rounds)
            rows += [about | dict(index=label) | built | row for row in found]
        print(f"search: {data}, {n:,} vectors, {kind}: built in {index.seconds:.1f} s", flush=True)
        del index
    return rows


def opened(file: str, queries: int) -> Stack:
    "Own embeddings, on disk; ValueError if they are too few."
    stack = open_embeddings(file)
    if len(stack) < 2 * K + queries: raise ValueError(f"{file} has {len(stack)} rows: give more, or fewer --queries than {queries}")
    return stack


def check_run(run: str | Path) -> Path:
    "The folder of a finished run; ValueError for another."
    for name, why in (("record.json", "it is no finished run"), ("checkpoint.pt", "its weights were removed")):
        if not (Path(run) / name).is_file(): raise ValueError(f"{run} has no {name}, so {why}: give a folder runs/train/<data set>/<row>/s<seed>-... that has both")
    return Path(run)


def views(run: str | Path, count: int, block: int = 2048) -> tuple[np.ndarray, str]: # (count, d), name
    "Embeddings of real images by a finished run's encoder: the images as they are, then randomly augmented as in its training, over and over."
    from dml_companion.datasets import load
    from dml_companion.device import augment, draw_table
    from dml_companion.encoders import build_encoder
    from dml_companion.training import Recipe, unsealed
    run = check_run(run)
    recipe = Recipe(**json.loads((run / "record.json").read_text())["recipe"])
    data = load(recipe.dataset, size=recipe.size, **recipe.data_options)
    images = torch.cat([split.batch(np.arange(len(split))) for split in (data.train, data.query)])
    encoder = build_encoder(recipe.encoder, in_channels=images.shape[1], size=images.shape[-1], dim=recipe.dim, norm=recipe.norm, crop=recipe.crop, **recipe.encoder_options)
    encoder.load_state_dict(unsealed(run / "checkpoint.pt")["encoder"])
    encoder.eval()
    out, generator = np.empty((count, encoder.dim), np.float32), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows in chunks(count, block):
            number = torch.arange(rows.start, rows.stop)
            pixels = images[number % len(images)]
            varied = augment(pixels, draw_table(len(pixels), pixels.shape[-2:], recipe.augment, generator), recipe.augment)
            plain = (number < len(images))[:, None, None, None]
            out[rows] = encoder(torch.where(plain, pixels / 255, varied.clamp(0, 1))).numpy()
    return out, f"views of {recipe.dataset}"


def run_name(run: str | Path) -> str:
    "Row, seed and hash of a finished run."
    record = json.loads((check_run(run) / "record.json").read_text())
    return f"{record['row']}, seed {record['seed']}, {record['run']}"


def asked_apart(x: np.ndarray, queries: int) -> tuple[np.ndarray, np.ndarray]: # gallery, queries
    "Some random rows ask, the others are searched."
    asks = np.zeros(len(x), dtype=bool)
    asks[np.random.default_rng(0).choice(len(x), queries, replace=False)] = True
    return x[~asks], x[asks]


def verdicts(table) -> list[dict]:
    "For each gallery and index: the quickest setting that finds enough, against exact search."
    found = []
    for (data, n), rows in table.groupby(["data", "n"], sort=False):
        exact = rows[rows["index"] == "exact"].iloc[0]
        for name in LOOKS:
            mine = rows[rows["index"] == name]
            good = mine[mine.recall >= WANTED]
            best = good.loc[good.seconds.idxmin()] if len(good) else None
            pays = None if best is None else break_even(max(0, best.build_seconds - exact.build_seconds), exact.seconds, best.seconds)
            found.append(dict(data=data, n=n, index=name, top=mine.recall.max(), gb=mine.gb.iloc[0], build=mine.build_seconds.iloc[0], best=best,
                              times=None if best is None else exact.seconds / best.seconds, pays=pays))
    return found


# what is written

def origin(table) -> str:
    "Whose views they are: a sentence for each data set that has some."
    told = table[table.data.astype(str).str.startswith("views of ")].drop_duplicates("data").to_dict("records")
    return "".join(f" {r['data'].capitalize()}: " + (f"the run {r['run']}." if r.get("run") else "the run's name was not recorded then.") for r in told)


def markdown(table, exact) -> str:
    "Exact search, then for each gallery what 95 % recall costs, then the options."
    parts = ["# Search at scale"]
    if len(exact):
        head = ["way", "n", "d", "seconds", "product, seconds", "times the product", "quickest runs", "peak, GB", "embeddings, GB", "whole matrix, GB"]
        lines = [[f"{r.way}, {r.device}", f"{r.n:,}", f"{r.d:,}", f"{r.seconds:.2f}", f"{r.floor_seconds:.2f}", f"{r.times_floor:.2f}",
                  f"{r.best_times_floor:.2f}", f"{r.peak_gb:.2f}", f"{r.embeddings_gb:.2f}", f"{r.matrix_gb:.2f}"] for r in exact.itertuples()]
        parts += [f"**Exact, all against all, {K} neighbours, self left out**", pipe_table(head, lines),
                  f"Float32, normal vectors. Peak: the most that torch held above the embeddings themselves. Seconds are medians of {exact.rounds.iloc[0]} rounds, ratios those of "
                  "ratios within a round. A ratio below one saves no part of the product, which is timed in the same rounds: noise, large on two cores, moves either."]
    if len(table):
        head = ["index", "data", "n", f"setting for recall {WANTED}", "ms a query", "exact / index", "visited", "pays after, queries", "build, s",
                "GB", "best recall seen"]
        lines = []
        for v in verdicts(table):
            b, pays = v["best"], "never" if v["pays"] == float("inf") else "" if v["pays"] is None else f"{v['pays']:,.0f}"
            took = ["not reached", "", "", ""] if b is None else [str(b.setting), f"{1e3 * b.seconds:.3g}", f"{v['times']:.2g}", f"{b.visited:.3f}"]
            lines.append([v["index"], v["data"], f"{v['n']:,}", *took, pays, f"{v['build']:.1f}", f"{v['gb']:.3g}", f"{v['top']:.3f}"])
        own = table[table["index"] == "exact"]
        base = "; ".join(f"{r.data}, {r.n:,} x {r.d}: {1e3 * r.seconds:.3g} ms a query after {r.build_seconds:.2g} s" for r in own.itertuples())
        parts += [f"**What recall {WANTED} of the {K} nearest costs, cosine**", pipe_table(head, lines),
                  f"Exact search: {base}. Recalls are rounded; every setting is in search.csv. A setting is nprobe or ef_search; refined: 4 x {K} candidates "
                  "sorted by true distances. Synthetic data are those of notebook 03b: classes of ten, 16 directions that matter. Views of a data set are real: all "
                  f"its images as a trained encoder sees them, then augmented as in its training, over and over; rows at random ask.{origin(table)}"]
        options = table[table.built != ""].drop_duplicates(["data", "n", "built"])
        parts += ["\n".join(f"- {r['data']}, {r['n']:,}, {r['index']}: {r['built']}" for r in options.to_dict("records"))]
    return "\n\n".join([*parts, "\n".join(machine_lines())])


def draw(table):
    "Recall against time, a panel for each gallery."
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter
    from dml_companion.reproduction import use_house_style
    use_house_style()
    panels = list(table.groupby(["data", "n"], sort=False))
    wide = min(2, len(panels))
    high = -(-len(panels) // wide)
    fig, axes = plt.subplots(high, wide, figsize=(3.4 * wide, 2.6 * high + .9), sharex=True, sharey=True, squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels):]: ax.set_axis_off()
    for ax, ((data, n), rows) in zip(axes.flat, panels):
        for name, (colour, marker) in LOOKS.items():
            mine = rows[rows["index"] == name]
            ax.plot(1e3 * mine.seconds, mine.recall, color=colour, marker=marker, ms=4, lw=1.4, label=name)
        ax.axvline(1e3 * rows[rows["index"] == "exact"].seconds.iloc[0], color="black", lw=1, ls="--", label="exact")
        ax.set(xscale="log", ylim=(0, 1.03), title=f"{n:,} {data}, d = {rows.d.iloc[0]}")
        ax.title.set_size(9)
        ax.xaxis.set_major_locator(LogLocator()); ax.xaxis.set_major_formatter("{x:g}"); ax.xaxis.set_minor_formatter(NullFormatter())
    for ax in axes[-1]: ax.set_xlabel("milliseconds a query")
    for ax in axes[:, 0]: ax.set_ylabel(f"recall of the {K} nearest")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    fig.suptitle(f"Cosine, {table.queries.iloc[0]:,} queries at once, quickest round. Points: nprobe, or ef_search of hnsw", size=8)
    return fig


def main(out_folder: str | Path = "figures/bench", # csv, md, svg and png go here
         exact: tuple[int, int] = EXACT, # vectors and dimension of the exact part; 0 0: leave it out
         sizes: tuple[int, ...] = SIZES, # of synthetic galleries
         dim: int = DIM, # of synthetic galleries
         queries: int = QUERIES,
         rounds: int = 5, # of the indexes; exact search at SOP's size, minutes a pass, takes two
         threads: int = 2, # of torch and faiss
         embeddings: str | None = None, # a .npy (.npz, folder): one gallery more
         run: str | None = None, # folder of a finished run: views of its images, as many as the largest size
        ) -> None:
    "Measure and write search.{csv,md,svg,png} and search_exact.csv, again after every gallery."
    import pandas as pd
    from dml_companion.reproduction import output_folder, save_figure
    for name, values in dict(sizes=sizes, dim=[dim], queries=[queries], rounds=[rounds], threads=[threads]).items():
        if min(values) < 1: raise ValueError(f"{name} must be at least 1, got {min(values)}")
    if min(exact) < 0 or (exact[0] and min(exact[0] - K, exact[1]) < 1): raise ValueError(f"exact search needs more than {K} vectors and a dimension, got {exact[0]} {exact[1]}; 0 0 leaves it out")
    if min(sizes) <= 2 * K: raise ValueError(f"a gallery needs more than {2 * K} vectors, got {min(sizes)}")
    if run: check_run(run)                                          # before an hour of other galleries
    mine = opened(embeddings, queries) if embeddings else None
    before, folder, rows = torch.get_num_threads(), output_folder(out_folder), []
    torch.set_num_threads(threads)
    try:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])] if exact[0] else []
        alone = pd.DataFrame([row for device in devices for row in measure_exact(*exact, min(rounds, 2), device)])
        if len(alone): alone.to_csv(folder / "search_exact.csv", index=False, float_format="%.4g")
        if len(alone): write_text(folder / "search.md", markdown(pd.DataFrame(), alone))
        made = [lambda size=size: (np.split(synthetic_embeddings(size + queries, dim), [size]), "synthetic") for size in sizes]
        if mine is not None: made.append(lambda: (asked_apart(np.array(mine.read(slice(0, len(mine))), dtype=np.float32), queries), Path(embeddings).stem))
        if run:
            def seen(): x, name = views(run, max(sizes) + queries); return asked_apart(x, queries), name
            made.append(seen)
        for make in made:
            (gallery, asked), name = make()
            whose = run_name(run) if name.startswith("views of ") and run else ""
            rows += [row | dict(run=whose) for row in curves(gallery, asked, name, rounds, threads)]
            table = pd.DataFrame(rows)
            save_figure(draw(table), "search", folder, data=table)
            write_text(folder / "search.md", markdown(table, alone))
    finally: torch.set_num_threads(before)


if __name__ == "__main__": main()
