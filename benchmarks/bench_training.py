"""Training: the path that most users have beside ours. Its speed, rung by rung, and what each of the two learns.

Not among the parts that run by default. On a GPU, at the paper's size:

    python -m benchmarks training                                     # ResNet-50, 224 of 256 pixels, batches of 128
    python -m benchmarks paths --data ~/data                          # both paths on Grocery, ten seeds

On a CPU the same commands are small: a ConvNet, 56 of 64 pixels, compiled only with `--compile`; `--encoder`, `--size`, `--crop`, `--batch`, `--steps`, `--compile` say otherwise. The images of the
ladder are noise in a memory-mapped pack of the wanted size, so that nothing has to be fetched: their content costs nothing and changes nothing.

The reference reads one image after the other from the pack, puts it through torchvision's transforms v2 and a DataLoader with workers, and trains in fp32.
A rung adds one thing to the one before it. The floor is forward, backward and update on one batch that lies on the device already.
All rungs are made ready first. Then each round times a block of each, in random order, so that a busy moment hits them all.
"""
import math
import os
import shutil
import statistics
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset as TorchDataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from benchmarks.common import interleaved, machine_lines, pipe_table, ratio, round_by_round, waited, write_text
from dml_companion import objectives
from dml_companion.datasets import Split
from dml_companion.device import DevicePack, augment, training_batches
from dml_companion.device_training import DeviceRun, check_compiler
from dml_companion.encoders import build_encoder, embed
from dml_companion.engine import own_cores
from dml_companion.retrieval import recall_at_k
from dml_companion.training import Augment, Recipe, Run, epoch_batches, train_epoch

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12} # dense bf16 FLOP/s in NVIDIA's data sheets (SXM boards)
STEADY = 1.5 # times that blocks of one rung may differ before the table says so
CLASSES = 98 # of Cars196's training half
RECIPES = {"CUB": (30, 5_864, 5_924), "Cars196": (100, 8_054, 8_131), "SOP": (100, 59_551, 60_502), "In-Shop": (100, 25_882, 26_830)} # epochs, training images, images judged an epoch


# the path that most users have

class OneByOne(TorchDataset):
    "Images of a split through torchvision's transforms, one at a time."
    def __init__(self, split: Split, transform: Callable): self.split, self.transform = split, transform
    def __len__(self) -> int: return len(self.split)
    def __getitem__(self, i: int) -> tuple[Tensor, int]: return self.transform(self.split.batch([i])[0]), int(self.split.labels[i])


def torchvision_transform(config: Augment, crop: int) -> v2.Compose:
    "The same augmentation as torchvision has it: colours first, then the crop, on bytes."
    steps = [v2.ColorJitter(*config.jitter)] if any(config.jitter) else []
    steps += [v2.RandomResizedCrop(crop, config.crop_scale, config.crop_ratio, antialias=True) if config.crop_scale else v2.RandomCrop(crop)]
    steps += [v2.RandomHorizontalFlip()] if config.flip else []
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


def one_thread(worker: int) -> None:
    "A worker of the DataLoader computes with one thread; torch gives each its own random numbers."
    torch.set_num_threads(1)


class LoaderRun(Run):
    "The run of notebook 05 with a DataLoader in place of the pack: same recipe, same batches' sizes, same schedule."
    workers = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]: # (b, c, crop, crop) float and (b,) labels, on the device
        index = epoch_batches(self.recipe, self.train.labels, self.generators["sampler"])
        data = OneByOne(self.train, torchvision_transform(self.recipe.augment, self.recipe.crop))
        for images, labels in DataLoader(data, batch_sampler=[i.tolist() for i in index], num_workers=self.workers, worker_init_fn=one_thread,
                                         generator=self.generators["augment"], pin_memory=self.device == "cuda"):
            yield images.to(self.accelerator.device, non_blocking=True), labels.to(self.accelerator.device, non_blocking=True)


# the ladder

class Rung(NamedTuple):
    "What is switched on."
    name: str
    device_batches: bool = False
    tf32: bool = False
    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False


LADDER = (Rung("fp32, DataLoader"), Rung("+ tf32", tf32=True), Rung("+ bf16", tf32=True, bf16=True), Rung("+ channels last", tf32=True, bf16=True, channels_last=True),
          Rung("+ compile", tf32=True, bf16=True, channels_last=True, compiled=True),
          Rung("+ batches on the device", device_batches=True, tf32=True, bf16=True, channels_last=True, compiled=True))


ITSELF, JUDGING, SEARCHING, AFTER = "the run itself, whole epochs", "images that are judged", "pairs that are searched", "what follows an epoch"
FLOOR = "floor: one batch, again and again"


def noise(n: int, size: int, folder: Path) -> Split:
    "A memory-mapped pack of random bytes, 98 classes."
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, 3, size, size))
    rng = np.random.default_rng(0)
    for start in range(0, n, 64): images[start:start + 64] = rng.integers(0, 256, images[start:start + 64].shape, dtype=np.uint8)
    images.flush()
    return Split(np.load(folder / "images.npy", mmap_mode="r"), np.arange(n) % CLASSES, [f"class {k}" for k in range(CLASSES)])


def make_step(recipe: Recipe, rung: Rung, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    "One training step of a new net under a rung's switches; images in [0, 1] on the device."
    torch.manual_seed(0)
    encoder = build_encoder(recipe.encoder, in_channels=3, size=recipe.crop, freeze_bn=recipe.freeze_bn, norm=recipe.norm, dropout=recipe.dropout, **recipe.encoder_options).to(device)
    layout = torch.channels_last if rung.channels_last else torch.contiguous_format
    encoder.trunk.to(memory_format=layout)
    loss = objectives.make("cross_entropy", num_classes=CLASSES, dim=encoder.dim, label_smoothing=.1).to(device)
    optimizer = torch.optim.SGD([*encoder.parameters(), *loss.parameters()], lr=1e-3, momentum=.9)
    def embed(images): # as Encoder.forward, whose memory format is always channels last
        x = ((images - encoder.mean) / encoder.std).contiguous(memory_format=layout)
        return encoder.project(encoder.dropout(encoder.norm(encoder.trunk(x))))
    def whole(images, labels):
        with torch.autocast(device.type, torch.bfloat16, enabled=rung.bf16): z = embed(images)
        return loss.parts(z.float(), labels).total
    forward = torch.compile(whole, dynamic=False) if rung.compiled else whole
    encoder.train(); loss.train()
    def step(images, labels):
        optimizer.zero_grad()
        forward(images, labels).backward()
        optimizer.step()
    return step


def endless(make: Callable[[], Iterator]) -> Iterator:
    "Epoch after epoch."
    while True: yield from make()


def on_device(split: Split, recipe: Recipe, rung: Rung, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    "Batches drawn and augmented where the net lies, without end."
    generators = {k: torch.Generator().manual_seed(i) for i, k in enumerate(("sampler", "augment"))}
    pack, made = DevicePack(split, device), torch.compile(augment, dynamic=False) if rung.compiled else augment
    return endless(lambda: training_batches(pack, recipe, generators, dtype=torch.bfloat16 if rung.bf16 else torch.float32, compiled=made))


def through_loader(split: Split, recipe: Recipe, device: torch.device, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    "Batches from a DataLoader, without end."
    data = OneByOne(split, torchvision_transform(recipe.augment, recipe.crop))
    endlessly = RandomSampler(data, replacement=True, num_samples=10**9, generator=torch.Generator().manual_seed(0))     # no worker waits for an epoch's end
    loader = DataLoader(data, recipe.batch_size, sampler=endlessly, drop_last=True, num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=one_thread)
    return ((x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in loader)


def worker_count(batch_bytes: int) -> int: # of a float batch
    "Processes that may load images: one less than the cores that are ours, as far as shared memory holds three batches of each."
    room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 2**40
    return max(0, min(own_cores() - 1, 16, room // (3 * batch_bytes)))


class Way(NamedTuple):
    "Something to be timed, a block of it at a time."
    name: str
    before: Callable[[], None] # not timed: uses up what was loaded in advance while others had their turn, or waits until nobody loads
    block: Callable[[], None] # ends when the device has done it
    units: int # how many steps, images, pairs or epochs a block has


@contextmanager
def switched(products: bool, convolutions: bool, same_shapes: bool = True) -> Iterator[None]: # same_shapes: cudnn may look for the quickest kernels
    "TF32 in products and in convolutions, or not."
    torch.set_float32_matmul_precision("high" if products else "highest")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = convolutions, same_shapes
    try: yield
    finally: torch.set_float32_matmul_precision("highest"); torch.backends.cudnn.benchmark = False


def rung_way(rung: Rung, recipe: Recipe, batches: Iterator, device: torch.device, steps: int, ahead: int, rest: float) -> Way: # batches in advance, seconds
    "Blocks of a rung's steps; it is compiled and warm."
    step = make_step(recipe, rung, device)
    def block(n):
        for _ in range(n): step(*next(batches))
    run = lambda n: switched(rung.tf32, rung.tf32)(waited(lambda: block(n), device.type))
    run(3)()
    return Way(rung.name, partial(time.sleep, rest) if rung.device_batches else run(ahead), run(steps), steps)


def run_ways(recipe: Recipe, split: Split, device: torch.device, folder: Path, rest: float) -> list[Way]:
    """Notebook 05c's run with all that it does: whole epochs; embedding images that are judged; search among them, both metrics, K up to 1,000 as on SOP;
    and what follows an epoch: a look at watched images, a checkpoint. TF32 as the package leaves it: in convolutions only."""
    given = recipe.model_copy(update=dict(precision="bf16", lr=1e-3, patience=100))
    run = DeviceRun(given, SimpleNamespace(digest="noise"), split, split, partial(objectives.make, "cross_entropy", label_smoothing=.1), 0, folder, device.type)
    def after(): run.look(dict(epoch=run.epoch)); run.save()
    n = RECIPES["SOP"][2] if device.type == "cuda" else len(split)
    z, labels = torch.randn(n, run.bare.dim, device=device, generator=torch.Generator(device).manual_seed(0)), np.arange(n) % (n // 5)
    def search():
        for metric in ("cosine", "euclidean"): recall_at_k(z, labels, [k for k in (1, 10, 100, 1000) if k < n], metric=metric)
    calls = {ITSELF: (lambda: train_epoch(run, 10**6), len(split) // recipe.batch_size), JUDGING: (lambda: embed(run.bare, run.pack), len(split)), SEARCHING: (search, n * n), AFTER: (after, 1)}
    ways = [Way(name, partial(time.sleep, rest), switched(False, True, name == ITSELF)(waited(call, device.type)), units) for name, (call, units) in calls.items()]
    for way in ways: way.block()
    return ways


def peak_rate(device: torch.device) -> tuple[float, str]: # FLOP/s, what they are
    "What a share of the peak is a share of: the data sheet's dense bf16 peak, or, where we know none, the quickest of nine large matrix products."
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    known = next((v for k, v in PEAKS.items() if k in card and "NVL" not in card and "MIG" not in card), None)
    if known: return known, f"the card's dense bf16 peak, {known / 1e12:,.0f} TFLOP/s in its data sheet"
    n = 8192 if card else 1024
    a = torch.randn(n, n, device=device)
    b = a.bfloat16()
    times = interleaved({"fp32": waited(lambda: a @ a, device.type), "bf16": waited(lambda: b @ b, device.type)}, rounds=9)
    best = min(times, key=lambda name: min(times[name]))
    rate = 2 * n**3 / min(times[best])
    return rate, f"the rate of a matrix product here, {n:,} x {n:,} in {best}, {rate / 1e9:,.0f} GFLOP/s"


def step_flops(recipe: Recipe) -> int: # floating-point operations of one image, forward and backward
    "Counted on the meta device by torch."
    encoder = build_encoder(recipe.encoder, in_channels=3, size=recipe.crop, **recipe.encoder_options).to("meta").train()
    with FlopCounterMode(display=False) as counter: encoder(torch.empty(1 + 1, 3, recipe.crop, recipe.crop, device="meta")).sum().backward()
    return counter.get_total_flops() // 2


def rungs(device: torch.device, compiling: bool) -> list[Rung]:
    "The ladder as this machine can climb it, and the floor: no tf32 on a CPU, and the compiler, where it is wanted, on its own rung alone: the package compiles on a GPU only."
    steps = [r for r in LADDER if (r.bf16 or not r.tf32 or device.type == "cuda") and (compiling or r.name != "+ compile")]
    floor = LADDER[-1]._replace(name=FLOOR)
    return [r._replace(compiled=r.compiled and (device.type == "cuda" or compiling and r.name == "+ compile")) for r in (*steps, floor)]


def ready(recipe: Recipe, split: Split, device: torch.device, steps: int, workers: int, compiling: bool, folder: Path) -> list[Way]:
    "Every rung, the floor and the run itself, compiled and warm. Rungs with a DataLoader share one, since all of them want the same batches of it."
    torch._dynamo.reset()
    found, loader, ahead = [], through_loader(split, recipe, device, workers), 2 * workers         # torch's prefetch_factor
    next(loader)
    start = time.perf_counter()
    for _ in range(ahead): next(loader)
    rest = time.perf_counter() - start                                                           # as long as workers may go on after a block
    for rung in rungs(device, compiling):
        batches = on_device(split, recipe, rung, device) if rung.device_batches else loader
        if rung.name == FLOOR: batches = repeat(next(batches))
        found.append(rung_way(rung, recipe, batches, device, steps, ahead, rest))
        print(f"ready: {rung.name}", flush=True)
    return found + run_ways(recipe, split, device, folder, rest)


def ladder(recipe: Recipe, split: Split, device: torch.device, steps: int, rounds: int, workers: int, compiling: bool, folder: Path, peak: float) -> "Iterator[pd.DataFrame]": # peak: FLOP/s
    "Images a second of every rung, of the run itself and of the floor: the table so far, after each round."
    flops, ways = step_flops(recipe), {way.name: way for way in ready(recipe, split, device, steps, workers, compiling, folder)}
    blocks, before = ({name: getattr(way, what) for name, way in ways.items()} for what in ("block", "before"))
    for done, taken in enumerate(round_by_round(blocks, rounds, warmup=0, before=before), 1):
        yield ladder_table({name: [t / ways[name].units for t in times] for name, times in taken.items()}, recipe.batch_size, flops, peak)
        print(f"round {done} of {rounds}", flush=True)


def ladder_table(seconds: dict[str, list[float]], batch: int, flops: int, peak: float) -> "pd.DataFrame": # seconds: a step, an image, a pair, an epoch's end, one a round
    "One line a rung, the floor last; ratios are medians over rounds of ratios within a round."
    import pandas as pd
    names = [name for name in seconds if name not in (JUDGING, SEARCHING, AFTER, ITSELF, FLOOR)] + [ITSELF, FLOOR]
    first, floor, judging, search, after = (seconds[name] for name in (names[0], FLOOR, JUDGING, SEARCHING, AFTER))
    lines = [dict(rung=name, images_per_second=batch / statistics.median(spent), low=batch / max(spent), high=batch / min(spent), flops_per_image=flops,
                  share_of_peak=batch / statistics.median(spent) * flops / peak, judged_per_second=1 / statistics.median(judging), pairs_per_second=1 / statistics.median(search), after_epoch=statistics.median(after),
                  against_first=ratio(first, spent), step_against_floor=ratio(spent, floor)) for name in names for spent in (seconds[name],)]
    return pd.DataFrame(lines)


def defaults(device: torch.device) -> dict:
    "The paper's size on a GPU; what a CPU can do in minutes elsewhere."
    if device.type == "cuda": return dict(encoder="resnet50", size=256, crop=224, batch=128, steps=20, images=2048)
    return dict(encoder="convnet", size=64, crop=56, batch=64, steps=8, images=1024)


def few_workers(workers: int, device: torch.device) -> str: # empty: all is well
    "Says when the first rung is no fair baseline."
    if device.type != "cuda" or workers >= 4: return ""
    return (f"**Only {workers} worker processes feed the rungs with a DataLoader** (cores, or room in /dev/shm): they measure the loading, and \"times the first\" says little. "
            "More room: `mount -o remount,size=16G /dev/shm`, or docker's `--shm-size`.")


def rung_table(table) -> str: # of `ladder`
    "One line a rung, and a word where the numbers are not steady."
    rows = [[r.rung, f"{r.images_per_second:,.1f} ({r.low:,.1f} to {r.high:,.1f})", f"{r.against_first:.2f}", f"{r.step_against_floor:.2f}", f"{r.share_of_peak:.1%}"] for r in table.itertuples()]
    text, apart = pipe_table(["rung", "images / s", "times the first", "step, times the floor's", "of the peak"], rows), (table.high / table.low).max()
    if apart >= STEADY: text += f"\n\nBlocks of one rung differ up to {apart:.1f} times: other work disturbed them, and small differences between rungs mean nothing."
    itself, last = table[table.rung == ITSELF], table[table.rung == LADDER[-1].name]
    if len(itself) and itself.low.iloc[0] > last.high.iloc[0]:
        text += "\n\nThe run itself does all that the last rung does, and more, and no round had it slower: a surprise, which this table does not explain."
    return text


def targets(table, hours: float) -> str: # of `ladder`, whole, at the paper's size; of the four recipes
    "What a GPU should reach, and whether it does."
    run = table[table.rung == ITSELF].iloc[0]
    asked = ((f"the run itself at least 4 times fp32 with a DataLoader: {run.against_first:.2f} times", run.against_first >= 4),
             (f"its step within 1.25 times the floor: {run.step_against_floor:.2f} times", run.step_against_floor <= 1.25), (f"the four recipes in about one hour: {hours:.2f} hours", hours <= 1.25))
    return "\n".join(["Targets:", "", *(f"- {what}, {'met' if met else 'not met'}" for what, met in asked)])


def asked_of_an_hour() -> str:
    "What the paper's four recipes in one hour would ask of a card: arithmetic from counted operations."
    image, judging = step_flops(Recipe(encoder="resnet50", size=256, crop=224, pipeline="device")), 1 / 3      # a forward pass of the three that a step has
    work = {who: (epochs * train, epochs * judged, epochs * (train + judging * judged) * image) for who, (epochs, train, judged) in RECIPES.items()}
    trained, judged, flops = map(sum, zip(*work.values()))
    search = sum(2 * 2 * 2048 * judged**2 * epochs for epochs, _, judged in RECIPES.values())                     # two metrics, 2,048 dimensions
    rows = [[who, f"{a:,}", f"{b:,}", f"{c / 1e15:,.0f}"] for who, (a, b, c) in (work | {"all four": (trained, judged, flops)}).items()]
    return "\n\n".join([
        "## What one hour for the paper's four recipes asks for", f"Arithmetic, not a measurement: {image / 1e9:.1f} GFLOP for an image of training (ResNet-50, 224 pixels, forward and backward, counted by torch), a third of that for one that is judged. "
        f"In one hour that is {flops / 3600 / 1e12:,.0f} TFLOP/s, {flops / 3600 / PEAKS['H200']:.1%} of the dense bf16 peak of an H200's data sheet, or a training speed of {(trained + judging * judged) / 3600:,.0f} images a second, "
        f"if images are judged at three times that. Exact search adds {search / flops:.1%} of operations, in fp32. "
        "Not in it: compilation, packing, the upload, judging the untrained encoder, and the k-means of NMI at the end, on the processor. A share of the peak that sounds small need not be easy: "
        "much of a ResNet's time is spent moving its maps and not in products.",
        pipe_table(["recipe", "images trained on", "images judged", "PFLOP"], rows)])


def hours_of(speed: float, judging: float, pairs: float, after: float) -> dict[str, float]: # of each recipe
    "Training and judging, from images a second, searched pairs a second, and the seconds that follow an epoch."
    return {who: epochs * (train / speed + judged / judging + judged**2 / pairs + after) / 3600 for who, (epochs, train, judged) in RECIPES.items()}


def recipe_hours(speed: float, judging: float, pairs: float, after: float) -> str: # images, images and pairs a second; seconds
    "What that makes of the paper's four recipes."
    hours = hours_of(speed, judging, pairs, after)
    rows = [[who, f"{epochs} × ({train:,} / {speed:,.0f} + {judged:,} / {judging:,.0f} + {judged**2 / pairs:.2f} + {after:.2f})", f"{hours[who]:.2f}"] for who, (epochs, train, judged) in RECIPES.items()]
    return "\n\n".join([
        "## What the paper's four recipes would take", f"The run itself trains on {speed:,.1f} images a second, and embeds {judging:,.1f} a second of those that are judged after every epoch. "
        f"Search among them goes through {pairs:,.3g} pairs a second, in both metrics and with K up to 1,000. Each epoch is followed by {after:.2f} s: some 2,000 training images are looked at, and a checkpoint is written. "
        f"Not counted: compilation, the first upload, the clustering at the end, that SOP and In-Shop have more than the {CLASSES} classes of this measurement, and that CUB's uncut pictures lie in squares of 512 pixels, which take longer to augment. "
        "The profile `paper` also has each recipe under our protocol, with five seeds: five times the epochs of these; `--row cub --row cars196 --row sop --row inshop` leaves those out.",
        pipe_table(["recipe", "epochs × (training / speed + judged / speed + search + what follows)", "hours"], [*rows, ["all four", "", f"{sum(hours.values()):.2f}"]])])


def main(out: str = "figures/bench", encoder: str | None = None, size: int | None = None, crop: int | None = None, batch: int | None = None,
         steps: int | None = None, rounds: int = 5, threads: int | None = None, compile: bool = False) -> None:
    "Climb the ladder, and say what that makes of the paper's four recipes."
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_compiler(device)                                                                       # before the first minute
    if threads: torch.set_num_threads(threads)
    given = {k: v for k, v in dict(encoder=encoder, size=size, crop=crop, batch=batch, steps=steps).items() if v is not None}
    use = defaults(device) | given
    recipe = Recipe(encoder=use["encoder"], size=use["size"], crop=use["crop"], pipeline="device", batch_size=use["batch"], freeze_bn=use["encoder"] != "convnet", dropout=.5,
                    augment=Augment(crop_scale=(.16, 1.), flip=True, jitter=(.25, .25, .25, 0.), jitter_first=True))
    workers = worker_count(use["batch"] * 3 * use["crop"] ** 2 * 4)
    machine, (peak, what) = machine_lines(), peak_rate(device)
    name, folder = f"training_{'gpu' if device.type == 'cuda' else 'cpu'}", Path(out)
    about = (f"{use['encoder']}, {use['crop']} of {use['size']} pixels, batches of {use['batch']}, {step_flops(recipe) / 1e9:.2f} GFLOP an image (forward and backward, counted by torch). "
             f"Median of {rounds} blocks of {use['steps']} steps, lowest and highest in brackets; all rungs take a block each in every round, and ratios are those within a round. {'Each rung adds to the one before it' + ', but for compile' * (device.type != 'cuda' and compile)}. DataLoader: {workers} worker processes. The run itself: 05c's, with its bookkeeping; "
             f"beside its steps it draws an epoch's table and waits at the end. The peak is {what}; the net's operations count, the loss's do not. Torch allows TF32 in convolutions unless told otherwise: what most scripts do lies between the first two rungs.")
    where = [] if device.type == "cuda" else ["**No GPU here: the same ladder on the CPU, small.** It says nothing about a GPU: there is no TF32, and what a GPU gains from bf16, channels last "
                                              "and batches that lie beside the net, a CPU may lose."]
    compiling = compile or device.type == "cuda"
    if device.type != "cuda": where += ["The package compiles on a GPU only: the compiler's rung stands aside here, and what follows it is not compiled." if compile else "Nothing is compiled: `--compile` climbs that rung, too."]
    paper = device.type == "cuda" and use["encoder"] == "resnet50" and use["crop"] == 224
    def hours(table):
        run = table[table.rung == ITSELF].iloc[0]
        if not paper: return ("What the paper's four recipes would take is left out: that wants ResNet-50 at 224 pixels on a GPU, and so do the targets (4 times fp32 with a DataLoader, a step within 1.25 times the floor, "
                              f"about one hour for the four). Here the run itself does {run.against_first:.2f} times the first rung, and its step takes {run.step_against_floor:.2f} times the floor.")
        speeds = run.images_per_second, run.judged_per_second, run.pairs_per_second, run.after_epoch
        return "\n\n".join([recipe_hours(*speeds), targets(table, sum(hours_of(*speeds).values()))])
    with tempfile.TemporaryDirectory() as scratch:
        split = noise(max(use["images"], 2 * use["batch"]), use["size"], Path(scratch))
        for table in ladder(recipe, split, device, use["steps"], rounds, workers, compiling, Path(scratch), peak):
            write_text(folder / f"{name}.md", "\n\n".join(["# A training step, rung by rung", *where, about, *filter(None, [few_workers(workers, device)]), rung_table(table), hours(table), asked_of_an_hour(), "\n".join(machine)]))
            table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")          # what is measured is kept round by round
    print(rung_table(table))
    print(f"wrote {folder}/{name}.md, .csv")


if __name__ == "__main__": main()
