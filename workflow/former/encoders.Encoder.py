# stands for 8ebaebceb5240543e89808c7abd3e3ece77209b88f992a9fd4dd0b8cafedd663
class Encoder(nn.Module):
    "Images to embeddings: scale, trunk, pool, norm, dropout, projection; never l2-normalised, eq. (1)."
    def __init__(self,
                 backbone: Backbone, # trunk with its scaling
                 dim: int | None = None, # size of a bias-free linear projection; None: pooled features as they are
                 norm: str = "none", # "none", "layer" or "batch", after pooling, no affine
                 freeze_bn: bool = False, # keep the statistics of every BatchNorm2d as they are
                 dropout: float = 0., # probability in [0, 1), after the norm, before the projection
                ):
        super().__init__()
        trunk, features, self.channels, mean, std, self.size = backbone
        if dim is not None and dim < 1: raise ValueError(f"dim must be >= 1 or None, got {dim}")
        if not 0 <= dropout < 1: raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if freeze_bn and not any(isinstance(m, nn.BatchNorm2d) for m in trunk.modules()):
            raise ValueError("freeze_bn=True, but this encoder has no BatchNorm2d: leave freeze_bn out")
        self.features, self.dim, self.freeze_bn = features, dim or features, bool(freeze_bn)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.trunk = trunk.to(memory_format=torch.channels_last)
        self.norm, self.dropout = norm_layer(norm, features), nn.Dropout(dropout)
        self.project = nn.Identity() if dim is None else nn.Linear(features, dim, bias=False)
        self.train()

    def train(self, mode: bool = True) -> "Encoder":
        "As ever, but with `freeze_bn` the BatchNorm2d layers stay in evaluation mode (their weights train)."
        super().train(mode)
        if self.freeze_bn:
            for m in self.trunk.modules():
                if isinstance(m, nn.BatchNorm2d): m.eval()
        return self

    def preprocess(self, images: Tensor) -> Tensor: # (b, c, h, w) uint8 or float in [0, 1] -> (b, channels, h, w)
        "Pixels as the trunk wants them: right channels, minus mean, over deviation, channels last."
        if images.ndim != 4:
            raise ValueError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
        if self.size and images.shape[-2:] != (self.size,) * 2:
            raise ValueError(f"this encoder was built with size={self.size}, got images of {tuple(images.shape[-2:])}")
        if images.dtype == torch.uint8: x = images.to(self.mean.dtype) / 255
        elif images.is_floating_point(): x = images.to(self.mean.dtype)
        else: raise ValueError(f"images must be uint8 or float in [0, 1], got {images.dtype}")
        return ((match_channels(x, self.channels) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor: # (b, c, h, w) uint8 or float in [0, 1] -> (b, dim)
        "Embeddings of a batch; `uint8` is scaled here, so never scale before."
        return self.project(self.dropout(self.norm(self.trunk(self.preprocess(images)))))
