# stands for d5732225b3a83e48825b6a75f757c899ac66833c7aeaec72012642e241591cf8
def open_pack(folder: Path) -> Pack:
    "Open a pack after the cheap checks; raises `BrokenPack`, which says what is wrong."
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta.pop("sha256", None) != sha256_json(meta): raise BrokenPack(f"{folder}: meta.json was changed or cut")
        if meta["format"] != PACK_FORMAT: raise BrokenPack(f"{folder}: format {meta['format']}, expected {PACK_FORMAT}")
        facts = file_facts(folder)
        for n in facts:
            if facts[n] != meta["files"][n]: raise BrokenPack(f"{folder}: {n} is not the file that was written")
        images = np.asarray(np.load(folder / "images.npy", mmap_mode="r"))
        labels, hashes = np.load(folder / "labels.npy"), np.load(folder / "hashes.npy")
        if list(images.shape) != meta["shape"]: raise BrokenPack(f"{folder}: images have shape {images.shape}")
    except BrokenPack: raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e: raise BrokenPack(f"{folder}: {e!r}") from e
    pack = Pack(images, labels, hashes, meta["class_names"], folder)
    verify_pack(pack, np.linspace(0, len(images) - 1, 16).astype(int))
    return pack
