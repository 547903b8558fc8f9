"Data sets: disjoint classes, clean glyphs, packs that are whole or absent, files that strangers made."
import hashlib, io, json, multiprocessing, os, stat, subprocess, sys, time, unicodedata, warnings, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
import dml_companion.datasets as D
from dml_companion.datasets import (BadArchive, BrokenImage, BrokenPack, MissingData, Rows, Source, Split, clean_glyphs,
                                    data_digest, decode, die, ensure_pack, holdout_classes, known_datasets, load,
                                    open_pack, subset_classes, verify_pack, zip_files)

REAL = os.environ.get("DML_DATA")
def real(*parts):
    return pytest.mark.skipif(not REAL or not Path(REAL, *parts).exists(), reason=f"DML_DATA has no {'/'.join(parts)}")

@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("packs")

@pytest.fixture(scope="module")
def glyphs(cache): return load("glyphs", cache=cache, progress=False)

# --- splits

def toy(n=12, classes=4):
    images = np.arange(n * 3, dtype=np.uint8).reshape(n, 3, 1, 1)
    return Split(images, np.arange(n) % classes, [f"c{i}" for i in range(classes)])

@pytest.mark.parametrize("indices", [[3, 0, 3], np.array([5, 1]), torch.tensor([2, 7]), slice(2, 9, 3), slice(None),
                                     np.arange(12) % 2 == 0])
def test_batch_takes_any_index(indices):
    split = toy()
    rows = Rows(np.concatenate([split.images[::-1], split.images]), np.arange(12, 24))
    views = split, Split(rows, split.labels, split.class_names)
    as_numpy = indices.numpy() if isinstance(indices, torch.Tensor) else indices
    for s in views:
        b = s.batch(indices)
        assert b.dtype == torch.uint8 and b.is_contiguous()
        assert np.array_equal(b.numpy(), split.images[as_numpy])
        b.zero_()                                                # writing to a batch leaves the data alone
        assert split.images.sum() == np.arange(36).sum()

def test_rows_behave_like_an_array():
    store = np.arange(20, dtype=np.uint8).reshape(5, 1, 2, 2)
    rows = Rows(store, [4, 1])
    assert rows.shape == (2, 1, 2, 2) and len(rows) == 2 and rows.dtype == np.uint8 and rows.ndim == 4
    assert np.array_equal(np.asarray(rows), store[[4, 1]]) and np.array_equal(rows[0], store[4])
    assert np.asarray(rows, dtype=np.float32).dtype == np.float32

@pytest.mark.parametrize("labels,names", [([0, 1], "ab"), ([0, 1, 3], "abc"), ([0, 1, 1], "abc"), ([-1, 0, 1], "abc")])
def test_split_refuses_wrong_labels(labels, names):
    with pytest.raises(ValueError): Split(np.zeros((3, 1, 2, 2), np.uint8), labels, list(names))

def test_dataset_refuses_leaks():
    s = toy()
    with pytest.raises(ValueError, match="4 classes are in train and query"): D.Dataset("x", s, s, None, "", False)
    other = Split(s.images, s.labels, ["w", "x", "y", "z"])
    with pytest.raises(ValueError, match="gallery and query"): D.Dataset("x", s, other, s, "", False)

@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(2, 28), st.floats(.01, .99), st.integers(0, 5))
def test_holdout_is_a_partition(classes, fraction, seed):
    split = toy(3 * classes, classes)
    if int(classes * fraction + 1e-9) < 1:
        with pytest.raises(ValueError, match="leaves a side empty"): holdout_classes(split, fraction, seed)
        return
    rest, held = holdout_classes(split, fraction, seed)
    assert not set(rest.class_names) & set(held.class_names)
    assert sorted(rest.class_names + held.class_names) == sorted(split.class_names)
    assert held.num_classes == int(classes * fraction + 1e-9) and len(rest) + len(held) == len(split)
    for part in (rest, held):
        assert part.images.store is split.images                  # nothing copied
        for image, label in zip(part.images[:], part.labels):     # an image keeps its class
            assert split.class_names[split.labels[image[0, 0, 0] // 3]] == part.class_names[label]

@pytest.mark.parametrize("fraction", [0, 1, -.1, 1.5, float("nan")])
def test_holdout_refuses(fraction):
    with pytest.raises(ValueError): holdout_classes(toy(), fraction, 0)

def test_holdout_nests_and_repeats():
    split = toy(60, 20)
    a, b = holdout_classes(split, .5, 1), holdout_classes(split, .5, 1)
    assert a[0].class_names == b[0].class_names and a[0].class_names != holdout_classes(split, .5, 2)[0].class_names
    rest, held = holdout_classes(a[0], .2, 0)
    assert rest.images.store is split.images and held.num_classes == 2

def test_subset():
    split = toy()
    assert subset_classes(split, None) is split and subset_classes(split, 9) is split
    assert subset_classes(split, 2).class_names == ["c0", "c1"] and subset_classes(split, 2, seed=3).num_classes == 2
    with pytest.raises(ValueError): subset_classes(split, 0)

def test_die_never_changes():
    assert die(["U+0041", "cat"]).tolist() == [0.3124512495576155, 0.7560432837626337]
    assert die(["cat"], 1)[0] != die(["cat"], 0)[0] and abs(die(map(str, range(20000))).mean() - .5) < .01

# --- glyphs

def test_glyphs_are_clean(glyphs):
    "The two properties the design asks for, by hashing pixels, not by the code that cleaned."
    seen = {}
    for name, s in (("train", glyphs.train), ("query", glyphs.query)):
        counts = np.bincount(s.labels)
        assert counts.min() >= 8 and counts.max() == 12
        for image, label in zip(s.images[:], s.labels):
            assert image.any()
            assert seen.setdefault(hashlib.sha256(image.tobytes()).digest(), (name, label)) == (name, label)
    assert len(seen) == len(glyphs.train) + len(glyphs.query)

def test_glyph_counts(glyphs):
    assert glyphs.info["code_points"] == 2383                      # the fonts have not changed since matplotlib 2
    assert 1500 <= glyphs.info["classes"] <= 1600 and 1350 <= glyphs.info["classes_with_all_faces"] <= 1450
    assert glyphs.train.num_classes + glyphs.query.num_classes == glyphs.info["classes"]
    assert .45 < glyphs.train.num_classes / glyphs.info["classes"] < .55
    assert glyphs.train.images.shape[1:] == (1, 32, 32) and glyphs.gallery is None and not glyphs.flip
    assert {"matplotlib", "pillow", "freetype", "licence"} <= set(glyphs.info) and json.dumps(glyphs.info)

def test_glyph_sides_are_disjoint_in_classes_and_base_letters(glyphs):
    base = lambda s: {D.base_letter(int(n.split()[0][2:], 16)) for n in s.class_names}
    assert not set(glyphs.train.class_names) & set(glyphs.query.class_names)
    assert not base(glyphs.train) & base(glyphs.query)
    assert D.base_letter(ord("ȇ")) == "e" and D.base_letter(ord("¨")) == "\u0308" and D.base_letter(ord("Ж")) == "Ж"

def test_twins_are_noise_in_training_only(glyphs, cache):
    noisy = load("glyphs", cache=cache, merge_twins=False, progress=False)
    assert noisy.query.class_names == glyphs.query.class_names
    assert np.array_equal(noisy.query.images[:], glyphs.query.images[:])
    assert set(noisy.train.class_names) > set(glyphs.train.class_names) and noisy.digest != glyphs.digest
    labels = {}
    for image, label in zip(noisy.train.images[:], noisy.train.labels):
        labels.setdefault(image.tobytes(), set()).add(label)
    assert sum(len(v) > 1 for v in labels.values()) > 100         # one image, several labels
    unseen = {i.tobytes() for i in noisy.query.images[:]}
    assert not unseen & set(labels)                                # ... and none of them in the test

def test_glyph_digest(glyphs, cache, tmp_path):
    assert len(glyphs.digest) == 64 and data_digest("glyphs", cache=cache) == glyphs.digest
    assert data_digest("glyphs", cache=tmp_path) == glyphs.digest  # drawn again: the same
    small = load("glyphs", cache=cache, progress=False, max_train_classes=7, max_test_classes=5)
    assert (small.train.num_classes, small.query.num_classes) == (7, 5) and small.digest != glyphs.digest
    assert set(small.train.class_names) <= set(glyphs.train.class_names)
    assert load("glyphs", cache=cache, progress=False, split_seed=1).digest != glyphs.digest

def test_glyph_digest_is_quick(glyphs, cache):
    started = time.perf_counter()
    data_digest("glyphs", cache=cache)
    assert time.perf_counter() - started < 2                       # about 0.02 s; it must not draw

def clean_oracle(images, merge_twins):
    owners, keep = {}, np.zeros(images.shape[:2], bool)
    for i, row in enumerate(images):
        for x in row: owners.setdefault(x.tobytes(), set()).add(i)
    for i, row in enumerate(images):
        seen = set()
        for j, x in enumerate(row):
            keep[i, j] = x.any() and x.tobytes() not in seen and (not merge_twins or len(owners[x.tobytes()]) == 1)
            seen.add(x.tobytes())
    return keep & (keep.sum(1, keepdims=True) >= D.MIN_FACES)

@settings(derandomize=True, deadline=None, max_examples=80)
@given(arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(8, 12), st.just(1)), elements=st.integers(0, 60)),
       st.booleans())
def test_cleaning_agrees_with_sets(images, merge_twins):
    hashes = np.stack([[D.image_hash(x) for x in row] for row in images])
    assert np.array_equal(clean_glyphs(hashes, ~images.any(-1), merge_twins), clean_oracle(images, merge_twins))

# --- packs

NOISE = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)
def noise_source(read=NOISE.__getitem__): return Source("noise", "f", (1, 8, 8), np.arange(50) % 5, list("abcde"), read)
def entries(folder): return [p for p in Path(folder).iterdir() if p.name != ".locks"]
def leftovers(folder): return [p.name for p in entries(folder) if p.name.startswith(".")]

def test_pack_is_made_once(tmp_path):
    calls = []
    read = lambda i: calls.append(i) or NOISE[i]
    first, second = (ensure_pack(noise_source(read), tmp_path, progress=False) for _ in range(2))
    assert sorted(calls) == list(range(50)) and first.folder == second.folder and not leftovers(tmp_path)
    assert np.array_equal(second.images, NOISE) and second.class_names == list("abcde")
    assert not second.images.flags.writeable
    verify_pack(second)

def test_key_follows_source_and_size(tmp_path):
    changes = {}, dict(fingerprint="g"), dict(shape=(1, 4, 16)), dict(name="other")
    folders = {ensure_pack(noise_source()._replace(**c), tmp_path, progress=False).folder for c in changes}
    assert len(folders) == 4

def test_an_error_leaves_nothing(tmp_path):
    def read(i):
        if i == 30: raise BrokenImage("image 30")
        return NOISE[i]
    with pytest.raises(BrokenImage, match="image 30"): ensure_pack(noise_source(read), tmp_path, progress=False)
    assert not entries(tmp_path)

def flip_byte(path, at):
    with open(path, "r+b") as f:
        f.seek(at); b = f.read(1); f.seek(at); f.write(bytes([b[0] ^ 255]))

DAMAGE = {
    "cut images": lambda d: os.truncate(d / "images.npy", 2000),
    "long images": lambda d: open(d / "images.npy", "ab").write(b"x"),
    "no images": lambda d: (d / "images.npy").unlink(),
    "no meta": lambda d: (d / "meta.json").unlink(),
    "cut meta": lambda d: os.truncate(d / "meta.json", 100),
    "edited meta": lambda d: (d / "meta.json").write_text((d / "meta.json").read_text().replace('"a"', '"z"')),
    "meta is no text": lambda d: (d / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "meta is a list": lambda d: (d / "meta.json").write_text("[1]"),
    "edited labels": lambda d: flip_byte(d / "labels.npy", 200),
    "edited hashes": lambda d: flip_byte(d / "hashes.npy", 200),
    "edited first image": lambda d: flip_byte(d / "images.npy", 128),
    "header": lambda d: flip_byte(d / "images.npy", 3),
}
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_mended(damage, tmp_path):
    pack = ensure_pack(noise_source(), tmp_path, progress=False)
    folder = pack.folder; del pack
    DAMAGE[damage](folder)
    with pytest.raises(BrokenPack): open_pack(folder)
    with pytest.warns(UserWarning, match="building it again"):
        again = ensure_pack(noise_source(), tmp_path, progress=False)
    assert np.array_equal(again.images, NOISE) and again.folder == folder and not leftovers(tmp_path)

def test_full_check_names_the_image(tmp_path):
    pack = ensure_pack(noise_source(), tmp_path, progress=False)
    flip_byte(pack.folder / "images.npy", 128 + 64 * 2 + 5)      # image 2: not one of the sixteen that opening looks at
    with pytest.raises(BrokenPack, match="image 2 "): verify_pack(open_pack(pack.folder))

def build_in_process(folder, queue):
    def read(i): time.sleep(.002); return NOISE[i]
    pack = ensure_pack(noise_source(read), folder, progress=False)
    queue.put(hashlib.sha256(np.ascontiguousarray(pack.images)).hexdigest())

@pytest.mark.parametrize("broken_before", [False, True])
def test_processes_at_once(tmp_path, broken_before):
    if broken_before: DAMAGE["cut images"](ensure_pack(noise_source(), tmp_path, progress=False).folder)
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jobs = [context.Process(target=build_in_process, args=(tmp_path, queue)) for _ in range(4)]
        for j in jobs: j.start()
        got = [queue.get(timeout=60) for _ in jobs]
        for j in jobs: j.join()
    assert set(got) == {hashlib.sha256(NOISE).hexdigest()} and len(entries(tmp_path)) == 1

def test_killed_half_way(tmp_path, monkeypatch):
    code = f"""if 1:
        import sys, time, numpy as np
        from dml_companion import datasets
        datasets.CHUNK = 8
        def read(i):
            if i > 20: print("half", flush=True); time.sleep(60)
            return np.zeros((1, 8, 8), np.uint8)
        source = datasets.Source("noise", {noise_source().fingerprint!r}, (1, 8, 8), np.arange(50) % 5, list("abcde"), read)
        datasets.ensure_pack(source, {str(tmp_path)!r}, progress=False)"""
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    job.stdout.readline(); job.kill(); job.wait(); job.stdout.close()
    assert len(leftovers(tmp_path)) == len(entries(tmp_path)) == 1            # nothing under the final name
    pack = ensure_pack(noise_source(), tmp_path, progress=False)
    assert not pack.images[:16].any() and np.array_equal(pack.images[16:], NOISE[16:])   # two marks of eight were kept
    D.verify_pack(pack)
    assert not leftovers(tmp_path)

def test_the_start_of_a_pack_that_nobody_finishes_is_removed_after_a_week(tmp_path):
    (old := tmp_path / ".unfinished-noise").mkdir(); (young := tmp_path / ".unfinished-other").mkdir()
    os.utime(old, (time.time() - 8 * 86400,) * 2); os.utime(young, (time.time() - 6 * 86400,) * 2)
    ensure_pack(noise_source(), tmp_path, progress=False)
    assert young.exists() and not old.exists()

@pytest.mark.parametrize("mark", ["", "x", "999"])
def test_a_broken_mark_starts_again(tmp_path, mark):
    "An unfinished pack whose mark cannot be read, or says more than is there, is no basis."
    key = ensure_pack(noise_source(), tmp_path / "a", progress=False).folder.name
    (start := tmp_path / "b" / f".unfinished-{key}").mkdir(parents=True)
    (start / "images.npy").write_bytes(b"cut"); (start / "rows").write_text(mark)
    pack = ensure_pack(noise_source(), tmp_path / "b", progress=False)
    assert np.array_equal(pack.images, NOISE)
    D.verify_pack(pack)

def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="DML_CACHE"):
        ensure_pack(noise_source(), tmp_path / "file" / "packs", progress=False)

def test_cache_from_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "here"))
    assert ensure_pack(noise_source(), progress=False).folder.parent == tmp_path / "here"

def test_full_disk_is_foreseen(tmp_path, monkeypatch):
    monkeypatch.setattr(D.shutil, "disk_usage", lambda p: type("usage", (), dict(free=10)))
    with pytest.raises(OSError, match="GB"): ensure_pack(noise_source(), tmp_path, progress=False)

# --- archives

def png(colour=128, size=(20, 20), mode="L", **save):
    buffer = io.BytesIO(); Image.new(mode, size, colour).save(buffer, save.pop("format", "PNG"), **save)
    return buffer.getvalue()

def make_zip(path, members):
    with zipfile.ZipFile(path, "w") as z:
        for name, data in members: z.writestr(name, data)
    return path

def member(name, mode=0o100644, system=3):
    info = zipfile.ZipInfo("x"); info.filename = info.orig_filename = name
    info.external_attr, info.create_system = mode << 16, system
    return info

@pytest.mark.parametrize("name,why", [
    ("/etc/cat/1.png", "absolute"), ("../cat/1.png", r"'\.\.'"), ("cat/../../1.png", r"'\.\.'"),
    ("..\\cat\\1.png", r"'\.\.'"), ("C:\\cat\\1.png", "absolute"), ("\\\\host\\cat\\1.png", "absolute")])
def test_hostile_paths(name, why, tmp_path):
    path = make_zip(tmp_path / "a.zip", [("cat/0.png", png()), (member(name), png())])
    for call in (lambda: zip_files(path), lambda: load("folder", path, cache=tmp_path, progress=False)):
        with pytest.raises(BadArchive, match=why) as e: call()
        assert "a.zip" in str(e.value)

@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o600, stat.S_IFIFO | 0o600])
def test_links_and_devices(mode, tmp_path):
    path = make_zip(tmp_path / "a.zip", [(member("cat/1.png", mode), b"/etc/passwd")])
    with pytest.raises(BadArchive, match="link"): zip_files(path)

def test_bombs(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("cat/1.png", bytes(2**23))
    with pytest.raises(BadArchive, match="ratio"): zip_files(tmp_path / "bomb.zip")
    monkeypatch.setattr(D, "MAX_MEMBER", 100)
    path = make_zip(tmp_path / "big.zip", [("cat/1.png", bytes(200))])
    with pytest.raises(BadArchive, match="more than 100"): zip_files(path)

def test_a_lying_header_cannot_fill_memory(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "liar.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("cat/1.png", bytes(2**22))
    raw = bytearray((tmp_path / "liar.zip").read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24:at + 28] = (1000).to_bytes(4, "little")             # the directory claims 1000 bytes
    (tmp_path / "liar.zip").write_bytes(raw)
    files = zip_files(tmp_path / "liar.zip")
    try: assert len(files.read("cat/1.png")) <= 1000
    except zipfile.BadZipFile: pass

def test_encrypted_doubled_or_damaged(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("cat/1.png", png())])
    raw = bytearray(path.read_bytes()); raw[raw.rindex(b"PK\x01\x02") + 8] |= 1; path.write_bytes(raw)
    with pytest.raises(BadArchive, match="encryption"): zip_files(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_zip(tmp_path / "b.zip", [("cat/1.png", png()), ("cat/1.png", png(3))])
    with pytest.raises(BadArchive, match="twice"): zip_files(tmp_path / "b.zip")
    (tmp_path / "c.zip").write_bytes(b"not an archive")
    with pytest.raises(BadArchive, match="c.zip"): zip_files(tmp_path / "c.zip")
    good = make_zip(tmp_path / "d.zip", [("cat/1.png", png())]).read_bytes()
    (tmp_path / "d.zip").write_bytes(good[:len(good) // 2])
    with pytest.raises(BadArchive, match="d.zip"): zip_files(tmp_path / "d.zip")

def test_damaged_member_is_named(tmp_path):
    path = make_zip(tmp_path / "a.zip", [(f"{c}/{i}.png", png(i)) for c in ("cat", "dog") for i in range(3)])
    raw = bytearray(path.read_bytes()); at = raw.index(b"dog/1.png") + 40; raw[at] ^= 255; path.write_bytes(raw)
    with pytest.raises(BrokenImage, match=r"dog/1\.png in .*a\.zip"): load("folder", path, 16, tmp_path, progress=False)

# --- decoding

def encode(image, format, **save):
    buffer = io.BytesIO(); image.save(buffer, format, **save)
    return buffer.getvalue()

@pytest.mark.parametrize("mode,format", [
    ("L", "PNG"), ("L", "JPEG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("RGB", "BMP"), ("RGB", "TIFF"), ("RGBA", "PNG"),
    ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("1", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("I;16", "PNG")])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_pixels(mode, format, channels):
    image = Image.new("RGB", (37, 23), (200, 200, 200))
    if mode == "I;16": image = Image.fromarray(np.full((23, 37), 200 * 257, np.uint16))
    else: image = image.quantize(4) if mode == "P" else image.convert(mode)
    out = decode(encode(image, format), 16, channels)
    assert out.shape == (channels, 16, 16) and out.dtype == np.uint8
    if mode != "1": assert np.abs(out.astype(int) - 200).max() <= 4  # JPEG and CMYK round

def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (decode(encode(clear, "PNG"), 16) == 255).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert (decode(encode(palette, "PNG", transparency=0), 16) == 255).all()
    assert decode(encode(palette, "PNG"), 16)[:, 0, 0].tolist() == [10, 20, 30]

def test_exif_rotation():
    image = Image.new("L", (32, 32), 0); image.paste(255, (0, 0, 32, 8))    # bright at the top
    exif = Image.Exif(); exif[0x112] = 6                                   # the camera was turned: top is to the right
    out = decode(encode(image, "JPEG", exif=exif, quality=95), 32, 1)[0]
    assert out[:, -6:].mean() > 250 and out[:, :20].mean() < 5

def test_aspect_is_kept_and_the_centre_cut():
    image = Image.new("L", (90, 30), 0); image.paste(255, (30, 0, 60, 30))  # the middle third is bright
    assert decode(encode(image, "PNG"), 30, 1).min() > 200
    assert decode(encode(Image.new("L", (1000, 1), 77), "PNG"), 16, 1).min() == 77

def test_a_square_of_the_right_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    assert np.array_equal(decode(encode(Image.fromarray(pixels), "PNG"), 24), pixels.transpose(2, 0, 1))

# --- folders

def tree(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root

def pets(root, classes=("cat", "dog", "eel", "fox"), n=3):
    return tree(root, {f"{c}/{i}.png": png(20 * k + i) for k, c in enumerate(classes) for i in range(n)})

def open_folder(root, tmp_path, **options):
    return load("folder", root, 16, tmp_path / "packs", progress=False, **options)

def test_folder_of_a_stranger(tmp_path):
    root = pets(tmp_path / "my pets")
    tree(root, {"grüne Äpfel/ein Bild.JPG": png(mode="RGB", colour=(0, 99, 0), format="JPEG"),
                "grüne Äpfel/deep/er/2.Png": png(), "cat/.DS_Store": b"?", "cat/Thumbs.db": b"?", ".git/1.png": b"?",
                "__MACOSX/cat/._1.png": b"?", "loose.png": png(), "read me.txt": b"hi"})
    (root / "empty").mkdir()
    data = open_folder(root, tmp_path, split=["grüne Äpfel"])
    assert data.query.class_names == ["grüne Äpfel"] and len(data.query) == 2
    assert data.train.class_names == ["cat", "dog", "eel", "fox"]
    assert data.info["left_out"] == {"hidden files": 3, "files that are no images": 2,
                                     "images outside a class folder": 1}
    assert data.train.batch([0, 4])[:, :, 8, 8].tolist() == [[0, 0, 0], [21, 21, 21]]
    assert data.flip and open_folder(root, tmp_path, channels=1, split=["cat"]).train.images.shape[1] == 1

def test_folder_and_zip_are_the_same_data(tmp_path):
    root = pets(tmp_path / "pets")
    pairs = [(f"{p.relative_to(root).as_posix()}", p.read_bytes()) for p in sorted(root.rglob("*.png"))]
    plain = make_zip(tmp_path / "plain.zip", pairs)
    wrapped = make_zip(tmp_path / "wrapped.zip", [(f"pets/{n}", b) for n, b in reversed(pairs)])
    windows = make_zip(tmp_path / "windows.zip", [(member(n.replace("/", "\\")), b) for n, b in pairs])
    digests = {open_folder(r, tmp_path).digest for r in (root, plain, wrapped, windows)}
    assert len(digests) == 1 and data_digest("folder", root, 16, tmp_path / "packs") in digests

def test_a_changed_file_makes_a_new_pack(tmp_path):
    root = pets(tmp_path / "pets")
    before = open_folder(root, tmp_path).digest
    (root / "cat" / "0.png").write_bytes(png(200)); os.utime(root / "cat" / "0.png", (1, 1))
    assert open_folder(root, tmp_path).digest != before

@pytest.mark.parametrize("suffix,text", [
    (".txt", "dog\n\n fox \n"), (".txt", "\ufeffdog\r\nfox\r\n"), (".json", '["dog", "fox"]'), (".csv", "dog\nfox"),
    (".csv", "class\ndog\nfox\n"), (".csv", "id,class\n1,dog\n2,fox\n")])
def test_split_by_file(suffix, text, tmp_path):
    (tmp_path / f"unseen{suffix}").write_text(text, "utf-8")
    data = open_folder(pets(tmp_path / "pets"), tmp_path, split=str(tmp_path / f"unseen{suffix}"))
    assert data.query.class_names == ["dog", "fox"]

def test_split_by_fraction_and_list(tmp_path):
    root = pets(tmp_path / "pets", [f"{i:02}" for i in range(9)])
    last = open_folder(root, tmp_path, split=.5, order="sorted")      # the odd class goes to training, as 41 of 81
    assert last.query.class_names == ["05", "06", "07", "08"]
    a, b = (open_folder(root, tmp_path, split=1 / 3, seed=s) for s in (0, 1))
    assert a.query.num_classes == b.query.num_classes == 3 and a.query.class_names != b.query.class_names
    assert a.digest == open_folder(root, tmp_path, split=1 / 3).digest != b.digest
    assert open_folder(root, tmp_path, split=("03", "01", "03")).query.class_names == ["01", "03"]
    assert len(entries(tmp_path / "packs")) == 1          # one pack serves all splits

@pytest.mark.parametrize("options,message", [
    (dict(split=["dgo"]), "did you mean 'dog'"), (dict(split=0), "between 0 and 1"),
    (dict(split=1.), "between 0 and 1"), (dict(split=True), "between 0 and 1"), (dict(split=[]), "0 of 4"),
    (dict(split=["cat", "dog", "eel", "fox"]), "4 of 4"), (dict(split=.1), "0 of 4"),
    (dict(order="alphabetical"), "sorted"),
    (dict(channels=4), "channels"), (dict(spilt=.5), "did you mean 'split'")])
def test_folder_refuses(options, message, tmp_path):
    root = pets(tmp_path / "pets")
    with pytest.raises(ValueError, match=message): open_folder(root, tmp_path, **options)

def test_split_file_with_wrong_content(tmp_path):
    (tmp_path / "s.json").write_text('{"a": 1}')
    root = pets(tmp_path / "pets")
    with pytest.raises(ValueError, match="JSON list"): open_folder(root, tmp_path, split=str(tmp_path / "s.json"))
    with pytest.raises(FileNotFoundError, match="none.txt"): open_folder(root, tmp_path, split=tmp_path / "none.txt")

def test_names_match_whatever_their_unicode_form(tmp_path):
    root = pets(tmp_path / "pets", ["a", "b", unicodedata.normalize("NFD", "é")])
    for form in ("NFC", "NFD"):
        assert open_folder(root, tmp_path, split=[unicodedata.normalize(form, "é")]).query.class_names == ["é"]

def test_one_image_class_is_named(tmp_path):
    root = tree(pets(tmp_path / "pets"), {"lynx/1.png": png()})
    with pytest.warns(UserWarning, match="1 classes have one image.*lynx"): data = open_folder(root, tmp_path)
    assert "lynx" in data.train.class_names + data.query.class_names and data.info["lonely"] == ["lynx"]

@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_image_is_named(format, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = encode(noise, format)
    name = f"dog/9.{format.lower()}"
    root = tree(pets(tmp_path / "pets"), {name: whole[:len(whole) // 2]})
    with pytest.raises(BrokenImage, match=name): open_folder(root, tmp_path)
    assert not entries(tmp_path / "packs")

@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_image_is_named(content, tmp_path):
    root = tree(pets(tmp_path / "pets"), {"dog/9.png": content})
    with pytest.raises(BrokenImage, match="dog/9.png"): open_folder(root, tmp_path)

def test_links(tmp_path):
    root = pets(tmp_path / "pets")
    os.symlink(root / "cat", root / "tiger"); os.symlink(tmp_path / "nowhere", root / "dog" / "9.png")
    with pytest.warns(UserWarning, match="tiger"), pytest.raises(BrokenImage, match="dog/9.png"):
        open_folder(root, tmp_path)

def test_missing_folder_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("DML_DATA", raising=False)
    for root in (tmp_path / "nowhere", None):
        with pytest.raises(FileNotFoundError, match="one sub-folder") as e: load("folder", root, cache=tmp_path)
        assert isinstance(e.value, MissingData) and (root is None or str(root) in str(e.value))
    (tmp_path / "void").mkdir()
    with pytest.raises(MissingData, match="0 classes"): load("folder", tmp_path / "void", cache=tmp_path)

# --- omniglot and grocery

def scribble(k, i):
    image = Image.new("1", (105, 105), 1); image.paste(0, (5 + k, 5 + i, 60, 30))
    return encode(image, "PNG")

def tiny_omniglot(root, counts=(3, 2)):
    for half, n in zip(("images_background", "images_evaluation"), counts):
        tree(root, {f"{half}/Script_{half[7:9]}/character{k:02}/{k:04}_{i:02}.png": scribble(k, i)
                    for k in range(1, n + 1) for i in range(1, 3)})
    return root

def zipped(root, home):
    home.mkdir(parents=True)
    for half in root.iterdir():
        files = [(p.relative_to(root).as_posix(), p.read_bytes()) for p in sorted(half.rglob("*.png"))]
        make_zip(home / f"{half.name}.zip", files)
    return home

@pytest.fixture
def two_each(monkeypatch):
    monkeypatch.setattr(D, "OMNIGLOT", {"images_background": 3, "images_evaluation": 2})
    monkeypatch.setattr(D, "OMNIGLOT_DRAWERS", 2)

def test_omniglot_layouts_agree(two_each, tmp_path, monkeypatch):
    plain = tiny_omniglot(tmp_path / "plain")
    roots = [plain, tiny_omniglot(tmp_path / "under" / "omniglot").parent, zipped(plain, tmp_path / "zip"),
             zipped(plain, tmp_path / "zip_under" / "omniglot").parent]
    sets = [load("omniglot", r, cache=tmp_path / "packs", progress=False) for r in roots]
    assert len({s.digest for s in sets}) == 1
    data = sets[0]
    assert (len(data.train), data.train.num_classes, len(data.query), data.query.num_classes) == (6, 3, 4, 2)
    assert not data.flip
    assert data.query.class_names == ["Script_ev/character01", "Script_ev/character02"]
    image = data.train.batch([0])[0, 0]
    assert image.shape == (32, 32) and image[31, 31] == 0 and image[5, 10] == 255     # ink is bright
    monkeypatch.setenv("DML_DATA", str(roots[1]))
    assert data_digest("omniglot", cache=tmp_path / "packs") == data.digest

def test_omniglot_rotations_are_training_classes(two_each, tmp_path):
    root = tiny_omniglot(tmp_path / "o")
    plain, turned = (load("omniglot", root, 24, tmp_path / "packs", progress=False, rotations=r) for r in (False, True))
    assert turned.train.num_classes == 12 and turned.query.class_names == plain.query.class_names
    label = turned.train.class_names.index("Script_ba/character02/turned 90")
    original = plain.train.batch(plain.train.labels == plain.train.class_names.index("Script_ba/character02"))
    assert torch.equal(turned.train.batch(turned.train.labels == label), torch.rot90(original, 1, (2, 3)))

def test_omniglot_counts_are_enforced(two_each, tmp_path):
    root = tiny_omniglot(tmp_path / "a", (2, 2))
    with pytest.raises(ValueError, match="2 characters, expected 3 with"): load("omniglot", root, cache=tmp_path)
    root = tiny_omniglot(tmp_path / "b")
    next(root.rglob("0002_01.png")).unlink()
    with pytest.raises(ValueError, match="character02 has 1 images"): load("omniglot", root, cache=tmp_path)

@pytest.mark.parametrize("name,words", [
    ("omniglot", ("images_background.zip", "github.com/brendenlake/omniglot", "<alphabet>/<character>")),
    ("grocery", ("grocery_128.zip", "github.com/marcusklasson", "00.Golden-Delicious"))])
def test_missing_data_names_folder_source_and_layout(name, words, tmp_path, monkeypatch):
    monkeypatch.delenv("DML_DATA", raising=False)
    with pytest.raises(MissingData) as e: load(name, tmp_path, cache=tmp_path / "p")
    assert all(w in str(e.value) for w in (str(tmp_path), *words)) and not (tmp_path / "p").exists()
    with pytest.raises(MissingData, match="DML_DATA"): load(name, cache=tmp_path)

def test_grocery_count_is_enforced(tmp_path):
    make_zip(tmp_path / "grocery_128.zip", [(f"{c}/{i}.png", png()) for c in "ab" for i in range(2)])
    with pytest.raises(ValueError, match="2 classes, expected 81"):
        load("grocery", tmp_path, cache=tmp_path / "p", progress=False)

@real("omniglot")
def test_real_omniglot(tmp_path):
    data = load("omniglot", REAL, cache=tmp_path, progress=False)
    assert (data.train.num_classes, len(data.train)) == (964, 19280)
    assert (data.query.num_classes, len(data.query)) == (659, 13180)
    assert (np.bincount(data.train.labels) == 20).all() and (np.bincount(data.query.labels) == 20).all()
    alphabets = [{n.split("/")[0] for n in s.class_names} for s in (data.train, data.query)]
    assert not alphabets[0] & alphabets[1] and [len(a) for a in alphabets] == [30, 20]
    x = data.query.batch(np.arange(2000)).float()
    assert 5 < x.mean() < 60 and x.amax((1, 2, 3)).min() > 100        # a little bright ink on black

@real("grocery", "grocery_128.zip")
def test_real_grocery_and_the_same_by_hand(tmp_path):
    data = load("grocery", REAL, size=32, cache=tmp_path, progress=False)
    names = sorted(n.split("/")[0] for n in zipfile.ZipFile(Path(REAL, "grocery", "grocery_128.zip")).namelist())
    names = list(dict.fromkeys(names))
    assert len(names) == 81 and data.train.class_names == names[:41] and data.query.class_names == names[41:]
    assert len(data.train) + len(data.query) == 5421
    path = Path(REAL, "grocery", "grocery_128.zip")
    by_hand = load("folder", path, size=32, cache=tmp_path, progress=False, split=names[41:])
    assert by_hand.digest == data.digest

# --- the door

def test_load_refuses_what_it_does_not_know(tmp_path, cache):
    with pytest.raises(ValueError, match="did you mean 'glyphs'.*omniglot"): load("glyph")
    with pytest.raises(ValueError, match="did you mean 'rotations'"): load("omniglot", tmp_path, rotation=True)
    for size in (0, 7, 4000, 32.5, "32", True):
        with pytest.raises(ValueError, match="size"): load("glyphs", size=size, cache=tmp_path)
    with pytest.raises(ValueError, match="at least 1"): load("glyphs", cache=cache, progress=False, max_train_classes=0)
    assert {"glyphs", "omniglot", "folder", "grocery"} <= set(known_datasets()) and all(known_datasets().values())

def test_a_set_with_a_gallery_enters_by_the_same_door(tmp_path, monkeypatch):
    "In-Shop has query and gallery images of the same classes."
    monkeypatch.setattr(D, "DATASETS", dict(D.DATASETS))
    @D.dataset("shop", "a test", 8)
    def shop(root, size, cache, progress, every: int = 1):
        pack = ensure_pack(noise_source(), cache, progress)
        rows = np.arange(50)
        unseen = pack.labels >= 2
        return D.Sides(pack, rows[~unseen], rows[unseen & (rows < 25)], rows[unseen & (rows >= 25)], True, {})
    data = load("shop", cache=tmp_path, progress=False)
    assert data.gallery.class_names == data.query.class_names == ["c", "d", "e"]
    assert data.train.class_names == ["a", "b"]
    assert np.array_equal(data.gallery.images[:], NOISE[25:][np.arange(25, 50) % 5 >= 2])
    assert "gallery" in repr(data)
    assert data.digest != load("shop", cache=tmp_path, progress=False, max_test_classes=2).digest

def test_import_is_light():
    code = "import sys, dml_companion.datasets; print({'matplotlib', 'torchvision', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
