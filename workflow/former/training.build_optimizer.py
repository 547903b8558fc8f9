# stands for e87c34c7d9bec76b985230acbb2a9081f689123f5fac610e6f65c7f635cbe384
def build_optimizer(groups: list[dict], # from `parameter_groups`
                    recipe: Recipe, # optimizer, momentum, nesterov
                   ) -> torch.optim.Optimizer:
    "SGD or AdamW over the groups."
    if recipe.optimizer == "adamw": return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
