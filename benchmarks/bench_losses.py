"""Forward + backward of every objective against matrix-product floors and peers, in one process, interleaved.

Two floors for losses over pairs of a (B, D) batch:
- `two products`: Z @ Z.T and (G + G.T) @ Z from a given G + G.T: what no exact method over all pairs can avoid, without
  normalisation, masks, exponentials or autograd. The target, within 2x at B >= 512, is against this one.
- `autograd`: the similarity matrix of normalised embeddings and its backward pass by torch from a given gradient, which
  takes three products because autograd does not know that the matrix is symmetric.
For classification over C classes: Z @ W.T, G @ W and G.T @ Z (three products; W needs its gradient too).
"""
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved, machine_lines, ratio, write_text
from dml_companion import objectives

DIM, CLASSES, SIZES = 512, 1000, (128, 256, 512, 1024, 2048)
PAIRWISE = { # label -> (name, options, peer)
    "contrastive": ("contrastive", {}, None),
    "contrastive, plain hinges": ("contrastive", dict(squared=False, reduction="nonzero"), "contrastive"),
    "SNCA": ("snca", {}, "snca"),
    "multi-similarity": ("multi_similarity", {}, "ms"),
    "multi-similarity, mined": ("multi_similarity", dict(mining=.1), "ms mined"),
}
CLASSIFICATION = {
    "cross-entropy": ("cross_entropy", {}, "linear"),
    "normalised softmax": ("normalized_softmax", {}, "normalized_softmax"),
    "center + cross-entropy": ("center", {}, None),
}


class LinearCrossEntropy(torch.nn.Module):
    "Torch's own: the peer of `cross_entropy`, which pytorch-metric-learning does not have."
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(DIM, CLASSES)
    def forward(self, z, y): return F.cross_entropy(self.linear(z), y)


def make_peers() -> dict[str, Callable]:
    "pytorch-metric-learning under the settings where it means the same; empty if it is not installed."
    try: from pytorch_metric_learning import losses, miners
    except ImportError: return {"linear": LinearCrossEntropy()}
    ms, miner = losses.MultiSimilarityLoss(2, 50, .5), miners.MultiSimilarityMiner(.1)
    return {"contrastive": losses.ContrastiveLoss(), "snca": losses.NCALoss(softmax_scale=5), "ms": ms,
            "ms mined": lambda z, y: ms(z, y, miner(z, y)), "linear": LinearCrossEntropy(),
            "normalized_softmax": losses.NormalizedSoftmaxLoss(CLASSES, DIM)}


def make_batch(size: int, per_class: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    "A half-trained batch: classes of four around random centres."
    g = torch.Generator().manual_seed(size)
    y = torch.arange(size) // per_class
    z = torch.randn(size // per_class + 1, DIM, generator=g)[y] + torch.randn(size, DIM, generator=g)
    return z.requires_grad_(), y


def step(loss: Callable, z: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    "Forward and backward of a loss, gradients dropped first."
    weights = list(loss.parameters()) if isinstance(loss, torch.nn.Module) else []
    def run():
        for leaf in (z, *weights): leaf.grad = None
        loss(z, y).backward()
    return run


def floors(z: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], object]]:
    "The products themselves."
    n, data = len(z), z.detach()
    pairs, classes = torch.randn(n, n), torch.randn(n, CLASSES)
    W = torch.randn(CLASSES, DIM)
    def two_products(): data @ data.T; pairs @ data
    def three_products(): data @ W.T; classes @ W; classes.T @ data
    def autograd():
        z.grad = None
        unit = F.normalize(z)
        (unit @ unit.T).backward(pairs)
    return {"two products": two_products, "autograd": autograd, "class products": three_products}


def measure(size: int, rounds: int) -> list[dict]:
    "One batch size: a row for each objective."
    z, y = make_batch(size)
    peers, ours = make_peers(), {**PAIRWISE, **CLASSIFICATION}
    contenders = floors(z, y)
    for label, (name, options, _) in ours.items():
        contenders[label] = step(objectives.make(name, CLASSES, DIM, **options), z, y)
    for label, peer in peers.items(): contenders[f"peer {label}"] = step(peer, z, y)
    seconds, rows = interleaved(contenders, rounds), []
    ms = {name: statistics.median(s) * 1e3 for name, s in seconds.items()}
    for label, (_, _, peer) in ours.items():
        floor = "two products" if label in PAIRWISE else "class products"
        other = f"peer {peer}" if f"peer {peer}" in seconds else None
        rows.append(dict(objective=label, batch=size,
                         ours_ms=ms[label], best_ms=min(seconds[label]) * 1e3, floor_ms=ms[floor],
                         times_floor=ratio(seconds[label], seconds[floor]),
                         best_times_floor=min(seconds[label]) / min(seconds[floor]),
                         times_autograd=ratio(seconds[label], seconds["autograd"]) if label in PAIRWISE else None,
                         peer_ms=ms[other] if other else None,
                         peer_times_ours=ratio(seconds[other], seconds[label]) if other else None,
                         best_peer_times_ours=min(seconds[other]) / min(seconds[label]) if other else None,
                         peer_times_floor=ratio(seconds[other], seconds[floor]) if other else None))
    return rows


def markdown(table, rounds: dict[int, int]) -> str:
    "The three questions as three tables: how long, how far from the floor, how far from the peer."
    def grid(column, digits, title):
        wide = table.pivot(index="objective", columns="batch", values=column)
        wide = wide.loc[list(dict.fromkeys(table.objective))].dropna(how="all")
        lines = [["objective", *(f"B = {b}" for b in wide.columns)], ["---", *["---:"] * len(wide.columns)]]
        lines += [[name, *(f"{v:.{digits}f}" for v in row)] for name, row in zip(wide.index, wide.values)]
        return f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([
        "# Losses, forward + backward",
        f"D = {DIM}, float32, classes of four; classification over {CLASSES:,} classes.",
        grid("ours_ms", 2, "Milliseconds, median"),
        grid("times_floor", 2, "Times the floor (pairwise: two matrix products; classification: three)"),
        grid("best_times_floor", 2, "The same from the quickest run of each, the least disturbed"),
        grid("times_autograd", 2, "Times torch's own similarity matrix, normalised, and its backward pass"),
        grid("peer_times_ours", 2, "How many times longer the peer takes (pytorch-metric-learning; "
                                   "cross-entropy: torch's Linear and cross_entropy)"),
        "Floors are bare products on ready matrices: no normalisation, no masks, no autograd. All contenders run in "
        "one process, one after the other in each round, in random order; ratios are medians over rounds of ratios "
        "within a round. Rounds: " + ", ".join(f"{r} at B = {b}" for b, r in rounds.items()) + ". `center` and the contrastive "
        "loss with squared hinges have no peer.",
        "\n".join(machine_lines())])


def draw(table):
    "Times the floor against batch size, ours and the peer's."
    import matplotlib.pyplot as plt
    from dml_companion.reproduction import STYLE, use_house_style
    use_house_style()
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
    titles, batches = ("Pairwise losses", f"Classification, {CLASSES:,} classes"), sorted(table.batch.unique())
    for ax, group, title in zip(axes, (PAIRWISE, CLASSIFICATION), titles):
        for label, (name, options, peer) in group.items():
            rows, look = table[table.objective == label], STYLE[name]
            line = ":" if options else "-"
            ax.plot(rows.batch, rows.times_floor, line, color=look["color"], marker=look["marker"], label=label)
            if peer: ax.plot(rows.batch, rows.peer_times_floor, line, color=look["color"], alpha=.35, lw=1)
        for y, text, dash in ((1, "floor", "-"), (2, "target", "--")):
            ax.axhline(y, color="grey", lw=.8, ls=dash, zorder=0)
            ax.text(1.01, y, text, va="center", size=8, color="grey", transform=ax.get_yaxis_transform())
        ax.set(xscale="log", yscale="log", xlabel="batch size B", title=title)
        ax.set_xticks(batches, [str(b) for b in batches]); ax.minorticks_off()
        ax.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        ax.legend(fontsize=7, loc="upper right")
    axes[0].set_ylabel("time / matrix products")
    note = f"Forward + backward, D = {DIM}, float32. Strong lines: ours; pale: the peer, same settings. Medians."
    fig.text(0, -.06, note, size=8)
    return fig


def main(out_folder: str | Path = "figures/bench", # csv, md, svg and png go here
         sizes: tuple[int, ...] = SIZES, # batch sizes
         threads: int = 2, # torch threads
         seconds: float = 20., # rough time for each batch size
        ) -> None:
    "Measure and write losses.{csv,md,svg,png}."
    import time
    import pandas as pd
    from dml_companion.reproduction import output_folder, save_figure
    before, rows, rounds = torch.get_num_threads(), [], {}
    torch.set_num_threads(threads)
    try:
        for size in sizes:
            start = time.perf_counter()
            measure(size, 1)                                     # three rounds, two of them to warm up
            rounds[size] = max(5, min(100, int(3 * seconds / (time.perf_counter() - start))))
            rows += measure(size, rounds[size])
            print(f"losses: B = {size}, {rounds[size]} rounds", flush=True)
        table, folder = pd.DataFrame(rows), output_folder(out_folder)
        save_figure(draw(table), "losses", folder, data=table)
        write_text(folder / "losses.md", markdown(table, rounds))
    finally: torch.set_num_threads(before)


if __name__ == "__main__": main()
