# stands for 2b9fc1fb3f63f9841a036b0a4bb7053b333958ea67e6606b59b8d25c081c33f1
def write_pack(source: Source,
               folder: Path, # must exist; filled with images.npy, labels.npy, hashes.npy and, last, meta.json
               progress: bool = True,
              ) -> None:
    "Decode every image of a source once, in order, in threads, and write a pack's files; goes on where it was killed."
    n, size, head = len(source.labels), int(np.prod(source.shape)), io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr="|u1", fortran_order=False, shape=(n, *source.shape)))
    done = packed_rows(folder, size, len(head.getvalue()))
    need, free = (n - done) * size, shutil.disk_usage(folder).free
    if need > free: raise OSError(f"the pack needs {need / 1e9:.1f} GB in {folder.parent}, {free / 1e9:.1f} are free")
    hashes, threads = np.zeros((n, 32), np.uint8), min(8, os.cpu_count() or 1)
    bar = tqdm(desc=f"packing {source.name}", total=n, initial=done, disable=not progress, unit=" images")
    with open(folder / "images.npy", "r+b" if done else "w+b") as f, ThreadPoolExecutor(threads) as pool, bar:
        f.write(head.getvalue())
        for i in range(done): hashes[i] = image_hash(np.frombuffer(f.read(size), np.uint8))
        f.truncate(f.tell())                               # what was written after the last mark is written again
        try:
            for start in range(done, n, CHUNK):
                for i, image in enumerate(pool.map(source.read, range(start, min(start + CHUNK, n))), start):
                    f.write(np.ascontiguousarray(image, np.uint8).reshape(source.shape).tobytes())
                    hashes[i] = image_hash(image)
                    bar.update()
                f.flush(); os.fsync(f.fileno())
                mark_rows(folder, i + 1)
        except BaseException: pool.shutdown(cancel_futures=True); raise
    np.save(folder / "labels.npy", np.asarray(source.labels, dtype=np.int64))
    np.save(folder / "hashes.npy", hashes)
    meta = dict(format=PACK_FORMAT, name=source.name, shape=[n, *source.shape], class_names=source.class_names,
                fingerprint=source.fingerprint, files=file_facts(folder))
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": sha256_json(meta)}, ensure_ascii=False), "utf-8")
    (folder / "rows").unlink(missing_ok=True)
