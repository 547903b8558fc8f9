"""Miners: loops and pytorch-metric-learning as oracles, frequencies of draws, poor batches, size of tensors, resuming."""
from copy import deepcopy
from math import exp, log

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dml_companion import mining, objectives
from dml_companion.geometry import normalize
from dml_companion.losses.mined import MinedTriplet
from dml_companion.mining import (MINERS, AllSemiHardMiner, BinMiner, DistanceWeightedMiner, HardMiner, Miner, MultiSimilarityMiner,
                                  PADS, RhoDistanceMiner, SemiHardMiner, SoftHardMiner, Triplets, UniformMiner, WindowMiner,
                                  class_order, compare, draw, kth_negative, kth_positive, make_miner, nearest_beyond,
                                  positive_slots, triplet_terms, windows)

NAMES = sorted(MINERS)
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
