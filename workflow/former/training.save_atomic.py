# stands for d2b3a6d1b77835f98df3e02a137808bfb9a03ad9b2ece7116812aa3979a5df68
def save_atomic(state: dict, # anything torch.save takes
                path: Path, # final place
               ) -> None:
    "Write beside the final place, flush to disk, then move: a reader sees the old file or the new one, never half."
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    with open(partial, "wb") as f:
        torch.save(state, f)
        f.flush(); os.fsync(f.fileno())
    os.replace(partial, path)
