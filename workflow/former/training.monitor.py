# stands for 6d3a9cf8e7adc951fb4caf1de3a8dc8453eddedbd765bcb33f16393b08e7990d
def monitor(encoder: Encoder, # any device
            split: Split, # the classes to look at
            device: str, # where to embed
           ) -> dict[str, float]: # recall@1 and the mean length of the mean direction
    "Recall@1 (cosine) on a split, and how far its embeddings have collapsed into one direction (0: none, 1: all)."
    z = embed(encoder, split, device=device)
    unit = F.normalize(z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # classes with one image are counted at the final evaluation
        recall = recall_at_k(z, split.labels, (1,))[1] if z.isfinite().all() else math.nan
    return {"recall@1": recall, "common_direction": unit.mean(0).norm().item()}
