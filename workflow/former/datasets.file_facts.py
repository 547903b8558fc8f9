# stands for 395aa5015db9084dc59c82f76cdf5dbf246371e6f1745aedc251a043d6a40b14
def file_facts(folder: Path) -> dict: # {file name: [bytes, sha256 or None]}
    "Sizes of a pack's files, and digests of the small ones (the images have one hash each in hashes.npy)."
    small = lambda p: hashlib.sha256(p.read_bytes()).hexdigest() if p.name != "images.npy" else None
    return {p.name: [p.stat().st_size, small(p)] for p in (folder / f"{n}.npy" for n in ("images", "labels", "hashes"))}
