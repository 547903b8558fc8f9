"Device batches: one pack in two places, torchvision's draws and torchvision's pictures, and nothing that waits."
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import transforms
from torchvision.transforms.v2 import InterpolationMode, functional as V

from dml_companion.datasets import Split, load
from dml_companion.device import (BOX, COVER, FACTORS, FLIP, ORDER, AFFINE, DevicePack, augment, by_grid, by_matrices, central_box, checked, draw_boxes,
                                  draw_table, free_bytes, jitter, normalisation, resample, stretch, training_batches, waits)
from dml_companion.training import Augment, Recipe, affine_batch, augment_batch, crop_boxes

REAL = os.environ.get("DML_DATA")
CARS = Augment(crop_scale=(.16, 1.), crop_ratio=(1., 1.), flip=True, jitter=(.3, .3, .3, .1))
FIRST = CARS.model_copy(update=dict(jitter_first=True))
CUB = Augment(crop_scale=(.16, 1.), flip=True, jitter=(.25, .25, .25, 0.))
LETTERS = Augment(degrees=10., translate=.08, scale=(.85, 1.15), shear=8.)
BOTH = Augment(degrees=10., shear=8., crop_scale=(.4, 1.), flip=True, jitter=(.2, .2, 0., 0.))
STEPS = V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch._dynamo.reset()


def gen(seed=0): return torch.Generator().manual_seed(seed)
def gens(seed=0): return {"sampler": gen(seed), "augment": gen(seed + 1)}


def pictures(n, h, w, channels=3, seed=0):
    "Soft colours with stripes, bytes."
    r = partial(torch.rand, generator=gen(seed))
    x = F.interpolate(r(n, channels, 4, 4), (h, w), mode="bicubic")
    stripes = (torch.arange(w) * (.3 + r(n, 1, 1, 1))).sin() * .3
    return ((x + stripes).clamp(0, 1) * 255).round().byte()


def photographs(n=24, h=40, w=40, classes=6):
    return Split(pictures(n, h, w).numpy(), np.arange(n) % classes, [f"c{i}" for i in range(classes)])


def mapped(split, folder):
    "The same split, its images in a memory map on disk."
    np.save(folder / "images.npy", split.images)
    return Split(np.load(folder / "images.npy", mmap_mode="r"), split.labels, split.class_names)


def levels(a, b): return (a - b).abs().mean((1, 2, 3)) * 255


def hand_jitter(image, row):
    for k in row[ORDER].int().tolist(): image = STEPS[k](image, row[FACTORS][k].item())
    return image


def hand_crop(image, row, size):
    left, top, width, height = row[BOX].int().tolist()
    image = V.resized_crop(image, top, left, height, width, list(size), antialias=True)
    return V.horizontal_flip(image) if row[FLIP] else image


def floats(images): return [V.to_dtype(im, torch.float32, scale=True) for im in images]


def ks(a, b):
    "Largest distance of two empirical distribution functions, and its limit at level 0.001."
    a, b = (torch.as_tensor(v, dtype=torch.float64).sort().values for v in (a, b))
    at = torch.cat([a, b])
    far = (torch.searchsorted(a, at, right=True) / len(a) - torch.searchsorted(b, at, right=True) / len(b)).abs().max().item()
    return far, math.sqrt(-.5 * math.log(.0005)) * math.sqrt(1 / len(a) + 1 / len(b))


# ---- the pack

def test_two_places_give_the_same_bytes(tmp_path):
    split = photographs()
    index = [np.array([3, 3, 0]), torch.arange(24), [23], torch.randperm(24, generator=gen())[:7]]
    packs = [DevicePack(split, "cpu"), DevicePack(mapped(split, tmp_path), "cpu", where="stream"), DevicePack(mapped(split, tmp_path), "cpu", where="device")]
    assert [p.resident for p in packs] == [True, False, True]
    for pack in packs:
        got = list(pack.batches(index))                                  # kept: none is overwritten by a later one
        assert len(got) == 4
        for (images, labels), rows in zip(got, index):
            assert images.dtype == torch.uint8 and torch.equal(images, split.batch(rows)) and images.is_contiguous()
            assert labels.dtype == torch.int64 and labels.tolist() == split.labels[np.asarray(rows)].tolist()
            assert torch.equal(pack[rows], images) and torch.equal(pack.labels[torch.as_tensor(rows)], labels)
        assert list(pack.batches([])) == []


def test_rows_of_a_larger_store():
    glyphs = load("glyphs", max_train_classes=8, max_test_classes=4, progress=False)
    for split in (glyphs.train, glyphs.query):
        pack = DevicePack(split, "cpu", free=1)
        assert not pack.resident and torch.equal(next(pack.batches([[5, 0]]))[0], split.batch([5, 0])) and len(pack) == len(split)


def test_the_place_follows_the_share_and_says_so():
    split = photographs()
    need = split.images.size
    assert DevicePack(split, "cpu", free=2 * need).resident and not DevicePack(split, "cpu", free=2 * need - 1).resident
    assert DevicePack(split, "cpu", share=1., free=need).resident
    why = DevicePack(split, "cpu", share=.25, free=4 * 10**5).why
    assert why == "streamed: 0.000115 GB of images, 25% of the 0.0004 GB free on cpu may be used"
    assert "where='stream' asked" in DevicePack(split, "cpu", where="stream").why
    assert free_bytes(torch.device("cpu")) > 0 and "resident" in repr(DevicePack(split, torch.device("cpu")))


@pytest.mark.parametrize("index, says", [([0, 24], "index 24 is outside of a pack of 24 images: give row numbers 0..23"), ([-1], "index -1"),
                                         (np.ones(24, bool), "turn a mask into numbers"), ([.5], "list of integers"), ([[1, 2]], "shape"), (3, "shape")])
def test_wrong_rows_are_refused_before_the_first_batch(index, says):
    for where in ("device", "stream"):
        pack = DevicePack(photographs(), "cpu", where=where)
        with pytest.raises(ValueError, match=says): pack.batches([[0, 1], index])
        with pytest.raises(ValueError, match=says): pack[index]
    assert checked([], 24).tolist() == [] and checked(np.array([1], np.int32), 24).dtype == torch.int64


@pytest.mark.parametrize("options, says", [(dict(where="gpu"), "choose auto, device, stream"), (dict(share=0), "share"), (dict(share=1.5), "1.5"),
                                           (dict(device="tpu"), "choose auto, cpu or cuda")])
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says): DevicePack(photographs(), **{"device": "cpu", **options})


def test_a_streamed_pack_trusts_no_index_it_cannot_read():
    pack = DevicePack(photographs(), "cpu", where="stream")
    with pytest.raises(ValueError, match="cannot be read without waiting"): pack[torch.zeros(2, dtype=torch.int64, device="meta")]


class Counting(Split):
    "Counts the batches it gave; the fourth cannot be read."
    def batch(self, indices=slice(None)):
        object.__setattr__(self, "given", getattr(self, "given", 0) + 1)
        if self.given == 4: raise OSError("the disk is gone")
        return super().batch(indices)


def test_streaming_is_one_batch_ahead_passes_errors_on_and_can_be_left():
    plain = photographs()
    split = Counting(plain.images, plain.labels, plain.class_names)
    batches = DevicePack(split, "cpu", where="stream").batches([[0], [1], [2], [3], [4]])
    assert getattr(split, "given", 0) == 0                               # nothing is read before it is asked for
    next(batches)
    for _ in range(500):                                                 # while the first is in use, a thread reads the second, and no more
        if split.given == 2: break
        time.sleep(.01)
    time.sleep(.05)
    assert split.given == 2
    next(batches); next(batches)
    with pytest.raises(OSError, match="the disk is gone"): next(batches)
    left = DevicePack(plain, "cpu", where="stream").batches([[0], [1], [2]])
    next(left); left.close()                                             # returns: the thread has ended


# ---- the table

def box_naive(u, side, scale, ratio):
    "Torchvision's loop, fed with uniform numbers."
    h, w = side
    for k in range(10):
        area, shape = h * w * (scale[0] + (scale[1] - scale[0]) * u[k]), math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[10 + k])
        width, height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < width <= w and 0 < height <= h: return [int(u[20] * (w - width + 1)), int(u[21] * (h - height + 1)), width, height]
    if w / h < ratio[0]: width, height = w, round(w / ratio[0])
    elif w / h > ratio[1]: width, height = round(h * ratio[1]), h
    else: width, height = w, h
    return [(w - width) // 2, (h - height) // 2, width, height]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side, scale, ratio", [((64, 64), (.16, 1.), (3/4, 4/3)), ((32, 32), (.9, 1.), (1.2, 1.9)), ((37, 90), (.3, 1.), (3/4, 4/3)),
                                                ((90, 37), (.3, 1.), (1., 1.)), ((5, 5), (.01, .03), (1., 1.)), ((20, 90), (1., 1.), (.2, .3))])
def test_boxes_are_the_loop_s(seed, side, scale, ratio):
    u = torch.rand(200, 22, dtype=torch.float64, generator=gen(seed))
    boxes = draw_boxes(u, side, scale, ratio)
    assert boxes.tolist() == [box_naive(row, side, scale, ratio) for row in u.tolist()]
    left, top, width, height = boxes.T
    assert (boxes >= 0).all() and (left + width <= side[1]).all() and (top + height <= side[0]).all() and (width > 0).all()


def test_each_image_has_its_own_frame():
    "Boxes in frames of three shapes are those of pictures of these shapes, moved to where the frame begins."
    frames = torch.tensor([[3, 20, 60, 30], [25, 2, 20, 60], [10, 10, 44, 44]])[torch.arange(300) % 3]
    for config, crop in ((Augment(crop_scale=(.3, 1.), crop_ratio=(1., 1.)), None), (Augment(), 20), (Augment(), None)):
        boxes = draw_table(300, (64, 64), config, gen(3), crop, frames)[:, BOX]
        for k in range(3):
            left, top, w, h = frames[k].tolist()
            alone = draw_table(300, (h, w), config, gen(3), crop)[k::3, BOX] + torch.tensor([left, top, 0, 0])
            assert torch.equal(boxes[k::3], alone)
    table = draw_table(300, (64, 64), Augment(translate=.5), gen(3), frames=frames)
    assert torch.equal(table[:, COVER], (frames[:, 2] * frames[:, 3] / 4096).float()) and (draw_table(9, (8, 8), Augment(), gen())[:, COVER] == 1).all()
    assert table[1::3, 6].abs().max() < 10 < table[::3, 6].abs().max() < 30
    with pytest.raises(ValueError, match="crop 21 is larger than the images, 30 x 20"): draw_table(300, (64, 64), Augment(), gen(), 21, frames)


def test_contrast_in_a_frame_is_that_of_the_picture():
    "Against torchvision on the uncut picture; the black around it must not count."
    uncut = torch.randint(256, (6, 3, 30, 50), generator=gen(1), dtype=torch.uint8)
    square = torch.zeros(6, 3, 64, 64, dtype=torch.uint8); square[:, :, 17:47, 7:57] = uncut
    config = Augment(crop_scale=(1., 1.), crop_ratio=(5 / 3, 5 / 3), jitter=(0., .6, 0., 0.), jitter_first=True)
    table = draw_table(6, (64, 64), config, gen(2), frames=torch.tensor([[7, 17, 50, 30]]).expand(6, 4))
    assert (table[:, BOX] == torch.tensor([7, 17, 50, 30])).all()
    for image, row, got in zip(uncut, table, augment(square, table, config, 24)):
        wanted = V.resize(V.adjust_contrast(V.to_dtype(image, torch.float32, scale=True), row[FACTORS][1].item()), [24, 24], antialias=True)
        assert_close(got, wanted, atol=2e-4, rtol=0)


def test_frames_reach_the_batches():
    "An epoch over framed pictures never shows the black around them, and in order the frames follow their pictures."
    rng, frames = np.random.default_rng(0), np.array([[0, 8, 32, 16], [8, 0, 16, 32], [4, 8, 24, 16]])[np.arange(24) % 3]
    images = np.zeros((24, 3, 32, 32), np.uint8)
    for image, (left, top, w, h) in zip(images, frames): image[:, top:top + h, left:left + w] = rng.integers(100, 256, (3, h, w))
    split = Split(images, np.arange(24) % 4, list("abcd"), frames)
    recipe = Recipe(batch_size=8, pipeline="device", crop=16, augment=Augment(crop_scale=(.2, 1.), flip=True))
    for _ in range(3):
        for batch, _ in training_batches(DevicePack(split, "cpu"), recipe, dict(sampler=gen(1), augment=gen(2))): assert batch.min() > .38
    bare = Split(images, split.labels, split.class_names)
    assert min(batch.min() for batch, _ in training_batches(DevicePack(bare, "cpu"), recipe, dict(sampler=gen(1), augment=gen(2)))) < .1
    with pytest.raises(ValueError, match="24 rows of left, top, width, height, got shape"): Split(images, split.labels, split.class_names, frames[:5])


@pytest.mark.parametrize("side, ratio", [((30, 90), (3/4, 4/3)), ((90, 30), (3/4, 4/3)), ((50, 50), (3/4, 4/3)), ((50, 50), (2., 3.))])
def test_fallback_is_torchvision_s(side, ratio, monkeypatch):
    "An area of four images fits never: torchvision falls back, and says what to."
    top, left, height, width = transforms.RandomResizedCrop.get_params(torch.empty(3, *side), [4., 4.], list(ratio))
    assert central_box(side, ratio) == (left, top, width, height)


@pytest.mark.parametrize("scale, ratio", [((.16, 1.), (3/4, 4/3)), ((.16, 1.), (1., 1.)), ((.6, 1.), (.5, 2.))])
def test_boxes_have_torchvision_s_distribution(scale, ratio):
    "Five distances a case, each at level 0.001, seeds fixed."
    torch.manual_seed(5)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(torch.empty(1, 96, 96), list(scale), list(ratio)) for _ in range(1500)])[:, [1, 0, 3, 2]]
    ours = draw_table(6000, (96, 96), Augment(crop_scale=scale, crop_ratio=ratio), gen(6))[:, BOX]
    for name, f in dict(left=lambda b: b[:, 0], top=lambda b: b[:, 1], width=lambda b: b[:, 2], height=lambda b: b[:, 3],
                        area=lambda b: b[:, 2] * b[:, 3]).items():
        distance, limit = ks(f(ours), f(theirs))
        assert distance < limit, (name, distance, limit)


def test_the_distance_would_see_another_distribution():
    wide, narrow = (draw_table(3000, (96, 96), Augment(crop_scale=s), gen())[:, 2] for s in ((.16, 1.), (.25, 1.)))
    assert ks(wide, narrow)[0] > ks(wide, narrow)[1]
    theirs = draw_table(3000, (96, 96), Augment(crop_scale=(.16, 1.)), gen())[:, BOX]
    short = crop_boxes(3000, (96, 96), (.16, 1.), (3/4, 4/3), gen())
    distance, limit = ks(theirs[:, 2] * theirs[:, 3], short[:, 2] * short[:, 3])
    assert distance > limit                                              # 05 shortens boxes: see notebook


@pytest.mark.parametrize("strength", [(.3, .25, .4, .1), (1.5, .1, .1, .5)])
def test_colours_have_torchvision_s_distribution(strength):
    torch.manual_seed(2)
    limits = transforms.ColorJitter(*strength)
    drawn = [transforms.ColorJitter.get_params(limits.brightness, limits.contrast, limits.saturation, limits.hue) for _ in range(1500)]
    table = draw_table(6000, (8, 8), Augment(jitter=strength), gen(3))
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        distance, limit = ks(table[:, FACTORS][:, k], torch.tensor([d[1 + k] for d in drawn]))
        assert distance < limit, name
    for step in range(4):                                                # where each step stands, of 6,000: 1,500 +- 5.2 deviations
        assert ((table[:, ORDER] == step).float().sum(0) - 1500).abs().max() < 5.2 * math.sqrt(6000 * 3 / 16)
    assert len(table[:, ORDER].unique(dim=0)) == 24 and (table[:, ORDER].sort(1).values == torch.arange(4)).all()


def test_other_columns():
    table = draw_table(4000, (32, 48), Augment(degrees=10, translate=.25, scale=(.5, 2.), shear=5, flip=True), gen())
    assert 0 < table[:, FLIP].mean() < 1 and set(table[:, FLIP].tolist()) == {0., 1.} and abs(table[:, FLIP].mean() - .5) < .03
    low, high = torch.tensor([-10, -12, -8, .5, -5]), torch.tensor([10, 12, 8, 2., 5])
    moves = table[:, AFFINE]
    assert (moves >= low).all() and (moves <= high).all() and ((moves.amax(0) - moves.amin(0)) > .99 * (high - low)).all()
    for k in range(5): assert ks(moves[:, k], low[k] + (high - low)[k] * torch.rand(4000, generator=gen(9)))[0] < .0437
    assert torch.corrcoef(table[:, [4, 5, 6, 7, 8, 9]].T).fill_diagonal_(0).abs().max() < .08


def test_what_is_off_is_neutral_and_changes_no_other_draw():
    off = draw_table(50, (20, 30), Augment(), gen())
    assert (off[:, :14] == torch.tensor([0, 0, 30, 20, 0, 0, 0, 0, 1, 0, 1, 1, 1, 0.])).all()
    crop, more = draw_table(50, (20, 30), Augment(crop_scale=(.2, 1.)), gen()), draw_table(50, (20, 30), Augment(crop_scale=(.2, 1.), degrees=5, flip=True, jitter=(.1,) * 4), gen())
    assert torch.equal(crop[:, BOX], more[:, BOX]) and torch.equal(crop[:, ORDER], more[:, ORDER])
    assert torch.equal(draw_table(50, (20, 30), BOTH, gen(4)), draw_table(50, (20, 30), BOTH, gen(4)))
    assert not torch.equal(draw_table(50, (20, 30), BOTH, gen(4)), draw_table(50, (20, 30), BOTH, gen(5)))


# ---- geometry

@pytest.mark.parametrize("h, w, size", [(40, 40, (30, 30)), (40, 56, (17, 70)), (56, 40, (64, 16)), (33, 33, (33, 33)), (48, 48, (5, 5))])
def test_matrices_are_torchvision_s_antialiased_crop(h, w, size):
    x, table = pictures(24, h, w, seed=h).float() / 255, draw_table(24, (h, w), Augment(crop_scale=(.05, 1.), crop_ratio=(.4, 2.5), flip=True), gen(h))
    table[0, BOX] = torch.tensor([3., 5., 1., 1.]); table[1, BOX] = torch.tensor([0., 0., w, h]); table[2, BOX] = torch.tensor([w - 2., 0., 2., h])
    oracle = torch.stack([hand_crop(im, row, size) for im, row in zip(x, table)])
    assert_close(by_matrices(x, table, size, torch.zeros(1, 3, 1, 1)), oracle, atol=3e-5, rtol=0)


def test_grid_is_torchvision_s_crop_where_it_does_not_shrink():
    x, table = pictures(24, 40, 40).float() / 255, draw_table(24, (40, 40), Augment(crop_scale=(.05, 1.), flip=True), gen())
    oracle = torch.stack([hand_crop(im, row, (40, 40)) for im, row in zip(x, table)])
    zero = torch.zeros(1, 3, 1, 1)
    assert_close(by_grid(x, table, (40, 40)), oracle, atol=3e-5, rtol=0)
    assert_close(by_matrices(x, table, (40, 40), zero), oracle, atol=3e-5, rtol=0)
    small = torch.stack([hand_crop(im, row, (10, 10)) for im, row in zip(x, table)])
    assert levels(by_grid(x, table, (10, 10)), small).max() > 2          # and not where it does
    assert torch.equal(resample(x, table, (10, 10), zero), by_matrices(x, table, (10, 10), zero))
    assert torch.equal(resample(x, table, (40, 41), zero), by_grid(x, table, (40, 41)))
    with pytest.raises(ValueError, match="auto, matrices or grid"): resample(x, table, (40, 40), zero, how="fast")


def test_rows_of_a_matrix_are_averages():
    start, length = torch.tensor([0., 7., 39., 3.]), torch.tensor([40., 11., 1., 30.])
    for n in (1, 13, 40, 100):
        a = stretch(start, length, 40, n)
        assert (a >= 0).all() and a.isfinite().all()
        assert_close(a.sum(-1), torch.ones(4, n))
        assert (a[1, :, :7] == 0).all() and (a[1, :, 18:] == 0).all()   # nothing from outside the box
        assert_close(stretch(start, length, 40, n, torch.ones(4)), a.flip(1))


@pytest.mark.parametrize("seed", range(2))
def test_affine_is_that_of_training_and_of_torchvision(seed):
    x, table = pictures(16, 32, 32, 1, seed).float() / 255, draw_table(16, (32, 32), LETTERS, gen(seed))
    table[:, 6:8] = table[:, 6:8].round()                                # torchvision shifts by whole pixels
    degrees, dx, dy, zoom, shear = table[:, AFFINE].T
    ours = by_grid(x, table, (32, 32), affine=True)
    assert_close(ours, affine_batch(x, degrees, torch.stack([dx, dy], 1), zoom, shear), atol=3e-5, rtol=0)
    oracle = torch.stack([V.affine(im, a.item(), [int(i), int(j)], s.item(), [g.item(), 0.], interpolation=InterpolationMode.BILINEAR)
                          for im, a, i, j, s, g in zip(x, degrees, dx, dy, zoom, shear)])
    assert_close(ours, oracle, atol=3e-4, rtol=0)


def test_affine_before_a_shrinking_crop_is_torchvision_s_two_passes():
    x, table = pictures(12, 48, 48), draw_table(12, (48, 48), (config := BOTH.model_copy(update=dict(jitter=(0.,) * 4))), gen())
    oracle = torch.stack([hand_crop(V.affine(im, r[5].item(), [0, 0], r[8].item(), [r[9].item(), 0.], interpolation=InterpolationMode.BILINEAR), r, (30, 30))
                          for im, r in zip(floats(x), table)])
    assert_close(augment(x, table, config, 30), oracle, atol=3e-4, rtol=0)


def test_outside_of_a_turned_picture_is_black_after_normalisation_too():
    x, table = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8), draw_table(2, (16, 16), Augment(degrees=1), gen())
    table[:, 5] = 45.
    for size in (16, 8):
        y = augment(x, table, Augment(degrees=90.), size, normalisation((.5, .4, .3), (.2, .2, .2)), how="auto")
        assert_close(y[:, :, 0, 0], torch.tensor([-2.5, -2., -1.5]).expand(2, 3), atol=.35 if size == 8 else 1e-5, rtol=0)
        assert_close(y[:, :, size // 2, size // 2], torch.tensor([2.5, 3., 3.5]).expand(2, 3), atol=1e-5, rtol=0)


# ---- colour, and all of it

@pytest.mark.parametrize("seed, strength", [(0, (.4, .4, .4, .5)), (1, (1.6, 1.6, 1.6, .2)), (2, (.25, .25, .25, 0.))])
def test_jitter_is_torchvision_s_in_every_order(seed, strength):
    x, table = pictures(120, 12, 12, seed=seed).float() / 255, draw_table(120, (12, 12), Augment(jitter=strength), gen(seed))
    assert len(table[:, ORDER].unique(dim=0)) == 24
    oracle = torch.stack([hand_jitter(im, row) for im, row in zip(x, table)])
    for hue in {True, strength[3] > 0}: assert_close(jitter(x, table, hue), oracle, atol=3e-4, rtol=0)


def test_grey_and_uniform_pictures():
    table = draw_table(30, (9, 9), Augment(jitter=(.5, .5, .5, .4)), gen())
    for x in (pictures(30, 9, 9, 1).float() / 255, torch.full((30, 3, 9, 9), .4), torch.zeros(30, 3, 9, 9), torch.ones(30, 3, 9, 9)):
        oracle = torch.stack([hand_jitter(im, row) for im, row in zip(x, table)])
        y = jitter(x, table)
        assert y.isfinite().all() and y.shape == x.shape
        assert_close(y, oracle, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [CARS, CUB, Augment(crop_scale=(.3, 1.)), Augment(flip=True, jitter=(.2, .2, .2, .2))], ids=["cars", "cub", "crop", "colour"])
@pytest.mark.parametrize("size", [None, 28, 50])
def test_each_picture_is_torchvision_s(config, size):
    x, table = pictures(32, 40, 40, seed=3), draw_table(32, (40, 40), config, gen(3))
    n = (size or 40,) * 2
    oracle = torch.stack([hand_jitter(hand_crop(im, r, n), r) for im, r in zip(floats(x), table)])
    other = torch.stack([hand_crop(hand_jitter(im, r), r, n) for im, r in zip(floats(x), table)])
    on_bytes = torch.stack([hand_jitter(hand_crop(im, r, n), r) for im, r in zip(x, table)]).float() / 255
    with torch.autocast("cpu", torch.bfloat16): mixed = augment(x, table, config, size).float()
    half = augment(x, table, config, size, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.shape == oracle.shape
    assert levels(augment(x, table, config, size), oracle).max() < .05
    assert levels(augment(x, table, config.model_copy(update=dict(jitter_first=True)), size), other).max() < .05
    for y in (half.float(), mixed): assert levels(y, oracle).max() < 2
    assert levels(augment(x, table, config, size), on_bytes).mean() < 2
    norm = normalisation((.485, .456, .406), (.229, .224, .225))
    for first, wanted in ((False, oracle), (True, other)):
        assert_close(augment(x, table, config.model_copy(update=dict(jitter_first=first)), size, norm), V.normalize(wanted, [.485, .456, .406], [.229, .224, .225]), atol=2e-3, rtol=0)


def test_nothing_on_is_nothing_done():
    x, table = pictures(4, 16, 16), draw_table(4, (16, 16), Augment(), gen())
    assert_close(augment(x, table, Augment()), x.float() / 255, atol=1e-7, rtol=0)
    assert_close(augment(x, table, Augment(), 8), F.interpolate(x.float() / 255, (8, 8), mode="bilinear", antialias=True), atol=1e-5, rtol=0)
    assert_close(augment(x, table, Augment(), norm=normalisation((.5,), (.25,))), (x.float() / 255 - .5) / .25)


def test_a_picture_does_not_depend_on_its_neighbours():
    x, table = pictures(12, 24, 24), draw_table(12, (24, 24), CARS, gen())
    together = augment(x, table, CARS, 20)
    alone = torch.cat([augment(x[i:i + 1], table[i:i + 1], CARS, 20) for i in range(12)])
    assert_close(together, alone, atol=1e-5, rtol=0)
    same = augment(x[:1].expand(12, -1, -1, -1), table, CARS, 20).flatten(1)
    assert torch.cdist(same, same).fill_diagonal_(1).min() > .1          # and parameters are each its own


def test_wrong_batches_are_refused():
    x, table = pictures(4, 16, 16), draw_table(4, (16, 16), CARS, gen())
    for images, rows in ((x.float(), table), (x[0], table), (x, table[:3]), (x, table[:, :17])):
        with pytest.raises(ValueError, match="b rows of 19 numbers"): augment(images, rows, CARS)
    for mean, std in (((.5,), (0.,)), ((.5, .5), (.2,)), ((.5,), (-1.,))):
        with pytest.raises(ValueError, match="std > 0"): normalisation(mean, std)


# ---- nothing waits

VARIANTS = [(CARS, {}), (CUB, dict(dtype=torch.bfloat16)), (FIRST, {}), (LETTERS, {}), (BOTH, dict(how="grid")), (BOTH, {}), (Augment(), {})]


@pytest.mark.parametrize("config, more", VARIANTS)
def test_nothing_reads_a_value_or_crosses_to_the_host(config, more):
    x, table, norm = pictures(4, 16, 16), draw_table(4, (16, 16), config, gen()), normalisation((.5,) * 3, (.2,) * 3, "meta")
    for size in (None, 12): assert waits(lambda im, r: augment(im, r, config, size, norm, **more), x, table) == []


def test_the_check_sees_what_it_should():
    x = torch.rand(4, 3, 8, 8)
    for call in (lambda t: t.sum().item(), lambda t: t.nonzero(), lambda t: t[t > .5], lambda t: t.cpu(), lambda t: t * torch.ones(3, 1, 1).to(t.device),
                 lambda t: t * torch.tensor([[[1.]]] * 3, device=t.device), lambda t: t * t.new_tensor(2.), lambda t: torch.as_tensor([1], device=t.device),
                 lambda t: float(t.mean()), lambda t: 1 if t.sum() > 0 else 0, lambda t: t.tolist(), lambda t: augment_batch(t, CARS, gen())):
        assert waits(call, x)
    assert waits(lambda t: t * 2 + t.mean() * torch.tensor(2.) + torch.as_tensor(t), x) == [] == waits(lambda t: t * 2, x.to("meta"))


@pytest.mark.parametrize("config, more", VARIANTS)
def test_all_of_it_is_one_graph(config, more):
    x, table = pictures(4, 16, 16), draw_table(4, (16, 16), config, gen())
    norm = normalisation((.5,) * 3, (.2,) * 3)
    compiled = torch.compile(augment, backend="aot_eager", fullgraph=True, dynamic=False)
    kind = dict(atol=.05, rtol=.05) if more.get("dtype") else dict(atol=1e-5, rtol=1e-5)
    assert_close(compiled(x, table, config, 12, norm, **more), augment(x, table, config, 12, norm, **more), **kind)


# ---- an epoch

@pytest.mark.parametrize("extra", [{}, dict(sampler="balanced", per_class=2)])
def test_an_epoch_is_the_same_wherever_the_pack_lies(extra, tmp_path):
    split, recipe = photographs(), Recipe(augment=CARS, batch_size=8, pipeline="device", crop=20, **extra)
    packs = [DevicePack(split, "cpu"), DevicePack(mapped(split, tmp_path), "cpu", where="stream")]
    resident, stream = (list(training_batches(p, recipe, gens())) for p in packs)
    assert len(resident) == 3 and resident[0][0].shape == (8, 3, 20, 20) and resident[0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for one, two in zip(resident, stream) for a, b in zip(one, two))
    assert all(0 <= x.min() and x.max() <= 1 for x, _ in resident)
    if extra: assert all((y.bincount(minlength=6) % 2 == 0).all() for _, y in resident)
    used = gens()
    first, second = ([y for _, y in training_batches(packs[0], recipe, used)] for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat([y for _, y in resident])) and not torch.equal(torch.cat(first), torch.cat(second))


def test_a_resumed_epoch_is_the_epoch():
    "Generators put back between epochs give the same batches: a checkpoint needs nothing of the device."
    pack, recipe, used = DevicePack(photographs(), "cpu"), Recipe(augment=CARS, batch_size=8), gens()
    list(training_batches(pack, recipe, used))
    states = {k: g.get_state() for k, g in used.items()}
    wanted = list(training_batches(pack, recipe, used))
    for k, g in used.items(): g.set_state(states[k])
    assert all(torch.equal(a, b) for one, two in zip(wanted, training_batches(pack, recipe, used)) for a, b in zip(one, two))


def test_images_keep_their_labels_and_their_numbers():
    split, recipe, seen = photographs(classes=24), Recipe(augment=Augment(), batch_size=8), []
    for images, labels in training_batches(DevicePack(split, "cpu"), recipe, gens()):
        assert_close(images, split.batch(labels).float() / 255, atol=1e-7, rtol=0)                  # here an image is its label
        seen += labels.tolist()
    assert sorted(seen) == list(range(24))
    calls = []
    def spy(images, table, config, *rest): calls.append((len(table), config, *rest)); return images
    recipe = Recipe(augment=FIRST, batch_size=8, pipeline="device", crop=20)
    list(training_batches(DevicePack(split, "cpu"), recipe, gens(), dtype=torch.bfloat16, compiled=spy))
    assert calls == [(8, FIRST, 20, None, torch.bfloat16)] * 3
    with pytest.raises(ValueError, match="make DevicePack"): training_batches(split, recipe, gens())


@pytest.mark.skipif(not REAL or not Path(REAL, "grocery").is_dir(), reason="DML_DATA has no grocery")
def test_photographs_from_shelves(tmp_path):
    split = load("grocery", REAL, cache=tmp_path, size=64, max_train_classes=2, max_test_classes=2, progress=False).train
    rows = np.arange(0, len(split), max(1, len(split) // 16))
    x = split.batch(rows)
    table = draw_table(len(rows), (64, 64), CARS, gen())
    for n in (64, 56):
        oracle = torch.stack([hand_jitter(hand_crop(im, r, (n, n)), r) for im, r in zip(floats(x), table)])
        on_bytes = torch.stack([hand_jitter(hand_crop(im, r, (n, n)), r) for im, r in zip(x, table)]).float() / 255
        y = augment(x, table, CARS, n)
        assert levels(y, oracle).max() < .05 and levels(y, on_bytes).mean() < 2
        assert levels(augment(x, table, CARS, n, dtype=torch.bfloat16).float(), oracle).max() < 2


# ---- on a GPU

@gpu
@pytest.mark.parametrize("where", ["device", "stream"])
def test_an_epoch_on_a_gpu_never_waits(where, tmp_path):
    split, recipe = mapped(photographs(), tmp_path), Recipe(augment=CARS, batch_size=8, pipeline="device", crop=20)
    pack, norm = DevicePack(split, "cuda", where=where), normalisation((.5,) * 3, (.2,) * 3, "cuda")
    list(training_batches(pack, recipe, gens(), norm))               # once, for what is set up at first use
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try: got = list(training_batches(pack, recipe, gens(), norm))
    finally: torch.cuda.set_sync_debug_mode(before)
    wanted = list(training_batches(DevicePack(split, "cpu"), recipe, gens(), normalisation((.5,) * 3, (.2,) * 3)))
    for (x, y), (u, v) in zip(got, wanted):
        assert torch.equal(y.cpu(), v)
        assert_close(x.cpu(), u, atol=.02, rtol=0)                       # tf32, if somebody switched it on


@gpu
def test_both_places_give_the_same_bytes_on_a_gpu(tmp_path):
    split = mapped(photographs(n=240), tmp_path)
    index = [torch.randperm(240, generator=gen(i))[:32] for i in range(20)]
    for pack in (DevicePack(split, "cuda"), DevicePack(split, "cuda", where="stream")):
        got = list(pack.batches(index))
        assert all(x.is_cuda and torch.equal(x.cpu(), split.batch(rows)) for (x, _), rows in zip(got, index))
    assert torch.equal(DevicePack(split, "cuda")[index[0].cuda()].cpu(), split.batch(index[0]))


@gpu
@pytest.mark.parametrize("config, more", VARIANTS)
def test_pictures_on_a_gpu_are_those_of_the_cpu(config, more):
    x, table = pictures(8, 40, 40), draw_table(8, (40, 40), config, gen())
    for size in (None, 28):
        there = augment(x.cuda(), table.cuda(), config, size, **more).cpu().float()
        assert levels(there, augment(x, table, config, size, **more).float()).max() < (2 if more.get("dtype") else .2)
