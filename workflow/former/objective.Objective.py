# stands for 41066568e90564c0c6e52b9d22436fda4fee71a0c3b27ef92f1cd5051be02890
class Objective(nn.Module):
    "A loss in two parts, called as `objective(embeddings, labels)`; a subclass defines `split`, and `param_kind`."
    param_kind: dict[str, str] = {} # name of a weight (or its first component) -> "classifier" or "proxies"

    def __init__(self, num_classes: int | None = None, # K, needed by objectives that own one vector a class
                 dim: int | None = None): # d, size of an embedding, needed by the same
        super().__init__()
        self.num_classes, self.dim, self.counts = num_classes, dim, {}

    def split(self, embeddings: Tensor, labels: Tensor) -> Parts:
        "The two parts of a checked batch in float32 or float64."
        raise NotImplementedError(f"{type(self).__name__} must define split(embeddings, labels) -> Parts")

    def parts(self, embeddings: Tensor, # (n, d) any float dtype
              labels: Tensor) -> Parts: # (n,) integer
        "Tightness and contrast of a batch, in full precision whatever autocast says."
        embeddings, labels = check_batch(embeddings, labels)
        self.counts = {}
        with torch.autocast(embeddings.device.type, enabled=False):
            wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            return Parts(*self.split(wide, labels))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor: # () the loss
        "Tightness + contrast."
        return self.parts(embeddings, labels).total

    def extra_repr(self) -> str:
        "The options, for `print`."
        shown = ((name, getattr(self, name, None)) for name in options(type(self)))
        return ", ".join(f"{name}={value!r}" for name, value in shown if not isinstance(value, (Tensor, type(None))))

    def param_groups(self) -> dict[str, list[nn.Parameter]]: # {"classifier": [...], "proxies": [...]}, no empty ones
        "The objective's weights by kind, for their own learning rates; ValueError if a weight has no kind."
        groups: dict[str, list[nn.Parameter]] = {}
        for name, weight in self.named_parameters():
            kind = self.param_kind.get(name, self.param_kind.get(name.split(".")[0]))
            if kind is None:
                raise ValueError(f"{type(self).__name__}.{name} has no kind: "
                                 "add it to param_kind as 'classifier' or 'proxies'")
            groups.setdefault(kind, []).append(weight)
        return groups
