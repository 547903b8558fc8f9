# stands for d32234f0cc99590ef7ced34b9bd212f88b7c2040cd44e0a3c75c9828e686dc0f
class Augment(Strict):
    "Random changes of a training image; parameters are drawn for each image on its own, and all are off by default."
    degrees: float = Field(0., ge=0, le=180) # rotation uniform in [-degrees, degrees]
    translate: float = Field(0., ge=0, lt=1) # shift uniform in [-translate, translate], as a share of the side
    scale: tuple[float, float] = (1., 1.) # zoom uniform in the interval
    shear: float = Field(0., ge=0, lt=90) # horizontal shear uniform in [-shear, shear] degrees
    crop_scale: tuple[float, float] | None = None # random resized crop: share of the area kept
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3) # random resized crop: width over height
    flip: bool = False # mirror half of the images; refused for data whose labels do not survive it
    jitter: tuple[float, float, float, float] = (0., 0., 0., 0.) # brightness, contrast, saturation, hue (hue <= 0.5)

    @model_validator(mode="after")
    def _sensible(self) -> "Augment":
        "Intervals are ordered and positive; a crop ratio without a crop would do nothing."
        for name in ("scale", "crop_scale", "crop_ratio"):
            lo, hi = getattr(self, name) or (1., 1.)
            if not 0 < lo <= hi: raise ValueError(f"augment.{name} must be 0 < low <= high, got ({lo}, {hi})")
        if self.crop_scale and self.crop_scale[1] > 1:
            raise ValueError(f"augment.crop_scale keeps a share of the area, at most 1, got {self.crop_scale}")
        if self.crop_scale is None and "crop_ratio" in self.model_fields_set and self.crop_ratio != (3 / 4, 4 / 3):
            raise ValueError("augment.crop_ratio has no effect without augment.crop_scale: set both or neither")
        if min(self.jitter) < 0 or self.jitter[3] > .5:
            raise ValueError(f"augment.jitter must be >= 0 with hue <= 0.5, got {self.jitter}")
        return self

    @property
    def affine(self) -> bool: # True when any of the four affine parameters is on
        "Does this configuration move pixels by an affine map?"
        return bool(self.degrees or self.translate or self.shear or self.scale != (1., 1.))
