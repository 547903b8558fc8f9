# stands for 55ae11cd6c04d688165fae4387cc175b47f11456b7e53134c935d774abbaf77f
def check_fit(recipe: Recipe, # what to do
              train: Split, # what to do it on
              data: Dataset, # for its properties
             ) -> None:
    "Refuse before any work what would be ignored or fail later; raises ValueError."
    channels = train.batch(np.arange(1)).shape[1]
    if recipe.augment.flip and not data.flip:
        raise ValueError(f"augment.flip changes the label of {data.name} images (a mirrored letter is another "
                         "letter): set flip = False")
    if channels == 1 and any(recipe.augment.jitter[2:]):
        raise ValueError(f"{data.name} images are grey: saturation and hue jitter {recipe.augment.jitter[2:]} "
                         "have no effect, set them to 0")
    if recipe.epochs and len(train) < recipe.batch_size:
        raise ValueError(f"batch_size {recipe.batch_size} is larger than the training split ({len(train)} images): lower it")
