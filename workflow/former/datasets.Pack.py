# stands for 4760bc77888e519785bf48a61332045cf56fd3c06fc69761435cd9453e588f63
class Pack(NamedTuple):
    "An open pack: arrays that live on disk."
    images: np.ndarray # (n, c, h, w) uint8, read-only memory map
    labels: np.ndarray # (n,) int64
    hashes: np.ndarray # (n, 32) uint8: sha256 of each image
    class_names: list[str]
    folder: Path
