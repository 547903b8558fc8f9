# stands for f57cf721ef26c4f0a1d486da1456d2a00388d64ac6e54216deaf3cfe3df2c1e0
class Source(NamedTuple):
    "What a pack is made from: rows in their final order, and a function that gives the image of a row."
    name: str # of the data set
    fingerprint: str # changes when the files or anything that changes pixels does
    shape: tuple[int, int, int] # (c, h, w)
    labels: Sequence[int] # (n,) class of each row
    class_names: list[str]
    read: Callable[[int], np.ndarray] # row number -> (c, h, w) uint8; called from several threads
