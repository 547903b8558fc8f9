# stands for 6784f2fa725367959d278965f865175353b23ead2226cf4061ebab5692af4f12
def train_epoch(accelerator: Any, # accelerate.Accelerator
                encoder: nn.Module, # prepared
                objective: Objective, # prepared
                optimizer: Any, # prepared
                split: Split, # training classes
                recipe: Recipe, # everything else
                position: tuple[int, int], # iteration at which the epoch starts, iterations of the whole run
                generators: dict[str, torch.Generator], # "sampler", "augment"
                tick: Callable[[], None] = lambda: None, # called after each iteration
               ) -> dict[str, float]: # means over the epoch
    "Train for one epoch; raises Collapsed when the loss is not finite."
    encoder.train(); objective.train()
    step, total = position
    labels, device = torch.as_tensor(split.labels), accelerator.device
    batches = epoch_batches(recipe, split.labels, generators["sampler"])
    sums, norms, counts = torch.zeros(2, device=device), torch.zeros((), device=device), {}
    for i, index in enumerate(batches):
        factor = warmup_cosine(step + i, total, recipe.warmup) if recipe.schedule == "warmcos" else 1.
        for group in optimizer.param_groups: group["lr"] = group["peak"] * factor
        images = split.batch(index.numpy()).to(device, non_blocking=True).float() / 255
        images = augment_batch(images, recipe.augment, generators["augment"])
        parts = objective.parts(encoder(images), labels[index].to(device))
        optimizer.zero_grad()
        accelerator.backward(parts.tightness + parts.contrast)
        if recipe.clip:
            norms += accelerator.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], recipe.clip)
        optimizer.step()
        sums += torch.stack([parts.tightness, parts.contrast]).detach().float()
        for name, n in objective.counts.items(): counts[name] = counts.get(name, 0) + n
        tick()
    if not sums.isfinite().all():
        raise Collapsed(f"the loss is not finite between iterations {step} and {step + len(batches)} (lr {recipe.lr:g}, "
                        f"objective {recipe.objective}): lower lr, set clip, or look at the batch with `objective.parts`")
    tightness, contrast = (sums / len(batches)).tolist()
    return dict(loss=tightness + contrast, tightness=tightness, contrast=contrast,
                lr=optimizer.param_groups[0]["lr"], iterations=len(batches),
                **({"gradient_norm": norms.item() / len(batches)} if recipe.clip else {}),
                **{k: int(n) for k, n in counts.items()})
