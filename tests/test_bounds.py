"""Lemma 1 and its relatives on fresh seeds: both sides are the losses' own, and a wrong constant is noticed."""
import re
from functools import partial
from math import cosh, exp, log, pi, sinh

import numpy as np
import pytest
import torch
from dml_companion.geometry import normalize, pair_masks
from dml_companion.losses.pairwise import CenterLoss, ContrastiveLoss, MultiSimilarityLoss, SNCALoss
from dml_companion.theory import bounds
from dml_companion.theory.bounds import (Bound, contrastive_contrast_bound, entropy_bound_from_spread,
                                         ms_contrast_bound, ms_tightness_bound, snca_contrast_bound,
                                         snca_tightness_bound, spread)
from dml_companion.theory.information import knn_entropy
from hypothesis import given, settings, strategies as st

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-9                # float64: values reach 1 / 0.05 = 20, rounding near 1e-14; sums over at most 48 points
FIVE = {"snca_T": snca_tightness_bound, "ms_T": ms_tightness_bound, "snca_C": snca_contrast_bound,
        "ms_C": ms_contrast_bound, "ms_C_common": partial(ms_contrast_bound, common=True),
        "contrastive_C": contrastive_contrast_bound}
OPTIONS = {"snca_T": ["temperature"], "snca_C": ["temperature"], "ms_T": ["alpha", "threshold"],
           "ms_C": ["beta", "threshold"], "ms_C_common": ["beta", "threshold"], "contrastive_C": ["margin"]}


def cloud(seed, sizes, d, width):
    "Unit vectors around class centres; width 0: collapsed, 10: uniform."
    g = torch.Generator().manual_seed(1000 + seed)
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = torch.randn(len(sizes), d, generator=g, dtype=torch.float64)
    z = normalize(centres[y] + width * torch.randn(len(y), d, generator=g, dtype=torch.float64))
    order = torch.randperm(len(y), generator=g)
    return z[order], 7 * y[order] - 3                                          # labels need not be 0..K-1


sizes = st.lists(st.integers(1, 8), min_size=2, max_size=6) | st.tuples(st.integers(2, 8), st.integers(2, 6)).map(
    lambda t: [t[0]] * t[1])
problems = st.builds(cloud, st.integers(0, 10**6), sizes, st.sampled_from([2, 3, 16]),
                     st.sampled_from([0, .05, .5, 10]))
parameters = st.fixed_dictionaries(dict(
    temperature=st.sampled_from([.05, .1, .5, 2]), alpha=st.sampled_from([.5, 2, 10]),
    beta=st.sampled_from([1, 10, 50]), threshold=st.sampled_from([-.2, .5, 1]), margin=st.sampled_from([.3, 1, 1.9])))


def options(name, p): return {k: p[k] for k in OPTIONS[name]}


def check(name, function, z, y, p, self_pairs):
    b = function(z, y, **options(name, p), self_pairs=self_pairs)
    assert isinstance(b, Bound) and b.lower.isfinite() and b.upper.isfinite()
    assert b.slack >= -TOLERANCE, (name, b)


@pytest.mark.parametrize("name", FIVE)
@given(problem=problems, p=parameters, self_pairs=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_bounds_hold(name, problem, p, self_pairs): check(name, FIVE[name], *problem, p, self_pairs)


def search(bound, sign, y, d, starts=2, steps=80, seed=0):
    "Extreme slack by gradient: 1 the smallest, -1 the largest."
    best, g = None, torch.Generator().manual_seed(2000 + seed)
    for _ in range(starts):
        raw = torch.randn(len(y), d, generator=g, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([raw], lr=.1)
        for _ in range(steps):
            adam.zero_grad(); (sign * bound(normalize(raw), y).slack).backward(); adam.step()
        slack = bound(normalize(raw.detach()), y).slack.item()
        best = slack if best is None else min(best, slack, key=lambda s: sign * s)
    return best


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize("name", FIVE)
def test_gradient_descent_finds_no_violation(name, self_pairs):
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 3])
    assert search(partial(FIVE[name], self_pairs=self_pairs), 1, y, 3) > -TOLERANCE


# ---- the loss sides are the losses

@given(problem=problems, p=parameters, self_pairs=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_loss_sides_are_what_the_losses_compute(problem, p, self_pairs):
    z, y = problem
    snca = SNCALoss(temperature=p["temperature"], self_pairs=self_pairs).parts(z, y)
    ms = MultiSimilarityLoss(**{k: p[k] for k in ("alpha", "beta", "threshold")}, self_pairs=self_pairs).parts(z, y)
    hinge = ContrastiveLoss(margin=p["margin"]).parts(z, y)
    def b(name): return FIVE[name](z, y, **options(name, p), self_pairs=self_pairs)
    pairs = [(b("snca_T").lower, snca.tightness), (b("ms_T").upper, ms.tightness), (b("snca_C").upper, snca.contrast),
             (b("ms_C").upper, ms.contrast), (b("ms_C_common").upper, ms.contrast),
             (b("contrastive_C").upper, hinge.contrast)]
    for ours, theirs in pairs: torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_bound_sides_by_loops():
    "The other sides from the formulas, pair by pair, with a class of one."
    z, y = cloud(5, [1, 3, 4, 2], 4, .7)
    n, s, lam, alpha, beta, m = len(y), .3, .4, 3., 20., 1.2
    D2 = [[((z[i] - z[j]) ** 2).sum().item() for j in range(n)] for i in range(n)]
    def mean(x): return sum(x) / len(x)
    for own in (False, True):
        snca = ms = 0.
        for i in range(n):
            P = [j for j in range(n) if y[j] == y[i] and (own or i != j)]
            if not P: continue
            w = mean([D2[i][j] for j in P])
            snca -= (log(len(P)) + (1 - w / 2) / s) / n
            ms += (log(len(P)) / alpha - (1 - w / 2 - lam)) / n
        assert abs(snca_tightness_bound(z, y, temperature=s, self_pairs=own).upper - snca) < TOLERANCE
        assert abs(ms_tightness_bound(z, y, alpha=alpha, threshold=lam, self_pairs=own).lower - ms) < TOLERANCE
    S = mean([D2[i][j] for i in range(n) for j in range(n) if i != j])
    N = [[j for j in range(n) if y[j] != y[i]] for i in range(n)]
    ms = mean([log(len(N[i])) / beta + 1 - lam - mean([D2[i][j] for j in N[i]]) / 2 for i in range(n)])
    negatives = [D2[i][j] for i in range(n) for j in N[i]]
    hinge = len(negatives) / n * max(m - mean(negatives) ** .5, 0) ** 2
    assert abs(spread(z) - S) < TOLERANCE
    assert abs(snca_contrast_bound(z, y, temperature=s).lower - (log(n - 1) + (1 - S / 2) / s)) < TOLERANCE
    assert abs(ms_contrast_bound(z, y, beta=beta, threshold=lam).lower - ms) < TOLERANCE
    assert abs(contrastive_contrast_bound(z, y, margin=m).lower - hinge) < TOLERANCE


# ---- tight and worst

def test_equality_cases():
    torch.manual_seed(1001)
    z, pairs = normalize(torch.randn(12, 5, dtype=torch.float64)), torch.arange(12) // 2
    assert abs(snca_tightness_bound(z, pairs).slack) < TOLERANCE                        # classes of two
    point = normalize(torch.randn(4, 5, dtype=torch.float64)).repeat_interleave(3, 0)
    assert abs(snca_tightness_bound(point, torch.arange(12) // 3, self_pairs=True).slack) < TOLERANCE
    simplex = normalize(torch.eye(6, dtype=torch.float64) - 1 / 6)
    assert abs(snca_contrast_bound(simplex, torch.arange(6) // 3).slack) < TOLERANCE
    one = torch.ones(6, 1, dtype=torch.float64)
    assert abs(contrastive_contrast_bound(one, torch.arange(6) // 3).slack) < TOLERANCE
    assert abs(ms_contrast_bound(one, torch.arange(6) // 3).slack) < TOLERANCE            # only 1/50 log(1 + e^-25/3)


def ceiling(t, sigma): return log(cosh(1 / sigma) + t * sinh(1 / sigma)) - t / sigma


def check_ceiling(ceiling):
    "Eq. (8): antipodal halves attain the ceiling of their mean cosine t, and no cloud passes that of its own."
    def mean_cosine(z, mask): return ((z @ z.T * mask).sum(1) / mask.sum(1)).mean().item()
    for sigma in (.1, .5):
        y = torch.arange(3).repeat_interleave(4)
        halves = torch.tensor([1., -1.], dtype=torch.float64).repeat(6)[:, None]
        for seed, z in enumerate([halves, *(cloud(seed, [4, 4, 4], 2, w)[0] for seed in range(5) for w in (.1, 10))]):
            same, others = y[:, None] == y, ~torch.eye(12, dtype=torch.bool)
            for bound, mask in ((partial(snca_tightness_bound, self_pairs=True), same),
                                (snca_tightness_bound, same & others), (snca_contrast_bound, others)):
                slack, top = bound(z, y, temperature=sigma).slack, ceiling(mean_cosine(z, mask), sigma)
                assert slack < top + TOLERANCE
                if seed == 0: assert abs(slack - top) < TOLERANCE


def test_antipodal_halves_are_the_worst_of_snca():
    check_ceiling(ceiling)
    for wrong in (lambda t, s: log(cosh(1 / s) - t * sinh(1 / s)) - t / s, lambda t, s: ceiling(t, s) + 2 * t / s,
                  lambda t, s: ceiling(t, s) + t / s, lambda t, s: ceiling(t, s) - log(cosh(1 / s)),
                  lambda t, s: ceiling(t, s) + log(2)):
        with pytest.raises(AssertionError): check_ceiling(wrong)


@pytest.mark.parametrize("sigma", [.1, .5])
@pytest.mark.parametrize("self_pairs", [False, True])
def test_ascent_comes_near_the_ceiling_and_not_past_it(sigma, self_pairs):
    y = torch.arange(3).repeat_interleave(4)
    for bound, t in ((partial(snca_tightness_bound, self_pairs=self_pairs), 0 if self_pairs else -1 / 3),
                     (snca_contrast_bound, -1 / 11)):
        top = ceiling(t, sigma)
        assert .5 * top < search(partial(bound, temperature=sigma), -1, y, 2) < top + TOLERANCE


def equidistant(m, self_pairs, K=2):
    "K classes whose positives are all equally far: a simplex each, or with self pairs one point each."
    shape = torch.ones(m, 1, dtype=torch.float64) if self_pairs else normalize(torch.eye(m + 1, dtype=torch.float64)
                                                                               - 1 / (m + 1))
    return shape.repeat(K, 1), torch.arange(K).repeat_interleave(len(shape))


def chain_slack(T_ms, T_snca, m, s, a, l): # eq. (9)
    return (T_ms - l) / s - (1 + 1 / (a * s)) * log(m) - T_snca


def sharper(V, m, s, a, l): # the sharper form of eq. (4)
    return torch.nn.functional.softplus(log(m) - a * (1 - l - V)) / a


def check_chain(chain_slack, sharper, z, y, p, self_pairs, equal=False):
    "Balanced: eq. (2) through the contrastive tightness, eq. (9), the sharper eq. (4); `equal`: equidistant positives."
    m, (s, a, l) = (y == y[0]).sum().item() - (not self_pairs), (p[k] for k in ("temperature", "alpha", "threshold"))
    low = snca_tightness_bound(z, y, temperature=s, self_pairs=self_pairs)
    ms = ms_tightness_bound(z, y, alpha=a, threshold=l, self_pairs=self_pairs)
    V = ContrastiveLoss().parts(z, y).tightness / (2 * m)
    assert abs(low.upper - ((V - 1) / s - log(m))) < 1e-8
    assert abs(ms.lower - (V + log(m) / a - 1 + l)) < 1e-8
    chain, sharp = chain_slack(ms.upper, low.lower, m, s, a, l), ms.upper - sharper(V, m, s, a, l)
    assert chain > -TOLERANCE and sharp > -TOLERANCE
    if equal: # nothing is lost but the 1 under the logarithm
        assert abs(sharp) < 1e-8
        assert abs(chain - torch.nn.functional.softplus(a * (1 - l - V) - log(m)) / a / s) < 1e-7   # over sigma


@given(n_k=st.integers(2, 6), K=st.integers(2, 5), seed=st.integers(0, 10**6), p=parameters, self_pairs=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_the_chain_end_to_end(n_k, K, seed, p, self_pairs):
    check_chain(chain_slack, sharper, *cloud(seed, [n_k] * K, 3, .5), p, self_pairs)


POINT = dict(temperature=.2, alpha=3., threshold=.4)


@pytest.mark.parametrize("self_pairs", [False, True])
def test_a_wrong_chain_is_caught(self_pairs):
    def run(chain=chain_slack, sharp=sharper):
        check_chain(chain, sharp, *equidistant(5, self_pairs), POINT, self_pairs, equal=True)
    run()
    for wrong in (lambda T, S, m, s, a, l: chain_slack(T, S, m, s, a, -l), lambda T, S, m, s, a, l: (T - l) / s - S,
                  lambda T, S, m, s, a, l: chain_slack(T, S, m, s, a, l) + 2 * log(m),
                  lambda T, S, m, s, a, l: (T - l) / s - log(m) - S,
                  lambda T, S, m, s, a, l: chain_slack(-T, S, m, s, a, l)):
        with pytest.raises(AssertionError): run(chain=wrong)
    for wrong in (lambda V, m, s, a, l: sharper(V, 1, s, a, l), lambda V, m, s, a, l: sharper(V - 1, m, s, a, l),
                  lambda V, m, s, a, l: sharper(V, m, s, a, -l), lambda V, m, s, a, l: sharper(V, m, s, a, l) * a):
        with pytest.raises(AssertionError): run(sharp=wrong)
    if not self_pairs:                                                          # V > 0 shows the sign of V
        with pytest.raises(AssertionError): run(sharp=lambda V, m, s, a, l: sharper(-V, m, s, a, l))


def reverse_slack(T_ms, T_snca, m, s, a, l): # the order that "up to constants" allows as well
    return T_snca + log(1 + m * exp(a * (1 + l))) / a + 1 / s + log(m) - T_ms


def check_reverse(reverse_slack):
    antipodes = torch.tensor([1., -1.], dtype=torch.float64).repeat(3)[:, None], torch.arange(6) // 2
    random = [cloud(seed, [4] * 3, 3, w) for seed in range(6) for w in (.05, 1)]
    for z, y in (antipodes, equidistant(21, True), *random):
        m = (y == y[0]).sum().item() - 1
        for s, a, l in ((.05, 2., .5), (50., 2., .5), (.5, 10., 1.), (50., 10., 1.)):
            T_snca = snca_tightness_bound(z, y, temperature=s).lower
            assert reverse_slack(ms_tightness_bound(z, y, alpha=a, threshold=l).upper, T_snca, m, s, a, l) > -TOLERANCE


def test_the_reverse_order_holds_too():
    check_reverse(reverse_slack)
    for wrong in (lambda T, S, m, s, a, l: reverse_slack(T, S, m, s, a, l) - 1 / s,
                  lambda T, S, m, s, a, l: reverse_slack(T, S, m, s, a, l) - log(m),
                  lambda T, S, m, s, a, l: reverse_slack(T, S, m, s, a, l - 1),
                  lambda T, S, m, s, a, l: reverse_slack(T, S, m, s, a, -l)):
        with pytest.raises(AssertionError): check_reverse(wrong)


# ---- through the center loss itself

def T_center(z, y):
    classes = y.unique(return_inverse=True)[1]
    loss = CenterLoss(int(classes.max()) + 1, z.shape[1], centers="batch", center_weight=1., reduction="sum").double()
    return loss.parts(z, classes).tightness.item()


def check_sandwich(low, high):
    "low(n_min) T_center / n <= T_contrastive <= high(n_max) T_center / n."
    for z, y in probes():
        n, sizes, T = len(y), y.unique(return_counts=True)[1].double(), ContrastiveLoss().parts(z, y).tightness
        assert low(sizes) * T_center(z, y) / n - 1e-8 < T < high(sizes) * T_center(z, y) / n + 1e-8


def test_contrastive_between_center_losses():
    def low(k): return 4 * k.min()
    def high(k): return 4 * k.max()
    check_sandwich(low, high)
    for wrong in ((high, high), (low, low), (lambda k: 8 * k.min(), high), (low, lambda k: 2 * k.max()),
                  (low, lambda k: -4 * k.max())):
        with pytest.raises(AssertionError): check_sandwich(*wrong)


def check_center(a, b):
    "T_SNCA <= a T_center / (sigma n) + b, any class sizes."
    near = [cloud(seed, k, 3, .02) for seed in range(4) for k in ([2] * 6, [3, 2, 1], [5, 5])]
    for z, y in near + probes():
        for s in (.1, 1.):
            for own in (False, True):
                m = (y[:, None] == y).sum(1).double() - int(not own)
                right = a(own) / s / len(y) * T_center(z, y) + b(m, s).item()
                assert snca_tightness_bound(z, y, temperature=s, self_pairs=own).lower < right + TOLERANCE


def test_snca_below_the_center_loss_itself():
    def a(own): return 2 if own else 4
    def b(m, s): return -((m > 0) / s + m.clamp_min(1).log()).mean()
    check_center(a, b)
    for wrong in ((lambda own: 2, b), (lambda own: 1 if own else 4, b), (lambda own: -a(own), b),
                  (a, lambda m, s: b(m, s) - 1 / s), (a, lambda m, s: 2 * b(m, s)),
                  (a, lambda m, s: -(1 / s + m.clamp_min(1).log()).mean())):     # anchors without positive counted
        with pytest.raises(AssertionError): check_center(*wrong)


def check_mean_distance(between, z, y, margin):
    b = contrastive_contrast_bound(z, y, margin=margin)
    assert b.lower - TOLERANCE <= between(z, y, margin) <= b.upper + 1e-7     # cdist's roots are coarser near 0


def by_mean(z, y, margin): return hinge(z, y, margin, 1)


@given(problem=problems, margin=st.sampled_from([.3, 1, 1.9]))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_the_mean_distance_is_sharper_than_the_rms(problem, margin): check_mean_distance(by_mean, *problem, margin)


def test_a_wrong_mean_distance_is_caught():
    def run(between):
        for z, y in probes(): check_mean_distance(between, z, y, 1.9)
    run(by_mean)
    for wrong in (lambda z, y, m: -by_mean(z, y, m), lambda z, y, m: by_mean(z, y, 0),
                  lambda z, y, m: by_mean(z, y, -m),
                  lambda z, y, m: hinge(z, y, m, 4), lambda z, y, m: 2 * by_mean(z, y, m),
                  lambda z, y, m: len(z) * (m - nearest(z, y)).relu() ** 2):
        with pytest.raises(AssertionError): run(wrong)


# ---- mutations: what a wrong proof would give

def mutant(name, change):
    "The bound with its non-loss side changed; `change(value, z, y, options)`."
    def function(z, y, **how):
        b = FIVE[name](z, y, **how)
        if name == "snca_T": return Bound(b.lower, change(b.upper, z, y, how))
        return Bound(change(b.lower, z, y, how), b.upper)
    return function


def logs(y, own):
    sizes = (y[:, None] == y).sum(1) - int(not own)
    return sizes.clamp_min(1).double().log().mean().item()


def V(z, y, own): # by loops over pairs, balanced or not
    same = y[:, None] == y if own else pair_masks(y)[0]
    return ((torch.cdist(z, z) ** 2 / 2 * same).sum(1) / same.sum(1).clamp_min(1)).mean().item()


MUTANTS = [ # (bound, what is wrong, change)
    ("snca_T", "sign of V", lambda u, z, y, h: u - 2 * V(z, y, h["self_pairs"]) / h["temperature"]),
    ("snca_T", "half of V", lambda u, z, y, h: u - .5 * V(z, y, h["self_pairs"]) / h["temperature"]),
    ("snca_T", "log m twice", lambda u, z, y, h: u - logs(y, h["self_pairs"])),
    ("snca_T", "1/sigma twice", lambda u, z, y, h: u - 1 / h["temperature"]),
    ("snca_T", "self pair counted in the size", lambda u, z, y, h: u + logs(y, h["self_pairs"]) - logs(y, True)),
    ("ms_T", "twice V", lambda u, z, y, h: u + V(z, y, h["self_pairs"])),
    ("ms_T", "1 - lambda dropped", lambda u, z, y, h: u + 1 - h["threshold"]),
    ("ms_T", "sign of lambda", lambda u, z, y, h: u + 2 * (1 - h["threshold"])),
    ("ms_T", "log m without 1/alpha", lambda u, z, y, h: u + logs(y, h["self_pairs"]) * (1 - 1 / h["alpha"])),
    ("snca_C", "sign of S", lambda u, z, y, h: u + spread(z) / h["temperature"]),
    ("snca_C", "half of S", lambda u, z, y, h: u + spread(z) / h["temperature"] / 4),
    ("snca_C", "log n for log(n - 1)", lambda u, z, y, h: u + log(len(z)) - log(len(z) - 1)),
    ("snca_C", "S over n^2 pairs", lambda u, z, y, h: u + spread(z) / len(z) / h["temperature"] / 2),
    ("ms_C", "the spread of all pairs", lambda u, z, y, h: u
        + ((torch.cdist(z, z)**2 * pair_masks(y)[1]).sum(1) / pair_masks(y)[1].sum(1)).mean() / 2 - spread(z) / 2),
    ("ms_C", "log n without 1/beta", lambda u, z, y, h: u
        + pair_masks(y)[1].sum(1).double().log().mean() * (1 - 1 / h["beta"])),
    ("ms_C", "1 + lambda", lambda u, z, y, h: u + 2 * h["threshold"]),
    ("ms_C_common", "sign of S", lambda u, z, y, h: u + spread(z)),
    ("ms_C_common", "factor (n - 1)/(n - n_max) dropped", lambda u, z, y, h: u + spread(z) / 2 * (
        (len(z) - 1) / (len(z) - (y[:, None] == y).sum(1).max()) - 1)),
    ("contrastive_C", "nearest for rms", lambda u, z, y, h: len(z) * (h["margin"] - nearest(z, y)).relu() ** 2),
    ("contrastive_C", "no root", lambda u, z, y, h: hinge(z, y, h["margin"], 2, root=False)),
    ("contrastive_C", "n pairs twice", lambda u, z, y, h: 2 * u),
    ("contrastive_C", "sign in the hinge", lambda u, z, y, h: hinge(z, y, -h["margin"], 2)),
]


def nearest(z, y): return torch.cdist(z, z)[pair_masks(y)[1]].min()


def hinge(z, y, m, power, root=True):
    D = torch.cdist(z, z)[pair_masks(y)[1]]
    root = (D**power).mean() ** (1 / power if root else 1)
    reach = (m - root).relu() if m > 0 else m - root
    return reach.square() * len(D) / len(z)


def probes():
    "Clouds on which a wrong constant shows: tight configurations and random ones, balanced and not."
    simplex = normalize(torch.eye(6, dtype=torch.float64) - 1 / 6)
    tight = [(simplex, torch.arange(6) // 3), (torch.ones(8, 1, dtype=torch.float64), torch.arange(8) // 4),
             (simplex.repeat_interleave(2, 0), torch.arange(12) // 2), (simplex.repeat(2, 1), torch.arange(12) // 6)]
    return tight + [cloud(seed, k, 3, w) for seed in range(6) for k in ([3, 3, 3], [1, 2, 8]) for w in (.05, .5, 10)]


def holds(name, function):
    for z, y in probes():
        for own in (False, True):
            for p in (dict(temperature=.1, alpha=2., beta=50., threshold=.5, margin=1.),
                      dict(temperature=1., alpha=10., beta=5., threshold=.2, margin=1.9)):
                check(name, function, z, y, p, own)


@pytest.mark.parametrize("name", FIVE)
def test_the_true_bounds_pass_the_probes(name): holds(name, FIVE[name])


@pytest.mark.parametrize("name, what, change", MUTANTS, ids=[f"{n}: {w}" for n, w, _ in MUTANTS])
def test_mutants_are_caught(name, what, change):
    with pytest.raises(AssertionError): holds(name, mutant(name, change))


# ---- off the sphere

def check_off_sphere(rho_of):
    "`rho_of(squares, some)`: what takes the place of the share v in (3) and (4), singletons and self pairs included."
    failed = torch.zeros(3)
    for seed in range(40):
        z, y = cloud(seed, ([3, 4, 2], [3, 2, 1], [1, 1, 5])[seed % 3], 4, 1.)
        g = torch.Generator().manual_seed(3000 + seed)
        z = z * (.2 + 2.5 * torch.rand(1, generator=g).double()) * (.5 + torch.rand(len(z), 1, generator=g).double())
        s, own = .2, seed % 2 == 0
        def slacks(z):
            how = dict(self_pairs=own, require_unit=False)
            return torch.stack([snca_tightness_bound(z, y, temperature=s, **how).slack,
                                ms_tightness_bound(z, y, **how).slack,
                                snca_contrast_bound(z, y, temperature=s, **how).slack])
        squares, some = z.square().sum(1), (((y[:, None] == y).sum(1) > 1) | own).double()
        v, rho, everyone, stated = some.mean(), rho_of(squares, some), squares.mean(), slacks(z)
        failed += stated < -1e-8
        assert (stated + torch.stack([(v - rho) / s, rho - v, (1 - everyone) / s]) > -1e-8).all()
        assert (slacks(z * (v / rho).sqrt())[:2] > -1e-8).all() and slacks(z / everyone.sqrt())[2] > -1e-8
        assert stated[0] > -1e-8 or rho < v
        assert stated[1] > -1e-8 or rho > v
        assert contrastive_contrast_bound(z, y, require_unit=False).slack > -1e-8
    assert (failed > 0).all()                                                 # as stated each of the three fails


def test_mean_squared_norm_takes_the_place_of_one():
    check_off_sphere(lambda squares, some: (squares * some).mean())
    for wrong in (lambda squares, some: squares.mean(), lambda squares, some: squares.mean() * some.mean(),
                  lambda squares, some: some.mean(), lambda squares, some: 2 * (squares * some).mean(),
                  lambda squares, some: (squares.sqrt() * some).mean()):
        with pytest.raises(AssertionError): check_off_sphere(wrong)


# ---- spread and entropy

def test_spread_is_twice_the_trace_and_sees_only_the_mean():
    z, _ = cloud(3, [5, 9], 6, 1.)
    torch.testing.assert_close(spread(z), 2 * z.T.cov().trace())
    torch.testing.assert_close(spread(z), 2 * 14 / 13 * (1 - z.mean(0).square().sum()))


@pytest.mark.parametrize("d", [1, 2, 7])
def test_entropy_bound_is_the_isotropic_gaussian(d):
    from torch.distributions import MultivariateNormal
    eye = torch.eye(d, dtype=torch.float64)
    def check(function):
        torch.testing.assert_close(function(2 * d * .49, d), MultivariateNormal(eye[0] * 0, .49 * eye).entropy())
        skew = torch.diag(torch.linspace(.2, 3, d, dtype=torch.float64))
        assert function(2 * skew.trace(), d) >= MultivariateNormal(eye[0] * 0, skew).entropy() - TOLERANCE
    check(entropy_bound_from_spread)
    for wrong in (lambda S, d: entropy_bound_from_spread(S, d) - .5 * d * log(2),
                  lambda S, d: -entropy_bound_from_spread(S, d), lambda S, d: entropy_bound_from_spread(S / d, d) - .1):
        with pytest.raises(AssertionError): check(wrong)


def test_a_larger_spread_can_have_the_smaller_entropy():
    "Random clouds near the circle, k-NN entropies: the order is often wrong, the upper bound never."
    rng = np.random.default_rng(5001)
    def draw():
        centres, width = rng.uniform(0, 2 * np.pi, rng.integers(1, 7)), 10 ** rng.uniform(-2, .3)
        a = torch.tensor(rng.choice(centres, 300) + width * rng.normal(size=300))
        z = torch.stack([a.cos(), a.sin()], 1) * (1 + .02 * torch.tensor(rng.normal(size=(300, 1))))
        return spread(z), knn_entropy(z, k=3)
    S, H = torch.tensor([draw() for _ in range(60)], dtype=torch.float64).T
    order = (S[:, None] - S).sign() * (H[:, None] - H)
    assert .1 < (order < -.3).double().mean() < .5                             # nats: well above the estimator's error
    def check(bound): assert (H < bound(S, 2) + .3).all()
    check(entropy_bound_from_spread)
    for wrong in (lambda S, d: -entropy_bound_from_spread(S, d), lambda S, d: (S / d).log(),
                  lambda S, d: d / 2 * (S / d).log()):
        with pytest.raises(AssertionError): check(wrong)


# ---- bad input

@pytest.mark.parametrize("name", FIVE)
def test_bad_input_is_named(name):
    f, (z, y) = FIVE[name], cloud(1, [3, 3], 4, 1.)
    longer = z.clone(); longer[2] *= 3
    with pytest.raises(ValueError, match=r"row 2 .* length 3.*normalize"): f(longer, y)
    assert f(longer, y, require_unit=False).upper.isfinite()
    with pytest.raises(ValueError, match="1 class"): f(z, y * 0)
    with pytest.raises(ValueError, match="6 embeddings but 5 labels"): f(z, y[:5])
    bad = z.clone(); bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="finite, got nan in row 1"): f(bad, y)
    for option in OPTIONS[name]:
        if option == "threshold": continue
        with pytest.raises(ValueError, match=f"{option} must be > 0, got -1"): f(z, y, **{option: -1.})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "2", None, True, [1.]], ids=str)
@pytest.mark.parametrize("name", FIVE)
def test_parameters_must_be_finite_numbers(name, bad):
    z, y = cloud(1, [3, 3], 4, 1.)
    for option in OPTIONS[name]:
        with pytest.raises(ValueError, match=rf"{option} must be a finite number, got {re.escape(repr(bad))}"):
            FIVE[name](z, y, **{option: bad})
        for good in (np.float32(.5), np.float64(.5), 1): assert FIVE[name](z, y, **{option: good}).slack > -TOLERANCE


@pytest.mark.parametrize("name", FIVE)
def test_lists_and_missing_labels_are_named(name):
    z, y = cloud(1, [3, 3], 4, 1.)
    with pytest.raises(ValueError, match="embeddings must be a torch tensor, got list"): FIVE[name](z.tolist(), y)
    with pytest.raises(ValueError, match="labels must be a torch tensor, got list"): FIVE[name](z, y.tolist())
    with pytest.raises(ValueError, match="labels must be .* got None"): FIVE[name](z, None)


def test_spread_and_entropy_bound_refuse():
    with pytest.raises(ValueError, match="two points, got 1"): spread(torch.ones(1, 3))
    with pytest.raises(ValueError, match="must be a torch tensor, got list"): spread([[1., 2.], [3., 4.]])
    for bad in (0., -1, torch.tensor([1., 0.]), torch.tensor(torch.inf), torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match="spread must be finite and > 0, got"): entropy_bound_from_spread(bad, 2)
    for bad in (float("nan"), float("inf"), "1", None, True):
        with pytest.raises(ValueError, match=f"spread must be a finite number, got {bad!r}"):
            entropy_bound_from_spread(bad, 2)
    for bad in (0, -2, 1.5, 2., float("nan"), float("inf"), True, "2", None):
        with pytest.raises(ValueError, match=f"dim must be an integer >= 1, got {bad!r}"):
            entropy_bound_from_spread(1., bad)
    assert entropy_bound_from_spread(torch.tensor(2), np.int64(2)) == entropy_bound_from_spread(2, 2)


def test_half_and_single_precision_and_gradients():
    z, y = cloud(2, [3, 4], 8, 1.)
    for dtype in (torch.float32, torch.float64):
        leaf = z.to(dtype).requires_grad_()
        for f in FIVE.values():
            b = f(normalize(leaf), y)
            assert b.slack.dtype == dtype and torch.autograd.grad(b.slack, leaf)[0].isfinite().all()
    assert bounds.snca_tightness_bound(normalize(z.bfloat16()), y).slack.dtype == torch.float32


# ---- SNCA's own bound, eq. (10)

def test_snca_bounds_the_conditional_entropy_in_expectation():
    "Classes uniform on arcs of width w: H(Z|Y) = log w; leave-one-out tightness, averaged over draws."
    g, m, draws = torch.Generator().manual_seed(4001), 39, 40
    y = torch.arange(2).repeat_interleave(m + 1)
    def check(constant):
        for w, sigma in ((1., .1), (1., .02), (3., .1)):
            T = 0.
            for _ in range(draws):
                a = w * torch.rand(len(y), generator=g, dtype=torch.float64) + 2 * y
                T += snca_tightness_bound(torch.stack([a.cos(), a.sin()], 1), y, temperature=sigma).lower / draws
            slack = T + constant(m, torch.tensor(1 / sigma, dtype=torch.float64)) - log(w)
            assert 0 < slack < .5, slack                                       # a bound, and not an idle one
    def log_bessel(k): return k + torch.special.i0e(k).log()
    check(lambda m, k: log(m) + log(2 * pi) + log_bessel(k))
    for wrong in (lambda m, k: log(m) + log_bessel(k), lambda m, k: log(2 * pi) + log_bessel(k),
                  lambda m, k: log(m) + log(2 * pi) - log_bessel(k)):
        with pytest.raises(AssertionError): check(wrong)


def arcs(u, seed, sigma, n_k):
    "A step of the path: two arcs a class, ten pieces each; pieces widen with u, arcs shrink and part."
    g = torch.Generator().manual_seed(seed)
    def rand(): return torch.rand(2, n_k, generator=g, dtype=torch.float64)
    length, apart = .5 - .15 * u, 1.5 + (pi - 1.5) * u
    width = length / 10 * 1e-3 ** (1 - u)
    angle = ((10 * rand()).floor() * length / 10 + width * rand() + apart * (2 * rand()).floor()).flatten()
    z, y = torch.stack([angle.cos(), angle.sin()], 1), torch.arange(2).repeat_interleave(n_k)
    return snca_tightness_bound(z, y, temperature=sigma).lower.item(), T_center(z, y), log(20 * width)


def check_path(constant, steps=(0, .2, .4, .6, .8, 1.), seed=6000, sigma=.01, n_k=400):
    T, center, H = torch.tensor([arcs(u, seed + i, sigma, n_k) for i, u in enumerate(steps)], dtype=torch.float64).T
    assert (T.diff() < 0).all() and (center.diff() > 0).all() and (H.diff() > 0).all()
    bound = T + constant(n_k - 1, torch.tensor(1 / sigma, dtype=torch.float64))
    assert (bound > H).all() and (bound - H)[-1] < .5                           # an idle bound would not be noticed


def test_conditional_entropy_rises_while_snca_tightness_falls():
    def log_bessel(k): return k + torch.special.i0e(k).log()
    def constant(m, k): return log(m) + log(2 * pi) + log_bessel(k)
    for seed in (6000, 7000): check_path(constant, seed=seed)
    for wrong in (lambda m, k: constant(m, k) - log(m), lambda m, k: constant(m, k) - log(2 * pi),
                  lambda m, k: constant(m, k) - 2 * log_bessel(k)):
        with pytest.raises(AssertionError): check_path(wrong)
    with pytest.raises(AssertionError): check_path(constant, steps=(1., .5, 0.))
