"""Does the path on the device learn what the DataLoader's path learns? Learning curves of both on photographs, several seeds.

    python -m benchmarks paths --data ~/data

Same recipe, same initial weights and batches by seed; other random numbers in the augmentation. The reference is fp32 through a DataLoader; the path on the device
is run in fp32, which compares the paths alone, and in bf16, as profiles have it. Recall@1 of held-out training classes after each epoch, mean over seeds and
95 % interval. Two agree if their intervals overlap after every epoch; that is printed, whatever it is.
"""
import os
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.bench_training import LoaderRun, worker_count
from benchmarks.common import machine_lines, pipe_table, write_text
from dml_companion import objectives, training
from dml_companion.datasets import load
from dml_companion.training import Recipe, fit

RECIPE = dict(dataset="grocery", size=64, crop=56, pipeline="device", encoder="convnet", encoder_options={"width": 16}, epochs=12, batch_size=64, lr=.1, warmup=40,
              validation=.2, objective="cross_entropy", augment=dict(crop_scale=(.3, 1.), flip=True, jitter=(.2, .2, .2, .05), jitter_first=True))
REFERENCE = "reference: DataLoader and torchvision, fp32"
PATHS = {REFERENCE: ("#D55E00", "s"), "on the device (05c), fp32": ("#56B4E9", "o"), "on the device (05c), bf16": ("#0072B2", "^")}


def curves(data: str | None, seeds: int, recipe: Recipe) -> pd.DataFrame: # path, seed, epoch, recall
    "Train every path with every seed."
    images, lines = load(recipe.dataset, root=data, size=recipe.size), []
    make, device = partial(objectives.make, recipe.objective, **recipe.objective_options), training.pick_device()
    train, validation = training.holdout_classes(images.train, recipe.validation, recipe.validation_seed)
    LoaderRun.workers = 0 if device == "cpu" else worker_count(recipe.batch_size * 3 * recipe.crop ** 2 * 4)
    for seed in range(seeds):
        for path in PATHS:
            if path == REFERENCE:
                with training.cpu_threads(recipe.threads): result = LoaderRun(recipe, images, train, validation, make, seed, None, device).go(progress=False)
            else: result = fit(recipe.model_copy(update={"precision": path[-4:]}), images, make, seed=seed, progress=False)
            lines += [dict(path=path, seed=seed, epoch=e["epoch"], recall=e["validation/recall@1"], loss=e.get("loss")) for e in result.history]
            print(f"seed {seed}, {path}: {result.history[-1]['validation/recall@1']:.3f} after {recipe.epochs} epochs, {result.summary['seconds']:.0f} s", flush=True)
    return pd.DataFrame(lines)


def compared(table: pd.DataFrame) -> pd.DataFrame: # one line a path on the device and epoch
    "Means and half widths beside those of the reference, and whether the intervals overlap."
    from dml_companion.reproduction import mean_interval
    lines = []
    for path in (p for p in PATHS if p != REFERENCE):
        for epoch, rows in table.groupby("epoch"):
            (a, da), (b, db) = (mean_interval(rows[rows.path == p].recall) for p in (REFERENCE, path))
            paired = rows.pivot(index="seed", columns="path", values="recall")
            gap, half = mean_interval(paired[path] - paired[REFERENCE])
            lines.append(dict(path=path, epoch=epoch, reference=a, reference_half=da, device=b, device_half=db, difference=gap, half=half, overlap=abs(a - b) <= da + db))
    return pd.DataFrame(lines)


def draw(table: pd.DataFrame) -> "Figure":
    "Every seed thin, means thick, intervals shaded."
    import matplotlib.pyplot as plt
    from dml_companion.reproduction import mean_interval
    fig, ax = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    for path, (colour, mark) in PATHS.items():
        own = table[table.path == path]
        for _, run in own.groupby("seed"): ax.plot(run.epoch, run.recall, color=colour, lw=.5, alpha=.4)
        epochs, ends = zip(*((epoch, mean_interval(rows.recall)) for epoch, rows in own.groupby("epoch")))
        ax.plot(epochs, [mean for mean, _ in ends], color=colour, marker=mark, ms=4, lw=1.6, label=path)
        ax.fill_between(epochs, *([mean + sign * half for mean, half in ends] for sign in (-1, 1)), color=colour, alpha=.15, lw=0)
    ax.set(xlabel="epoch", ylabel="Recall@1, held-out classes", title="Two paths, one recipe: Grocery")
    ax.legend(loc="lower right", fontsize=8)
    fig.supxlabel(f"Thin: {table.seed.nunique()} seeds; thick and shaded: mean and 95 % interval.", size=7)
    return fig


def verdict_of(both: pd.DataFrame) -> str: # of one path on the device
    "Where the intervals part, and where the paired differences exclude zero."
    apart, told = both[~both.overlap].epoch.tolist(), both[both.difference.abs() > both.half].epoch.tolist()
    told = f"The paired differences exclude zero after {'epoch ' + ', '.join(map(str, told)) if told else 'no epoch'}."
    return ("The intervals overlap after every epoch. " if not apart else f"The intervals do not overlap after epoch {', '.join(map(str, apart))}. ") + told


def page_of(both: pd.DataFrame) -> str: # of one path on the device
    "Its verdict and its table."
    rows = [[str(r.epoch), f"{r.reference:.3f} ± {r.reference_half:.3f}", f"{r.device:.3f} ± {r.device_half:.3f}", f"{r.difference:+.3f} ± {r.half:.3f}", "yes" if r.overlap else "no"] for r in both.itertuples()]
    return "\n\n".join([f"## {both.path.iloc[0].capitalize()}", verdict_of(both), pipe_table(["epoch", "DataLoader", "device", "difference, same seed", "intervals overlap"], rows)])


def main(out: str = "figures/bench", data: str | None = None, seeds: int = 10, epochs: int | None = None) -> None:
    "Train, compare, write."
    from dml_companion.reproduction import save_figure, use_house_style
    if seeds < 2: raise SystemExit(f"--seeds {seeds}: an interval needs two or more")
    recipe = Recipe(**RECIPE | ({"epochs": epochs} if epochs else {}))
    table = curves(data or os.environ.get("DML_DATA"), seeds, recipe)
    both = compared(table)
    use_house_style()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(draw(table), "training_paths", folder, data=table)
    pages = [page_of(rows) for _, rows in both.groupby("path", sort=False)]
    few = table[table.seed < 5]
    first = "\n".join(f"- {path[:1].upper()}{path[1:]}: {verdict_of(rows)}" for path, rows in compared(few).groupby("path", sort=False)) if seeds > 5 else ""
    write_text(folder / "training_paths.md", "\n\n".join(["# The DataLoader's path and the device's",
        f"Recall@1 of held-out training classes of Grocery, {recipe.crop} of {recipe.size} pixels, {recipe.encoder}, {seeds} seeds: mean and half width of the 95 % interval. The reference is fp32 through a DataLoader and torchvision's transforms.",
        *pages, *(["## What the first five of these seeds say alone", first] if first else []), "\n".join(machine_lines())]))
    for path, rows in both.groupby("path", sort=False): print(f"{path}: {verdict_of(rows)}")


if __name__ == "__main__": main()
