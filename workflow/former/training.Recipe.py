# stands for b4f2dfcec1da95816d0af12d7737346148edc66d43bcfbe3bd59f8ddfc2e65d1
class Recipe(Strict):
    "Everything that changes the result of a training run, besides its seed."
    # data
    dataset: str = "glyphs" # scientific; a name known to `datasets.load`
    data_options: dict[str, Any] = {} # scientific; options of that data set
    size: int | None = Field(None, ge=8) # fixed; side of the square images in pixels, None: the data set's own
    validation: float = Field(0., ge=0, lt=1) # fixed; share of the training classes held out for model selection
    validation_seed: int = 0 # fixed; which classes those are, the same for every seed of a run
    augment: Augment = Augment() # nuisance
    # encoder
    encoder: str = "convnet" # scientific; a name known to `encoders.build_encoder`
    encoder_options: dict[str, Any] = {} # scientific
    dim: int | None = Field(None, ge=2) # scientific; embedding size, None: the pooled features themselves, as in the paper
    norm: Literal["none", "layer", "batch"] = "none" # scientific; normalisation after pooling, without affine part
    dropout: float = Field(0., ge=0, lt=1) # nuisance
    freeze_bn: bool | None = None # fixed; frozen BatchNorm2d statistics, None: the encoder's own default
    pretrained: bool = False # scientific
    # objective
    objective: str | None = "cross_entropy" # scientific; a name known to `objectives.make`, None only with epochs = 0
    objective_options: dict[str, Any] = {} # nuisance
    # optimisation
    optimizer: Literal["sgd", "adamw"] = "sgd" # fixed
    lr: float = Field(.1, gt=0) # nuisance; peak learning rate of the encoder
    classifier_lr: float = Field(1., gt=0) # nuisance; multiple of lr for classifier weights
    proxy_lr: float = Field(1., gt=0) # nuisance; multiple of lr for proxies and centres
    momentum: float = Field(.9, ge=0, lt=1) # fixed; SGD only
    nesterov: bool = False # fixed; SGD only
    weight_decay: float = Field(5e-4, ge=0) # fixed; never on 1-D parameters (biases, norm weights)
    schedule: Literal["warmcos", "constant"] = "warmcos" # fixed; per iteration
    warmup: int = Field(100, ge=0) # fixed; iterations of linear warm-up
    epochs: int = Field(10, ge=0) # fixed; 0 evaluates the untrained encoder
    batch_size: int = Field(128, ge=2) # fixed
    sampler: Literal["random", "balanced"] = "random" # scientific
    per_class: int | None = Field(None, ge=2) # fixed; images of a class in a balanced batch
    clip: float | None = Field(None, gt=0) # nuisance; largest gradient norm
    precision: Literal["fp32", "bf16"] = "fp32" # fixed; losses compute in fp32 either way
    threads: int = Field(1, ge=1) # fixed; CPU threads: they change the order of sums, so the last bits
    patience: int = Field(5, ge=1) # fixed; evaluations in a row below the untrained encoder after which a run stops

    @model_validator(mode="after")
    def _no_idle_field(self) -> "Recipe":
        "Refuse combinations in which a field would have no effect."
        rules = [
            (self.optimizer != "sgd" and {"momentum", "nesterov"} & self.changed, "momentum and nesterov belong to sgd"),
            (self.nesterov and self.momentum == 0, "nesterov needs momentum > 0"),
            ((self.sampler == "balanced") != (self.per_class is not None), "per_class goes with sampler='balanced', always"),
            (self.per_class and self.batch_size % self.per_class,
             f"batch_size {self.batch_size} is no multiple of per_class {self.per_class}"),
            (self.schedule == "constant" and "warmup" in self.changed, "warmup belongs to schedule='warmcos'"),
            (self.validation == 0 and self.validation_seed, "validation_seed has no effect with validation = 0"),
            ((self.epochs == 0) != (self.objective is None),
             "objective = None goes with epochs = 0 (the untrained encoder), always"),
            (self.epochs == 0 and self.changed & TRAINING,
             f"epochs = 0 trains nothing, so these have no effect: {sorted(self.changed & TRAINING)}"),
        ]
        for broken, why in rules:
            if broken: raise ValueError(f"this recipe says something that would be ignored: {why}")
        return self

    @property
    def changed(self) -> set[str]: # names of fields that differ from their default
        "The fields that differ from their default."
        return {k for k, f in type(self).model_fields.items() if getattr(self, k) != f.default}

    @classmethod
    def load(cls, source: str | Path | dict, # a YAML file or a dictionary
            ) -> "Recipe":
        "Read and validate a recipe; pydantic's ValidationError (a ValueError) names the bad field and value."
        values = source if isinstance(source, dict) else yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{source}: a recipe is a mapping of field: value, got {type(values).__name__}")
        return cls.model_validate(values)
