# stands for 91367a5d35924ec83ee12b6e74715b62fb3d0488173639d0cc5bc5472e7a00a2
def content_digest(splits: Sequence[tuple[np.ndarray, Split] | None], # (image hashes, split); None: no gallery
                  ) -> str: # sha256, hex
    "Digest of the contents of splits: image hashes, labels and class names, in order."
    h = hashlib.sha256()
    for s in splits:
        if s is None: h.update(b"none"); continue
        hashes, split = s
        h.update(sha256_json([list(split.images.shape), split.class_names]).encode())
        h.update(np.ascontiguousarray(hashes)); h.update(split.labels.astype("<i8"))
    return h.hexdigest()
