"""Miners: loops and pytorch-metric-learning as oracles, frequencies of draws, poor batches, size of tensors, resuming."""
from copy import deepcopy
from math import exp, log, radians, tan

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dml_companion import mining, objectives
from dml_companion.geometry import normalize
from dml_companion.losses.mined import BASES, OF_TRIPLETS, Mined, MinedTriplet, choose, stranger, told
from dml_companion.losses.pairwise import ContrastiveLoss, MultiSimilarityLoss, SNCALoss
from dml_companion.losses.ranking import (AngularLoss, CircleLoss, GeneralizedLiftedLoss, HistogramLoss, LiftedLoss, MarginLoss, NPairLoss,
                                          QuadrupletLoss, SNRLoss, TripletLoss)
from dml_companion.mining import (MINERS, AllSemiHardMiner, BinMiner, DistanceWeightedMiner, HardMiner, Miner, MultiSimilarityMiner,
                                  PADS, RhoDistanceMiner, SemiHardMiner, SoftHardMiner, Triplets, UniformMiner, WindowMiner,
                                  class_order, compare, draw, kth_negative, kth_positive, make_miner, nearest_beyond,
                                  positive_slots, triplet_terms, windows)

NAMES = sorted(MINERS)
OTHER = {"mined": dict(base="triplet", base_options=dict(beta=1.), miner="hard", miner_options=dict(cutoff=.9, upper=1.), pairs=True)}
NEEDS = {"n_pair": dict(pairs="all")}                                            # no base works without them
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def batch(sizes=(4,) * 6, d=8, seed=0, spread=1., dtype=torch.float64):
    "Classes of the given sizes around random centres, rows in random order."
    g = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[torch.randperm(sum(sizes), generator=g)]
    z = torch.randn(len(sizes), d, generator=g, dtype=torch.float64)[y] + spread * torch.randn(len(y), d, generator=g, dtype=torch.float64)
    return z.to(dtype), y


def distances(z): return torch.cdist(normalize(z), normalize(z), compute_mode="donot_use_mm_for_euclid_dist")
def as_set(*indices): return set(zip(*(i.tolist() for i in indices)))
def all_triplets(y):
    n = len(y)
    return {(a, p, k) for a in range(n) for p in range(n) for k in range(n) if a != p and y[a] == y[p] and y[a] != y[k]}


# ---------------------------------------------------------------- rules against loops

SHAPES = [(4,) * 6, (1, 2, 3, 5, 1, 7), (2, 14), (12, 1)]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_rules_equal_their_loops(sizes, seed):
    z, y = batch(sizes, seed=seed)
    D, n = distances(z), len(y)
    P = [[j for j in range(n) if y[j] == y[i] and j != i] for i in range(n)]
    N = [[j for j in range(n) if y[j] != y[i]] for i in range(n)]
    hard = {(i, max(P[i], key=lambda j: D[i, j]), min(N[i], key=lambda j: D[i, j])) for i in range(n) if P[i]}
    assert as_set(*HardMiner()(z, y)) == hard
    beyond = {(i, p, min(far, key=lambda j: D[i, j])) for i in range(n) for p in P[i] if (far := [j for j in N[i] if D[i, j] > D[i, p]])}
    assert as_set(*SemiHardMiner()(z, y)) == beyond
    for _ in range(5):
        for a, p, k in as_set(*SoftHardMiner()(z, y)):
            near, far = min(D[a, N[a]]), max(D[a, P[a]])
            assert p in ([j for j in P[a] if D[a, j] > near] or P[a]) and k in ([j for j in N[a] if D[a, j] < far] or N[a])
        for squared, power in ((True, 2), (False, 1)):
            E = D ** power
            for a, p, k in as_set(*WindowMiner(margin=.3, squared=squared)(z, y)):
                assert p in P[a] and k in ([j for j in N[a] if 0 < E[a, j] - E[a, p] < .3] or N[a])
            for a, p, k in as_set(*AllSemiHardMiner(margin=.3, squared=squared)(z, y)): assert 0 < E[a, k] - E[a, p] <= .3
    kept = MultiSimilarityMiner(epsilon=.05).pairs(z, y)
    S = 1 - D ** 2 / 2
    assert as_set(*kept[:2]) == {(i, j) for i in range(n) for j in P[i] if S[i, j] < max(S[i, N[i]]) + .05}
    assert as_set(*kept[2:]) == {(i, j) for i in range(n) if P[i] for j in N[i] if S[i, j] > min(S[i, P[i]]) - .05}


@PROPERTY
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14))
def test_class_order_names_every_partner_once(labels):
    y, n = torch.tensor(labels), len(labels)
    order = class_order(y)
    slots, exist = positive_slots(order)
    for i in range(n):
        P, N = [j for j in range(n) if y[j] == y[i] and j != i], [j for j in range(n) if y[j] != y[i]]
        assert slots[i, exist[i]].tolist() == P
        rows = torch.full((len(N),), i)
        assert sorted(kth_negative(order, rows, torch.arange(len(N))).tolist()) == N
        assert sorted(kth_positive(order, torch.full((len(P),), i), torch.arange(len(P))).tolist()) == P


@PROPERTY
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_sorting_and_comparing_agree(n, q, seed):
    "Both branches of the searches, on distances with ties and with rows that lack negatives."
    g = torch.Generator().manual_seed(seed)
    far = (torch.rand(n, n, generator=g) * 8).round() / 4
    far[torch.rand(n, n, generator=g) < .3] = torch.inf
    reach = (torch.rand(n, q, generator=g) * 8).round() / 4
    results = []
    before = mining.FEW
    for few in (0, 100):
        mining.FEW = few
        try: results.append((nearest_beyond(far, reach), windows(far, reach, reach + .5)))
        finally: mining.FEW = before
    (((c0, f0), (s0, w0)), ((c1, f1), (s1, w1))) = results
    assert (f0 == f1).all() and (s0 == s1).all() and (w0 == w1).all()
    assert (far.gather(1, c0)[f0] == far.gather(1, c1)[f1]).all()            # tied negatives may differ by index, not by distance


# ---------------------------------------------------------------- random rules: how often

def frequencies(miner, z, y, repeats):
    counts = {}
    for _ in range(repeats):
        for t in zip(*(i.tolist() for i in miner(z, y))): counts[t] = counts.get(t, 0) + 1
    return counts


def chi_square(counts, expected):
    "Statistic over its degrees of freedom, and those."
    assert set(counts) <= {k for k, e in expected.items() if e > 0}
    total = sum((counts.get(k, 0) - e) ** 2 / e for k, e in expected.items() if e > 0)
    free = sum(e > 0 for e in expected.values()) - 1
    return (total - free) / (2 * free) ** .5                                  # about standard normal


def test_uniform_is_uniform_over_triplets():
    torch.manual_seed(0)
    z, y = batch((1, 2, 3, 5))
    every = all_triplets(y)
    counts = frequencies(UniformMiner(), z, y, 1500)
    assert sum(counts.values()) == 1500 * len(y)
    assert abs(chi_square(counts, {t: 1500 * len(y) / len(every) for t in every})) < 5


@pytest.mark.parametrize("cutoff, upper", [(.5, 1.4), (.8, None), (.3, 1.1)])
def test_distance_weighted_draws_by_the_formula(cutoff, upper):
    torch.manual_seed(1)
    z, y = batch((2, 3, 4), d=5, spread=.6, seed=3)
    D, n, d = distances(z), len(y), 5
    def inverse(t): return exp((2 - d) * log(t) - (d - 3) / 2 * log(1 - t * t / 4))
    expected = {}
    for a in range(n):
        N = [j for j in range(n) if y[j] != y[a]]
        near = [j for j in N if upper is None or D[a, j] < upper]
        w = {j: min(inverse(cutoff), inverse(max(D[a, j].item(), cutoff))) for j in near} or dict.fromkeys(N, 1.)
        P = [j for j in range(n) if y[j] == y[a] and j != a]
        for p in P:
            for j, v in w.items(): expected[a, p, j] = 2000 * v / sum(w.values())
    counts = frequencies(DistanceWeightedMiner(cutoff=cutoff, upper=upper), z, y, 2000)
    assert sum(counts.values()) == 2000 * sum(y.tolist().count(c) - 1 for c in y.tolist())
    common = {k: e for k, e in expected.items() if e > 5}
    assert abs(chi_square({k: c for k, c in counts.items() if k in common}, common)) < 5
    assert set(counts) <= set(expected)


def test_distance_weighted_is_finite_where_the_density_is_not():
    x = torch.eye(3, 256)
    z, y = torch.cat([x, -x, x]), torch.tensor([0, 1, 2, 1, 2, 0, 0, 1, 2])       # antipodes and duplicates in 256 dimensions
    for dtype in (torch.float32, torch.float64):
        for upper in (1.4, None):
            table = compare(z.to(dtype), y)
            w = DistanceWeightedMiner(upper=upper).weights(table)
            assert w.isfinite().all() and (w.sum(1) > 0).all() and (w[~table.negatives] == 0).all()


def test_rows_without_a_near_negative_keep_their_anchor():
    "One class pair at distance 0.5 must not silence the anchors whose nearest negative is at 1.3, in float32 at d = 512."
    torch.manual_seed(0)
    z, y = normalize(torch.randn(40, 512)), torch.arange(40) // 2
    z[2] = normalize(z[0] + .3 * z[2])
    a, p, k = DistanceWeightedMiner(upper=None)(z, y)
    assert a.tolist() == list(range(40))


def test_rho_distance_switches_its_share():
    torch.manual_seed(2)
    z, y = batch((3,) * 8)
    a, p, k = (torch.cat(i) for i in zip(*(RhoDistanceMiner(switch=.3)(z, y) for _ in range(100))))
    turned = a == p
    assert (y[a[turned]] == y[k[turned]]).all() and (a[turned] != k[turned]).all() and (y[a[~turned]] != y[k[~turned]]).all()
    assert abs(turned.double().mean() - .3) < 5 * (.21 / len(a)) ** .5
    assert not (RhoDistanceMiner(switch=0.)(z, y).anchors == RhoDistanceMiner(switch=0.)(z, y).positives).any()


def test_bins_draw_only_where_there_is_weight():
    torch.manual_seed(0)
    z, y = batch((4,) * 10, d=4)
    miner, D = BinMiner(bins=13, start=(.5, .9)), distances(z)
    miner.density[miner.density < .01] = 0
    for a, p, k in as_set(*miner(z, y)):
        others = [j for j in range(len(y)) if y[j] != y[a] and .5 <= D[a, j] < .9]
        assert not others or .5 <= D[a, k] < .9
    own = BinMiner(own_class=True)
    a, p, k = (torch.cat(i) for i in zip(*(own(z, y) for _ in range(20))))
    assert (y[a] == y[k]).any() and (a != k).all()


@PROPERTY
@given(st.integers(0, 10**6))
def test_draw_never_takes_weight_zero(seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(6, 9, generator=g) * (torch.rand(6, 9, generator=g) < .4) * 10. ** torch.randint(-30, 30, (6, 9), generator=g)
    some = w.any(1)
    found = draw(w, 50)
    assert found.shape == (6, 50) and (w.gather(1, found)[some] > 0).all() and ((found >= 0) & (found < 9)).all()


# ---------------------------------------------------------------- pytorch-metric-learning

def pml():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers
    return losses, miners, distances, reducers


@pytest.mark.parametrize("sizes", [(4,) * 6, (2, 3, 5, 7)])
def test_chosen_indices_equal_pytorch_metric_learning(sizes):
    _, miners, _, _ = pml()
    z, y = batch(sizes)
    assert as_set(*HardMiner()(z, y)) == as_set(*miners.BatchHardMiner()(z, y))
    a, p, _, k = miners.BatchEasyHardMiner("hard", "semihard")(z, y)         # for the farthest positive of each anchor only
    farthest = {t[:2] for t in as_set(*HardMiner()(z, y))}
    assert {t for t in as_set(*SemiHardMiner()(z, y)) if t[:2] in farthest} == as_set(a, p, k)
    theirs, ours = miners.MultiSimilarityMiner(.1)(z, y), MultiSimilarityMiner().pairs(z, y)
    assert as_set(*ours[:2]) == as_set(*theirs[:2]) and as_set(*ours[2:]) == as_set(*theirs[2:])


@pytest.mark.parametrize("sizes", [(4,) * 6, (1, 2, 3, 5, 1, 12)])
@pytest.mark.parametrize("squared", [True, False])
def test_all_semihard_equals_miner_and_loss_of_pytorch_metric_learning(sizes, squared):
    losses, miners, distances, _ = pml()
    z, y = batch(sizes)
    metric = distances.LpDistance(power=2 if squared else 1)
    miner, loss = miners.TripletMarginMiner(.2, "semihard", distance=metric), losses.TripletMarginLoss(.2, distance=metric)
    ours = MinedTriplet(miner="semihard_all", squared=squared)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    mine, theirs = ours(a, y), loss(b, y, miner(b, y))
    assert_close(mine, theirs, rtol=0, atol=1e-9)
    assert ours.counts["active"] == len(miner(z, y)[0]) > 0
    assert_close(torch.autograd.grad(mine, a)[0], torch.autograd.grad(theirs, b)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dim", [3, 16, 40])
@pytest.mark.parametrize("sizes", [(4,) * 6, (2, 3, 5, 7)])
def test_distance_weights_equal_those_of_pytorch_metric_learning(monkeypatch, dim, sizes):
    "The probabilities themselves: caught on the way to its draw."
    _, miners, _, _ = pml()
    from pytorch_metric_learning.miners import distance_weighted_miner as theirs
    caught = []
    def catch(labels, ref_labels, weights):
        caught.append(weights)
        return labels, labels, labels
    monkeypatch.setattr(theirs.lmu, "get_random_triplet_indices", catch)
    z, y = batch(sizes, d=dim, spread=.6)
    miners.DistanceWeightedMiner()(z, y)
    ours = DistanceWeightedMiner().weights(compare(normalize(z), y))
    kept = caught[0].isfinite().all(1)                                       # 0 / 0 where no negative is nearer than 1.4
    assert kept.sum() > len(y) / 2
    assert_close(ours[kept] / ours[kept].sum(1, keepdim=True), caught[0][kept], rtol=0, atol=1e-9)


def test_margin_loss_of_pytorch_metric_learning_behind_the_distance_weighted_miner():
    losses, _, _, _ = pml()
    torch.manual_seed(4)
    z, y = batch((4,) * 6, spread=.6)
    triplets, D = DistanceWeightedMiner()(z, y), distances(z)
    a, p, k = triplets
    pull, push = (D[a, p] - 1.05).relu(), (1.45 - D[a, k]).relu()            # beta 1.25, exact in float32
    assert (pull > 0).any() and (push > 0).any()
    value = losses.MarginLoss(margin=.2, nu=0, beta=1.25)(z, y, tuple(triplets))
    assert_close(value, ((pull + push).sum() / ((pull > 0).sum() + (push > 0).sum())), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_miners_stand_before_losses_of_pytorch_metric_learning(name):
    losses, _, distances, reducers = pml()
    z, y = batch()
    triplets = make_miner(name)(z, y)
    loss = losses.TripletMarginLoss(.2, distance=distances.LpDistance(power=2), reducer=reducers.MeanReducer())
    assert_close(loss(z, y, tuple(triplets)), triplet_terms(normalize(z), triplets).mean(), rtol=0, atol=1e-9)
    pairs = make_miner(name).pairs(z, y)
    assert losses.ContrastiveLoss()(z, y, tuple(pairs)).isfinite()


# ---------------------------------------------------------------- the objective

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("reduction", ["mined", "nonzero"])
def test_objective_equals_its_triplets(name, squared, reduction):
    z, y = batch((1, 2, 3, 9, 4))
    loss = MinedTriplet(miner=name, squared=squared, reduction=reduction, margin=.3)
    torch.manual_seed(5)
    triplets = loss.chooser(z, y)
    if name == "semihard_all":
        E = distances(z) ** (2 if squared else 1)
        triplets = Triplets(*torch.tensor([(a, p, k) for a, p, k in all_triplets(y) if 0 < E[a, k] - E[a, p] <= .3]).T)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    torch.manual_seed(5)
    parts, terms = loss.parts(a, y), triplet_terms(normalize(b), triplets, .3, squared)
    assert loss.counts["mined"] == len(terms) and loss.counts["active"] == (terms > 0).sum() > 0
    count = len(terms) if reduction == "mined" else (terms > 0).sum()
    near = triplet_terms(normalize(b), triplets._replace(negatives=triplets.anchors), 0., squared)      # d_ap alone
    assert_close(parts.tightness, (near * (terms > 0)).sum() / count, rtol=0, atol=1e-10)
    assert_close(parts.total, terms.sum() / count, rtol=0, atol=1e-10)
    assert_close(torch.autograd.grad(parts.total, a)[0], torch.autograd.grad(terms.sum() / count, b)[0], rtol=0, atol=1e-9)


def poor_batches(dtype):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    twos = torch.arange(6) // 2
    return {"one a class": (x, torch.arange(6)), "one class": (x, torch.zeros(6).long()), "one sample": (x[:1], torch.tensor([2])),
            "coincident": (torch.ones_like(x), twos), "zero": (torch.zeros_like(x), twos), "two equal": (torch.ones_like(x[:2]), torch.zeros(2).long()),
            "antipodes": (torch.cat([x[:3], -x[:3]]), torch.tensor([0, 0, 1, 1, 2, 2])), "a class of one": (x, torch.tensor([0, 0, 1, 1, 1, 2]))}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_poor_batches(name, dtype):
    for case, (x, y) in poor_batches(dtype).items():
        for squared in (True, False):
            loss, leaf = MinedTriplet(miner=name, squared=squared), x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                parts = loss.parts(leaf, y)
                grads = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in parts]
            assert all(part.isfinite() for part in parts) and all(g.isfinite().all() for g in grads), case
            lonely = sum(y.tolist().count(c) == 1 for c in y.tolist())
            assert loss.counts["anchors_without_positives"] == lonely
            a, p, k = loss.chooser(x, y)
            assert loss.chooser.counts["anchors_without_positives"] == lonely
            if case in ("one a class", "one class", "one sample", "two equal"):
                assert len(a) == 0 and parts.total == 0 and loss.counts["mined"] == 0
            if case == "a class of one": assert 5 not in a and 5 not in p
            assert (y[a] == y[p]).all() and (name == "rho_distance" or (y[a] != y[k]).all() and (a != p).all())
            assert all(i.dtype == torch.int64 for i in (a, p, k))


class Largest(TorchDispatchMode):
    "Remembers the largest tensor that any operation made."
    entries = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.entries = max(self.entries, t.numel())
        return out


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_of_cubic_size(name):
    for sizes in ((2,) * 32, (32, 32), (8,) * 8):
        z, y = batch(sizes, dtype=torch.float32)
        with Largest() as seen: MinedTriplet(miner=name)(z, y)
        assert 64 * 64 <= seen.entries <= 64 * 65, sizes


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_the_compiler(name):
    z, y = batch((4,) * 6, dtype=torch.float32)
    loss = MinedTriplet(miner=name)
    torch._dynamo.reset()
    compiled, found = torch.compile(loss, backend="eager", fullgraph=True), []
    for f in (loss, compiled):
        torch.manual_seed(3)
        leaf = z.clone().requires_grad_()
        value = f(leaf, y)
        value.backward()
        found.append((value.detach(), leaf.grad))
    if name in ("hard", "soft_hard", "semihard", "semihard_window", "semihard_all", "uniform", "multi_similarity"):
        assert_close(found[1], found[0])                                      # the others draw a wider rectangle
    assert found[1][0] > 0 and found[1][1].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_decides(name):
    z, y = batch((4,) * 8)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, later = make_miner(name)(z, y), make_miner(name)(z, y)
    torch.set_rng_state(state)
    again = make_miner(name)(z, y)
    assert all((a == b).all() for a, b in zip(first, again))
    random = name not in ("hard", "semihard")
    assert random == any(len(a) != len(b) or (a != b).any() for a, b in zip(first, later))


@pytest.mark.parametrize("call, words", [
    (lambda: make_miner("semi_hard"), ["miner 'semi_hard'", "did you mean 'semihard'"]),
    (lambda: make_miner("hard", margin=1), ["option of hard 'margin'"]),
    (lambda: make_miner("distance_weighted", cutoff=1.5), ["upper", "cutoff = 1.5", "1.4"]),
    (lambda: make_miner("rho_distance", switch=1.), ["switch", "1.0"]),
    (lambda: make_miner("multi_similarity", epsilon=-.1), ["epsilon", "-0.1"]),
    (lambda: make_miner("semihard_window", margin=0), ["margin", "0"]),
    (lambda: make_miner("bins", low=2.), ["low", "2.0", "1.4"]),
    (lambda: make_miner("bins", start=(3, 4)), ["start=(3, 4)", "0.1"]),
    (lambda: PADS(BinMiner(), measures=2).update(.5), ["1 measures", "expected 2"]),
    (lambda: objectives.make("mined_triplet", miner="soft"), ["miner 'soft'", "did you mean 'soft_hard'"]),
    (lambda: objectives.make("mined_triplet", miner=3), ["miner", "3", "semihard"]),
    (lambda: objectives.make("mined_triplet", margin=-1.), ["margin", "-1.0"]),
    (lambda: objectives.make("mined_triplet", reduction="mean"), ["reduction 'mean'", "mined"]),
    (lambda: HardMiner()(torch.ones(3, 2), torch.arange(4)), ["3 embeddings", "4 labels"]),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError) as e: call()
    for word in words: assert word in str(e.value)


def test_own_miner():
    class Nearest(Miner):
        def choose(self, table): return HardMiner().choose(table)
    z, y = batch()
    assert MinedTriplet(miner=Nearest())(z, y) == MinedTriplet(miner="hard")(z, y)
    with pytest.raises(NotImplementedError, match="Miner must define choose"): Miner()(z, y)


# ---------------------------------------------------------------- any loss behind a miner

def chosen(z, y):
    "Triplets and pairs of the same batch, a triplet twice."
    torch.manual_seed(3)
    triplets = DistanceWeightedMiner()(z, y)
    return Triplets(*(torch.cat([i, i[:3]]) for i in triplets)), MultiSimilarityMiner().pairs(z, y)


def values_and_gradients(loss, z, *given):
    leaf = z.clone().requires_grad_()
    value = loss(leaf, *given)
    beta = getattr(getattr(loss, "objective", loss), "beta", None)
    return [value.detach(), *torch.autograd.grad(value, [leaf, beta] if isinstance(beta, torch.nn.Parameter) else [leaf])]


def composed():
    "Ours, ours behind the wrapper, and theirs."
    losses, _, distances, _ = pml()
    def bare(base, **options): return Mined(4, base=base, base_options=options, miner=None).double()
    plain, square = (losses.TripletMarginLoss(.2, distance=distances.LpDistance(power=power)) for power in (1, 2))
    one, each = dict(beta=1.25), dict(beta=1.25, learn="class")
    return {
        "margin": (bare("margin", **one), losses.MarginLoss(.2, nu=0, beta=1.25, learn_beta=True)),
        "margin itself": (MarginLoss(**one).double(), losses.MarginLoss(.2, nu=0, beta=1.25, learn_beta=True)),
        "margin class": (bare("margin", **each), losses.MarginLoss(.2, nu=0, beta=1.25, learn_beta=True, num_classes=4)),
        "contrastive": (bare("contrastive", margin=1.2, positive_margin=.1, squared=False, reduction="nonzero"), losses.ContrastiveLoss(.1, 1.2)),
        "multi_similarity": (bare("multi_similarity"), losses.MultiSimilarityLoss(2, 50, .5)),
        "triplet": (bare("triplet", squared=False), plain), "triplet squared": (bare("triplet"), square),
        "circle": (bare("circle"), losses.CircleLoss(.4, 80)), "circle 20": (bare("circle", margin=.25, gamma=20.), losses.CircleLoss(.25, 20)),
        "generalized_lifted": (bare("generalized_lifted"), losses.GeneralizedLiftedStructureLoss(1, 0)),
        "lifted": (bare("lifted"), losses.LiftedStructureLoss(1, 0))}


@pytest.mark.parametrize("which", ["margin", "margin itself", "margin class", "contrastive", "multi_similarity", "triplet", "triplet squared",
                                   "circle", "circle 20", "generalized_lifted", "lifted"])
@pytest.mark.parametrize("sizes", [(4,) * 4, (2, 3, 5, 7)])
@pytest.mark.parametrize("kind", [0, 1])
def test_the_third_argument_is_that_of_pytorch_metric_learning(which, sizes, kind):
    "The same triplets (kind 0) or pairs (1) given to both: values, gradients and the gradient of beta."
    ours, theirs = composed()[which]
    if kind and which.startswith("triplet"): pytest.skip("theirs builds triplets of pairs; ours refuses, tested below")
    if not kind and which == "lifted": pytest.skip("theirs adds a negative up as often as it was chosen; ours once")
    z, y = batch(sizes)
    given = tuple(chosen(z, y)[kind])
    for a, b in zip(values_and_gradients(ours, z, y, given), values_and_gradients(theirs.double(), z, y, given)):
        assert_close(a, b, rtol=0, atol=1e-9)
        assert a.abs().max() > 0


def test_lists_histograms_and_all_pairs_of_pytorch_metric_learning():
    "Where theirs reads a choice as ours does: no pair twice (its nodes are float32: 64 bins are exact), all negatives behind a pair, one pair a class, all."
    losses, _, lengths, _ = pml()
    z, y = batch((4,) * 4)
    firsts = [(y == c).nonzero()[0].item() for c in range(4)]
    some = [(a, p, k) for a, p, k in sorted(all_triplets(y)) if a in firsts and k not in firsts and (a + k) % 3]
    unique = [sorted({(a, t[at]) for a, *t in some}) for at in (0, 1)]
    listed = lambda rows: tuple(torch.tensor(rows).T)
    halves = [t for t in sorted(all_triplets(y)) if t[0] < t[1]]
    partner = {a: next(p for p in range(16) if p != a and y[p] == y[a]) for a in firsts}
    cases = {"histogram": (dict(bins=64), losses.HistogramLoss(n_bins=64), tuple(i for rows in unique for i in listed(rows)), listed(some)),
             "angular": ({}, losses.AngularLoss(alpha=45), listed(halves), (*listed(sorted({t[:2] for t in halves})), *listed([(0, 1)]))),
             "n_pair": (dict(pairs="all", norm_weight=0.), losses.NPairsLoss(distance=lengths.DotProductSimilarity(normalize_embeddings=False)),
                        listed([(a, partner[a], partner[b]) for a in firsts for b in firsts if a != b]), (*listed(sorted(partner.items())), *listed([(0, 1)]))),
             "snca": ({}, losses.NCALoss(softmax_scale=10, distance=lengths.CosineSimilarity()),
                      [i for same in (True, False) for i in ((y[:, None] == y).eq(same) & ~torch.eye(16, dtype=torch.bool)).nonzero().T], None)}
    for base, (options, theirs, ours_told, theirs_told) in cases.items():
        ours = Mined(base=base, base_options=options, miner=None).double()
        def other(leaf, *given): return theirs(leaf if base == "n_pair" else normalize(leaf), *given)     # its angular loss does not normalise negatives
        for a, b in zip(values_and_gradients(ours, z, y, ours_told), values_and_gradients(other, z, y, theirs_told)):
            assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m: f"{base}: {m}")
            assert a.abs().max() > 0


def log_sum(terms): return torch.stack(terms).logsumexp(0)


def rows_in_words(loss, x, P, N):
    "One (tightness, contrast) for each anchor that counts, and how many share the mean."
    def d(i, j): return (x[i] - x[j]).square().sum().clamp_min(1e-30).sqrt()
    def circle(kind, pairs):
        out = []
        for i, j in pairs:
            s = x[i] @ x[j]
            pace = ((1 + loss.margin - s) if kind == "near" else (s + loss.margin)).relu()
            if loss.detach: pace = pace.detach()
            out.append(loss.gamma * pace * (1 - loss.margin - s if kind == "near" else s - loss.margin))
        return log_sum(out)
    both, zero = [i for i in range(len(x)) if P[i] and N[i]], x.sum() * 0
    if isinstance(loss, CircleLoss):
        groups = [([(i, j) for j in P[i]], [(i, j) for j in N[i]]) for i in both]
        if loss.pairs == "batch": groups = [[[(i, j) for i in range(len(x)) for j in K[i]] for K in (P, N)]]
        half = log(2) if loss.pairs == "batch" else 0
        uv = [(circle("near", a) - half, circle("far", b) - half) for a, b in groups]
        return [(u, (u + v).exp().log1p() - u) for u, v in uv], len(x) if loss.reduction == "anchor" else len(uv)
    if isinstance(loss, GeneralizedLiftedLoss):
        uv = [(log_sum([d(i, j) for j in P[i]]), log_sum([loss.margin - d(i, j) for j in N[i]])) for i in both]
        return [(u, v) if u + v > 0 else (zero, zero) for u, v in uv], len(x) if loss.reduction == "anchor" else len(uv)
    terms = []
    for i in range(len(x)):
        own, every = [*P[i]] + [i] * (loss.self_pairs and bool(P[i] | N[i])), P[i] | N[i]
        if loss.reduction == "valid" and not P[i]: continue
        u, v = (log_sum([x[i] @ x[j] / loss.temperature for j in J]) if J else zero for J in (own, every))
        terms.append((-u, v))
    return terms, len(terms)


def nodes(cosines, bins):
    h = [torch.zeros((), dtype=torch.float64) for _ in range(bins + 1)]
    for s in cosines:
        at = (s + 1) * bins / 2
        r = int(at)
        h[r], h[r + 1] = h[r] + (r + 1 - at) / len(cosines), h[r + 1] + (at - r) / len(cosines)
    return torch.stack(h)


def in_words(loss, Z, near, far, triplets):
    "Both parts of a loss of chosen pairs, as lists of (anchor, other) that may repeat, or of triplets; one term at a time."
    x = normalize(Z) if loss.normalize else Z
    if isinstance(loss, (AngularLoss, NPairLoss)):
        t, T, C = tan(radians(getattr(loss, "alpha", 0.))) ** 2, [], []
        for a, p in sorted({t[:2] for t in triplets}):
            ks = [k for i, j, k in triplets if (i, j) == (a, p)]
            own = 2 * (1 + t) * x[a] @ x[p] if isinstance(loss, AngularLoss) else x[a] @ x[p]
            C.append(log_sum([own] + [4 * t * (x[a] + x[p]) @ x[k] if isinstance(loss, AngularLoss) else x[a] @ x[k] for k in ks]))
            T.append(-own + getattr(loss, "norm_weight", 0.) * (x[a] @ x[a] + x[p] @ x[p]) / 2)
        return sum(T) / len(T), sum(C) / len(C)
    if isinstance(loss, HistogramLoss):
        s = [[x[i] @ x[j] for i, j in pairs] for pairs in (near, far)]
        T = sum(1 - v for v in s[0]) / 2 / len(near)
        return T, nodes(s[1], loss.bins) @ nodes(s[0], loss.bins).cumsum(0) - T
    P, N = ([{j for a, j in pairs if a == i} for i in range(len(x))] for pairs in (near, far))
    if isinstance(loss, LiftedLoss):
        def d(i, j): return (x[i] - x[j]).square().sum().clamp_min(1e-30).sqrt()
        some = [(i, j) for i, j in near if N[i] | N[j]]
        J = [(log_sum([loss.margin - d(a, k) for a in (i, j) for k in N[a]]) + d(i, j)).relu() for i, j in some]
        u = [d(i, j) ** 2 * (v > 0) for (i, j), v in zip(some, J)]
        return sum(u) / 2 / len(some), (sum(v ** 2 for v in J) - sum(u)) / 2 / len(some)
    terms, count = rows_in_words(loss, x, P, N)
    return tuple(sum(part) / count for part in zip(*terms))


@pytest.mark.parametrize("base, options", [
    ("circle", {}), ("circle", dict(pairs="batch", gamma=20., margin=.25, detach=False)), ("circle", dict(reduction="anchor")),
    ("generalized_lifted", {}), ("generalized_lifted", dict(reduction="valid", normalize=False, margin=.5)),
    ("snca", {}), ("snca", dict(self_pairs=True)), ("snca", dict(reduction="valid", temperature=.3)), ("lifted", {}),
    ("lifted", dict(normalize=False, margin=.3)), ("histogram", {}), ("histogram", dict(bins=7)), ("angular", {}), ("angular", dict(alpha=30.)),
    ("n_pair", dict(pairs="all")), ("n_pair", dict(pairs="all", norm_weight=0., normalize=True))])
def test_soft_losses_of_a_choice_equal_their_formulas_in_words(base, options):
    "Triplets, some told twice; and pairs, some twice, with anchors that lack one kind or both."
    z, y = batch((1, 2, 3, 4), d=5)
    triplets = UniformMiner()(z, y)
    told_twice = Triplets(*(torch.cat([i, i[:3]]) for i in triplets))
    same = y[:, None] == y
    near, far = ([p for t, p in enumerate(kind.nonzero().tolist()) if t % 3 or p[0] > 6] for kind in (same & ~torch.eye(10, dtype=torch.bool), ~same))
    near, far = [p for p in near if p[0] not in (0, 3)], [p for p in far if p[0] not in (0, 5)]
    near, far = [[*map(tuple, pairs), *map(tuple, pairs[:3])] for pairs in (near, far)]
    listed = [tuple(t) for t in torch.stack(told_twice).T.tolist()]
    cases = [(told_twice, [t[:2] for t in listed], [(t[0], t[2]) for t in listed])]
    if base not in OF_TRIPLETS: cases.append((tuple(i for pairs in (near, far) for i in torch.tensor(pairs).T), near, far))
    for given, pulled, pushed in cases:
        loss = Mined(base=base, base_options=options, miner=None).double()
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        found, wanted = loss.parts(a, y, given), in_words(loss.objective, b, pulled, pushed, listed)
        assert_close([v.detach() for v in found], [v.detach() for v in wanted], rtol=0, atol=1e-9)
        for T, W in zip(found, wanted):
            assert_close(torch.autograd.grad(T, a, retain_graph=True)[0], torch.autograd.grad(W, b, retain_graph=True)[0], rtol=0, atol=1e-8)
        assert_close(loss(z, y, given), sum(wanted).detach(), rtol=0, atol=1e-9)


def test_means_count_how_often_and_soft_maxima_whether():
    z, y = batch((4,) * 4)
    once = HardMiner()(z, y)
    twice = Triplets(*(torch.cat([i, i[:3]]) for i in once))
    for base in sorted(set(BASES) - {"quadruplet"}):
        loss = Mined(base=base, base_options=NEEDS.get(base), miner=None).double()
        assert (abs(loss(z, y, once) - loss(z, y, twice)) < 1e-12) == (base in ("circle", "generalized_lifted", "snca", "multi_similarity")), base


@pytest.mark.parametrize("base", sorted(BASES))
def test_nothing_told_is_nothing(base):
    "Empty lists, and lists of one kind: finite parts and gradients, no division by an empty set."
    z, y = batch((1, 2, 3, 4))
    none, a, p, k = torch.zeros(0, dtype=torch.int64), *HardMiner()(z, y)
    loss = Mined(base=base, base_options=NEEDS.get(base), miner=None).double()
    for given in [(none,) * 3] + ([] if base in OF_TRIPLETS else [(none,) * 4, (a, p, none, none), (none, none, a, k)]):
        leaf = z.clone().requires_grad_()
        parts = loss.parts(leaf, y, given)
        grads = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in parts]
        assert all(part.isfinite() for part in parts) and all(g.isfinite().all() for g in grads), given
        nothing = not any(len(i) for i in given) or base in ("circle", "generalized_lifted", "lifted", "histogram")
        if nothing and base != "snr": assert parts.total == 0 and not any(g.any() for g in grads), given


def test_numbers_of_images_reach_the_boundaries():
    z, y = batch()
    options, numbers = dict(learn="sample", num_samples=50, beta=1.1), torch.arange(24) * 2
    wrapped, plain = Mined(base_options=options, miner=None).double(), MarginLoss(**options).double()
    triplets = HardMiner()(z, y)
    for loss in (wrapped.objective, plain): loss.beta.data += torch.linspace(-.2, .2, 50).double()
    for given in ((), (triplets,)):
        found = [values_and_gradients(loss.at(numbers), z, y, *given) for loss in (wrapped, plain)]
        assert_close(*found, rtol=0, atol=0)
        assert (found[0][2][1::2] == 0).all() and found[0][2].abs().max() > 0
    with pytest.raises(ValueError, match="loss.at"): wrapped(z, y, triplets)          # told once a batch


def composed_by_tuples(loss, Z, y, triplets):
    "Every chosen tuple written out; the stranger of a quadruplet as it is drawn after the same seed."
    base = getattr(loss, "objective", loss)
    x = normalize(Z) if base.normalize else Z
    a, p, k = triplets
    if isinstance(base, SNRLoss):
        v = lambda i, j: (x[j] - x[i]).var(1) / x[i].var(1)
    else: v = lambda i, j: (x[i] - x[j]).square().sum(1) if getattr(base, "squared", False) else (x[i] - x[j]).square().sum(1).clamp_min(1e-30).sqrt()
    def mean(reach, of, reduction): return [(t * (reach > 0)).sum() / ((reach > 0).sum().clamp_min(1) if reduction == "nonzero" else len(reach)) for t in of]
    if isinstance(base, MarginLoss):
        pull, push = (base.margin + v(a, p) - base.beta).relu(), (base.margin - v(a, k) + base.beta).relu()
        return [part.sum() / ((pull > 0).sum() + (push > 0).sum()) for part in (pull, push)]
    if isinstance(base, ContrastiveLoss):
        power = 2 if base.squared else 1
        length = (x[a] - x[p]).square().sum(1).clamp_min(1e-30).sqrt(), (x[a] - x[k]).square().sum(1).clamp_min(1e-30).sqrt()
        count = {"anchor": len(y), "pair": len(a)}[base.reduction]
        return [length[0].pow(power).sum() / count, (base.margin - length[1]).relu().pow(power).sum() / count]
    near, far = v(a, p), v(a, k)
    T, C = mean(near - far + base.margin, (near, base.margin - far), base.reduction)
    if isinstance(base, SNRLoss): T = T + base.mean_weight * x.sum(1).abs().mean()
    if isinstance(base, QuadrupletLoss):
        l, some = stranger(class_order(y), a, k)
        assert some.all() and (y[l] != y[a]).all() and (y[l] != y[k]).all()
        more = mean(near - v(k, l) + base.stranger_margin, (near, base.stranger_margin - v(k, l)), base.reduction)
        T, C = T + more[0], C + more[1]
    return [T, C]


@pytest.mark.parametrize("base, options", [
    ("contrastive", dict(reduction="pair", squared=False)), ("contrastive", dict(margin=1.3)), ("margin", dict(beta=1.)),
    ("triplet", dict(reduction="all")), ("triplet", dict(squared=False, margin=.4)), ("snr", {}), ("snr", dict(reduction="all", normalize=True, margin=.6)),
    ("quadruplet", {}), ("quadruplet", dict(squared=False, reduction="all", stranger_margin=.3))])
@pytest.mark.parametrize("sizes", [(4,) * 4, (1, 2, 3, 5, 6)])
def test_composed_losses_equal_their_tuples(base, options, sizes):
    "Told, and mined by the wrapper itself: parts and gradients."
    z, y = batch(sizes, spread=.8)
    asks, is_told = (Mined(base=base, base_options=options, miner=miner).double() for miner in ("distance_weighted", None))
    torch.manual_seed(3)
    triplets = DistanceWeightedMiner()(z, y)
    for loss, given in ((is_told, (triplets,)), (is_told, (chosen(z, y)[0],)), (asks, ())):
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        torch.manual_seed(3)
        found, mined = loss.parts(a, y, *given), given[0] if given else triplets
        torch.manual_seed(3)
        if not given: DistanceWeightedMiner()(z, y)                           # the wrapper has drawn as often before its stranger
        wanted = composed_by_tuples(loss, b, y, mined)
        if base == "quadruplet" and not given and 1 in sizes: continue        # a place without triplet draws a stranger, too
        assert_close(list(found), [w.detach().clone() for w in wanted], rtol=0, atol=1e-9)
        for T, W in zip(found, wanted):
            assert_close(torch.autograd.grad(T, a, retain_graph=True)[0], torch.autograd.grad(W, b, retain_graph=True)[0], rtol=0, atol=1e-8)
        assert loss.counts["mined_positives"] == loss.counts["mined_negatives"] == len(mined.anchors)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", sorted(BASES))
def test_every_miner_stands_before_every_base(base, name):
    z, y = batch((1, 2, 3, 5, 4), spread=1.5)                                 # wide classes: a uniform triplet, too, has a loss
    given = dict(base=base, base_options=NEEDS.get(base))
    miner, loss = make_miner(name), Mined(**given, miner=name).double()
    torch.manual_seed(1); triplets = miner(z, y)
    torch.manual_seed(1); asked = loss(leaf := z.clone().requires_grad_(), y)
    if base != "quadruplet": assert_close(asked, Mined(**given, miner=None).double()(z, y, triplets), rtol=0, atol=1e-12)
    gradient = torch.autograd.grad(asked, leaf)[0]
    assert asked.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 0
    if base in OF_TRIPLETS: return
    torch.manual_seed(1); pairs = miner.pairs(z, y)
    torch.manual_seed(1); asked = Mined(base=base, miner=name, pairs=True).double()(z, y)
    assert_close(asked, Mined(base=base, miner=None).double()(z, y, pairs), rtol=0, atol=1e-12)


def test_wrappers_that_choose_everything_are_the_loss_itself():
    z, y = batch((1, 2, 3, 5, 4))
    every = Triplets(*torch.tensor(sorted(all_triplets(y))).T)
    pairs = [i for same in (True, False) for i in ((y[:, None] == y).eq(same) & ~torch.eye(len(y), dtype=torch.bool)).nonzero().T]
    for loss in (TripletLoss(), TripletLoss(reduction="all", squared=False), SNRLoss(), MarginLoss(beta=1.1), AngularLoss(), NPairLoss(pairs="all"),
                 NPairLoss(pairs="all", normalize=True, norm_weight=.1), CircleLoss(), GeneralizedLiftedLoss(), SNCALoss(reduction="valid")):
        assert_close(Mined(base=loss.double(), miner=None)(z, y, every), loss(z, y), rtol=0, atol=1e-9)
    for loss in (ContrastiveLoss(), ContrastiveLoss(reduction="pair", squared=False, positive_margin=.3), MultiSimilarityLoss(self_pairs=True),
                 MultiSimilarityLoss(reduction="valid"), MarginLoss(), MarginLoss(count="pairs", nu=.2), CircleLoss(pairs="batch"),
                 CircleLoss(reduction="anchor", detach=False), GeneralizedLiftedLoss(reduction="valid"), GeneralizedLiftedLoss(normalize=False),
                 SNCALoss(self_pairs=True), SNCALoss(reduction="valid"), LiftedLoss(), LiftedLoss(normalize=False), HistogramLoss(bins=20)):
        assert_close(Mined(base=loss.double(), miner=None)(z, y, pairs), loss(z, y), rtol=0, atol=1e-9)
        assert Mined(base=loss, miner=None)(z, y) == loss(z, y)               # untold: all pairs
    assert_close(Mined(base="multi_similarity", miner="multi_similarity", pairs=True)(z, y), MultiSimilarityLoss(mining=.1)(z, y), rtol=0, atol=1e-9)


@pytest.mark.parametrize("base", sorted(BASES))
def test_gradcheck_of_composed_losses(base):
    z, y = batch((1, 2, 3, 4), d=4)
    triplets, pairs = chosen(z, y)
    for given in (triplets,) if base in OF_TRIPLETS else (triplets, pairs):
        options = {**NEEDS, "margin": dict(learn="class", nu=.1), "circle": dict(detach=False, gamma=20.)}
        loss = Mined(4, base=base, base_options=options.get(base), miner=None).double()
        names, weights = list(dict(loss.named_parameters())), [w.detach().requires_grad_() for w in loss.parameters()]
        def parts(z, *weights):
            torch.manual_seed(0)
            value = torch.func.functional_call(loss, dict(zip(names, weights)), (z, y, given))
            return value
        assert torch.autograd.gradcheck(parts, (z.clone().requires_grad_(), *weights))


def test_strangers_are_uniform_over_what_is_left():
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 0, 3, 3, 1, 1, 2])
    a, k = torch.tensor([0, 2, 7, 4]), torch.tensor([1, 4, 3, 8])
    found = torch.stack([stranger(class_order(y), a, k)[0] for _ in range(4000)])
    for t in range(4):
        left = [j for j in range(9) if y[j] not in (y[a[t]], y[k[t]])]
        counts = torch.bincount(found[:, t], minlength=9)
        assert counts.sum() == counts[left].sum() and (counts[left] - 4000 / len(left)).abs().max() < 5 * (4000 / len(left)) ** .5
    assert not stranger(class_order(y[:2]), torch.tensor([0]), torch.tensor([1]))[1].any()


@pytest.mark.parametrize("base", sorted(BASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_poor_batches_of_composed_losses(base, dtype):
    for case, (x, y) in poor_batches(dtype).items():
        for name in ("distance_weighted", "rho_distance", "hard"):
            loss, leaf = Mined(base=base, base_options=NEEDS.get(base), miner=name), x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                parts = loss.parts(leaf, y)
                grads = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in parts]
            assert all(part.isfinite() for part in parts) and all(g.isfinite().all() for g in grads), (case, name)
            if case in ("one a class", "one class", "one sample", "two equal"):
                assert loss.counts["mined_positives"] == 0 and (base == "snr" or parts.total == 0), (case, name)


@pytest.mark.parametrize("base", sorted(BASES))
def test_composed_losses_make_no_cubic_tensor_and_one_graph(base):
    for sizes in ((2,) * 32, (32, 32), (8,) * 8):
        z, y = batch(sizes, dtype=torch.float32)
        with Largest() as seen: Mined(base=base, base_options=NEEDS.get(base))(z, y)
        assert 64 * 64 <= seen.entries <= 64 * 65, sizes
    z, y = batch((4,) * 6, dtype=torch.float32)
    loss = Mined(base=base, base_options=NEEDS.get(base), miner="hard")
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    values = []
    for f in (loss, compiled):
        torch.manual_seed(3)
        values.append(values_and_gradients(f, z, y)[:2])
    assert_close(values[1], values[0])
    assert values[0][0] > 0


def test_options_of_the_wrapper_are_all_listed_and_all_change_something():
    from dml_companion.objective import catalogue
    table = {name: e for name, e in catalogue().items() if e.path.startswith("dml_companion.losses.mined:")}
    assert sorted(table) == ["mined", "mined_triplet"] and set(table["mined"].defaults) == set(OTHER["mined"])
    assert set(objectives.make("mined").param_groups()) == {"proxies"} and not objectives.make("mined", base="triplet").param_groups()
    z, y = batch((3,) * 5, spread=.6)
    def value(**options): torch.manual_seed(0); return objectives.make("mined", 5, 8, **options).double()(z, y).item()
    for option, other in OTHER["mined"].items(): assert abs(value() - value(**{option: other})) > 1e-6, option


@pytest.mark.parametrize("call, words", [
    (lambda: objectives.make("mined", base="cross_entropy"), ["'cross_entropy'", "contrastive, generalized_lifted", "triplet", "class weights", "no pairs"]),
    (lambda: Mined(base="arcface"), ["'arcface'", "class weights", "no pairs"]), (lambda: Mined(base="proxy_anchor"), ["'proxy_anchor'", "proxies", "no pairs"]),
    (lambda: Mined(base="spce"), ["'spce'", "without a miner"]), (lambda: Mined(base=3), ["got 3"]),
    (lambda: Mined(base="n_pair"), ["pairs='first'", "{'pairs': 'all'}"]), (lambda: Mined(base="angular", pairs=True), ["angular is made of triplets"]),
    (lambda: Mined(base_options=dict(learn="sample", num_samples=4)).at([1, 2, 3]), ["int64 tensor", "[1, 2, 3]"]),
    (lambda: Mined(base_options=dict(learn="sample", num_samples=4)).at(torch.ones(3)), ["int64 tensor", "torch.float32", "(3,)"]),
    (lambda: Mined(base="circle").at(torch.arange(3)), ["circle", "only margin"]),
    (lambda: Mined(base=MinedTriplet()), ["MinedTriplet", "contrastive, generalized_lifted"]),
    (lambda: Mined(base=MarginLoss(), base_options=dict(beta=1.)), ["base_options", "MarginLoss"]),
    (lambda: Mined(base_options=dict(bta=1.)), ["option of margin 'bta'", "did you mean 'beta'"]),
    (lambda: Mined(miner="near"), ["miner 'near'", "did you mean 'semihard'"]),
    (lambda: Mined(miner=3), ["miner", "3", "distance_weighted"]),
    (lambda: Mined(miner=None, miner_options=dict(cutoff=1.)), ["miner_options", "None"]),
    (lambda: Mined(miner_options=dict(cut=1.)), ["option of distance_weighted 'cut'", "cutoff"]),
    (lambda: Mined(base="snr", base_options=dict(form="contrastive")), ["form='triplet'", "contrastive"]),
    (lambda: Mined(base="multi_similarity", base_options=dict(mining=.1)), ["mining=0.1", "by itself"]),
    (lambda: Mined(base="triplet", pairs=True), ["triplet is made of triplets", "miner(embeddings, labels)"]),
    (lambda: Mined(base="triplet", miner=None)(*batch(), HardMiner().pairs(*batch())), ["triplet is made of triplets", "not miner.pairs"]),
    (lambda: Mined(miner=None)(*batch(), 3), ["three int64 index tensors", "got 3"]),
    (lambda: MarginLoss()(*batch(), HardMiner()(*batch())[:2]), ["three int64 index tensors", "got 2 of them"]),
    (lambda: MarginLoss()(*batch(), tuple(i.float() for i in HardMiner()(*batch()))), ["torch.float32"]),
    (lambda: MarginLoss()(*batch(), tuple(i[j:] for j, i in enumerate(HardMiner()(*batch())))), ["equal length", "[24, 23, 22]"]),
    (lambda: MarginLoss()(*batch(), tuple(i + 9 for i in HardMiner()(*batch()))), ["to 32", "24 rows", "this very batch"]),
])
def test_errors_of_composing_say_what_to_do(call, words):
    with pytest.raises(ValueError) as e: call()
    for word in words: assert word in str(e.value)


def test_a_choice_does_not_outlive_its_batch():
    z, y = batch()
    for loss in (MarginLoss(), Mined(base="contrastive", miner=None)):
        before = loss(z, y)
        assert loss(z, y, HardMiner()(z, y)) != before and loss(z, y) == before
        with pytest.raises(ValueError): loss(z, y[:3], HardMiner()(z, y))
        assert loss(z, y) == before


# ---------------------------------------------------------------- PADS

def rewarded(pads, updates, seed=None):
    if seed is not None: torch.manual_seed(seed)
    return [pads.update(pads.miner.density[10:14].sum().item()) for _ in range(updates)]


def test_pads_learns_from_an_honest_reward():
    for seed in range(3):
        torch.manual_seed(seed)
        pads = PADS(BinMiner(start=(.1, 1.4)))
        rewarded(pads, 120)
        assert pads.miner.density[10:14].sum() > .8 and abs(pads.miner.density.sum() - 1) < 1e-4


def test_pads_resumes_exactly():
    torch.manual_seed(0)
    pads = PADS(BinMiner())
    rewarded(pads, 20)
    saved, state = deepcopy(pads.state_dict()), torch.get_rng_state()
    first, density = rewarded(pads, 10), pads.miner.density.clone()
    torch.manual_seed(77)
    other = PADS(BinMiner())
    other.load_state_dict(saved)
    torch.set_rng_state(state)
    assert rewarded(other, 10) == first and (other.miner.density == density).all()


def test_pads_rewards_are_signs_of_change_and_can_be_replaced():
    pads = PADS(BinMiner(), measures=2)
    assert [pads.update(e, .5) for e in (.5, .6, .6, .2)] == [0, 1, 0, -1]
    assert pads.update(.9, .5, reward=-1.) == -1.
