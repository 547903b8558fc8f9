# stands for 2ec39e41aaa92c75f66d2d091dcb3b5708d8be8a9160518ab720afd4cc3ff50b
def contextual_similarity(similarities: Tensor, # (n, n) cosines
                          neighbours: int = 4, # k, itself included
                          slack: float = .05, # epsilon, added to the k-th squared distance
                          step: str = "straight_through", # or "sigmoid"
                         ) -> Tensor: # (n, n) in [0, 1], symmetric
    "How far two points agree on their neighbours, eq. (3)."
    n, nearness = len(similarities), -(2 - 2 * similarities).clamp_min(0)
    k, held = min(neighbours, n), (Tensor.detach if step == "straight_through" else lambda x: x)
    best = held(nearness.topk(k, 1).values)
    near, nearest = (STEPS[step](nearness + slack - best[:, [j]]) for j in (k - 1, max(k // 2, 1) - 1))
    shared, size = near @ near.T, near.sum(1)
    apart = n - size[:, None] - size + shared
    both = shared / held(size)[:, None] + apart / held(n - size).clamp_min(1)[:, None]
    mutual = nearest * nearest.T
    votes = mutual @ (.5 * both * near) / mutual.sum(1, keepdim=True)
    return .5 * (votes + votes.T)
