# stands for d80ee8e2d7d5f2d3fdabae7d117cfdfe14ef0ce630f5aa11d1fc187511c684fe
def check_batch(embeddings: Tensor, # (n, d) floating point
                labels: Tensor, # (n,) integer class of each row
               ) -> tuple[Tensor, Tensor]: # the same embeddings, the labels as int64 on the embeddings' device
    "Refuse a batch that no objective can use; ValueError says what is wrong and what to do."
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be (n, d), got shape {tuple(embeddings.shape)}: "
                         "flatten what follows the batch axis")
    if not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be floating point, got {embeddings.dtype}: call .float() first")
    if labels.ndim != 1:
        raise ValueError(f"labels must be (n,), got shape {tuple(labels.shape)}: one integer a row, not one-hot")
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"labels must be integers, got {labels.dtype}: call .long() first")
    if len(embeddings) != len(labels):
        raise ValueError(f"{len(embeddings)} embeddings but {len(labels)} labels: both need one row a sample")
    if len(labels) == 0: raise ValueError("empty batch: a loss needs at least one embedding")
    return embeddings, labels.to(embeddings.device, torch.int64)
