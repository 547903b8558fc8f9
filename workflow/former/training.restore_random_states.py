# stands for 64fc89f6aaf392af81aa5d44e44a82a93e81280ac237b6934524e5e7065de1c8
def restore_random_states(states: dict, # from `random_states`
                          generators: dict[str, torch.Generator], # set in place
                         ) -> None:
    "Put every source of randomness back where `random_states` found it."
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available(): torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    for k, g in generators.items(): g.set_state(states["own"][k])
