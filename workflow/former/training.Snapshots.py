# stands for 38addb3d15937c9c74314d58a79e6b99eb03ceefdf5b84fb7908420a625f4393
class Snapshots:
    "An observer for `fit` that keeps embeddings (and a classifier's weights) of some epochs in `folder/epochs/`."
    def __init__(self, folder: str | Path, # the run's
                 epochs: list[int], # from `kept_epochs`
                 **splits: Split): # name -> images to embed
        self.folder, self.epochs, self.splits = Path(folder) / "epochs", set(epochs), splits

    def __call__(self, epoch: int, encoder: Encoder, objective: Objective | None) -> None:
        "Write one epoch's arrays, completely or not at all."
        if epoch not in self.epochs: return
        arrays = {name: embed(encoder, split).numpy() for name, split in self.splits.items()}
        for name in ("weight", "bias"):
            if (value := getattr(objective, name, None)) is not None: arrays[name] = value.detach().float().cpu().numpy()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{epoch:04d}.{os.getpid()}.partial"
        with open(partial, "wb") as file: np.savez(file, **arrays)
        os.replace(partial, self.folder / f"{epoch:04d}.npz")

    def merge(self, **labels: np.ndarray, # kept beside them: the labels of each split
             ) -> Path: # folder / epochs.npz: "epoch" (E,), each array with E in front, and the labels
        "Put the epochs into one file, in the place of the many; ValueError names an epoch that is missing."
        target, files = self.folder.with_suffix(".npz"), {e: self.folder / f"{e:04d}.npz" for e in sorted(self.epochs)}
        if target.exists(): shutil.rmtree(self.folder, ignore_errors=True); return target        # merged before
        for file in files.values():
            if not file.exists(): raise ValueError(f"{file} is missing: delete the run's checkpoint.pt to train it again")
        found = [dict(np.load(file)) for file in files.values()]
        partial = target.with_name(f"epochs.{os.getpid()}.partial")
        with open(partial, "wb") as out:
            np.savez(out, epoch=np.array(list(files)), **{k: np.stack([f[k] for f in found]) for k in found[0]}, **labels)
        os.replace(partial, target)
        shutil.rmtree(self.folder)
        return target
