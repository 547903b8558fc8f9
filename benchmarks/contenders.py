"""What is timed: every registered objective, some under a second setting, and the peer that means the same."""
from collections.abc import Callable
from math import degrees
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dml_companion import objectives

DIM, CLASSES, PER_CLASS = 512, 1024, 4
PANELS = {"pairs": "Pairs", "hinges": "Triplets and hinges", "lists": "Lists and histograms",
          "classes": "Classification", "proxies": "Proxies and centres", "context": "Contextual"}
EXEMPT = {
    "histogram": "sorts the cosines of all pairs into bins, a scatter and no product",
    "contextual similarity": "compares neighbourhoods of neighbourhoods: products of (B, B) matrices",
    "group loss": "replicator dynamics over the batch, on top of a classifier",
    "intra-batch": "a transformer layer over the batch, with weights of its own",
}
# Why a contender is above twice the floor; for all others PASSES.
PASSES = "passes over (B, B) that are no products: masks, hinges, exponentials"
MISSED = {
    "SPCE": "its logits are not symmetric: three products where the floor has two",
    "triplet, semi-hard nearest": "looks for a negative in the window of each positive pair: passes over (B, B) for every partner, no products",
    "triplet, all semi-hard": "weighs all negatives in the window of each positive pair: passes over (B, B) for every partner, no products",
    "margin, distance-weighted": "draws a partner for each anchor: weights in log-space, cumulative sums and a search in each row",
}
TORCH = "held against torch itself, the library has no such loss: one number there, two parts here"
PADS = "a policy over a miner's bins: it acts once in many steps, and its reward is an evaluation of validation classes"


class Contender(NamedTuple):
    "One line of the tables."
    name: str                   # registered
    panel: str                  # one of PANELS
    options: dict = {}
    peer: str | None = None     # one of make_peers()
    products: str = "pairs"     # the floor: "pairs", "classes" or "centres"
    centers: int = 1            # a class, for the floor over classes

    def make(self, num_classes: int = CLASSES, dim: int = DIM) -> torch.nn.Module:
        "The objective."
        return objectives.make(self.name, num_classes, dim, **self.options)


def classes(name, peer=None, centers=1, panel="classes", **options):
    "A contender whose floor is three products with one or more vectors a class."
    return Contender(name, panel, options, peer, "classes", centers)


CONTENDERS = {
    "contrastive": Contender("contrastive", "pairs"),
    "contrastive, plain hinges": Contender("contrastive", "pairs", dict(squared=False, reduction="nonzero"),
                                           "contrastive"),
    "SNCA": Contender("snca", "pairs", {}, "snca"),
    "multi-similarity": Contender("multi_similarity", "pairs", {}, "ms"),
    "multi-similarity, mined": Contender("multi_similarity", "pairs", dict(mining=.1), "ms mined"),
    "SPCE": Contender("spce", "pairs"),
    "DANML": Contender("danml", "pairs"),
    "ALMN": Contender("almn", "pairs"),
    "triplet, squared": Contender("triplet", "hinges"),
    "triplet, plain": Contender("triplet", "hinges", dict(squared=False), "triplet"),
    "triplet, semi-hard nearest": Contender("mined_triplet", "hinges"),
    "triplet, all semi-hard": Contender("mined_triplet", "hinges", dict(miner="semihard_all", squared=False),
                                        "semihard"),
    "margin, all pairs": Contender("margin", "hinges", {}, "margin"),
    "margin, distance-weighted": Contender("mined", "hinges", {}, "margin mined"),
    "quadruplet": Contender("quadruplet", "hinges"),
    "SNR, triplet": Contender("snr", "hinges"),
    "SNR, contrastive": Contender("snr", "lists", dict(form="contrastive", margin=1., mean_weight=0., normalize=True),
                                  "snr"),
    "lifted": Contender("lifted", "lists", {}, "lifted"),
    "lifted, generalised": Contender("generalized_lifted", "lists", {}, "generalized_lifted"),
    "N-pair": Contender("n_pair", "lists"),
    "N-pair, no norm": Contender("n_pair", "lists", dict(norm_weight=0.), "n_pair"),
    "angular": Contender("angular", "lists", {}, "angular"),
    "circle": Contender("circle", "lists", {}, "circle"),
    "histogram": Contender("histogram", "lists", {}, "histogram"),
    "cross-entropy": classes("cross_entropy", "linear"),
    "softmax": classes("softmax", "linear, no bias"),
    "modified softmax": classes("modified_softmax", "modified_softmax"),
    "normalised softmax": classes("normalized_softmax", "normalized_softmax"),
    "SphereFace": classes("sphereface", "sphereface", anneal_from=0, anneal_to=0),
    "CosFace": classes("cosface", "cosface"),
    "ArcFace": classes("arcface", "arcface"),
    "ArcFace, 3 sub-centres": classes("subcenter_arcface", "subcenter_arcface", 3),
    "Proxy-NCA": classes("proxy_nca", panel="proxies"),
    "ProxyNCA++": classes("proxy_nca_pp", "proxy_nca_pp", panel="proxies"),
    "Proxy-Anchor": classes("proxy_anchor", "proxy_anchor", panel="proxies"),
    "SoftTriple": classes("soft_triple", None, 10, "proxies"),
    "SoftTriple, no regulariser": classes("soft_triple", "soft_triple", 10, "proxies", spread_weight=0),
    "center + cross-entropy": classes("center", panel="proxies"),
    "regularised softmax": Contender("regularised", "proxies", {}, None, "centres"),
    "contextual similarity": Contender("contextual_similarity", "context"),
    "group loss": Contender("group_loss", "context"),
    "intra-batch": Contender("intra_batch", "context"),
}
PAIRWISE = {label: c for label, c in CONTENDERS.items() if c.products == "pairs"}
CLASSIFICATION = {label: c for label, c in CONTENDERS.items() if c.products != "pairs"}


class LinearCrossEntropy(torch.nn.Module):
    "Torch's own: the peer of `cross_entropy` and `softmax`, which pytorch-metric-learning does not have."
    def __init__(self, bias: bool = True):
        super().__init__()
        self.linear = torch.nn.Linear(DIM, CLASSES, bias)
    def forward(self, z, y): return F.cross_entropy(self.linear(z), y)


def make_peers() -> dict[str, Callable]:
    "pytorch-metric-learning under the settings where it means the same (tests compare values); torch's own without it."
    own = {"linear": LinearCrossEntropy(), "linear, no bias": LinearCrossEntropy(bias=False)}
    try: from pytorch_metric_learning import distances, losses, miners
    except ImportError: return own
    ms, ms_miner = losses.MultiSimilarityLoss(2, 50, .5), miners.MultiSimilarityMiner(.1)
    triplet, semihard = losses.TripletMarginLoss(.2), miners.TripletMarginMiner(.2, "semihard")
    mined, draw = losses.MarginLoss(.2, beta=1.2, learn_beta=True), miners.DistanceWeightedMiner()
    angular = losses.AngularLoss(45)
    faces, plain = (CLASSES, DIM), dict(num_classes=CLASSES, embedding_size=DIM)
    return own | {
        "contrastive": losses.ContrastiveLoss(), "snca": losses.NCALoss(softmax_scale=5), "ms": ms,
        "ms mined": lambda z, y: ms(z, y, ms_miner(z, y)),
        "triplet": triplet, "semihard": lambda z, y: triplet(z, y, semihard(z, y)),
        "margin": losses.MarginLoss(.2, beta=1.2, learn_beta=True),
        "margin mined": lambda z, y: mined(z, y, draw(z, y)),
        "snr": losses.SignalToNoiseRatioContrastiveLoss(),
        "lifted": losses.LiftedStructureLoss(1, 0), "generalized_lifted": losses.GeneralizedLiftedStructureLoss(1, 0),
        "n_pair": losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False)),
        "angular": lambda z, y: angular(F.normalize(z), y),             # by itself it leaves negatives unnormalised
        "circle": losses.CircleLoss(.4, 80), "histogram": losses.HistogramLoss(n_bins=100),
        "modified_softmax": losses.SphereFaceLoss(*faces, margin=1, scale=1),
        "normalized_softmax": losses.NormalizedSoftmaxLoss(*faces),
        "sphereface": losses.SphereFaceLoss(*faces, margin=4, scale=1),
        "cosface": losses.CosFaceLoss(*faces, margin=.35, scale=64),
        "arcface": losses.ArcFaceLoss(*faces, margin=degrees(.5), scale=64),
        "subcenter_arcface": losses.SubCenterArcFaceLoss(**plain, margin=degrees(.5), scale=64, sub_centers=3),
        "proxy_nca_pp": losses.ProxyNCALoss(*faces, softmax_scale=9),
        "proxy_anchor": losses.ProxyAnchorLoss(*faces, margin=.1, alpha=32),
        "soft_triple": losses.SoftTripleLoss(*faces, centers_per_class=10, la=20, gamma=.1, margin=.01)}


# Largest B of the peers that grow like B^3.
LIMITS = {"lifted": 512, "histogram": 512, "triplet": 1024, "semihard": 1024, "margin": 1024}

def peer_bytes(peer: str, # one of make_peers()
               size: int, # B
              ) -> int: # what its largest tensors take together, roughly; 0 if none outgrows (B, B)
    "What peers need that enumerate triplets, positive pairs times negative pairs, or differences: decided before they are run."
    triplets = size * (PER_CLASS - 1) * (size - PER_CLASS)
    if peer == "snr": return 16 * size**2 * DIM             # all differences of all embeddings, a few times
    if peer == "lifted": return 26 * size * triplets         # a few floats and masks for each pair of pairs
    if peer in LIMITS: return 3 * size**3 + 100 * triplets  # masks of B^3; three index tensors and what follows
    return 0


def make_batch(size: int, per_class: int = PER_CLASS, dim: int = DIM, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    "A half-trained batch: classes of four around random centres, the same numbers on every device."
    g = torch.Generator().manual_seed(size)
    y = torch.arange(size) // per_class
    z = torch.randn(size // per_class + 1, dim, generator=g)[y] + torch.randn(size, dim, generator=g)
    return z.to(device).requires_grad_(), y.to(device)


def step(loss: Callable, z: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    "Forward and backward of a loss, gradients dropped first."
    weights = list(loss.parameters()) if isinstance(loss, torch.nn.Module) else []
    def run():
        for leaf in (z, *weights): leaf.grad = None
        loss(z, y).backward()
    return run
