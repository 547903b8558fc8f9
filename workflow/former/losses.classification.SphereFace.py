# stands for be4d0fe4a57d182d3deca199ea72ad9a47f272b551e940287a9aace6ab12827d
@register("sphereface", "classification", "Liu et al. 2017", own=("proxies",))
class SphereFace(MarginSoftmax):
    "The own class's angle times m, raw embedding lengths, annealed from the plain cosine (Liu et al. 2017, eq. 7)."
    def __init__(self, num_classes: int | None = None, dim: int | None = None, *, # both required: it owns the proxies
                 margin: int = 4, # m, a factor; 1 is modified softmax
                 anneal_from: float = 1000., # lambda at the first batch; with anneal_to=0 and 0 here: the formula
                 anneal_to: float = 5., # lambda never falls below: 1 / (1 + it) of the margin arrives
                 anneal_rate: float = .12): # how fast: lambda = from / (1 + rate * batches)
        super().__init__(num_classes, dim)
        check_count(margin=margin)
        check_between(0, 1e6, "0 is no annealing", anneal_from=anneal_from, anneal_to=anneal_to,
                      anneal_rate=anneal_rate)
        self.margin, self.anneal_from, self.anneal_to, self.anneal_rate = margin, anneal_from, anneal_to, anneal_rate
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def share(self) -> Tensor: # () lambda
        "How many plain cosines one bent cosine is mixed with now."
        return (self.anneal_from / (1 + self.anneal_rate * self.batches.double())).clamp_min(self.anneal_to)

    def bend(self, cosine: Tensor) -> tuple[Tensor, Tensor]: # (n, 1) each
        "psi, mixed with the plain cosine."
        mixed, (psi, slope) = self.share().to(cosine.dtype), sphere_margin(cosine, self.margin)
        return (mixed * cosine + psi) / (1 + mixed), (mixed + slope) / (1 + mixed)

    def scaled(self, embeddings: Tensor) -> tuple[Tensor, Tensor]: # (n, d) as they are, and their lengths (n, 1)
        "Raw embeddings."
        return embeddings, torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp_min(1e-12)

    def split(self, embeddings: Tensor, labels: Tensor) -> Parts:
        "As for every margin; counts the training batches."
        parts = super().split(embeddings, labels)
        if self.training and torch.is_grad_enabled(): self.batches.add_(1)
        return parts
