# stands for f5a5449581e384d6c3cdb2c25cafb01820ddcf02acc6fd6676d92954224f7458
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
