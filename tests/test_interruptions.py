"Interruptions: killed at any moment, damaged files, a full disk, two processes on one folder. What goes on must be the same run, bit for bit."
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from functools import partial

import pytest
import torch
from tqdm import tqdm

from dml_companion import device_training, objectives, training
from dml_companion.datasets import load
from dml_companion.training import DiskFull, FolderInUse, Recipe, checkpoint_before, fit, load_checkpoint, save_checkpoint, sealed, unsealed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
RECIPE = Recipe(encoder_options={"width": 4}, epochs=30, batch_size=32, lr=.1, warmup=3, dropout=.1, validation=.25, objective="center",
                augment={"degrees": 5., "translate": .05})


@pytest.fixture(scope="module")
def data(): return load("glyphs", progress=False, max_train_classes=16, max_test_classes=8)


def train(data, folder=None, recipe=RECIPE):
    return fit(recipe, data, partial(objectives.make, recipe.objective), seed=5, folder=folder, device="cpu", progress=False)


def weights(result): return [*result.encoder.state_dict().values(), *result.objective.state_dict().values()]


def same(a, b):
    told = [[{k: v for k, v in e.items() if k != "seconds"} for e in r.history] for r in (a, b)]
    return told[0] == told[1] and all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.fixture(scope="module")
def whole(data): return train(data)


def in_child(work):
    "Fork a process that does some work and leaves with exit code 0, or 3 after an error. It has a lock of its own for tqdm, whose usual one all processes share: one that is killed may keep it."
    if pid := os.fork(): return pid
    tqdm.set_lock(threading.RLock())
    try: work(); os._exit(0)
    except BaseException: os._exit(3)


def deadly(calls: int):
    "Let this very process die at the n-th step of training or of keeping it: batch, file, flush, link, move."
    left = [calls]
    def counted(f):
        def g(*a, **k):
            left[0] -= 1
            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
            return f(*a, **k)
        return g
    for name in ("fsync", "replace", "link"): setattr(os, name, counted(getattr(os, name)))
    for name in ("augment_batch", "sealed", "random_states"): setattr(training, name, counted(getattr(training, name)))
    device_training.augment = counted(device_training.augment)


@pytest.mark.parametrize("pipeline", ["host", "device"])
def test_twenty_kills_at_random_moments_change_no_bit(pipeline, tmp_path, data):
    recipe, start = RECIPE.model_copy(update={"pipeline": pipeline}), time.monotonic()
    reference, seconds = train(data, recipe=recipe), time.monotonic() - start
    dice, epochs = random.Random(0), []
    for kill in range(20):                                                # by our hand after a random time, or by its own at a random step
        calls, pause = dice.randrange(24), dice.uniform(0, seconds / 30)
        def work():
            if kill % 2: deadly(calls)
            train(data, tmp_path, recipe)
        pid = in_child(work)
        if not kill % 2: time.sleep(pause); os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the run ended by itself after {kill} kills, in epochs {epochs}: {status}"
        if (tmp_path / "checkpoint.pt").exists(): epochs.append(unsealed(tmp_path / "checkpoint.pt")["epoch"])
    assert epochs == sorted(epochs) and 0 < epochs[-1] < recipe.epochs, epochs
    assert same(train(data, tmp_path, recipe), reference)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b[:-1], lambda b: b"", lambda b: b[:900] + bytes([b[900] ^ 1]) + b[901:],
                                    lambda b: b[:-10] + b"0" * 10], ids=["half", "last byte", "empty", "one bit", "checksum"])
def test_a_damaged_checkpoint_costs_an_epoch_and_a_warning(damage, tmp_path, data):
    recipe = RECIPE.model_copy(update={"epochs": 3})
    unbroken = train(data, recipe=recipe)
    def work():
        seen = training.Run.save
        def save(run):
            seen(run)
            if run.epoch == 2: os._exit(0)
        training.Run.save = save
        train(data, tmp_path, recipe)
    os.waitpid(in_child(work), 0)
    path = tmp_path / "checkpoint.pt"
    assert unsealed(path)["epoch"] == 2 and unsealed(checkpoint_before(path))["epoch"] == 1
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="checkpoint.pt .*; going on from checkpoint.previous.pt, epoch 1"): resumed = train(data, tmp_path, recipe)
    assert same(resumed, unbroken) and path.with_suffix(".damaged").exists() and unsealed(path)["epoch"] == 3


def test_no_whole_checkpoint_left(tmp_path):
    path, who = tmp_path / "checkpoint.pt", {"seed": 0}
    for epoch in range(2): save_checkpoint({"identity": who, "epoch": epoch}, path)
    for file in (path, checkpoint_before(path)): file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="checkpoint.pt .*no whole one before it: delete it to train from the start"): load_checkpoint(path, who)


def test_checkpoints_from_before_the_checksum_are_read(tmp_path):
    path, who = tmp_path / "checkpoint.pt", {"seed": 0}
    torch.save({"identity": who, "epoch": 7}, path)
    assert load_checkpoint(path, who)["epoch"] == 7
    save_checkpoint({"identity": who, "epoch": 8}, path)
    assert [load_checkpoint(p, who)["epoch"] for p in (path, checkpoint_before(path))] == [8, 7]
    assert torch.load(path, weights_only=True)["epoch"] == 8


def test_a_deleted_checkpoint_is_not_replaced_without_a_word(data, tmp_path):
    recipe = RECIPE.model_copy(update=dict(epochs=3))
    train(data, tmp_path, recipe)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.warns(UserWarning, match="checkpoint.pt is missing; going on from checkpoint.previous.pt, epoch 2: delete that, too"): train(data, tmp_path, recipe)
    for file in tmp_path.glob("checkpoint*.pt"): file.unlink()
    assert load_checkpoint(tmp_path / "checkpoint.pt", {}) is None


def test_without_links_the_checkpoint_before_is_copied(tmp_path, monkeypatch):
    def no(*a): raise OSError("no links here")
    monkeypatch.setattr(os, "link", no)
    for epoch in range(3): save_checkpoint({"identity": {}, "epoch": epoch}, tmp_path / "checkpoint.pt")
    assert unsealed(tmp_path / "checkpoint.previous.pt")["epoch"] == 1 and len(list(tmp_path.iterdir())) == 2


def test_every_byte_counts():
    content = sealed({"identity": {}, "x": torch.arange(20.)})
    file = lambda b: type("F", (), {"read_bytes": staticmethod(lambda: b)})
    assert unsealed(file(content))["x"][-1] == 19
    for i in random.Random(0).sample(range(len(content)), 150):
        with pytest.raises(ValueError, match="checksum is wrong|cannot be read"): unsealed(file(content[:i] + bytes([content[i] ^ 4]) + content[i + 1:]))


def full_after_two_epochs(folder, data):
    "Train with a quota that is used up after the second epoch; what is told goes to a file that was opened before."
    with open(folder.parent / "told", "w") as told:
        seen = training.Run.save
        def save(run):
            seen(run)
            if run.epoch == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        training.Run.save = save
        try: train(data, folder)
        except DiskFull as e: told.write(str(e)); told.flush()


def test_a_full_disk_is_named_and_the_last_good_state_stays(tmp_path, data, whole):
    folder = tmp_path / "run"
    _, status = os.waitpid(in_child(lambda: full_after_two_epochs(folder, data)), 0)
    told = (tmp_path / "told").read_text()
    assert status == 0 and "no room for checkpoint.pt" in told and "free some and start again" in told and str(folder) in told
    assert unsealed(folder / "checkpoint.pt")["epoch"] == 2 and not list(folder.glob("*.partial"))
    assert same(train(data, folder), whole)


@pytest.fixture
def small_disk(tmp_path):
    "Four megabytes of memory as a file system, where we may mount one."
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True).returncode: pytest.skip("may not mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(small_disk, data, whole):
    folder, ballast = small_disk / "run", small_disk / "ballast"
    def fill(epoch, *_):
        if epoch == 2: ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free // 4096 * 4096 - 8192))
    with pytest.raises(DiskFull, match="no room for checkpoint.pt"):
        fit(RECIPE, data, partial(objectives.make, "center"), seed=5, folder=folder, device="cpu", progress=False, observe=fill)
    assert unsealed(folder / "checkpoint.pt")["epoch"] == 1
    ballast.unlink()
    assert same(train(data, folder), whole)


def test_a_second_process_is_refused_and_a_dead_one_forgotten(tmp_path, data):
    folder, ready = tmp_path / "run", tmp_path / "ready"
    def work():
        def wait(*_): ready.write_text(""); time.sleep(60)
        fit(RECIPE, data, partial(objectives.make, "center"), seed=5, folder=folder, device="cpu", progress=False, observe=wait)
    pid = in_child(work)
    while not ready.exists(): time.sleep(.02)
    with pytest.raises(FolderInUse, match="another process trains in .*run: wait for it, or choose another folder.* delete .*run/training.lock"): train(data, folder)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    result = train(data, folder, RECIPE.model_copy(update={"epochs": 1}))
    assert len(result.history) == 2 and json.loads((folder / "progress.json").read_text())["epoch"] == 1
