# stands for a823c19a739c3ca88d07fcc45ee7cc39fa3245b30395f11c74f0c4f810132f2b
def fit(recipe: Recipe, # everything that changes the result
        data: Dataset, # only its training classes are used
        make_objective: Callable[..., Objective] | None = None, # (num_classes, dim) -> Objective; None with epochs = 0
        seed: int = 0, # initial weights, batches, augmentation, dropout
        folder: str | Path | None = None, # checkpoint and progress, one folder a run; None: keep nothing
        device: str = "auto", # "auto", "cpu", "cuda"
        progress: bool = True, # show a bar
        observe: Observer | None = None, # called before training and after each epoch; what it returns joins the history
        weights: str | Path | None = None, # file of the pretrained weights; None: the encoder's usual place
       ) -> Result:
    """Train an encoder; resumes from `folder` when it holds a checkpoint of this run.

    Raises ValueError before training, Collapsed during it."""
    device = pick_device(device)
    train, validation = (holdout_classes(data.train, recipe.validation, recipe.validation_seed) if recipe.validation
                         else (data.train, None))
    check_fit(recipe, train, data)
    if (make_objective is None) != (recipe.epochs == 0):
        raise ValueError("make_objective is needed to train, and only then: pass "
                         "partial(objectives.make, recipe.objective, **recipe.objective_options)")
    with cpu_threads(recipe.threads):
        watched = validation or subset_classes(train, max(2, WATCHED * train.num_classes // len(train)))
        run = Run(recipe, data, train, watched, make_objective, seed, Path(folder) if folder else None, device,
                  observe, weights)
        return run.go(progress)
