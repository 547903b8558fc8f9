"information: eq. 1 and every estimator against loops, closed forms, scikit-learn, and mutants that must be caught."
from functools import partial
from math import exp, inf, isfinite, lgamma, log, pi

import pytest
import torch
from hypothesis import given, settings, strategies as st

from dml_companion.geometry import normalize
from dml_companion.theory import information as I

few = settings(derandomize=True, deadline=None, max_examples=20)
seeds = st.integers(1000, 10**6)
F = torch.float64


def rng(seed): return torch.Generator().manual_seed(seed)
def cloud(n, d, seed): return torch.randn(n, d, generator=rng(seed), dtype=F)
def psi(m): return torch.digamma(torch.tensor(float(m), dtype=F)).item()
def normal_entropy(d): return d / 2 * log(2 * pi) + d / 2


def labelled(n, d, seed, K=4, apart=2.):
    y = torch.randint(0, K, (n,), generator=rng(seed))
    y[:2 * K] = torch.arange(2 * K) % K                                  # at least two of each
    return cloud(n, d, seed + 1) + apart * cloud(K, d, seed + 2)[y], y


def caught(check, *mutants):
    "A check that a wrong implementation passes checks nothing."
    for mutant in mutants:
        with pytest.raises(AssertionError): check(mutant)


# ---- eq. 1, by quadrature: the two conditional entropies are averaged over z, and over classes

def one_mixture(seed):
    g = rng(seed)
    K = int(torch.randint(2, 6, (), generator=g))
    means, scale, prior = 4 * torch.randn(K, generator=g, dtype=F), *(torch.rand(K, generator=g, dtype=F) + .3 for _ in "ab")
    prior /= prior.sum()
    z = torch.linspace(means.min() - 13, means.max() + 13, 20_001, dtype=F)
    joint = prior.log()[:, None] + torch.distributions.Normal(means[:, None], scale[:, None]).log_prob(z)
    p, step = joint.logsumexp(0), z[1] - z[0]
    H_Y, H_Z = torch.special.entr(prior).sum(), -(p.exp() * p).sum() * step
    H_YZ = (p.exp() * torch.special.entr((joint - p).exp()).sum(0)).sum() * step
    return H_Y, H_YZ, H_Z, (prior * (.5 * log(2 * pi) + .5 + scale.log())).sum()


def check_two_views(views):
    for seed in range(1000, 1020):
        H_Y, H_YZ, H_Z, H_ZY = one_mixture(seed)
        first, second = views(H_Y, H_YZ, H_Z, H_ZY)
        assert abs(first - second) < 1e-9                                # rounding of 20,000 terms
        assert -1e-9 < first < H_Y + 1e-9


def test_two_views():
    check_two_views(lambda a, b, c, d: (a - b, c - d))
    caught(check_two_views, lambda a, b, c, d: (a - b, d - c), lambda a, b, c, d: (a, c - d), lambda a, b, c, d: (a - b, c + d))


# ---- k-NN

def knn_loop(x, k, dim=None):
    n, d = len(x), dim or x.shape[1]
    reach = [sorted((x[i] - x[j]).norm().item() for j in range(n) if j != i)[k - 1] for i in range(n)]
    return psi(n) - psi(k) + d / 2 * log(pi) - lgamma(d / 2 + 1) + d / n * sum(map(log, reach))


def check_knn(entropy):
    for seed, (n, d, k) in enumerate(((5, 1, 1), (30, 3, 3), (40, 8, 6)), 1000):
        x = cloud(n, d, seed)
        assert abs(entropy(x, k) - knn_loop(x, k)) < 1e-10               # rounding


def test_knn_is_its_formula():
    check_knn(I.knn_entropy)
    caught(check_knn, lambda x, k: I.knn_entropy(x, k) + psi(k), lambda x, k: -I.knn_entropy(x, k),
           lambda x, k: I.knn_entropy(x, k) - log(2), lambda x, k: I.knn_entropy(x, min(k + 1, len(x) - 1)) if k < 6 else 0)
    z = normalize(cloud(30, 4, 1005))
    assert abs(I.knn_entropy(z, 2, dim=3) - knn_loop(z, 2, 3)) < 1e-10


@few
@given(seeds, st.floats(.01, 100), st.integers(1, 6))
def test_entropies_move_with_scale_and_not_with_shift(seed, s, d):
    x = cloud(40, d, seed)
    shift = cloud(1, d, seed + 1)
    for entropy in (I.knn_entropy, I.mean_nn_entropy, I.gaussian_entropy, lambda x: I.kde_entropy(x, I.scott_bandwidth(x))):
        assert abs(entropy(s * x + shift) - entropy(x) - d * log(s)) < 1e-6


def test_duplicates_never_give_nan():
    x = cloud(50, 3, 1010)
    for copies in (2, 4, 9):
        for entropy in (I.knn_entropy, I.mean_nn_entropy, partial(I.kde_entropy, bandwidth=.3)):
            assert isfinite(entropy(x.repeat(copies, 1)))
    assert abs(I.knn_entropy(torch.cat([x, x[:1]])) - I.knn_entropy(x)) < .2
    one = torch.ones(9, 3)
    assert I.knn_entropy(one) == I.mean_nn_entropy(one) == I.gaussian_entropy(one) == -inf
    assert isfinite(I.kde_entropy(one, .1))
    quads = x.repeat(4, 1)                                               # k = 3 reaches copies only: rank 4, next point
    reach = torch.cdist(x, x).fill_diagonal_(inf).amin(1)
    assert abs(I.knn_entropy(quads) - (psi(200) - psi(4) + I.log_ball(3) + 3 * reach.log().mean().item())) < 1e-6


def test_huge_and_tiny_points():
    (x, y), d = labelled(60, 3, 1014), 3
    for entropy in (I.knn_entropy, I.mean_nn_entropy, I.gaussian_entropy):
        for s in (1e300, 1e200, 1e-200, 1e-300):
            assert abs(entropy(s * x) - entropy(x) - d * log(s)) < 1e-9  # rounding of 2,000
    for f in (I.mutual_information, I.linear_information, partial(I.mutual_information, method="gaussian")):
        assert all(abs(f(s * x, y) - f(x, y)) < 1e-6 for s in (1e200, 1e-200))
    assert I.scott_bandwidth(1e-200 * x) == pytest.approx(1e-200 * I.scott_bandwidth(x), rel=1e-12)


def test_blocks_have_enough_rows():
    assert I.block(60_000) == 128 and I.block(100) == 2500
    assert [r.stop - r.start for r, _ in I.distance_rows(cloud(3000, 1, 1015))][0] == 128


def test_float32_and_offsets_do_not_matter():
    x = cloud(300, 64, 1011).float()
    y = torch.arange(300) % 5
    for f in (I.knn_entropy, I.mean_nn_entropy, I.gaussian_entropy, lambda x: I.mutual_information(x, y)):
        assert abs(f(x) - f(x.double())) < 1e-9 and abs(f(x + 8.) - f(x)) < 1e-3
    assert isfinite(I.kde_entropy(1e15 * x, 1e-3)) and isfinite(I.kde_information(1e3 * x, y, 1e-3))
    assert isfinite(I.kde_information(normalize(x), y, 1e-4, "vmf"))


def test_blocks_do_not_matter(monkeypatch):
    (x, y), z = labelled(90, 4, 1012), normalize(cloud(90, 4, 1013))
    def all_of_them():
        return (I.knn_entropy(x), I.mean_nn_entropy(x), I.kde_entropy(x, .5), I.kde_entropy(z, .1, "vmf"),
                I.mutual_information(x, y), I.kde_information(x, y, .5), I.kde_information(z, y, .1, "vmf"))
    whole, plain = all_of_them(), I.chunks
    monkeypatch.setattr(I, "chunks", lambda n, size: plain(n, 7))
    assert all(abs(a - b) < 1e-9 for a, b in zip(whole, all_of_them()))


# ---- mean-NN and Gaussian

def check_mean_nn(entropy):
    for seed, (n, d) in enumerate(((6, 1), (30, 4)), 1020):
        x = cloud(n, d, seed)
        assert abs(entropy(x) - sum(I.knn_entropy(x, k) for k in range(1, n)) / (n - 1)) < 1e-10


def test_mean_nn_is_the_mean_over_k():
    check_mean_nn(I.mean_nn_entropy)
    caught(check_mean_nn, lambda x: I.mean_nn_entropy(x) - 1, lambda x: 2 * I.mean_nn_entropy(x),
           lambda x: I.mean_nn_entropy(x) - I.log_ball(x.shape[1]) + .1)


def mean_nn_bias(d): return d / 2 * (log(4) + psi(d / 2)) + I.log_ball(d) + 1 - normal_entropy(d)


def check_mean_nn_limit(bias):
    for d in (1, 3, 10, 64):
        got = [I.mean_nn_entropy(cloud(500, d, 1030 + s)) - normal_entropy(d) for s in range(6)]
        assert abs(sum(got) / 6 - bias(d)) < .3                          # > four standard errors at d = 64


def test_mean_nn_is_not_the_entropy():
    check_mean_nn_limit(mean_nn_bias)
    caught(check_mean_nn_limit, lambda d: 0., lambda d: -mean_nn_bias(d), lambda d: mean_nn_bias(d) - 1)
    assert [round(mean_nn_bias(d), 2) for d in (2, 5)] == [.12, .79] and 2.2 < mean_nn_bias(10) < 2.22
    for d in (16, 64, 256): assert abs(mean_nn_bias(d) - (d / 2 * log(2) - log(pi * d) / 2 + .5)) < 1 / d * 5


def check_constant_bias(entropy):
    "Up to a constant of n and d an estimate is right if shapes of known entropy have the same bias."
    for d in (2, 5):
        x = cloud(1000, d, 1045)
        two = x + 50 * (torch.arange(1000)[:, None] % 2) * torch.eye(d, dtype=F)[0]
        bias = entropy(x) - normal_entropy(d), entropy(two) - normal_entropy(d) - log(2)
        assert abs(bias[0] - bias[1]) < .15                              # k-NN: some .05 apart


def test_mean_nn_is_not_the_entropy_up_to_a_constant():
    check_constant_bias(I.knn_entropy)
    check_constant_bias(lambda x: I.knn_entropy(x) + 7)                  # a constant is no reason to fail
    caught(check_constant_bias, I.mean_nn_entropy, lambda x: 2 * I.mean_nn_entropy(x), I.gaussian_entropy)
    two = cloud(2000, 2, 1046) + 50 * (torch.arange(2000)[:, None] % 2) * torch.eye(2, dtype=F)[0]
    assert 2.8 < I.mean_nn_entropy(two) - normal_entropy(2) - log(2) < 3.05


def check_gaussian(entropy):
    for n, d in ((12, 8), (100, 8)):
        got = torch.tensor([entropy(cloud(n, d, 1040 + s)) - normal_entropy(d) for s in range(300)])
        assert got.mean().abs() < 4 * got.std() / 300 ** .5


def test_gaussian_is_unbiased_at_any_size():
    check_gaussian(I.gaussian_entropy)
    caught(check_gaussian, lambda x: .5 * torch.logdet(x.T.cov()).item() + normal_entropy(x.shape[1]), lambda x: -I.gaussian_entropy(x))
    A = cloud(5, 5, 1050)
    x = cloud(50, 5, 1051)
    assert abs(I.gaussian_entropy(x @ A) - I.gaussian_entropy(x) - torch.linalg.slogdet(A)[1]) < 1e-9
    assert I.gaussian_entropy(torch.cat([x, x[:, :1]], 1)) == -inf       # on a hyperplane


# ---- Bessel, von Mises-Fisher, kernels

def check_bessel(bessel):
    ive = pytest.importorskip("scipy.special").ive
    for order in (0, .5, 1, 3.5, 31, 200, 1023):
        for x in (1e-3, .1, 1., 33., 500., 1e4, 1e6):
            if (v := ive(order, x)) > 1e-290: assert abs(bessel(order, x) - log(v) - x) < 1e-9 * max(1, x, order)


def test_bessel_in_log_space():
    check_bessel(I.log_bessel_i)
    caught(check_bessel, lambda v, x: I.log_bessel_i(v + 1, x), lambda v, x: I.log_bessel_i(v, x) + 1e-3 * log(x) ** 2 + 1e-6)
    for x in (1e-9, 1e-3, 1.):                                           # far below float64: its first two terms
        assert abs(I.log_bessel_i(1023., x) - (1023 * log(x / 2) - lgamma(1024) + x * x / 4096)) < 1e-6
    for v, x in ((1023., 30.), (1023., 2000.), (511., 1e4)):             # the recurrence I_{v-1} - I_{v+1} = 2v/x I_v
        a, b, c = (I.log_bessel_i(v + i, x) for i in (-1, 0, 1))
        assert abs(exp(a - b) - exp(c - b) - 2 * v / x) < 1e-7 * (1 + 2 * v / x)


def check_vmf_constant(constant):
    for d, kappa in ((2, 3.), (3, 20.), (9, 5.), (64, 80.)):             # 1 = integral over the sphere, by its axis
        t = torch.linspace(0, pi, 200_001, dtype=F)
        area = log(2) + (d - 1) / 2 * log(pi) - lgamma((d - 1) / 2)      # of the sphere of one dimension less
        mass = (kappa * t.cos() + (d - 2) * t.sin().clamp_min(1e-300).log() + constant(d, kappa) + area).exp()
        assert abs(torch.trapezoid(mass, t).item() - 1) < 1e-6


def test_vmf_integrates_to_one():
    check_vmf_constant(I.vmf_log_constant)
    caught(check_vmf_constant, lambda d, k: -I.vmf_log_constant(d, k), lambda d, k: I.vmf_log_constant(d, k) + log(2),
           lambda d, k: I.vmf_log_constant(d + 1, k))
    for d in (2, 16, 128, 2048):
        for kappa in (1e-3, 1., 20., 1e3, 1e5): assert isfinite(I.vmf_log_constant(d, kappa)) and isfinite(I.vmf_entropy(d, kappa))
        entropies = [I.vmf_entropy(d, kappa) for kappa in (1e-3, 1., 20., 1e3, 1e5)]
        assert entropies == sorted(entropies, reverse=True)
    for d in (2, 3, 16):                                                 # at large kappa: normal on the tangent plane
        for kappa in (1e6, 5e7, 1e8):
            assert abs(I.vmf_entropy(d, kappa) - (d - 1) / 2 * log(2 * pi / kappa) - (d - 1) / 2) < 1e-5 + d * d / kappa
    angle = torch.distributions.VonMises(torch.tensor(0., dtype=F), torch.tensor(4., dtype=F))
    t = torch.linspace(-pi, pi, 20_001, dtype=F)
    assert abs(I.vmf_entropy(2, 4.) + torch.trapezoid(angle.log_prob(t).exp() * angle.log_prob(t), t).item()) < 1e-6


def kde_loop(x, h, kernel):
    n, d = x.shape
    def light(i, j):
        if kernel == "vmf": return x[i] @ x[j] / h + I.vmf_log_constant(d, 1 / h)
        return -(x[i] - x[j]).square().sum() / (2 * h * h) - d / 2 * log(2 * pi * h * h)
    return -sum(torch.stack([light(i, j) for j in range(n) if j != i]).exp().mean().log().item() for i in range(n)) / n


@pytest.mark.parametrize("kernel,h", [("gaussian", .7), ("vmf", .3)])
def test_kde_is_its_formula(kernel, h):
    x = normalize(cloud(25, 5, 1060))
    def check(entropy): assert abs(entropy(x, h, kernel) - kde_loop(x, h, kernel)) < 1e-10
    check(I.kde_entropy)
    caught(check, lambda *a: -I.kde_entropy(*a), lambda *a: I.kde_entropy(*a) + log(24 / 25), lambda x, h, k: I.kde_entropy(x, h * h, k))


def check_errs_upwards(entropy):
    for h in (.1, .4, 1.):
        got = torch.tensor([entropy(cloud(100, 2, 1070 + s), h) - normal_entropy(2) for s in range(60)])
        assert got.mean() > -3 * got.std() / 60 ** .5                    # three standard errors


def lit_by_itself(x, h): # the mistake that eq. (6) avoids
    table = -torch.cdist(x, x).square() / (2 * h * h)
    return log(len(x)) + x.shape[1] / 2 * log(2 * pi * h * h) - table.logsumexp(1).mean().item()


def test_kde_errs_upwards_in_expectation():
    check_errs_upwards(I.kde_entropy)
    caught(check_errs_upwards, lit_by_itself, lambda x, h: -I.kde_entropy(x, h),
           lambda x, h: I.kde_entropy(x, h) - log(len(x) - 1), lambda x, h: I.kde_entropy(x, h) + 2 * log(h))


# ---- mutual information

def snca(z, y, sigma):
    "T + C of SNCA without self pairs, by loops."
    n, total = len(y), 0.
    for i in range(n):
        s = (z @ z[i] / sigma).exp()
        others = torch.arange(n) != i
        total += (-s[others & (y == y[i])].sum().log() + s[others].sum().log()).item()
    return total / n


def check_kde_information(information):
    for seed in (1080, 1083):
        z, y = labelled(60, 6, seed)
        z, sizes = normalize(z), y.bincount()
        classes = sum(m / 60 * log(m - 1) for m in sizes.tolist())    # unequal: one term a class
        assert abs(information(z, y, .2) + snca(z, y, .2) - log(59) + classes) < 1e-9
        parts = I.kde_entropy(z, .2, "vmf") - I.conditional_entropy(z, y, partial(I.kde_entropy, bandwidth=.2, kernel="vmf"))
        assert abs(information(z, y, .2) - parts) < 1e-9


def test_kde_information_is_snca():
    def ours(z, y, s): return I.mutual_information(z, y, "kde", bandwidth=s, kernel="vmf")
    check_kde_information(ours)
    caught(check_kde_information, lambda z, y, s: -ours(z, y, s), lambda z, y, s: ours(z, y, s) + log(60 / 59),
           lambda z, y, s: ours(z, y, 2 * s))
    z, y = labelled(60, 3, 1086)
    parts = I.kde_entropy(z, .5) - I.conditional_entropy(z, y, lambda c: I.kde_entropy(c, .5))
    assert abs(I.mutual_information(z, y, "kde", bandwidth=.5) - parts) < 1e-9


def ross_loop(x, y, k):
    n, total = len(y), 0.
    D = (x[:, None] - x).norm(dim=2)
    for i in range(n):
        same = [D[i, j].item() for j in range(n) if j != i and y[j] == y[i]]
        own = min(k, len(same))
        reach = sorted(same)[own - 1]
        total += psi(len(same) + 1) + psi(sum(D[i, j] <= reach for j in range(n) if j != i)) - psi(own)
    return psi(n) - total / n


def check_ross(information):
    for seed, k in ((1090, 1), (1093, 3), (1096, 5)):
        x, y = labelled(40, 3, seed)
        assert abs(information(x, y, k=k) - ross_loop(x, y, k)) < 1e-10


def test_ross_is_its_formula():
    check_ross(I.mutual_information)
    caught(check_ross, lambda x, y, k: -I.mutual_information(x, y, k=k), lambda x, y, k: I.mutual_information(x, y, k=k + 1),
           lambda x, y, k: I.mutual_information(x, y, k=k) + 1 / 40)


def test_ross_against_scikit_learn():
    theirs = pytest.importorskip("sklearn.feature_selection").mutual_info_classif
    for seed in range(1100, 1110):
        x, y = labelled(200, 1, seed)
        y = torch.cat([y[:-1], torch.tensor([99])])                      # a class of one: left out by both
        for k in (1, 3, 10):                                             # below half a class theirs is exact
            assert abs(max(0, I.mutual_information(x, y, k=k)) - theirs(x, y, n_neighbors=k, random_state=0)[0]) < 1e-6


def test_collapse_is_the_entropy_of_the_labels():
    for sizes in ([50, 50, 50], [5, 20, 100]):
        y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        for x in (torch.eye(3)[y], torch.eye(3)[y] + 1e-4 * cloud(len(y), 3, 1111)):
            most = psi(len(y)) - sum(m / len(y) * psi(m) for m in sizes)
            assert abs(I.mutual_information(x, y) - most) < 1e-9 and abs(most - I.label_entropy(y)) < .15
            assert I.kde_information(x, y, .05) == pytest.approx(log(len(y) - 1) - sum(m / len(y) * log(m - 1) for m in sizes), abs=1e-9)


def check_ross_bound(information):
    for seed in range(1200, 1212):
        x, y = labelled(50, 1 + seed % 6, seed, apart=4.)
        assert information(x, y) <= psi(50) - sum(m / 50 * psi(m) for m in y.bincount().tolist()) + 1e-9


def check_kde_bound(information):
    for seed in range(1200, 1212):
        x, y = labelled(50, 1 + seed % 6, seed, apart=4.)
        assert information(x, y) <= log(49) - sum(m / 50 * log(m - 1) for m in y.bincount().tolist()) + 1e-9


def check_linear_bound(information):
    for seed in range(1200, 1212):
        x, y = labelled(50, 1 + seed % 6, seed, apart=4.)
        assert information(x, y) <= I.label_entropy(y)


def test_bounded_estimators_stay_below_their_bound():
    def share(y, f): return sum(m / 50 * f(m) for m in y.bincount().tolist())
    check_ross_bound(I.mutual_information)
    caught(check_ross_bound, lambda x, y: I.mutual_information(x, y) + share(y, psi),    # a dropped term
           lambda x, y: I.mutual_information(x, y) + psi(3), lambda x, y: 2 * psi(50) - 2 * share(y, psi) - I.mutual_information(x, y))
    def kde(x, y): return I.kde_information(x, y, .3)
    check_kde_bound(kde)
    caught(check_kde_bound, lambda x, y: kde(x, y) + share(y, lambda m: log(m - 1)), lambda x, y: kde(x, y) + log(50 / 49),
           lambda x, y: 2 * log(49) - 2 * share(y, lambda m: log(m - 1)) - kde(x, y))    # the sign of log A/B
    check_linear_bound(I.linear_information)
    caught(check_linear_bound, lambda x, y: 2 * I.label_entropy(y) - I.linear_information(x, y),     # H(Y) + CE
           lambda x, y: 2 * I.linear_information(x, y))


@pytest.mark.parametrize("gap,truth", [(.6, log(4)), (2., log(2))])
def test_arcs(gap, truth):
    y = torch.arange(2000) % 4
    angle = pi / 2 * (y + gap * torch.rand(2000, generator=rng(1120), dtype=F))
    z = torch.stack([angle.cos(), angle.sin()], 1)
    assert abs(I.mutual_information(z, y) - truth) < .05
    assert -.06 < I.mutual_information(z, y, "kde", bandwidth=.005, kernel="vmf") - truth < .03
    assert I.linear_information(z, y) < truth


def test_labels_may_be_any_numbers_in_any_order():
    x, y = labelled(80, 3, 1130)
    other, order = torch.tensor([700, -3, 12, 5])[y], torch.randperm(80, generator=rng(1133))
    for method in ("knn", "gaussian", "mean_nn"):
        assert abs(I.mutual_information(x, y, method) - I.mutual_information(x[order], other[order], method)) < 1e-9
    for method, entropy in (("gaussian", I.gaussian_entropy), ("mean_nn", I.mean_nn_entropy)):
        by_hand = entropy(x) - sum((y == k).double().mean().item() * entropy(x[y == k]) for k in range(4))
        assert abs(I.mutual_information(x, y, method) - by_hand) < 1e-9
    single = torch.cat([y, torch.tensor([50])])
    more = torch.cat([x, x[:1] + 9])
    for method in ("knn", "gaussian", "mean_nn"): assert I.mutual_information(more, single, method) == I.mutual_information(x, y, method)
    assert isfinite(I.conditional_entropy(more, single))
    assert abs(I.conditional_entropy(x, torch.tensor([1] * 79 + [0])) - I.knn_entropy(x[:79])) < 1e-12   # one class left


# ---- the classifier's bound

def test_label_entropy():
    assert abs(I.label_entropy(torch.arange(60) % 6) - log(6)) < 1e-12 and I.label_entropy(torch.zeros(3).long()) == 0
    assert abs(I.label_entropy(torch.tensor([0, 0, 0, 7])) - (.75 * log(4 / 3) + .25 * log(4))) < 1e-12


def true_mixture(n, seed, prior=torch.tensor([.6, .3, .1], dtype=F)):
    "1-D normal classes at 0, 2, 4 with their exact posterior and I(Z;Y) by quadrature."
    y = torch.multinomial(prior, n, replacement=True, generator=rng(seed))
    x = torch.randn(n, generator=rng(seed + 1), dtype=F) + 2 * y
    def joint(z): return prior.log()[:, None] - (z - 2 * torch.arange(3.)[:, None]).square() / 2
    z = torch.linspace(-12, 16, 20_001, dtype=F)
    p = joint(z).logsumexp(0).exp() / (2 * pi) ** .5
    left = torch.trapezoid(p * torch.special.entr(joint(z).softmax(0)).sum(0), z)
    return x, y, joint(x).T, (torch.special.entr(prior).sum() - left).item()


def check_bound(bound):
    x, y, scores, truth = true_mixture(20_000, 1140)
    assert abs(bound(scores, y) - truth) < .03                           # the posterior itself: the bound is tight
    for worse in (2 * scores, .5 * scores, scores + torch.tensor([1., 0., 0.]), scores.flip(1)):
        assert bound(worse, y) < truth - .005
    assert abs(bound(scores.log_softmax(1), y) - bound(scores, y)) < 1e-9


def test_classifier_bound():
    check_bound(I.classifier_bound)
    caught(check_bound, lambda s, y: -I.classifier_bound(s, y), lambda s, y: I.classifier_bound(s, y) - I.label_entropy(y),
           lambda s, y: I.classifier_bound(s, y) + .1)
    assert I.classifier_bound(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])) < 0     # worse than the frequencies
    assert abs(I.classifier_bound(torch.tensor([[9., 0., 9.]] * 2).float() * 100, torch.tensor([0, 2]))) < 1e-6


def test_linear_information():
    x, y, _, truth = true_mixture(2000, 1150)
    got = I.linear_information(x[:, None], y, weight_decay=1e-4)
    assert truth - .06 < got < truth + .06
    assert got == I.linear_information(x[:, None], y, weight_decay=1e-4)                  # deterministic
    assert abs(got - I.linear_information(1e-3 * x[:, None] + 5, y, weight_decay=1e-4)) < 1e-3
    noise = cloud(200, 300, 1152)
    assert I.linear_information(noise, torch.arange(200) % 4) < 0                         # seen: H(Y); held out: nothing
    with torch.no_grad(): assert isfinite(I.linear_information(x[:100, None], y[:100], folds=5, seed=3))
    assert isfinite(I.linear_information(torch.ones(20, 3), torch.arange(20) % 2))        # constant features


def test_every_point_is_held_out(monkeypatch):
    "Each fold is predicted by a classifier that never saw it, and every class is in every training set."
    x, y, seen = cloud(30, 2, 1160), torch.arange(30) % 10, []
    plain = I.fit_linear
    monkeypatch.setattr(I, "fit_linear", lambda z, y, K, w: seen.append((len(z), len(y.unique()))) or plain(z, y, K, w))
    for folds in (2, 3): I.linear_information(x, y, folds=folds)
    assert [n for n, _ in seen] == [15, 15, 20, 20, 20] and {k for _, k in seen} == {10}


# ---- bad input is named

x, y = cloud(20, 3, 1170), torch.arange(20) % 4
dead, one_point = torch.cat([x, torch.zeros(20, 1)], 1), torch.where(y[:, None] == 2, 1., x)
flat = torch.where((y[:, None] == 2) & (torch.arange(3) == 2), x[:, :1], x)       # class 2 on a plane
lonely = torch.tensor([7] * 18 + [8, 9])
NEED_LABELS = (I.mutual_information, I.ross_information, lambda x, y: I.kde_information(x, y, .5), I.linear_information,
               I.conditional_entropy, I.classifier_bound, lambda x, y: I.label_entropy(y))
BAD = [
    (lambda: I.knn_entropy(x, 20), "k must be an integer from 1 to 19.*got 20"), (lambda: I.knn_entropy(x, 0), "got 0"),
    (lambda: I.knn_entropy(x, 2.), "got 2.0"), (lambda: I.knn_entropy(x[:1]), "1 points are too few"),
    (lambda: I.knn_entropy(x, dim=4), "dim must be an integer from 1 to 3.*got 4"),
    (lambda: I.mean_nn_entropy(torch.tensor([[0.], [inf]])), "finite, got inf in row 1"),
    (lambda: I.gaussian_entropy(x[:3]), "3 points in 3 dimensions"), (lambda: I.knn_entropy(x.long()), "floating"),
    (lambda: I.kde_entropy(x, 0.), "bandwidth must be > 0, got 0.0"), (lambda: I.kde_entropy(x, inf), "got inf"),
    (lambda: I.kde_entropy(x, float("nan")), "got nan"), (lambda: I.kde_entropy(x, 1., "vmf"), "needs unit vectors.*off by"),
    (lambda: I.kde_entropy(x, 1., "gausian"), "did you mean 'gaussian'"), (lambda: I.scott_bandwidth(torch.ones(4, 2)), "coincide"),
    (lambda: I.vmf_log_constant(3, 1e9), "at most 1e8, got 1000000000.0"), (lambda: I.kde_entropy(x, 1e-200), "got 1e-200"),
    (lambda: I.vmf_log_constant(1, 1.), "got 1"), (lambda: I.vmf_log_constant(3, -1.), "got -1.0"),
    (lambda: I.mutual_information(x, y[:5]), "20 embeddings but 5 labels"), (lambda: I.mutual_information(x, 0 * y), "1 class"),
    (lambda: I.mutual_information(x, torch.arange(20)), "each of the 20 labels occurs once"),
    (lambda: I.mutual_information(x, y, "knnn"), "'knnn', did you mean 'knn'"), (lambda: I.mutual_information(x, y, k=-1), "got -1"),
    (lambda: I.mutual_information(x, y, "kde"), "needs a bandwidth, got None"),
    (lambda: I.mutual_information(cloud(8, 5, 1171), torch.arange(8) % 2, "gaussian"), "4 points in 5 dimensions"),
    (lambda: I.classifier_bound(x, y), "0..2, got 0..3"), (lambda: I.classifier_bound(x, -y), "got -3..0"),
    (lambda: I.knn_entropy(x, dim=True), "got True"), (lambda: I.knn_entropy(x[:, :0]), r"d >= 1, got shape \(20, 0\)"),
    (lambda: I.gaussian_entropy(x[:, :0]), "d >= 1"), (lambda: I.mutual_information(x[:, :0], y), "d >= 1"),
    (lambda: I.knn_entropy(torch.tensor(3.)), r"got shape \(\)"), (lambda: I.mean_nn_entropy(None), "got NoneType"),
    (lambda: I.knn_entropy([[1.], [2.]]), "embeddings must be a torch tensor, got list"),
    (lambda: I.kde_entropy(1e200 * x, 1.), "points reach .*e.200, beyond 1e100"), (lambda: I.label_entropy(torch.tensor(3)), "labels"),
    (lambda: I.vmf_entropy(3, -1.), "concentration must be > 0, got -1.0"), (lambda: I.vmf_entropy(3, 0.), "concentration must be > 0"),
    (lambda: I.vmf_entropy(3, float("nan")), "concentration must be > 0, got nan"), (lambda: I.vmf_entropy(3, 1e9), "at most 1e8"),
    (lambda: I.vmf_entropy(1, 1.), "dim must be an integer >= 2.*got 1"), (lambda: I.vmf_entropy(2.5, 1.), "got 2.5"),
    (lambda: I.log_bessel_i(-.5, 1.), "order must be a number >= 0, got -0.5"), (lambda: I.log_bessel_i(1., 0.), "x must be > 0.*got 0.0"),
    (lambda: I.log_bessel_i(float("nan"), 1.), "got nan"), (lambda: I.log_bessel_i(1., inf), "got inf"),
    (lambda: I.mutual_information(dead, y, "gaussian"), r"H\(Z\|Y=0\) is -inf \(constant columns \[3\]"),
    (lambda: I.mutual_information(dead.repeat(3, 1), y.repeat(3), "gaussian"), r"is -inf \(constant columns \[3\]\)"),
    (lambda: I.mutual_information(one_point, y + 10, "gaussian"), r"H\(Z\|Y=12\) is -inf \(all its points coincide"),
    (lambda: I.mutual_information(one_point, y + 10, "mean_nn"), r"H\(Z\|Y=12\) is -inf \(all its points coincide"),
    (lambda: I.mutual_information(flat, y, "gaussian"), r"H\(Z\|Y=2\) is -inf \(its points fill less than 3"),
    (lambda: I.mutual_information(torch.ones(20, 3), y, "mean_nn"), "is -inf .all its points coincide"),
    *((lambda f=f: f(x, lonely), "only class 7 has two or more points") for f in
      (I.mutual_information, I.linear_information, lambda x, y: I.kde_information(x, y, .5),
       lambda x, y: I.mutual_information(x, y, "gaussian"), lambda x, y: I.mutual_information(x, y, "mean_nn"))),
    *((lambda f=f: f(x, None), "labels must be a torch tensor.*got None") for f in NEED_LABELS),
    *((lambda f=f: f(x, [0, 1] * 10), "labels must be a torch tensor, got list") for f in NEED_LABELS),
    (lambda: I.classifier_bound(x.masked_fill(x > 1, inf), y % 3), "scores must be finite, got inf"),
    (lambda: I.classifier_bound(x[0], y % 3), "scores must be"), (lambda: I.classifier_bound(x[:4], y % 3), "4 scores but 20 labels"),
    (lambda: I.linear_information(x, y, weight_decay=inf), "weight_decay must be finite, got inf"),
    (lambda: I.linear_information(x, y, weight_decay=float("nan")), "weight_decay must be > 0, got nan"),
    (lambda: I.linear_information(x, y, seed=1.5), "seed must be an integer, got 1.5"),
    (lambda: I.linear_information(x, y, folds=1), "got 1"), (lambda: I.linear_information(x, y, weight_decay=0.), "got 0.0"),
]


@pytest.mark.parametrize("call,message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call()
