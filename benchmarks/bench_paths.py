"""Does the path on the device learn what the DataLoader's path learns? Learning curves of both on photographs, several seeds.

    python -m benchmarks paths --data ~/data

Same recipe, same initial weights and batches by seed; other random numbers in the augmentation. Recall@1 of held-out training classes after each epoch, mean
over seeds and 95 % interval. The two agree if their intervals overlap after every epoch; that is printed, whatever it is.
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
PATHS = {"reference: DataLoader and torchvision": ("#D55E00", "s"), "on the device (05c)": ("#0072B2", "o")}


def curves(data: str | None, seeds: int, recipe: Recipe) -> pd.DataFrame: # path, seed, epoch, recall
    "Train every path with every seed."
    images, lines = load(recipe.dataset, root=data, size=recipe.size), []
    make, device = partial(objectives.make, recipe.objective, **recipe.objective_options), training.pick_device()
    train, validation = training.holdout_classes(images.train, recipe.validation, recipe.validation_seed)
    LoaderRun.workers = 0 if device == "cpu" else worker_count(recipe.batch_size * 3 * recipe.crop ** 2 * 4)
    for seed in range(seeds):
        for path in PATHS:
            if path.startswith("reference"):
                with training.cpu_threads(recipe.threads): result = LoaderRun(recipe, images, train, validation, make, seed, None, device).go(progress=False)
            else: result = fit(recipe, images, make, seed=seed, progress=False)
            lines += [dict(path=path, seed=seed, epoch=e["epoch"], recall=e["validation/recall@1"], loss=e.get("loss")) for e in result.history]
            print(f"seed {seed}, {path}: {result.history[-1]['validation/recall@1']:.3f} after {recipe.epochs} epochs, {result.summary['seconds']:.0f} s", flush=True)
    return pd.DataFrame(lines)


def compared(table: pd.DataFrame) -> pd.DataFrame: # one line an epoch
    "Means and half widths of both paths, and whether their intervals overlap."
    from dml_companion.reproduction import mean_interval
    lines = []
    for epoch, rows in table.groupby("epoch"):
        (a, da), (b, db) = (mean_interval(rows[rows.path == path].recall) for path in PATHS)
        paired = rows.pivot(index="seed", columns="path", values="recall")
        gap, half = mean_interval(paired[list(PATHS)[1]] - paired[list(PATHS)[0]])
        lines.append(dict(epoch=epoch, reference=a, reference_half=da, device=b, device_half=db, difference=gap, half=half, overlap=abs(a - b) <= da + db))
    return pd.DataFrame(lines)


def draw(table: pd.DataFrame, both: pd.DataFrame) -> "Figure":
    "Every seed thin, means thick, intervals shaded."
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5.4, 3.1), layout="constrained")
    for (path, (colour, mark)), column in zip(PATHS.items(), ("reference", "device")):
        for _, run in table[table.path == path].groupby("seed"): ax.plot(run.epoch, run.recall, color=colour, lw=.5, alpha=.5)
        ax.plot(both.epoch, both[column], color=colour, marker=mark, ms=4, lw=1.6, label=path)
        ax.fill_between(both.epoch, both[column] - both[f"{column}_half"], both[column] + both[f"{column}_half"], color=colour, alpha=.15, lw=0)
    ax.set(xlabel="epoch", ylabel="Recall@1, held-out classes", title="Two paths, one recipe: Grocery")
    ax.legend(loc="lower right", fontsize=8)
    return fig


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
    save_figure(draw(table, both), "training_paths", folder, data=table)
    apart = both[~both.overlap].epoch.tolist()
    rows = [[str(r.epoch), f"{r.reference:.3f} ± {r.reference_half:.3f}", f"{r.device:.3f} ± {r.device_half:.3f}", f"{r.difference:+.3f} ± {r.half:.3f}", "yes" if r.overlap else "no"] for r in both.itertuples()]
    verdict = "The intervals overlap after every epoch." if not apart else f"The intervals do not overlap after epoch {', '.join(map(str, apart))}."
    told = both[both.difference.abs() > both.half].epoch.tolist()
    verdict += f" The paired differences exclude zero after {'no epoch' if not told else 'epoch ' + ', '.join(map(str, told))}."
    write_text(folder / "training_paths.md", "\n\n".join(["# The DataLoader's path and the device's",
        f"Recall@1 of held-out training classes of Grocery, {recipe.crop} of {recipe.size} pixels, {recipe.encoder}, {seeds} seeds: mean and half width of the 95 % interval. {verdict}",
        pipe_table(["epoch", "DataLoader", "device", "difference, same seed", "intervals overlap"], rows), "\n".join(machine_lines())]))
    print(verdict)


if __name__ == "__main__": main()
