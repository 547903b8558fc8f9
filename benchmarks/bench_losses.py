"""Forward + backward of every objective against matrix-product floors and peers, in one process, interleaved.

Two floors for losses over pairs of a (B, D) batch:
- `two products`: Z @ Z.T and (G + G.T) @ Z from a given G + G.T: what no exact method over all pairs can avoid, without
  normalisation, masks, exponentials or autograd. The target, within 2x at B >= 512, is against this one.
- `autograd`: the similarity matrix of normalised embeddings and its backward pass by torch from a given gradient, which
  takes three products because autograd does not know that the matrix is symmetric.
For classification and proxies with C vectors: Z @ W.T, G @ W and G.T @ Z (three products; W needs its gradient too); C
is three or ten times the classes for sub-centres and SoftTriple. A regulariser adds two products among the centres.
"""
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import available_bytes, grid, interleaved, kept_lines, machine_lines, pipe_table, ratio, write_text
from benchmarks.contenders import CLASSES, CLASSIFICATION, CONTENDERS, DIM, EXEMPT, LIMITS, MISSED, PADS, PAIRWISE
from benchmarks.contenders import PANELS, PASSES, TORCH, make_batch, make_peers, peer_bytes, step

SIZES, PATIENCE, FEW = (128, 512, 1024, 4096), 5., 3             # B; seconds a step from which a peer gets few rounds
TARGET, TARGET_FROM, PEERS_AT = 2., 512, 512                     # times the floor, from which B; B of peers' targets
PEER_TARGETS = {"lifted": 500, "triplet, all semi-hard": 10, "margin, distance-weighted": 10,
                "multi-similarity, mined": 3, "circle": 1, "SoftTriple, no regulariser": 1}  # others, and other B: never slower
UNDECIDED = f"the median and the quickest run lie on different sides of {TARGET:g}"


def three_products(data: torch.Tensor, vectors: int) -> Callable[[], None]: # data: (n, d); vectors: of all classes
    "What no classifier can avoid: scores, and the gradients of embeddings and of weights."
    W, slopes = torch.randn(vectors, data.shape[1], device=data.device), torch.randn(len(data), vectors, device=data.device)
    def run(): data @ W.T; slopes @ W; slopes.T @ data
    return run


def floors(z: torch.Tensor, num_classes: int = CLASSES) -> dict[str, Callable[[], object]]: # z: (n, d) with gradient
    "The products themselves, by name, where the batch is."
    n, data = len(z), z.detach()
    pairs, among = torch.randn(n, n, device=z.device), torch.randn(num_classes, num_classes, device=z.device)
    def two_products(): data @ data.T; pairs @ data
    def with_centres(run, W):
        def more(): run(); W @ W.T; among @ W
        return more
    def autograd():
        z.grad = None
        unit = F.normalize(z)
        (unit @ unit.T).backward(pairs)
    products = {f"classes x {k}": three_products(data, k * num_classes) for k in sorted({c.centers for c in CLASSIFICATION.values()})}
    centres = with_centres(products["classes x 1"], torch.randn(num_classes, data.shape[1], device=z.device))
    return {"pairs": two_products, "autograd": autograd, **products, "centres": centres}


def floor_of(label: str) -> str:
    "Which of `floors` a contender is held against."
    c = CONTENDERS[label]
    return f"classes x {c.centers}" if c.products == "classes" else c.products


def time_all(contenders: dict[str, Callable], seconds: float) -> tuple[dict[str, list[float]], int]:
    "Warm up, then as many rounds as fit; peers beyond PATIENCE and what they are compared with get FEW more rounds."
    first = {name: min(t) for name, t in interleaved(contenders, 1, warmup=0).items()}
    slow = {name for name, t in first.items() if t > PATIENCE and name.startswith("peer ")}
    quick = {name: run for name, run in contenders.items() if name not in slow}
    rounds = max(FEW, min(100, int(seconds / sum(first[name] for name in quick))))
    taken = interleaved(quick, rounds, warmup=0)
    if slow: taken |= interleaved({name: contenders[name] for name in slow}, FEW, warmup=0)
    return taken, rounds


def measure(size: int, seconds: float) -> tuple[list[dict], int]:
    "One batch size: a row for each objective, and the number of rounds."
    z, y = make_batch(size)
    peers, room = make_peers(), .7 * available_bytes()
    wanted = {c.peer for c in CONTENDERS.values() if c.peer in peers}
    large = {peer for peer in wanted if size > LIMITS.get(peer, size) or peer_bytes(peer, size) > room}
    contenders = floors(z)
    for label, c in CONTENDERS.items(): contenders[f"ours {label}"] = step(c.make(), z, y)
    for peer in sorted(wanted - large): contenders[f"peer {peer}"] = step(peers[peer], z, y)
    times, rounds = time_all(contenders, seconds)
    return [row_of(label, size, times, CONTENDERS[label].peer in large) for label in CONTENDERS], rounds


def against(a: list[float], b: list[float]) -> float:
    "Median of ratios within a round; ratio of medians if one of them was so slow that it had rounds of its own."
    return ratio(a, b) if len(a) == len(b) else statistics.median(a) / statistics.median(b)


def row_of(label: str, size: int, times: dict[str, list[float]], too_large: bool) -> dict:
    "Milliseconds and ratios of one objective."
    c, ours, floor = CONTENDERS[label], times[f"ours {label}"], times[floor_of(label)]
    peer = times.get(f"peer {c.peer}")
    ms = lambda t: statistics.median(t) * 1e3 if t else None
    return dict(objective=label, name=c.name, panel=c.panel, batch=size, floor=floor_of(label), ours_ms=ms(ours),
                best_ms=min(ours) * 1e3, floor_ms=ms(floor), times_floor=against(ours, floor),
                best_times_floor=min(ours) / min(floor),
                times_autograd=against(ours, times["autograd"]) if label in PAIRWISE else None,
                peer=c.peer, peer_state="too large" if too_large else "measured" if peer else "none", peer_ms=ms(peer),
                peer_rounds=len(peer) if peer else 0, peer_times_ours=against(peer, ours) if peer else None,
                best_peer_times_ours=min(peer) / min(ours) if peer else None,
                peer_times_floor=against(peer, floor) if peer else None)


def torch_takes(row) -> "float | Series": # row: of `row_of`, of a loss over pairs; or a table of such
    "Torch's own similarity matrix and its backward pass, in floors."
    return row.times_floor / row.times_autograd


def why_not_quicker(label: str, target: float, row) -> str: # row: of `row_of`
    "Why a peer is not beaten by as much as was promised: what the promise comes to in floors, or which costs decide."
    if row.peer.startswith("linear"): return TORCH
    if row.best_peer_times_ours >= target: return f"by the median; by the quickest runs {row.best_peer_times_ours:.2f}"
    if target <= 1: return f"the floor is {row.floor_ms:.2f} of our {row.ours_ms:.2f} ms: fixed costs decide" if row.floor_ms < row.ours_ms / 2 else ""
    if label not in PAIRWISE: return ""
    return (f"the target is {row.peer_times_floor / target:.1f} times the floor; "
            f"torch's own similarity matrix and backward pass take {torch_takes(row):.1f}")


def targets(table) -> "pd.DataFrame": # objective, kind, batch, target, measured, verdict
    "The promises, each beside what the table says; 'not measured' if it does not say."
    import pandas as pd
    def line(label, kind, batch, target, value, good):
        verdict = "met" if good else "not met" if value is not None and value == value else "not measured"
        return dict(objective=label, kind=kind, batch=batch, target=target, measured=value, verdict=verdict, why="")
    rows = []
    for label, c in CONTENDERS.items():
        mine = table[table.objective == label].set_index("batch")
        measured = [b for b in mine.index if mine.peer_times_ours[b] == mine.peer_times_ours[b]] if c.peer else []
        for b in sorted({*measured, PEERS_AT}) if c.peer else ():
            value, target = mine.peer_times_ours.get(b), PEER_TARGETS.get(label, 1) if b == PEERS_AT else 1
            rows.append(line(label, "peer / ours", b, target, value, b in measured and value >= target))
            if rows[-1]["verdict"] == "not met": rows[-1]["why"] = why_not_quicker(label, target, mine.loc[b])
        for b in (b for b in mine.index if b >= TARGET_FROM):
            good, best = (of[b] <= TARGET for of in (mine.times_floor, mine.best_times_floor))
            rows.append(line(label, "ours / floor", b, TARGET, mine.times_floor[b], good))
            if rows[-1]["verdict"] == "not met": rows[-1]["why"] = MISSED.get(label, PASSES)
            if good != best: rows[-1] |= dict(verdict="undecided", why=UNDECIDED)
            if label in EXEMPT: rows[-1] |= dict(verdict="exempt", why=EXEMPT[label])
    rows.append(dict(objective="PADS", kind="ours / floor", target=TARGET, verdict="exempt", why=PADS))
    return pd.DataFrame(rows, columns=["objective", "kind", "batch", "target", "measured", "verdict", "why"])


def promises(found, table) -> str: # of `targets`, of `measure`
    "Targets as two Markdown tables: against the peers, against the floor."
    show = lambda v, digits=2: "" if v is None or v != v else f"{v:.{digits}f}"
    peers, floor = (found[found.kind == kind] for kind in ("peer / ours", "ours / floor"))
    slower, peers = slower_than_peers(peers), peers[peers.batch == PEERS_AT]
    first = pipe_table(["objective", "peer / ours, at least", "measured", "verdict", "why"],
                       [[r.objective, f"{r.target:g}", show(r.measured), r.verdict, r.why] for r in peers.itertuples()])
    rows = []
    for label, mine in floor.groupby("objective", sort=False):
        verdicts = ", ".join(f"{r.verdict} at {r.batch:g}" for r in mine.itertuples())
        if (mine.verdict == mine.verdict.iloc[0]).all(): verdicts = mine.verdict.iloc[0]
        reasons = "; ".join(dict.fromkeys(filter(None, mine.why)))
        rows.append([label, ", ".join(filter(None, map(show, mine.measured))), verdicts, reasons])
    batches = ", ".join(f"{b:g}" for b in sorted(floor.batch.dropna().unique()))
    second = pipe_table(["objective", f"ours / floor at B = {batches or 'none'}", "verdict", "why"], rows)
    return (f"**Targets against the peer, B = {PEERS_AT}**\n\n{first}\n\n{slower}\n\n"
            f"**Target against the floor: at most {TARGET:g} from B = {TARGET_FROM}**\n\n{second}\n\n{torch_says(table)}")


def slower_than_peers(peers) -> str: # of `targets`, its rows against peers
    "At which sizes ours takes longer, with the reason."
    known = peers[peers.measured.notna()]
    late = known[known.measured < 1]
    if late.empty: return f"Slower than the peer in none of {len(known)} comparisons."
    told = []
    for (label, why), mine in late.groupby(["objective", "why"], sort=False):
        at = ", ".join(f"{r.measured:.2f} at B = {r.batch:,.0f}" for r in mine.itertuples())
        told.append(f"- {label}: {at}" + (f" ({why})" if why else ""))
    return f"**Slower than the peer**, in {len(late)} of {len(known)} comparisons over all measured B:\n\n" + "\n".join(told)


def torch_says(table) -> str:
    "How much of twice the floor torch itself takes for a similarity matrix."
    pairs = table[table.times_autograd.notna() & (table.batch >= TARGET_FROM)]
    if pairs.empty: return ""
    takes = [f"{torch_takes(mine).median():.2f} at B = {b:,}" for b, mine in pairs.groupby("batch")]
    return ("Before any loss, torch's own similarity matrix of normalised embeddings and its backward pass take, in floors: "
            f"{', '.join(takes)}.")


def markdown(table, rounds: dict[int, int], machine: list[str] | None = None) -> str: # machine: for the foot; default: this one
    "Promises first, then how long, how far from the floor, how far from the peer."
    say = lambda column: lambda row: "too large" if row.peer_state == "too large" else f"{row[column]:.2f}"
    peer_of = " (pytorch-metric-learning; cross-entropy and softmax: torch's Linear and cross_entropy)"
    return "\n\n".join([
        "# Losses, forward + backward",
        f"D = {DIM}, float32, classes of four; classification over {CLASSES:,} classes.",
        promises(targets(table), table),
        "**Milliseconds, median**\n\n" + grid(table, "ours_ms"),
        "**Times the floor (pairs: two matrix products; classification and proxies: three)**\n\n"
        + grid(table, "times_floor"),
        "**The same from the quickest run of each, the least disturbed**\n\n" + grid(table, "best_times_floor"),
        "**Times torch's own similarity matrix, normalised, and its backward pass**\n\n"
        + grid(table, "times_autograd"),
        f"**How many times longer the peer takes{peer_of}**\n\n"
        + grid(table[table.peer_state != "none"], "peer_times_ours", say("peer_times_ours")),
        "*too large*: the peer enumerates triplets, or positive pairs times negative pairs, and was not started: its "
        "tables would not fit into 0.7 of the free memory, or it is beyond its limit ("
        + ", ".join(f"{peer}: {b}" for peer, b in LIMITS.items()) + ").\n\nFloors are bare products on ready matrices: "
        "no normalisation, no masks, no autograd. All contenders run in one process, one after the other in each "
        "round, in random order; ratios are medians over rounds of ratios within a round. A peer that takes more than "
        f"{PATIENCE:g} s a step gets {FEW} rounds of its own, and its ratio is one of medians. Rounds: "
        + ", ".join(f"{r} at B = {b}" for b, r in rounds.items())
        + ". `margin, distance-weighted` is our miner in front of margin hinges: "
        "the registered `margin` takes all pairs.",
        "\n".join(machine or machine_lines())])


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*<>"


def spread(heights: list[float], gap: float) -> list[float]:
    "Heights moved apart until no two labels touch, their order and middle kept."
    order, placed = sorted(range(len(heights)), key=heights.__getitem__), list(heights)
    for below, above in zip(order, order[1:]): placed[above] = max(placed[above], placed[below] + gap)
    shift = (sum(placed) - sum(heights)) / len(heights) if heights else 0
    return [h - shift for h in placed]


def draw(table):
    "Times the floor against batch size: a panel a family, names at the ends of the lines."
    import matplotlib.pyplot as plt
    import numpy as np
    from dml_companion.reproduction import use_house_style
    use_house_style()
    fig, axes = plt.subplots(3, 2, figsize=(7.2, 8.4), sharex=True, sharey=True)
    batches, values = sorted(table.batch.unique()), np.log10(table.times_floor)
    low, high = min(values.min(), -.1), max(values.max(), .4)
    for ax, (panel, title) in zip(axes.flat, PANELS.items()):
        mine = table[table.panel == panel]
        labels = list(dict.fromkeys(mine.objective))
        lines = [mine[mine.objective == label] for label in labels]
        ends = spread([np.log10(rows.times_floor.iloc[-1]) for rows in lines], (high - low) / 13)
        for i, (label, rows, end) in enumerate(zip(labels, lines, ends)):
            colour, last = COLOURS[i % len(COLOURS)], np.log10(rows.times_floor.iloc[-1])
            ax.plot(rows.batch, np.log10(rows.times_floor), color=colour, marker=MARKERS[i % len(MARKERS)],
                    ls=("-", "--")[i // len(COLOURS)], ms=4, lw=1.2)
            ax.annotate(label, (rows.batch.iloc[-1], last), (1.06, end), textcoords=ax.get_yaxis_transform(),
                        color=colour, size=8, va="center", annotation_clip=False,
                        arrowprops=dict(arrowstyle="-", color=colour, lw=.4, shrinkA=1, shrinkB=3, relpos=(0, .5)))
        ax.axhline(0, color="grey", lw=.8, zorder=0)
        ax.axhline(np.log10(TARGET), color="grey", lw=.8, ls="--", zorder=0)
        ax.set(title=title, xscale="log")
        ax.set_xticks(batches, [f"{b:,}" for b in batches]); ax.minorticks_off()
    ticks = [t for t in (.01, .03, .1, .3, 1, 3, 10, 30, 100, 300) if low - .3 < np.log10(t) < high + .3]
    axes[0, 0].set_yticks(np.log10(ticks), [f"{t:g}" for t in ticks]); axes[0, 0].set_ylim(low - .1, high + .1)
    for ax in axes[-1]: ax.set_xlabel("batch size B")
    for ax in axes[:, 0]: ax.set_ylabel("time / matrix products")
    note = f"Forward + backward, D = {DIM}, float32, medians. Solid grey: the products alone; dashed: the target."
    fig.text(0, -.03, note, size=8)
    return fig


def draw_peers(table):
    "How much longer the peer takes, at the size of the targets or the largest measured below it."
    import matplotlib.pyplot as plt
    from dml_companion.reproduction import use_house_style
    use_house_style()
    known = table[(table.peer_state == "measured") & (table.batch <= PEERS_AT)]
    rows = known.sort_values("batch").groupby("objective", sort=False).tail(1).sort_values("peer_times_ours")
    fig, ax = plt.subplots(figsize=(6, .8 + .22 * len(rows)))
    for y, r in enumerate(rows.itertuples()):
        target = PEER_TARGETS.get(r.objective, 1)
        colour = COLOURS[0] if r.peer_times_ours >= target else COLOURS[1]
        ax.plot([target] * 2, [y - .35, y + .35], color="grey", lw=1.2)
        ax.plot(r.peer_times_ours, y, "o", color=colour)
        times = f"{r.peer_times_ours:.3g}" if r.peer_times_ours < 999 else f"{r.peer_times_ours:,.0f}"
        ax.annotate(times, (r.peer_times_ours, y), (6, 0), textcoords="offset points", va="center",
                    size=8, color=colour)
    ax.set_yticks(range(len(rows)), [r.objective if r.batch == PEERS_AT else f"{r.objective} (B = {r.batch})"
                                     for r in rows.itertuples()])
    ax.set(xscale="log", xlabel="time of the peer / ours", title=f"Against the peers, B = {PEERS_AT}")
    ax.margins(x=.14, y=.03); ax.grid(False, axis="y")
    fig.text(0, -.06, f"Peer: pytorch-metric-learning; of softmax and cross-entropy torch itself. Grey bar: the target.\nForward + backward, D = {DIM}, float32, medians.", size=8)
    return fig


def main(out_folder: str | Path = "figures/bench", # csv, md, svg and png go here
         sizes: tuple[int, ...] = SIZES, # batch sizes
         threads: int = 2, # torch threads
         seconds: float = 45., # rough time for each batch size, slow peers and at least three rounds besides
        ) -> None:
    "Measure and write losses.{csv,md,svg,png}, losses_peers.{svg,png} and losses_targets.csv."
    import pandas as pd
    from dml_companion.reproduction import output_folder
    before, rows, rounds, folder = torch.get_num_threads(), [], {}, output_folder(out_folder)
    torch.set_num_threads(threads)
    try:
        for size in sizes:
            start = time.perf_counter()
            more, rounds[size] = measure(size, seconds)
            rows += more
            print(f"losses: B = {size}, {rounds[size]} rounds, {time.perf_counter() - start:.0f} s", flush=True)
        write_all(pd.DataFrame(rows), rounds, folder)
    finally: torch.set_num_threads(before)


def write_all(table, rounds: dict[int, int], folder: Path, machine: list[str] | None = None) -> None:
    "All files of a measured table; its csv only if the machine is this one."
    from dml_companion.reproduction import save_figure
    save_figure(draw(table), "losses", folder, data=None if machine else table)
    if (table.peer_state == "measured").any(): save_figure(draw_peers(table), "losses_peers", folder)
    targets(table).to_csv(folder / "losses_targets.csv", index=False, float_format="%.4g")
    write_text(folder / "losses.md", markdown(table, rounds, machine))


def render(out_folder: str | Path = "figures/bench") -> None: # with losses.{csv,md}
    "Everything but losses.csv anew from it, without measuring; rounds and machine are those of losses.md."
    import pandas as pd
    folder = Path(out_folder)
    told = re.search(r"Rounds: ([^.]*)\.", (folder / "losses.md").read_text())[1]
    rounds = {int(b): int(r) for r, b in re.findall(r"(\d+) at B = (\d+)", told)}
    write_all(pd.read_csv(folder / "losses.csv"), rounds, folder, kept_lines(folder / "losses.md"))


if __name__ == "__main__": main()
