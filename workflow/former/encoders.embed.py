# stands for ff8f61a0bc230acff8f6b6550ed4c42e6a90afd50c328cb744ca7231479637ae
@torch.no_grad()
def embed(encoder: nn.Module, # `Encoder`, or a wrapped one
          images: Tensor | np.ndarray | Sized, # (n, c, h, w) uint8 or float in [0, 1], or a Split with `batch(indices)`
          batch_size: int = 512, # images at a time; memory, not results, depends on it
          device: torch.device | str | None = None, # where to compute: the encoder is moved there; None: where it is
          progress: bool = False, # show a bar
         ) -> Tensor: # (n, dim) float32 on the CPU
    "Embeddings of all images, in evaluation mode and without gradient; the encoder's mode is put back."
    if len(images) == 0: raise ValueError("no images to embed: the split or array is empty")
    if batch_size < 1: raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if device is not None: encoder.to(device)
    device = next(t.device for t in [*encoder.parameters(), *encoder.buffers()])
    take = images.batch if hasattr(images, "batch") else lambda i: torch.as_tensor(images[i[0]:i[-1] + 1])
    starts, mode, out = range(0, len(images), batch_size), encoder.training, []
    if progress:
        from tqdm import tqdm
        starts = tqdm(starts, desc="embed", unit="batch", leave=False)
    encoder.eval()
    try:
        for s in starts:
            batch = take(np.arange(s, min(s + batch_size, len(images))))
            if batch.is_floating_point() and batch.max() > 1.5:
                raise ValueError(f"float images must lie in [0, 1], got {batch.max():.4g}: divide by 255 or give uint8")
            out.append(encoder(batch.to(device)).float().cpu())
    finally: encoder.train(mode)
    return torch.cat(out)
