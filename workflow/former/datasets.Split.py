# stands for 287066207cb5aaf9d62bd6b42a6bde19a4d13151e9752b8bafae04f08bc128f5
@dataclass(frozen=True, eq=False, repr=False)
class Split:
    "Images of a set of classes. `images` behaves like an (n, c, h, w) `uint8` array and may live on disk."
    images: Any # (n, c, h, w) uint8: array, memory map or `Rows`
    labels: np.ndarray # (n,) int64, 0 .. num_classes-1, every class has an image
    class_names: list[str] # one for each label

    def __post_init__(self):
        labels = np.ascontiguousarray(self.labels, dtype=np.int64)
        object.__setattr__(self, "labels", labels)
        if len(labels) != len(self.images): raise ValueError(f"{len(self.images)} images but {len(labels)} labels")
        found = np.unique(labels)
        if not np.array_equal(found, np.arange(len(self.class_names))):
            raise ValueError(f"labels must be 0..{len(self.class_names) - 1}, each present, one for each of the "
                             f"{len(self.class_names)} class names; got {len(found)} different ones")

    def __len__(self) -> int: return len(self.labels)
    @property
    def num_classes(self) -> int: return len(self.class_names)
    def batch(self,
              indices: slice | Tensor | ArrayLike = slice(None), # integers or a mask; default: all
             ) -> Tensor: # (b, c, h, w) uint8, contiguous, safe to write to
        "The images at `indices` (integers, a slice or a mask; default all) as one tensor: one fancy index, no loop."
        if isinstance(indices, Tensor): indices = indices.cpu().numpy()
        images = np.ascontiguousarray(self.images[indices])
        return torch.from_numpy(images if images.flags.owndata else images.copy())
    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"Split({len(self):,} images of {self.num_classes:,} classes, {shape})"
