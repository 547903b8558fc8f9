"The ladder of a training step and the comparison of two paths, in sizes that a test can pay."
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("matplotlib")
from benchmarks import bench_paths as P, bench_training as T
from benchmarks.__main__ import main
from dml_companion import objectives
from dml_companion.datasets import load
from dml_companion.training import Augment, Recipe, epoch_batches, holdout_classes


def test_the_ladder_is_climbed_and_its_arithmetic_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "worker_count", lambda batch_bytes: 0)        # no fork of a process full of other tests' threads: it may wait for ever
    main(["training", "--size", "24", "--crop", "16", "--batch", "8", "--steps", "1", "--rounds", "2", "--out", str(tmp_path)])
    table, text = pd.read_csv(tmp_path / f"training_{'gpu' if torch.cuda.is_available() else 'cpu'}.csv"), next(tmp_path.glob("*.md")).read_text()
    assert table.rung.iloc[0] == "fp32, DataLoader" and table.rung.iloc[-3] == "+ batches on the device" and table.rung.iloc[-2] == T.ITSELF and table.rung.iloc[-1].startswith("floor")
    assert (table[["judged_per_second", "pairs_per_second", "after_epoch"]] > 0).to_numpy().all() and table.against_first[0] == 1 and table.step_against_floor.iloc[-1] == 1
    assert "| hours |" not in text and "recipes would take is left out" in text and ("No GPU here" in text) == ("Nothing is compiled" in text) == (not torch.cuda.is_available())
    own = table.set_index("rung").loc[T.ITSELF]
    assert f"does {own.against_first:.2f} times the first rung, and its step takes {own.step_against_floor:.2f} times the floor" in text
    peak = table.images_per_second * table.flops_per_image / table.share_of_peak
    assert "The peak is the" in text and (table.share_of_peak > 0).all() and peak.max() == pytest.approx(peak.min(), rel=1e-4)          # CSV: six digits
    assert ("disturbed them" in text) == ((table.high / table.low).max() >= T.STEADY)
    hours, told = sum(e * (n / 1000 + m / 4000 + m * m / 1e9 + .5) for e, n, m in T.RECIPES.values()) / 3600, T.recipe_hours(1000., 4000., 1e9, .5)
    assert f"| all four |  | {hours:.2f} |" in told and "| CUB | 30 × (5,864 / 1,000 + 5,924 / 4,000 + 0.04 + 0.50) | 0.07 |" in told
    whole = pd.DataFrame([dict(rung=name, against_first=a, step_against_floor=b) for name, a, b in ((T.LADDER[0].name, 1., 6.), (T.ITSELF, 5., 1.3))])
    assert [line.endswith(", met") for line in T.targets(whole, 1.1).splitlines()[2:]] == [True, False, True]
    for words in (["--seeds", "3"], ["losses", "--steps", "3"], ["training", "--data", "x"]):
        with pytest.raises(SystemExit): main(words)


def test_ratios_are_those_within_a_round():
    "The second round is twice as slow for all: no ratio moves. Medians of the seconds are their own."
    times = {"fp32, DataLoader": 4., T.ITSELF: 2., T.FLOOR: 1.}
    seconds = {name: [s, 2 * s, s] for name, s in times.items()} | {T.JUDGING: [.1] * 3, T.SEARCHING: [1e-9] * 3, T.AFTER: [.5] * 3}
    table = T.ladder_table(seconds, 8, 10, 160.)
    assert table.rung.tolist() == list(times) and table.against_first.tolist() == [1, 2, 4] and table.step_against_floor.tolist() == [4, 2, 1]
    assert table.images_per_second.tolist() == [2, 4, 8] and table.low.tolist() == [1, 2, 4] and table.share_of_peak.tolist() == [.125, .25, .5] and (table.after_epoch == .5).all() and (table.judged_per_second == 10).all()


def test_a_ladder_that_is_stopped_keeps_the_rounds_it_has(tmp_path, monkeypatch):
    "Killed in the second round: every rung, the run itself and the floor are written."
    monkeypatch.setattr(T, "worker_count", lambda batch_bytes: 0)
    once = []
    monkeypatch.setattr(T, "print", lambda *said, **_: once.append(said) if "round" not in said[0] else (_ for _ in ()).throw(KeyboardInterrupt), raising=False)
    with pytest.raises(KeyboardInterrupt): T.main(tmp_path, size=24, crop=16, batch=8, steps=1, rounds=3)
    table = pd.read_csv(next(tmp_path.glob("*.csv")))
    names = [r.name for r in T.rungs(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.cuda.is_available())]
    assert table.rung.tolist() == [*names[:-1], T.ITSELF, names[-1]] and (table.low == table.high).all() and table.notna().to_numpy().all()


def test_workers_are_as_many_as_cores_and_shared_memory_allow():
    assert 0 <= T.worker_count(2**20) <= 16 and T.worker_count(2**60) == 0


def test_the_flops_are_those_of_the_net():
    "ResNet-50 at 224 pixels: 4.09 billion multiply-adds forward (torchvision's table), twice as many operations, three times that with backward but for the first layer."
    flops = T.step_flops(Recipe(encoder="resnet50", size=256, crop=224, pipeline="device"))
    assert flops == pytest.approx(3 * 2 * 4.09e9, rel=.03)


def test_what_an_hour_asks_for():
    "From the numbers of the paper's sets and torchvision's count of multiply-adds, by hand."
    trained, judged = 30 * 5864 + 100 * (8054 + 59551 + 25882), 30 * 5924 + 100 * (8131 + 60502 + 26830)
    told, flops = T.asked_of_an_hour(), T.step_flops(Recipe(encoder="resnet50", size=256, crop=224, pipeline="device"))
    assert f"| all four | {trained:,} | {judged:,} | {(trained + judged / 3) * flops / 1e15:,.0f} |" in told and f"{(trained + judged / 3) / 3600:,.0f} images a second" in told
    assert f"{(trained + judged / 3) * flops / 3600 / 989e12:.1%} of the dense bf16 peak" in told


def test_the_peak_without_a_data_sheet_is_measured_here():
    rate, what = T.peak_rate(torch.device("cpu"))
    assert rate > 1e8 and what.startswith("the rate of a matrix product here") and f"{rate / 1e9:,.0f} GFLOP/s" in what


def test_a_cpu_climbs_no_rung_that_it_has_not():
    names = [r.name for r in T.rungs(torch.device("cpu"), False)]
    assert "+ tf32" not in names and "+ compile" not in names and not any(r.compiled for r in T.rungs(torch.device("cpu"), False))
    assert [r.name for r in T.rungs(torch.device("cpu"), True) if r.compiled] == ["+ compile"]
    assert [r.name for r in T.rungs(torch.device("cuda"), True)][:-1] == [r.name for r in T.LADDER] and all(r.compiled for r in T.rungs(torch.device("cuda"), True)[-3:])


def test_the_reference_sees_the_same_images_in_the_same_batches():
    "Without augmentation the DataLoader's batches are 05's, image by image."
    data = load("glyphs", progress=False, max_train_classes=20, max_test_classes=20)
    recipe = Recipe(encoder_options={"width": 4}, epochs=1, batch_size=16, pipeline="device", crop=32, validation=.3)
    train, held = holdout_classes(data.train, .3, 0)
    run = T.LoaderRun(recipe, data, train, held, partial(objectives.make, "cross_entropy"), 0, None, "cpu")
    index = epoch_batches(recipe, train.labels, torch.Generator().manual_seed(0))
    batches = list(run.batches())
    assert len(batches) == len(index)
    for (images, labels), i in zip(batches, index):
        assert torch.allclose(images, train.batch(i.numpy()).float() / 255, rtol=0, atol=1e-7) and labels.tolist() == train.labels[i.numpy()].tolist()


def test_torchvision_s_transform_has_the_recipe_s_numbers():
    steps = T.torchvision_transform(Augment(crop_scale=(.3, 1.), crop_ratio=(1., 1.), flip=True, jitter=(.2, .3, .4, .1)), 56).transforms
    assert [type(s).__name__ for s in steps] == ["ColorJitter", "RandomResizedCrop", "RandomHorizontalFlip", "ToDtype"]
    assert tuple(steps[1].scale) == (.3, 1.) and steps[1].size in ((56, 56), [56, 56]) and steps[0].brightness == (.8, 1.2) and steps[0].hue == (-.1, .1)


def test_intervals_that_part_are_seen():
    near, far = ([dict(path=p, seed=s, epoch=e, recall=.5 + .01 * s + gap * e * k) for k, p in enumerate(P.PATHS) for s in range(3) for e in (0, 1)] for gap in (.001, .3))
    assert P.compared(pd.DataFrame(near)).overlap.all() and P.compared(pd.DataFrame(far)).overlap.tolist() == [True, False] * 2
    fp32, bf16 = (rows for _, rows in P.compared(pd.DataFrame(far)).groupby("path", sort=False))
    assert bf16.path.iloc[0].endswith("bf16") and fp32.difference.tolist() == pytest.approx([0, .3]) and bf16.difference.tolist() == pytest.approx([0, .6])
    assert P.verdict_of(fp32) == "The intervals do not overlap after epoch 1. The paired differences exclude zero after epoch 1."


@pytest.mark.skipif(not Path(os.environ.get("DML_DATA", ""), "grocery").is_dir(), reason="DML_DATA has no grocery")
def test_both_paths_train_on_photographs(tmp_path):
    main(["paths", "--seeds", "2", "--epochs", "1", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "training_paths.csv")
    assert set(table.path) == set(P.PATHS) and (table.groupby(["seed", "epoch"]).size() == 3).all()
    start = table[(table.epoch == 0) & table.path.str.endswith("fp32")].groupby("seed").recall.nunique()
    text = (tmp_path / "training_paths.md").read_text()
    assert (start == 1).all() and text.count("The intervals overlap after every epoch") + text.count("The intervals do not overlap after epoch") == 2
