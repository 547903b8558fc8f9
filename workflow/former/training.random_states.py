# stands for eba95b77817d7a9bf5988bb805c1b4e02abc10937258da3823b7390c11d4f4a9
def random_states(generators: dict[str, torch.Generator], # the run's own generators
                 ) -> dict: # plain data, loadable with weights_only=True
    "All random states that a run can depend on."
    name, keys, *rest = np.random.get_state()
    return dict(torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                python=random.getstate(), numpy=[name, torch.from_numpy(keys.astype(np.int64)), *rest],
                own={k: g.get_state() for k, g in generators.items()})
