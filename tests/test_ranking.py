"""Ranking losses: enumerated tuples and pytorch-metric-learning as oracles, poor batches, the GPU's fixed shapes, counts."""
from itertools import combinations, product
from math import radians, tan

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

import test_objectives as base
from dml_companion import objectives
from dml_companion.geometry import normalize as unit
from dml_companion.losses import ranking
from dml_companion.losses.pairwise import MultiSimilarityLoss, own_class_sizes
from dml_companion.losses.ranking import (AngularLoss, CircleLoss, GeneralizedLiftedLoss, HistogramLoss, LiftedLoss, MarginLoss,
                                          NPairLoss, QuadrupletLoss, SNRLoss, TripletLoss, class_blocks, mix_within, near_table,
                                          violations, violations_sorted, within, without_mean)

K, D, PROPERTY, batch = base.K, base.D, base.PROPERTY, base.batch
# Every option at a value that is not its default; each objective has an enumeration `<name>_by_tuples` below.
OTHER = {
    "triplet": dict(margin=.6, squared=False, reduction="all", normalize=False),
    "lifted": dict(margin=.4, normalize=False),
    "generalized_lifted": dict(margin=.4, reduction="valid", normalize=False),
    "margin": dict(margin=.4, beta=.9, learn="class", num_samples=7, count="pairs", nu=.3, normalize=False),
    "n_pair": dict(norm_weight=.1, pairs="all", normalize=True),
    "circle": dict(margin=.25, gamma=20., pairs="batch", detach=False, reduction="anchor"),
    "angular": dict(alpha=36.),
    "snr": dict(form="contrastive", margin=.9, mean_weight=.1, reduction="all", normalize=True),
    "quadruplet": dict(margin=.5, stranger_margin=.4, squared=False, reduction="all", normalize=False),
    "histogram": dict(bins=7),
}
NAMES = sorted(OTHER)
SILENT = {("margin", "learn"), ("margin", "num_samples"), ("circle", "detach")}               # these change what is learned, not the value


def _variants():
    for name in NAMES:
        yield pytest.param(name, {}, id=name)
        for option, value in OTHER[name].items(): yield pytest.param(name, {option: value}, id=f"{name}-{option}")
    yield pytest.param("margin", dict(learn="none"), id="margin-none")
    yield pytest.param("n_pair", dict(pairs="all", normalize=True), id="n_pair-all-normalize")
    yield pytest.param("snr", dict(form="contrastive", reduction="all"), id="snr-contrastive-all")
    yield pytest.param("circle", dict(pairs="batch", detach=False, gamma=10.), id="circle-batch-detach")


VARIANTS = list(_variants())


# ---------------------------------------------------------------- oracle 1: every tuple written out, gradients by autograd

def plain_distances(Z, squared=False):
    d2 = (Z[:, None] - Z[None]).square().sum(2)
    return d2 if squared else torch.where(d2 > 0, torch.where(d2 > 0, d2, 1).sqrt(), 0)


def kinds(y):
    n = range(len(y))
    return ([[j for j in n if y[j] == y[i] and j != i] for i in n], [[j for j in n if y[j] != y[i]] for i in n])


def open_mean(pairs, total, zero, reduction):
    "Tightness and contrast of hinges [u + v]_+, from the list of (u, v)."
    opened = [(u, v) for u, v in pairs if u + v > 0]
    count = max(len(opened) if reduction == "nonzero" else total, 1)
    return sum((u for u, _ in opened), zero) / count, sum((v for _, v in opened), zero) / count


def triplet_terms(V, y, margin):
    P, N = kinds(y)
    return [(V[i, p], margin - V[i, k]) for i in range(len(y)) for p in P[i] for k in N[i]]


def triplet_by_tuples(loss, Z, y):
    terms = triplet_terms(plain_distances(Z, loss.squared), y, loss.margin)
    return open_mean(terms, len(terms), Z.sum() * 0, loss.reduction)


def quadruplet_by_tuples(loss, Z, y):
    V, (P, _), n = plain_distances(Z, loss.squared), kinds(y), len(y)
    terms = [(V[i, p], loss.stranger_margin - V[k, l]) for i in range(n) for p in P[i]
             for k, l in combinations(range(n), 2) if len({int(y[i]), int(y[k]), int(y[l])}) == 3]
    both = zip(triplet_by_tuples(loss, Z, y), open_mean(terms, len(terms), Z.sum() * 0, loss.reduction))
    return [sum(parts) for parts in both]


def lifted_by_tuples(loss, Z, y):
    V, (P, N), m, n = plain_distances(Z), kinds(y), loss.margin, len(y)
    pairs = [(i, p) for i in range(n) for p in P[i] if i < p and N[i]]
    T = C = Z.sum() * 0
    for i, p in pairs:
        J = torch.cat([m - V[i, N[i]], m - V[p, N[p]]]).logsumexp(0) + V[i, p]
        u = V[i, p] ** 2 * (J > 0) / (2 * len(pairs))
        T, C = T + u, C + J.relu() ** 2 / (2 * len(pairs)) - u
    return T, C


def generalized_lifted_by_tuples(loss, Z, y):
    V, (P, N), n, zero = plain_distances(Z), kinds(y), len(y), Z.sum() * 0
    terms = [(V[i, P[i]].logsumexp(0), (loss.margin - V[i, N[i]]).logsumexp(0)) for i in range(n) if P[i] and N[i]]
    return open_mean(terms, n if loss.reduction == "anchor" else len(terms), zero, "all")


def margin_by_tuples(loss, Z, y):
    V, (P, N), zero = plain_distances(Z), kinds(y), Z.sum() * 0
    beta = loss.beta[y] if loss.learn == "class" else loss.beta.expand(len(y))
    T = C = zero
    active = 0
    for i in range(len(y)):
        for js, sign, w in ((P[i], 1, len(N[i])), (N[i], -1, len(P[i]))):
            for j in js:
                hinge, w_ = (loss.margin + sign * (V[i, j] - beta[i])).relu(), w if loss.count == "triplets" else 1
                active += w_ * int(hinge > 0)
                if sign > 0: T = T + w_ * hinge
                else: C = C + w_ * hinge
    return T / max(active, 1) + loss.nu * beta.mean(), C / max(active, 1)


def n_pair_by_tuples(loss, Z, y):
    (P, N), n, zero = kinds(y), len(y), Z.sum() * 0
    if loss.pairs == "all":
        chosen = [(i, p, N[i]) for i in range(n) for p in P[i] if N[i]]
    else:
        first = [(i, min(P[i])) for i in range(n) if P[i] and all(y[j] != y[i] for j in range(i))]
        chosen = [(i, p, [q for j, q in first if j != i]) for i, p in first] if len(first) > 1 else []
    T = C = zero
    for i, p, others in chosen:
        T = T - Z[i] @ Z[p] + loss.norm_weight / 2 * (Z[i] @ Z[i] + Z[p] @ Z[p])
        C = C + torch.stack([Z[i] @ Z[j] for j in [p, *others]]).logsumexp(0)
    return T / max(len(chosen), 1), C / max(len(chosen), 1)


def circle_by_tuples(loss, Z, y):
    S, (P, N), m, n, zero = Z @ Z.T, kinds(y), loss.margin, len(y), Z.sum() * 0
    held = torch.Tensor.detach if loss.detach else lambda a: a
    def u(i, p): return -loss.gamma * held((1 + m - S[i, p]).relu()) * (S[i, p] - 1 + m)
    def v(i, k): return loss.gamma * held((S[i, k] + m).relu()) * (S[i, k] - m)
    if loss.pairs == "anchor":
        rows = [([u(i, p) for p in P[i]], [v(i, k) for k in N[i]]) for i in range(n) if P[i] and N[i]]
        count = n if loss.reduction == "anchor" else len(rows)
    else:
        rows, count = [([u(i, p) for i in range(n) for p in P[i] if i < p], [v(i, k) for i in range(n) for k in N[i] if i < k])], 1
        if not all(rows[0]): rows = []
    terms = [(torch.stack(a).logsumexp(0), torch.stack(b).logsumexp(0)) for a, b in rows]
    return (sum((a for a, _ in terms), zero) / max(count, 1), sum((F.softplus(a + b) - a for a, b in terms), zero) / max(count, 1))


def angular_by_tuples(loss, Z, y):
    t, (P, N), zero = tan(radians(loss.alpha)) ** 2, kinds(y), Z.sum() * 0
    T = C = zero
    pairs = [(i, p) for i in range(len(y)) for p in P[i] if N[i]]
    for i, p in pairs:
        own = 2 * (1 + t) * Z[i] @ Z[p]
        T, C = T - own, C + torch.cat([own[None], 4 * t * Z[N[i]] @ (Z[i] + Z[p])]).logsumexp(0)
    return T / max(len(pairs), 1), C / max(len(pairs), 1)


def snr_by_tuples(loss, Z, y):
    n, zero = len(y), Z.sum() * 0
    d = (Z[None] - Z[:, None]).var(2) / Z.var(1)[:, None]
    if loss.form == "triplet":
        terms = triplet_terms(d, y, loss.margin)
        T, C = open_mean(terms, len(terms), zero, loss.reduction)
    else:
        P, N = kinds(y)
        hinges = [d[i, p] for i in range(n) for p in P[i]], [(loss.margin - d[i, k]).relu() for i in range(n) for k in N[i]]
        T, C = (sum(h, zero) / max(sum(int(x > 0) for x in h) if loss.reduction == "nonzero" else len(h), 1) for h in hinges)
    return T + loss.mean_weight * Z.sum(1).abs().mean(), C


def histogram_by_tuples(loss, Z, y):
    S, nodes, n = (Z @ Z.T).clamp(-1, 1), torch.linspace(-1, 1, loss.bins + 1, dtype=Z.dtype), len(y)
    sets = [[S[i, j] for i, j in combinations(range(n), 2) if (y[i] == y[j]) == same] for same in (True, False)]
    if not all(sets): return Z.sum() * 0, Z.sum() * 0
    plus, minus = ((1 - (torch.stack(s)[:, None] - nodes).abs() * loss.bins / 2).relu().mean(0) for s in sets)
    T = (1 - (Z @ Z.T)[[i for i in range(n) for j in range(n) if i != j and y[i] == y[j]],
                       [j for i in range(n) for j in range(n) if i != j and y[i] == y[j]]]).mean() / 2
    return T, minus @ plus.cumsum(0) - T


@pytest.mark.parametrize("name, settings_", VARIANTS)
@pytest.mark.parametrize("duplicate", [False, True])
def test_parts_and_gradients_equal_the_tuples(name, settings_, duplicate):
    Z, y = batch(8, seed=int(duplicate), classes=4 if duplicate else 3)
    if duplicate: Z[1], y[1] = Z[0], y[0]
    loss = base.filled(objectives.make(name, K, D, **settings_))
    fast, slow = (Z.clone().requires_grad_() for _ in range(2))
    ours, tuples = loss.parts(fast, y), globals()[f"{name}_by_tuples"](loss, unit(slow) if loss.normalize else slow, y)
    for a, b in zip(ours, tuples):
        assert_close(a, b, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part, leaf in ((a, fast), (b, slow))]
        assert_close(*grads, rtol=1e-8, atol=1e-8)
    for weight in loss.parameters():
        grads = [torch.autograd.grad(sum(parts), weight, retain_graph=True)[0] for parts in (ours, tuples)]
        assert_close(*grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_gradcheck(name, settings_):
    if name == "circle": settings_ = {"gamma": 10., **settings_, "detach": False}   # held constant, alpha has no difference quotient
    base.test_gradcheck(name, settings_)


def test_gradcheck_of_beta():
    for learn in ("one", "class"):
        Z, y = batch(7, seed=3, classes=3)
        loss = MarginLoss(K, D, learn=learn, nu=.2).double()
        def run(beta): return tuple(torch.func.functional_call(loss, {"beta": beta}, (Z, y)).unsqueeze(0))
        assert torch.autograd.gradcheck(run, torch.linspace(.8, 1.3, len(loss.beta), dtype=torch.float64).requires_grad_())


# ---------------------------------------------------------------- oracle 2: pytorch-metric-learning

def peers():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import DotProductSimilarity, LpDistance, SNRDistance
    from pytorch_metric_learning.reducers import MeanReducer
    raw = DotProductSimilarity(normalize_embeddings=False)
    return {
        "triplet": (TripletLoss(squared=False), losses.TripletMarginLoss(.2)),
        "triplet squared": (TripletLoss(reduction="all"),
                            losses.TripletMarginLoss(.2, distance=LpDistance(power=2), reducer=MeanReducer())),
        "triplet raw": (TripletLoss(margin=1., squared=False, normalize=False),
                        losses.TripletMarginLoss(1., distance=LpDistance(normalize_embeddings=False))),
        "lifted": (LiftedLoss(), losses.LiftedStructureLoss(1, 0)),
        "generalized_lifted": (GeneralizedLiftedLoss(), losses.GeneralizedLiftedStructureLoss(1, 0)),
        "margin": (MarginLoss(), losses.MarginLoss(.2, beta=1.2, learn_beta=True)),
        "margin class": (MarginLoss(6, learn="class"), losses.MarginLoss(.2, beta=1.2, learn_beta=True, num_classes=6)),
        "n_pair": (NPairLoss(norm_weight=0.), losses.NPairsLoss(distance=raw)),
        "circle": (CircleLoss(), losses.CircleLoss(.4, 80)),
        "angular": (AngularLoss(), lambda z, y: losses.AngularLoss(45)(unit(z), y)),   # theirs leaves negatives unnormalised
        "snr": (SNRLoss(form="contrastive", margin=1., mean_weight=0., normalize=True), losses.SignalToNoiseRatioContrastiveLoss()),
        "snr raw": (SNRLoss(form="contrastive", margin=1., mean_weight=0.),              # the paper's: raw embeddings
                    losses.SignalToNoiseRatioContrastiveLoss(distance=SNRDistance(normalize_embeddings=False))),
        "histogram": (HistogramLoss(), in_float64(losses.HistogramLoss(n_bins=100))),
        "histogram 37": (HistogramLoss(bins=37), in_float64(losses.HistogramLoss(n_bins=37))),
    }


def in_float64(loss):
    "PML's nodes are whole numbers times a float, so of torch's default type: in float32 they are wrong by 1e-6 of a bin."
    def run(z, y):
        torch.set_default_dtype(torch.float64)
        try: return loss(z, y)
        finally: torch.set_default_dtype(torch.float32)
    return run


PEERS = ["triplet", "triplet squared", "triplet raw", "lifted", "generalized_lifted", "margin", "margin class", "n_pair", "circle",
         "angular", "snr", "snr raw", "histogram", "histogram 37"]


@pytest.mark.parametrize("which", PEERS)
@pytest.mark.parametrize("seed", range(3))
def test_equal_pytorch_metric_learning(which, seed):
    ours, theirs = peers()[which]
    z, y = batch(24, d=6, seed=seed)[0], torch.arange(24) // 4
    if seed == 1: y = torch.tensor([0] * 9 + [1] * 2 + [2] * 5 + [3] * 3 + [4] * 3 + [5] * 2)
    if seed == 2: y = y[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    values, grads, betas = [], [], []
    for loss in (ours, theirs):
        leaf = z.clone().requires_grad_()
        if isinstance(loss, torch.nn.Module): loss.double()
        values.append(value := loss(leaf, y))
        beta = getattr(loss, "beta", None)
        grad, *rest = torch.autograd.grad(value, [leaf] if beta is None else [leaf, beta])
        grads.append(grad), betas.append(rest)
    assert_close(*values, rtol=0, atol=1e-9)
    assert_close(*grads, rtol=0, atol=1e-9)
    if betas[0]: assert_close(*betas[0], *betas[1], rtol=0, atol=1e-9)


def test_angular_normalises_the_negatives_too():
    z, y = batch(16, seed=5, classes=4)
    lengths = torch.rand(16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + .2
    assert_close(AngularLoss()(z * lengths, y), AngularLoss()(z, y), rtol=1e-12, atol=0)
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    assert abs(losses.AngularLoss(45)(z, y) - AngularLoss()(z, y)) > .1


@pytest.mark.parametrize("alpha, beta, threshold", [(2., 50., .5), (1., 10., .2)])
def test_multi_similarity_has_the_published_weights(alpha, beta, threshold):
    "Wang et al. 2019: w-_ij = 1 / (e^(beta (lam - s_ij)) + sum_k e^(beta (s_ik - s_ij))), and for positives with -alpha."
    Z, y = batch(12, seed=1)
    S, (P, N) = unit(Z) @ unit(Z).T, kinds(y)
    *_, (_, tight, spread) = MultiSimilarityLoss(alpha=alpha, beta=beta, threshold=threshold).rule(y, own_class_sizes(y), unit(Z))
    for i in range(12):
        for js, slopes, sharp in ((P[i], -tight, -alpha), (N[i], spread, beta)):
            for j in js:
                w = 1 / ((sharp * (threshold - S[i, j])).exp() + (sharp * (S[i, js] - S[i, j])).exp().sum())
                assert_close(12 * slopes[i, j], w, rtol=1e-9, atol=1e-15)


# ---------------------------------------------------------------- the contract, by the tests of every objective

@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_poor_batches_are_finite(name, settings_): base.test_poor_batches_are_finite(name, settings_, torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_poor_batches_of_other_types_are_finite(name, dtype): base.test_poor_batches_are_finite(name, {}, dtype)


@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_protocol(name, settings_):
    base.test_forward_is_the_sum_of_the_parts(name, settings_)
    for half in (torch.bfloat16, torch.float16): base.test_half_precision_batches_are_computed_in_float32(name, settings_, half)


@pytest.mark.parametrize("name, settings_", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_order_does_not_matter(name, settings_, seed):
    if name == "n_pair" and settings_.get("pairs") != "all": pytest.skip("the first two of a class depend on the order")
    Z, y = batch(11, seed=seed)
    loss, order = base.filled(objectives.make(name, K, D, **settings_)), torch.randperm(11, generator=torch.Generator().manual_seed(seed))
    assert_close(tuple(loss.parts(Z[order], y[order])), tuple(loss.parts(Z, y)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_accurate(name): base.test_float32_is_accurate(name)


@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_absent_parts_are_differentiable_zeros(name, settings_):
    "Without positives or without negatives nothing can be ranked."
    free = dict(norm_weight=0.) if name == "n_pair" else dict(mean_weight=0.) if name == "snr" else {}
    loss = objectives.make(name, K, D, **{**settings_, **free, **({"nu": 0.} if name == "margin" else {})})
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pairwise = getattr(loss, "count", "") == "pairs" or getattr(loss, "form", "") == "contrastive"
    for y, missing in ((torch.arange(5), "positives"), (torch.zeros(5).long(), "negatives")):
        parts = loss.parts(x, y)
        assert loss.counts[f"anchors_without_{missing}"] == 5 and sum(loss.counts.values()) == 5
        for part, kind in zip(parts, ("positives", "negatives")):
            if pairwise and kind != missing: continue             # pairs of the other kind are there and count
            assert part == 0 and part.requires_grad, missing
            assert torch.autograd.grad(part, x, retain_graph=True)[0].abs().max() == 0, missing


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_the_loss(name):
    Z, y = batch(14, seed=2)
    y[0], y[1:] = 4, y[1:] % 4                                   # class 4 has one member
    for option, value in OTHER[name].items():
        if (name, option) in SILENT: continue
        a, b = (objectives.make(name, K, D, **extra).double()(Z + 1, y).item() for extra in ({}, {option: value}))
        assert abs(a - b) > 1e-6, option


def test_the_tables_name_every_option():
    from dml_companion.objective import catalogue
    table = {name: e for name, e in catalogue().items() if e.path.startswith("dml_companion.losses.ranking:")}
    assert sorted(table) == NAMES
    for name, entry in table.items():
        assert set(entry.defaults) == set(OTHER[name]) and entry.family == "ranking"
        assert set(objectives.make(name, K, D).param_groups()) == set(entry.own)


@pytest.mark.parametrize("call, words", [
    (lambda: TripletLoss(margin=0), ["margin", "> 0", "0"]),
    (lambda: TripletLoss(reduction="mean"), ["reduction 'mean'", "nonzero", "all"]),
    (lambda: GeneralizedLiftedLoss(reduction="al"), ["reduction 'al'", "anchor", "valid"]),
    (lambda: MarginLoss(beta=1.9), ["1.9", "2", "normalize=False"]),
    (lambda: MarginLoss(learn="class"), ["num_classes", "None"]),
    (lambda: MarginLoss(learn="image"), ["learn 'image'", "class", "sample", "one"]),
    (lambda: MarginLoss(learn="sample"), ["num_samples", "None"]),
    (lambda: MarginLoss(learn="sample", num_samples=9)(torch.ones(2, 2), torch.tensor([0, 1])), ["all 2", "none", "loss.at"]),
    (lambda: MarginLoss(learn="sample", num_samples=9).at(torch.arange(3))(torch.ones(2, 2), torch.tensor([0, 1])), ["all 2", "3"]),
    (lambda: MarginLoss(learn="sample", num_samples=2).at(torch.arange(3))(torch.ones(3, 2), torch.arange(3)), ["0 to 2", "0 to 1"]),
    (lambda: MarginLoss(nu=-1), ["nu", "-1"]),
    (lambda: MarginLoss(3, learn="class")(torch.ones(2, 2), torch.tensor([0, 3])), ["3", "0 to 2"]),
    (lambda: NPairLoss(norm_weight=-1), ["norm_weight", "-1"]),
    (lambda: NPairLoss(pairs="firsts"), ["pairs 'firsts'", "did you mean 'first'"]),
    (lambda: CircleLoss(gamma=0), ["gamma", "0"]),
    (lambda: CircleLoss(pairs="row"), ["pairs 'row'", "anchor", "batch"]),
    (lambda: AngularLoss(alpha=70), ["alpha", "60", "70", "36 to 55"]),
    (lambda: AngularLoss(alpha=-1), ["alpha", "-1"]),
    (lambda: SNRLoss(form="lifted"), ["form 'lifted'", "triplet", "contrastive"]),
    (lambda: SNRLoss(mean_weight=float("inf")), ["mean_weight", "inf"]),
    (lambda: QuadrupletLoss(stranger_margin=-1), ["stranger_margin", "-1"]),
    (lambda: HistogramLoss(bins=0), ["bins", "0"]),
    (lambda: HistogramLoss(bins=2.5), ["bins", "2.5"]),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError) as e: call()
    for word in words: assert word in str(e.value)


# ---------------------------------------------------------------- what the losses promise

ANGLES = ["triplet", "lifted", "generalized_lifted", "margin", "circle", "angular", "quadruplet", "histogram"]

@PROPERTY
@given(st.sampled_from(NAMES), st.integers(0, 10**6))
def test_rotations_and_lengths(name, seed):
    "A rotation changes nothing (SNR sees coordinates: only those that keep each mean); lengths do not matter on the sphere."
    Z, y = batch(10, seed=seed)
    g = torch.Generator().manual_seed(seed)
    loss = objectives.make(name, K, D, **({"mean_weight": 0.} if name == "snr" else {})).double()
    order = torch.randperm(D, generator=g)
    turn = torch.eye(D, dtype=Z.dtype)[order] if name == "snr" else torch.linalg.qr(torch.randn(D, D, generator=g, dtype=Z.dtype))[0]
    assert_close(tuple(loss.parts(Z @ turn, y)), tuple(loss.parts(Z, y)), rtol=1e-9, atol=1e-9)
    lengths = torch.rand(10, 1, generator=g, dtype=Z.dtype) + .5 if name in ANGLES else torch.tensor(3., dtype=Z.dtype)
    if name != "n_pair": assert_close(loss(Z * lengths, y), loss(Z, y), rtol=1e-9, atol=1e-9)


@PROPERTY
@given(st.integers(1, 10), st.integers(1, 12), st.integers(0, 10**6))
def test_both_ways_to_count_violations(w, n, seed):
    g = torch.Generator().manual_seed(seed)
    t, v = torch.randint(-1, 8, (n, w), generator=g).float(), torch.randint(0, 8, (n, n), generator=g).float()     # with ties
    t[t < 0] = -torch.inf
    v[torch.rand(n, n, generator=g) < .3] = torch.finfo(torch.float32).max
    brute = v[:, None] < t[:, :, None]
    for count in (violations, violations_sorted):
        below, above = count(t, v)
        assert torch.equal(below, brute.sum(2).float()) and torch.equal(above, brute.sum(1).float())


@PROPERTY
@given(st.lists(st.integers(-2, 5), min_size=1, max_size=20))
def test_near_table_and_blocks(labels):
    y = torch.tensor(labels)
    near, n = near_table(y, own_class_sizes(y)), len(labels)
    assert [sorted(row[keep].tolist()) for row, keep in zip(*near)] == [sorted(p) for p in kinds(y)[0]]
    assert (near.index[~near.real] == torch.arange(n)[:, None].expand_as(near.index)[~near.real]).all()
    v = torch.rand(n, n)
    if blocks := class_blocks(y, own_class_sizes(y), near.index.shape[1]):
        w = torch.rand_like(near.real, dtype=torch.float32) * near.real
        assert_close(within(v, near, blocks) * near.real, within(v, near, None) * near.real)
        assert_close(mix_within(w, v, near, blocks), mix_within(w, v, near, None))


@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_the_fixed_shapes_of_a_gpu_give_the_same(name, settings_, monkeypatch):
    Z, y = batch(16, seed=4)
    loss, results = base.filled(objectives.make(name, K, D, **settings_)), []
    for look in (True, False):
        monkeypatch.setattr(ranking, "may_look", lambda x: look)
        leaf = Z.clone().requires_grad_()
        parts = loss.parts(leaf, y)
        results.append([*parts, *base.gradients(parts, leaf)])
    assert_close(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sizes", [(60, 60), (100, 1, 1, 1, 1, 1, 1), (70, 66), (1,) * 40 + (2,) * 5, (50, 49, 7, 3)])
def test_unequal_classes_on_every_path(sizes):
    "Classes larger than what is counted slot by slot, and batches that no blocks fit: against all triplets at once."
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    Z = batch(len(y), d=6, seed=1)[0]
    V, same, other = plain_distances(unit(Z), True), (y[:, None] == y).fill_diagonal_(False), y[:, None] != y
    hinge = (V[:, :, None] - V[:, None, :] + .2).relu() * (same[:, :, None] & other[:, None, :])
    assert_close(TripletLoss()(Z, y), hinge.sum() / (hinge > 0).sum(), rtol=1e-11, atol=0)
    S, t = unit(Z) @ unit(Z).T, tan(radians(45.)) ** 2
    pairs = same.nonzero()
    rows = (4 * t * (S[pairs[:, 0]] + S[pairs[:, 1]])).masked_fill(~other[pairs[:, 0]], -torch.inf)
    values = F.softplus(rows.logsumexp(1) - 2 * (1 + t) * S[same])
    assert_close(AngularLoss()(Z, y), values.mean(), rtol=1e-10, atol=0)


def test_a_negative_out_of_reach_is_dropped_and_counted_right():
    "All quadruplets of a batch whose classes are far apart: none violated; pulled together: all."
    y, centres = torch.arange(12) // 3, torch.eye(4, dtype=torch.float64)
    z = centres[y] + .01 * batch(12, seed=0)[0]
    assert QuadrupletLoss()(z, y) == 0
    every = QuadrupletLoss(squared=False, margin=1.9, stranger_margin=1.9)(z, y)
    assert_close(every, QuadrupletLoss(squared=False, margin=1.9, stranger_margin=1.9, reduction="all")(z, y), rtol=1e-12, atol=0)


def test_beta_moves_towards_the_gap_and_is_free_of_weight_decay():
    from dml_companion.training import Recipe, parameter_groups
    loss = MarginLoss(beta=.3)
    z, y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) // 4
    loss(z, y).backward()
    assert loss.beta.grad.item() < 0                             # random points: almost all positives lie outside .3
    groups = parameter_groups(torch.nn.Linear(2, 2), loss, Recipe(objective="margin", weight_decay=.1))
    assert [g["weight_decay"] for g in groups if g["name"] == "proxies"] == [0.]
    assert not MarginLoss.param_kind and not MarginLoss(learn="none").param_groups()


def test_one_beta_a_sample():
    "Numbers said once a batch; equal to the tuples, in value and in the gradient of those betas that were asked for."
    Z, y = batch(8, seed=2, classes=3)
    samples, loss = torch.tensor([7, 1, 4, 0, 9, 3, 8, 2]), base.filled(MarginLoss(learn="sample", num_samples=12, nu=.3))
    loss.beta.data.sigmoid_()
    V, (P, N) = plain_distances(unit(Z)), kinds(y)
    ours = loss.at(samples).parts(Z, y)
    T = C = active = 0
    for i in range(8):
        for js, sign, w in ((P[i], 1, len(N[i])), (N[i], -1, len(P[i]))):
            hinge = (loss.margin + sign * (V[i, js] - loss.beta[samples[i]])).relu()
            active += w * int((hinge > 0).sum())
            if sign > 0: T = T + w * hinge.sum()
            else: C = C + w * hinge.sum()
    tuples = T / active + .3 * loss.beta[samples].mean(), C / active
    assert_close(tuple(ours), tuples, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(sum(parts), loss.beta)[0] for parts in (ours, tuples)]
    assert_close(*grads, rtol=1e-9, atol=1e-12)
    assert (grads[0][[5, 6, 10, 11]] == 0).all()
    with pytest.raises(ValueError): loss(Z, y)                   # said once, used once


def test_lengths_beyond_float32_squares():
    "Raw products are all that overflow here: every other loss leaves lengths to the sphere."
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * 1e25, torch.arange(8) // 2
    for name in ANGLES: assert objectives.make(name, K, 4)(x, y).isfinite(), name


def test_scores_far_beyond_exp():
    "gamma = 5,000 spans e^8000; the loss and its gradient stay finite."
    z, y = batch(16, seed=0, dtype=torch.float32)
    for pairs in ("anchor", "batch"):
        leaf = z.clone().requires_grad_()
        value = CircleLoss(gamma=5000., pairs=pairs)(leaf, y)
        assert value.isfinite() and torch.autograd.grad(value, leaf)[0].isfinite().all()


def test_rows_without_signal():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    x[2] = .1                                                    # a mean that rounds: the rest is not noise to divide by
    assert (without_mean(x)[2] == 0).all() and (without_mean(x)[1] != 0).all()
    leaf = x.requires_grad_()
    assert torch.autograd.grad(SNRLoss(mean_weight=0.)(leaf, torch.arange(6) // 2), leaf)[0].abs().max() < 1e3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_no_wait_for_the_gpu(name, settings_):
    z, y = (t.cuda() for t in batch(64, dtype=torch.float32))
    loss = objectives.make(name, K, D, **settings_).cuda()
    loss(z.requires_grad_(), y).backward()
    torch.cuda.set_sync_debug_mode("error")
    try: loss(z, y).backward()
    finally: torch.cuda.set_sync_debug_mode("default")
