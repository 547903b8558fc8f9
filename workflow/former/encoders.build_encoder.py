# stands for d4b2081e6ff8c0a1938a904507a9a1993df01890925ce57d310fd0df40e8e53f
def build_encoder(name: str, # "convnet", "pixels", "resnet18", "resnet34", "resnet50" or "efficientnet_lite0"
                  dim: int | None = None, # size of a bias-free projection; None: the pooled features themselves
                  in_channels: int = 1, # channels of the images; a pretrained net stays RGB, grey images are repeated
                  size: int = 32, # pixels a side; `pixels` takes no other, the rest only check that it is not too small
                  norm: str = "none", # "none", "layer" or "batch", after pooling, no affine
                  freeze_bn: bool | None = None, # frozen BatchNorm2d statistics; None: frozen when pretrained
                  dropout: float = 0., # probability in [0, 1), after the norm
                  pretrained: bool = False, # ImageNet weights, never downloaded here
                  weights: str | Path | None = None, # their file; None: the package's, or torch's cache
                  **options: Any, # convnet: width=16; resnets: stem="imagenet" or "small"; pixels: standardise=None
                 ) -> Encoder: # maps (b, c, h, w) uint8, or float in [0, 1], to (b, encoder.dim)
    "An encoder by name; ValueError for an unknown name or an option without effect, naming the nearest known one."
    check_encoder(name, in_channels, size, dim, pretrained, weights, options)
    backbone = ENCODERS[name](3 if pretrained else in_channels, size, **options)
    if pretrained: fill(backbone.trunk, *PRETRAINED[name](weights=weights))
    return Encoder(backbone, dim, norm, pretrained if freeze_bn is None else freeze_bn, dropout)
