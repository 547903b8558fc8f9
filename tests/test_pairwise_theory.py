"""What 11_pairwise_losses proves, on fresh seeds, each statement with mutants that its check must catch."""
from math import e, exp, lgamma, log, pi, sin

import pytest
import torch
from torch.testing import assert_close

from dml_companion.geometry import class_means, normalize, pair_masks, squared_distances
from dml_companion.losses.pairwise import CenterLoss, ContrastiveLoss, SNCALoss
from dml_companion.theory.information import (conditional_entropy, kde_entropy, kde_information, mutual_information,
                                              vmf_log_constant)

SEEDS = range(5000, 5040)                                      # the notebook uses 0..599 and 1000..1199


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def rng(seed): return torch.Generator().manual_seed(seed)


def cloud(seed, balanced=False, least=2, d=4, sphere=False):
    "Points of random classes, labels, class sizes."
    g = rng(seed)
    K = int(torch.randint(2, 6, (), generator=g))
    n = torch.randint(least, 9, (K,), generator=g)
    n = n[0].repeat(K) if balanced else torch.where(torch.arange(K) == 0, n.max() + 1, n)       # never all equal
    y = torch.arange(K).repeat_interleave(n)
    z = torch.rand(K, generator=g)[y, None] * torch.randn(len(y), d, generator=g) + torch.randn(K, d, generator=g)[y]
    return normalize(z) if sphere else z, y, n


def scatter(z, y): return torch.stack([(z[y == k] - z[y == k].mean(0)).square().sum() for k in range(int(y.max()) + 1)])
def contrastive(z, y, **options): return ContrastiveLoss(normalize=False, **options).parts(z, y)


def center(z, y):
    loss = CenterLoss(int(y.max()) + 1, z.shape[1], center_weight=1., centers="batch", reduction="sum")
    return loss.parts(z, y).tightness


def caught(check, *mutants):
    "Each mutant must fail the check that the truth passes."
    for mutant in mutants:
        with pytest.raises(AssertionError): check(mutant)


# ---- 11.1 contrastive and center

def test_contrastive_tightness_weights_classes_by_their_size():
    def check(formula):
        for seed in SEEDS:
            z, y, n = cloud(seed)
            assert_close(contrastive(z, y).tightness, formula(scatter(z, y), n), rtol=1e-9, atol=0)
    check(lambda S, n: 2 / n.sum() * (n * S).sum())
    caught(check, lambda S, n: 1 / n.sum() * (n * S).sum(), lambda S, n: 2 / n.sum() * S.sum(),
           lambda S, n: 2 / n.sum() * ((n - 1) * S).sum(), lambda S, n: -2 / n.sum() * (n * S).sum(),
           lambda S, n: 4 / len(n) * S.sum() / 2)                       # the balanced constant on unbalanced classes


def test_balanced_classes_make_them_multiples():
    def check(factor):
        for seed in SEEDS:
            z, y, n = cloud(seed, balanced=True)
            assert_close(contrastive(z, y).tightness, factor(len(n)) * center(z, y), rtol=1e-9, atol=0)
    check(lambda K: 4 / K)
    caught(check, lambda K: 2 / K, lambda K: 4 / (K + 1), lambda K: -4 / K)


def best_affine_fit(seed, balanced):
    "What is left of the contrastive tightness after the best a * T_center + b over six clouds of one list of sizes."
    z, y, n = cloud(seed, balanced)
    g = rng(7 * seed)
    clouds = [torch.randn(len(y), 4, generator=g) * torch.rand(len(n), generator=g)[y, None] for _ in range(6)]
    T = torch.stack([contrastive(x, y).tightness for x in clouds])
    basis = torch.stack([torch.stack([center(x, y) for x in clouds]), torch.ones(6)], 1)
    return ((T - (basis @ torch.linalg.lstsq(basis, T[:, None]).solution)[:, 0]).abs().max() / T.max()).item()


def test_no_constants_help_unequal_classes():
    def check(balanced):
        for seed in SEEDS: assert best_affine_fit(seed, balanced) < 1e-9
    check(True)
    caught(check, False)
    assert min(best_affine_fit(seed, False) for seed in SEEDS) > 1e-6


# ---- 11.2 center as a Gaussian cross-entropy

def unit_bound(V, d): return V / 2 + d / 2 * log(2 * pi)
def free_bound(V, d): return d / 2 * log(2 * pi * e / d * V)


def test_center_is_a_gaussian_cross_entropy():
    def check(formula):
        for seed in SEEDS:
            z, y, n = cloud(seed)
            guess = torch.distributions.Normal(class_means(z, y, len(n))[y], 1.)
            cross_entropy = -guess.log_prob(z).sum(1).mean()
            assert_close(cross_entropy, formula(center(z, y) / len(z), z.shape[1]), rtol=0, atol=1e-9)
    check(lambda T, d: T + d / 2 * log(2 * pi))
    caught(check, lambda T, d: T, lambda T, d: T - d / 2 * log(2 * pi), lambda T, d: 2 * T + d / 2 * log(2 * pi))


def known(seed):
    "Exact H(Z|Y) and mean square radius of Gaussian, box and Laplace classes of random weights."
    g = rng(seed)
    K, d = (int(torch.randint(a, b, (), generator=g)) for a, b in ((1, 6), (1, 17)))
    pi_k, s = torch.rand(K, generator=g) + .05, torch.randn(K, d, generator=g).mul(.3 * (1 + seed % 5)).exp()
    H, V = ((s.log() + log(2 * pi * e) / 2, s ** 2), (s.log(), s ** 2 / 12), (1 + (2 * s).log(), 2 * s ** 2))[seed % 3]
    return ((pi_k @ H.sum(1)) / pi_k.sum()).item(), ((pi_k @ V.sum(1)) / pi_k.sum()).item(), d


def test_both_bounds_hold_in_order():
    def check(bounds):
        unit, free = bounds
        for seed in range(5300, 5600):
            H, V, d = known(seed)
            assert H <= free(V, d) + 1e-9 and free(V, d) <= unit(V, d) + 1e-9          # 1e-9: sums of some 100 terms
    check((unit_bound, free_bound))
    caught(check, (lambda V, d: V / 2, free_bound), (lambda V, d: V / 4 + d / 2 * log(2 * pi), free_bound),
           (unit_bound, lambda V, d: d / 2 * log(2 * pi / d * V)),
           (unit_bound, lambda V, d: d / 2 * log(2 * pi * e * V)),
           (free_bound, unit_bound), (unit_bound, lambda V, d: -free_bound(V, d)))


def test_the_free_variance_is_exact_for_isotropic_gaussians_only():
    def check(bound):
        for d, s in ((1, .01), (8, .1), (8, 1.), (64, 3.)):
            assert abs(bound(d * s * s, d) - d / 2 * log(2 * pi * e * s * s)) < 1e-9
    check(free_bound)
    caught(check, unit_bound, lambda V, d: free_bound(V, d) + .01, lambda V, d: free_bound(V / d, d))
    assert free_bound(1 + 4, 2) > log(2 * pi * e * 2) + .2                               # axes of unequal spread: loose
    assert abs(unit_bound(8 * 1e-4, 8) - 4 * log(2 * pi * e * 1e-4) - 32.84) < .01       # collapse: loose by 32.8 nats


def arc_V(w): return 1 - (2 * sin(w / 2) / w) ** 2


def test_the_arc_spread_is_that_of_points_on_the_arc():
    def check(formula):
        for w in (.1, .5, 1., 3., 6.):
            angle = w * ((torch.arange(20_000) + .5) / 20_000 - .5)
            z = torch.stack([angle.cos(), angle.sin()], 1)
            assert abs(scatter(z, torch.zeros(len(z)).long()).item() / len(z) - formula(w)) < 1e-7    # midpoint rule
    check(arc_V)
    caught(check, lambda w: w ** 2 / 12, lambda w: 1 - (2 * sin(w / 2) / w))


def test_on_the_circle_the_unit_variance_holds_and_the_free_one_does_not():
    def check(bound):
        for w in (.07, .1, .3, .5, .8, 1., 1.3, 2., 3., 2 * pi): assert log(w) <= bound(arc_V(w), 2) + 1e-9
    check(unit_bound)
    check(lambda V, d: unit_bound(V, d) - .499)                                          # half a nat to spare
    caught(check, free_bound, lambda V, d: unit_bound(V, d) - .51, lambda V, d: V / 2)
    gaps = [free_bound(arc_V(w), 2) - log(w) for w in (.1, .5, 1., 2.)]
    assert [round(gap, 2) for gap in gaps[:3]] == [-2.64, -1.04, -.37] and gaps[3] > 0


def test_a_unit_gaussian_puts_little_mass_on_the_sphere():
    def check(largest):
        for d in (2, 3, 8):
            x = normalize(torch.randn(20_000, d, generator=rng(5000 + d)))               # the sphere's mean, by sampling
            log_area = log(2) + d / 2 * log(pi) - lgamma(d / 2)
            for r in (0., .5, 1.):
                density = -d / 2 * log(2 * pi) - ((x - r * torch.eye(d)[0]).square().sum(1)) / 2
                mass = (log_area + density).exp().mean().item()
                assert mass < 1.02 * largest(d)                                          # 2 %: error of 20,000 draws
                if r == 0: assert mass > .98 * largest(d)
    check(lambda d: exp((1 - d / 2) * log(2) - .5 - lgamma(d / 2)))
    caught(check, lambda d: exp((1 - d / 2) * log(2) - 1 - lgamma(d / 2)), lambda d: exp(-.5), lambda d: 1.)


def test_means_of_the_same_batch_break_the_bound():
    z = torch.randn(500, 4, 4, 8, generator=rng(5001))                                  # 4 classes of 4, N(0, I)
    V = (z - z.mean(2, keepdim=True)).square().sum(3).mean((1, 2))
    assert (unit_bound(V, 8) < 4 * log(2 * pi * e)).double().mean() > .9
    assert_close(V.mean(), torch.tensor(8 * (1 - 1 / 4)), rtol=.02, atol=0)


# ---- 11.3 SNCA is a kernel estimate

def check_information(mutant):
    "The identity T + C = -I + const, by parts; a mutant changes one of its terms."
    lonely, total, sign, own = mutant
    for seed in SEEDS:
        g = rng(seed)
        z, y, n = cloud(seed, d=2 + seed % 6, sphere=True)
        sigma, share = 10 ** (-1.7 * torch.rand((), generator=g).item()), n / n.sum()
        T, C = SNCALoss(temperature=sigma, self_pairs=own).parts(z, y)
        left = (share * (n - lonely).log()).sum()
        log_c = vmf_log_constant(z.shape[1], 1 / sigma)
        H_class = conditional_entropy(z, y, lambda x: kde_entropy(x, sigma, "vmf"))
        assert_close(T, H_class + log_c - left, rtol=0, atol=1e-9)
        assert_close(C, torch.tensor(log(len(z) - total) - log_c - kde_entropy(z, sigma, "vmf")), rtol=0, atol=1e-9)
        I = mutual_information(z, y, method="kde", bandwidth=sigma, kernel="vmf")
        assert I == kde_information(z, y, sigma, "vmf")
        assert_close(T + C, sign * -I + log(len(z) - total) - left, rtol=0, atol=1e-9)


def test_snca_is_a_kernel_estimate_of_information():
    check_information((1, 1, 1, False))
    caught(check_information, (0, 1, 1, False), (1, 0, 1, False), (1, 1, -1, False), (1, 1, 1, True))


def test_information_has_a_ceiling_and_reaches_it():
    def check(ceiling):
        for seed in SEEDS:
            z, y, n = cloud(seed, balanced=seed % 2 == 0, d=6, sphere=True)
            apart = normalize(torch.eye(6)[y] + .05 * z)                                 # tight classes at right angles
            for x, sigma in ((z, .1), (z, 1.), (apart, .05)):
                I = mutual_information(x, y, method="kde", bandwidth=sigma, kernel="vmf")
                assert I <= ceiling(n, n / n.sum()) + 1e-9
            assert I > log(n.sum() - 1) - (n / n.sum() * (n - 1).log()).sum() - 1e-3     # 1e-3: other classes' kernels
    check(lambda n, share: log(n.sum() - 1) - (share * (n - 1).log()).sum())
    caught(check, lambda n, share: log(n.sum() - 1) - (share * n.log()).sum(),           # as if (i, i) were counted
           lambda n, share: -(share * share.log()).sum(),                                # the entropy of the labels
           lambda n, share: log(n.sum() - 1) - (n - 1.).mean().log() - .01,
           lambda n, share: (share * (n - 1).log()).sum() - log(n.sum() - 1))


def test_with_the_self_pair_the_tightness_is_the_self_included_estimate():
    def check(mutant):
        kernels, size, own = mutant
        for seed in SEEDS:
            z, y, n = cloud(seed, sphere=True)
            loss = SNCALoss(temperature=.2, self_pairs=own)
            log_c = vmf_log_constant(z.shape[1], 5.)
            same = (z @ z.T / .2).masked_fill(y[:, None] != y, -torch.inf)
            if not kernels: same = same.fill_diagonal_(-torch.inf)
            H = -(log_c + same.logsumexp(1) - (n - size)[y].log()).mean()
            left = (n / n.sum() * n.log()).sum()
            assert_close(loss.parts(z, y).tightness, H + log_c - left, rtol=0, atol=1e-9)
            assert_close(loss.parts(z, y).contrast, SNCALoss(temperature=.2).parts(z, y).contrast)
    check((True, 0, True))
    caught(check, (True, 1, True), (False, 0, True), (True, 0, False))


def test_the_kernel_estimate_is_a_double_loop():
    z, y, n = cloud(5000, sphere=True)
    s, total = z @ z.T / .2, 0.
    for i in range(len(z)):
        mine = [s[i, j].exp() for j in range(len(z)) if j != i and y[j] == y[i]]
        every = [s[i, j].exp() for j in range(len(z)) if j != i]
        total += ((sum(mine) / len(mine)).log() - (sum(every) / len(every)).log()) / len(z)
    assert_close(torch.tensor(kde_information(z, y, .2, "vmf")), total, rtol=0, atol=1e-12)


def test_a_lonely_point_is_outside_the_identity():
    z, y, n = cloud(5002, sphere=True)
    z, y, n = torch.cat([z, z[:1].roll(1)]), torch.cat([y, y[-1:] + 1]), torch.cat([n, torch.tensor([1])])
    T, C = SNCALoss(temperature=.3).parts(z, y)
    left = (n[:-1] / n[:-1].sum() * (n[:-1] - 1).log()).sum()
    assert abs(T + C + kde_information(z, y, .3, "vmf") - log(len(z) - 2) + left) > 1e-3


# ---- 11.4 the contrastive fence

def arcs(w, g, each=12):
    along, y = (torch.arange(each) + .5) / each - .5, torch.arange(2 * each) // each
    angle = w * torch.cat([along, along]) + g * y
    return torch.stack([angle.cos(), angle.sin()], 1), y


def test_beyond_the_margin_nothing_pushes():
    def check(margin):
        for w in torch.linspace(.05, 1.2, 9).tolist():
            z, y = arcs(w, w + 1.1)
            C = contrastive(z.requires_grad_(), y, margin=margin).contrast
            assert C == 0 and (torch.autograd.grad(C, z)[0] == 0).all()
    check(1.)
    caught(check, 1.5, 2.)


def test_widening_classes_adds_entropy_but_raises_the_contrast():
    entropy = [log(w) + min(1., 1.2 / w) * log(2) for w in (.6, .9, 1.2)]
    C = [contrastive(*arcs(w, 1.2)).contrast.item() for w in (.6, .9, 1.2)]
    assert entropy == sorted(entropy) and C == sorted(C) and C[0] < C[2]


def regroup(D, mask, m): # the three sums: springs less hinges over same-class pairs, and hinges over the pairs of `mask`
    P, N = mask
    near = (m - D).relu().square()
    return (D.square() - near)[P].sum() / len(D), near[P | N].sum() / len(D), near[N].sum() / len(D)


def distances(z): return (z[:, None] - z).norm(dim=2)


def test_regrouping_changes_the_parts_and_not_the_loss():
    def check(combine):
        for seed in SEEDS:
            z, y, _ = cloud(seed, sphere=True)
            for m in (.5, 1., 2.):
                total = contrastive(z, y, margin=m).total
                assert_close(combine(*regroup(distances(z), pair_masks(y), m)), total, rtol=0, atol=1e-9)
    check(lambda pull, every, negatives: pull + every)
    caught(check, lambda pull, every, negatives: pull + negatives, lambda pull, every, negatives: pull - every,
           lambda pull, every, negatives: pull + every / 2)


def test_what_regrouping_leaves_of_the_springs_still_pulls():
    def check(f):
        D = torch.linspace(0, 2, 401)
        for m in (.5, 1., 2.):
            assert (f(D, m).diff() > 0).all()
            assert_close(f(D, m), torch.where(D < m, 2 * m * D - m * m, D * D))
    check(lambda D, m: D ** 2 - (m - D).relu() ** 2)
    caught(check, lambda D, m: D ** 2 + (m - D).relu() ** 2, lambda D, m: D ** 2 - 2 * (m - D).relu() ** 2,
           lambda D, m: -(m - D).relu() ** 2)


def ranked_alike(push, seed, draws=400):
    "Share of pairs of random arc worlds, entropies 0.05 nats apart or more, that a push ranks as -H(Z) does."
    g = rng(seed)
    w, gap = pi * (1 - torch.rand(2, draws, generator=g))                               # off the notebook's grid
    minus_H = -w.log() - (gap / w).clamp(max=1) * log(2)
    C = torch.stack([push(distances(z), pair_masks(y)) for z, y in (arcs(*x) for x in zip(w.tolist(), gap.tolist()))])
    a, b = (v[:, None] - v for v in (minus_H, C))
    return (a * b > 0)[a.abs() > .05].double().mean().item()


def test_over_all_pairs_the_hinge_ranks_most_worlds_as_the_entropy_does():
    def check(mutant):
        which, sign = mutant
        for seed in (5000, 5001, 5002):
            one, two = (ranked_alike(lambda D, mask: sign * regroup(D, mask, m)[which], seed) for m in (1., 2.))
            assert .93 < one < .98 and .81 < two < .91                                  # 95.3 %, 85.8 % in the notebook
    check((1, 1))
    caught(check, (2, 1), (1, -1), (0, 1))                                              # negatives only; sign; T' for C'


def test_negatives_alone_rank_about_half():
    def check(which):
        for seed in (5000, 5001, 5002):
            one, two = (ranked_alike(lambda D, mask: regroup(D, mask, m)[which], seed) for m in (1., 2.))
            assert .38 < one < .54 and .46 < two < .63                                  # 46.2 %, 54.6 % in the notebook
    check(2)
    caught(check, 1, 0)


# ---- ranking losses

def triplet(z, y, m):
    D2, (P, N) = squared_distances(z, z), pair_masks(y)
    some = P[:, :, None] & N[:, None, :]
    hinge = (m + D2[:, :, None] - D2[:, None, :]).relu() * some
    active = (hinge > 0).to(z.dtype)
    return hinge.sum() / some.sum(), (active.sum(2) * D2).sum() / some.sum(), (active.sum(1) * D2).sum() / some.sum(), \
        m * active.sum() / some.sum()


def test_an_active_triplet_is_a_positive_distance_less_a_negative_one():
    def check(combine):
        for seed in SEEDS:
            z, y, _ = cloud(seed, sphere=True)
            z.requires_grad_()
            for m in (.1, .5):
                whole, near, far, rest = triplet(z, y, m)
                assert_close(whole, combine(near, far, rest))
                both = whole, combine(near, far, rest)
                assert_close(*(torch.autograd.grad(v, z, retain_graph=True)[0] for v in both))
    check(lambda near, far, rest: near - far + rest)
    caught(check, lambda near, far, rest: near + far + rest, lambda near, far, rest: near - far,
           lambda near, far, rest: 2 * near - far + rest)
    assert triplet(*arcs(1., 2.6), .1)[0] == triplet(*arcs(.05, 2.6), .1)[0] == 0        # whatever the width


def test_average_precision_has_no_tightness():
    def check(bound):
        for seed in SEEDS:
            z, y, _ = cloud(seed, least=4, sphere=True)
            s, mine = z @ z[0], y == y[0]
            ahead = (s[None, :] > s[:, None]) & (torch.arange(len(y)) != 0)
            R, own = ((1 + x.sum(1))[mine][1:].to(z.dtype) for x in (ahead, ahead & mine))
            assert_close(own.log().sum(), torch.tensor(len(own) + 1.).lgamma())         # 1..P in some order
            assert -(own / R).mean().log() <= bound(R, own) + 1e-12
    check(lambda R, own: R.log().mean() - own.log().mean())
    caught(check, lambda R, own: own.log().mean() - R.log().mean(), lambda R, own: (R.log() - own.log()).mean() / 2)


def test_only_hard_ranks_without_ties_are_a_permutation():
    def check(step, z):
        s = z @ z[0]
        lead = step(s[None, 1:] - s[1:, None]) * ~torch.eye(len(s) - 1, dtype=torch.bool)
        assert_close((1 + lead.sum(1)).log().sum(), torch.tensor(lgamma(len(s))))       # one class, query 0: log P!
    def hard(lead): return (lead > 0).to(lead.dtype)
    for seed in SEEDS: check(hard, normalize(torch.randn(8, 5, generator=rng(seed))))
    z = normalize(torch.randn(8, 5, generator=rng(5000)))
    with pytest.raises(AssertionError): check(lambda lead: (lead / .1).sigmoid(), z)    # smoothed
    with pytest.raises(AssertionError): check(hard, z[[0, 1, 1, 2, 3, 4, 5, 6]])        # a tie
