# stands for acabd532981fc86a9d1c815e9179fa392c14b25a945ce97fa254156a4a1bb924
def step_bytes(encoder: nn.Module, # any device; not changed
               objective: Objective, # likewise
               recipe: Recipe, # augmentation is left out: it needs no gradient
               images: Tensor, # (b, c, h, w) uint8 or float in [0, 1], a batch
               labels: Tensor, # (b,)
              ) -> int: # bytes
    "Bytes that one training step holds when its backward pass begins, counted by autograd's hooks on saved tensors."
    encoder, objective = copy.deepcopy((encoder, objective))
    encoder.train(); objective.train()
    own = [p for module in (encoder, objective) for p in module.parameters()]
    known, saved = {p.untyped_storage().data_ptr() for p in own}, {}
    def keep(t):
        if (place := t.untyped_storage().data_ptr()) not in known: saved[place] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        parts = objective.parts(encoder(images), labels)       # keeps the graph, and so the storages, alive
    moments = 2 if recipe.optimizer == "adamw" else int(recipe.momentum > 0)
    return sum(saved.values()) + (2 + moments) * sum(p.numel() * p.element_size() for p in own)
