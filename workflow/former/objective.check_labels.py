# stands for 9e1f16cfb667ea98e1749ab2047da4fba30c92d4e7a04d9f9c2f8d558297878d
def check_labels(labels: Tensor, # (n,) int64
                 num_classes: int) -> None: # accepted: 0 .. num_classes - 1
    "ValueError for a label out of range, on a CPU; a GPU is not made to wait for the answer."
    if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, "
                         f"but there are {num_classes} classes: 0 to {num_classes - 1}")
