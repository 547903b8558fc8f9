"""Centre regularisers, their means, `regularised` and `danml`: loops, autograd and pytorch-metric-learning as oracles."""
from itertools import combinations
from math import exp, inf, log, pi

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dml_companion import objectives
from dml_companion.geometry import normalize
from dml_companion.losses import regularisers as R
from dml_companion.losses.classification import NormalizedSoftmax
from dml_companion.losses.pairwise import MultiSimilarityLoss
from dml_companion.objective import Objective, Parts

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
ENERGIES = {
    "mhe 0": lambda P: R.hyperspherical_energy(P, 0), "mhe 1": lambda P: R.hyperspherical_energy(P, 1.),
    "mhe 2": R.hyperspherical_energy, "mhe 3.5": lambda P: R.hyperspherical_energy(P, 3.5),
    "mhe a0": lambda P: R.hyperspherical_energy(P, 0, True), "mhe a2": lambda P: R.hyperspherical_energy(P, 2., True),
    "mhe half": lambda P: R.hyperspherical_energy(P, 2., False, True), "mhe half a1": lambda P: R.hyperspherical_energy(P, 1., True, True),
    "uniform_face": R.uniform_face, "regular_face": R.regular_face, "gaussian": R.gaussian_uniformity,
    "log_exp": R.log_exp_separation, "log_exp 0": lambda P: R.log_exp_separation(P, 0.), "log_exp 3": lambda P: R.log_exp_separation(P, 3.),
    "power": R.power_separation, "power 0": lambda P: R.power_separation(P, 0.), "power 3": lambda P: R.power_separation(P, 3.),
    "power -0.01": lambda P: R.power_separation(P, -.01), "power -40": lambda P: R.power_separation(P, -40.),
}


def cloud(C=9, D=4, seed=0, dtype=torch.float64):
    return torch.randn(C, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(name, P):
    "The formulas by autograd over a full table of cosines, in the plainest way."
    u = P / P.norm(dim=1, keepdim=True)
    if "half" in name: u = torch.cat([u, -u])
    off = ~torch.eye(len(u), dtype=torch.bool)
    s = (u @ u.T)[off]
    d = torch.where(s < -1 + 1e-12, torch.full_like(s, 2.), (2 - 2 * s).clamp_min(1e-300).sqrt())   # the mirror image is no direction
    kind, *rest = name.split()
    lam = float(rest[0]) if rest and rest[0].lstrip("-").replace(".", "").isdigit() else None
    if kind == "mhe":
        sharp = float(name[-1]) if name[-2:] in ("a0", "a1", "a2") else 2. if lam is None else lam
        if "a" in name.split()[-1][:1]: d = torch.where(s < -1 + 1e-12, torch.ones_like(s), s.clamp(-1 + 1e-12, 1).arccos() / pi)
        return -d.log().mean() if sharp == 0 else (d ** -sharp).mean()
    if kind == "uniform_face": return (1 / (1 + d)).mean()
    if kind == "gaussian": return (-2 * d ** 2).exp().mean().log()
    rows = s.view(len(u), -1)
    if kind == "regular_face": return rows.amax(1).mean()
    if kind == "log_exp":
        gamma = 10. if lam is None else -lam
        return rows.mean() if gamma == 0 else ((gamma * rows).exp().mean(1).log() / gamma).mean()
    lam = -2. if lam is None else lam
    return -d.log().mean() if lam == 0 else -((d ** lam).mean() ** (1 / lam)).log()


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_equal_the_formulas(name, seed):
    a, b = (cloud(seed=seed, C=(9, 2, 17)[seed]).requires_grad_() for _ in range(2))
    ours, theirs = ENERGIES[name](a), plain(name, b)
    assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert_close(torch.autograd.grad(ours, a)[0], torch.autograd.grad(theirs, b)[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ENERGIES)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(ENERGIES[name], cloud(5, 3, 7).requires_grad_())


@pytest.mark.parametrize("name", ENERGIES)
@PROPERTY
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 6))
def test_only_directions_count_and_neither_order_nor_axes(name, seed, C, D):
    g = torch.Generator().manual_seed(seed)
    P = torch.randn(C, D, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
    lengths = torch.rand(C, 1, generator=g, dtype=torch.float64) + .1
    changed = (P * lengths)[torch.randperm(C, generator=g)] @ turn
    assert_close(ENERGIES[name](changed), ENERGIES[name](P), rtol=1e-6, atol=1e-8)


def test_regular_face_equals_pytorch_metric_learning():
    regularizers = pytest.importorskip("pytorch_metric_learning.regularizers")
    for seed in range(4):
        a, b = (cloud(20, 6, seed).requires_grad_() for _ in range(2))
        ours, theirs = R.regular_face(a), regularizers.RegularFaceRegularizer()(b)
        assert_close(ours, theirs, rtol=0, atol=1e-9)
        assert_close(torch.autograd.grad(ours, a)[0], torch.autograd.grad(theirs, b)[0], rtol=0, atol=1e-9)


POOR = {"one": torch.randn(1, 3, generator=torch.Generator().manual_seed(0)), "two": torch.eye(2), "coincident": torch.ones(4, 3),
        "antipodal": torch.tensor([[1., 0], [-1, 0], [1, 0]]), "zeros": torch.zeros(4, 3), "tiny": 1e-30 * torch.eye(3),
        "large": 1e30 * torch.eye(3), "nearly one": torch.ones(3, 2) + torch.tensor([[1e-4], [0], [-1e-4]]) * torch.tensor([1., -1])}


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_poor_centres_are_finite(name, dtype):
    for case, P in POOR.items():
        if dtype == torch.float16 and case in ("tiny", "large"): continue
        leaf = P.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = ENERGIES[name](leaf)
            grad, = torch.autograd.grad(value, leaf)
        assert value.isfinite() and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), case
        if case == "tiny": continue                              # unit length from 1e-30: a slope of 1e30 is right
        assert grad.isfinite().all(), case
        if case == "one": assert grad.abs().max() < 1e-6 and (value == 0 or "half" in name)


@pytest.mark.parametrize("name", ENERGIES)
def test_float32_is_accurate(name):
    P = cloud(60, 8, dtype=torch.float32)
    a, b = P.clone().requires_grad_(), P.double().requires_grad_()
    ours, exact = ENERGIES[name](a), ENERGIES[name](b)
    assert_close(ours.double(), exact, rtol=3e-5, atol=3e-6)
    assert_close(torch.autograd.grad(ours, a)[0].double(), torch.autograd.grad(exact, b)[0], rtol=2e-3, atol=2e-6)


# ---- means

def exact_mean(values, lam):
    v = np.asarray(values, np.longdouble)
    if lam == 0: return float(v.mean())
    x = lam * v
    return float((np.log(np.exp(x - x.max()).mean()) + x.max()) / np.longdouble(lam)) if abs(lam) > 1e-4 else float(v.mean() + lam * v.var() / 2)


@PROPERTY
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.floats(-60, 60) | st.sampled_from([0., 1e-15, -1e-6, .099, .101]))
def test_log_exp_mean_is_exact_and_between_the_extremes(values, lam):
    v = torch.tensor(values, dtype=torch.float64)
    mean = R.log_exp_mean(v, lam).item()
    assert abs(mean - exact_mean(values, lam)) < 1e-8
    assert min(values) - 1e-9 <= mean <= max(values) + 1e-9
    assert R.log_exp_mean(v, lam + 1.).item() >= mean - 1e-9
    assert abs(mean - v.max().item()) <= log(len(v)) / lam + 1e-9 if lam > 0 else True


@PROPERTY
@given(st.lists(st.floats(.01, 5), min_size=1, max_size=12), st.floats(-20, 20))
def test_power_mean_rises_and_stays_between_the_extremes(values, lam):
    v = torch.tensor(values, dtype=torch.float64)
    mean = R.power_mean(v, lam).item()
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9) and R.power_mean(v, lam + .5).item() >= mean * (1 - 1e-9)
    assert_close(R.power_mean(v, 1.).item(), v.mean().item(), rtol=1e-10, atol=0)
    assert_close(R.power_mean(v, -1.).item(), 1 / (1 / v).mean().item(), rtol=1e-10, atol=0)


def test_small_lambda_has_all_its_digits_and_slopes():
    v = torch.rand(50).requires_grad_()
    for lam in (1e-15, -1e-6, 1e-3, .05):
        mean = R.log_exp_mean(v, lam)
        assert abs(mean.item() - exact_mean(v.detach().double().numpy(), lam)) < 1e-6
        assert_close(torch.autograd.grad(mean, v)[0], (lam * v).softmax(0).detach(), rtol=1e-4, atol=1e-8)


@PROPERTY
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=9), st.data())
def test_tail_mean_is_the_mean_of_a_sorted_end_and_1_lipschitz(values, data):
    k = data.draw(st.integers(1, len(values)))
    v, low = torch.tensor(values, dtype=torch.float64), sorted(values)
    assert_close(R.tail_mean(v, -k).item(), sum(low[:k]) / k, rtol=0, atol=1e-12)
    assert_close(R.tail_mean(v, k).item(), sum(low[-k:]) / k, rtol=0, atol=1e-12)
    w = v + torch.tensor(data.draw(st.lists(st.floats(-1, 1), min_size=len(values), max_size=len(values))), dtype=torch.float64)
    for sign in (1, -1): assert (R.tail_mean(w, sign * k) - R.tail_mean(v, sign * k)).abs() <= (w - v).abs().max() + 1e-12
    assert R.log_exp_mean(v, inf) == max(values) and R.log_exp_mean(v, -inf) == min(values)


# ---- what the audit says

def test_special_cases():
    for seed in range(5):
        P = cloud(8, 3, seed)
        d = R.off_diagonal(torch.cdist(normalize(P), normalize(P))).flatten()
        for s in (.5, 1., 2.): assert_close(R.hyperspherical_energy(P, s), R.power_mean(d, -s) ** -s, rtol=1e-9, atol=0)
        assert_close(R.uniform_face(P), 1 / R.power_mean(d + 1, -1.), rtol=1e-9, atol=0)
        assert (R.uniform_face(P) - R.power_mean(d, 1.)).abs() > .1               # as the manuscript prints it
        assert_close(R.log_exp_separation(P, -1e4), R.regular_face(P), rtol=0, atol=1e-3)
        assert_close(R.power_separation(P, 0.), R.hyperspherical_energy(P, 0), rtol=1e-10, atol=0)


@PROPERTY
@given(st.integers(2, 12), st.integers(2, 5), st.floats(2, 8), st.integers(0, 10**6))
def test_two_piles_are_the_best_of_far_weighted_means(C, D, lam, seed):
    "Eq. (4): <d^lam> <= 2^(lam - 1) C / (C - 1), attained by two antipodal piles of C / 2."
    bound = log(2 ** (lam - 1) * C / (C - 1)) / lam
    P = torch.randn(C, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert -R.power_separation(P, lam) <= bound + 1e-6
    if C % 2 == 0:
        d = 2. * torch.cat([torch.zeros(C // 2 - 1), torch.ones(C // 2)]).double()       # from one centre to the others
        assert_close(log((d ** lam).mean().item()) / lam, bound, rtol=0, atol=1e-12)


def settle(lam, steps=250):
    P = cloud(12, 3, 4).requires_grad_()
    adam = torch.optim.Adam([P], .03)
    for _ in range(steps):
        P.grad, = torch.autograd.grad(R.power_separation(P, lam), P)
        adam.step()
    u = normalize(P.detach())
    return (u @ u.T).fill_diagonal_(-1).max(1).values.clamp(-1, 1).arccos().rad2deg().mean()


def test_far_weighted_centres_collapse_and_near_weighted_ones_spread():
    assert settle(-8.) > 55 and settle(-2.) > 55 and settle(3.) < 5


def test_a_sample_estimates_mean_energies_only():
    P = cloud(7, 3, 2)
    subsets = [P[list(rows)] for rows in combinations(range(7), 3)]
    for f, unbiased in ((R.hyperspherical_energy, True), (R.uniform_face, True), (R.regular_face, False), (R.log_exp_separation, False)):
        mean = torch.stack([f(some) for some in subsets]).mean()
        assert abs(mean - f(P)) < 1e-10 if unbiased else mean < f(P) - .05, f
    drawn = R.draw_centres(P, 3)
    assert len(drawn) == 3 and all((row == P).all(1).any() for row in drawn) and R.draw_centres(P, 7) is P and R.draw_centres(P, None) is P


# ---- regularised

def batch(n=12, d=4, classes=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=dtype), torch.randint(classes, (n,), generator=g)


def regularised_loop(loss, Z, y):
    "The base from its formula, and the power or log-exp mean over every pair of centres."
    W, inner, lam = loss.objective.weight, loss.objective, loss.lam
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    if loss.base == "cross_entropy": logits = [[(z @ w + b).item() for w, b in zip(W, inner.bias)] for z in Z]
    else: logits = [[cosine(z, w) / inner.temperature for w in W] for z in Z]
    T = -sum(row[k] for row, k in zip(logits, y.tolist())) / len(y)
    C = sum(log(sum(map(exp, row))) for row in logits) / len(y)
    c = [[cosine(a, b) for j, b in enumerate(W) if j != i] for i, a in enumerate(W)]
    if loss.regulariser == "log_exp": term = sum(log(sum(exp(-lam * v) for v in row) / len(row)) / -lam for row in c) / len(c)
    else: term = -log(sum((2 - 2 * v) ** (lam / 2) for row in c for v in row) / len(c) / (len(c) - 1)) / lam
    return [T, C + loss.strength * term]


# For the tests that every objective goes through, in test_objectives.py.
OTHER = {"danml": dict(alpha=3., beta=5., near=.9, far=.1, normalize=False),
         "regularised": dict(base="cross_entropy", base_options=dict(temperature=.3), regulariser="log_exp", lam=-5., strength=.7, centres=3)}
LOOPS = {"danml": lambda loss, Z, y: danml_loop(Z, y, **{k: getattr(loss, k) for k in OTHER["danml"]}), "regularised": regularised_loop}
SPECIAL = {("regularised", "centres"): dict.fromkeys(("loop", "gradcheck", "order", "repeat"), "centres are drawn at random")}


@pytest.mark.parametrize("base, options, kind", [("normalized_softmax", {}, "proxies"), ("cross_entropy", dict(bias=False), "classifier"),
                                                 ("snca", dict(temperature=.3), None), ("center", dict(centers="learned"), "proxies")])
@pytest.mark.parametrize("name", R.REGULARISERS)
def test_regularised_is_the_base_plus_its_term(base, options, kind, name):
    z, y = batch()
    loss = objectives.make("regularised", 5, 4, base=base, base_options=options, regulariser=name, lam=-3., strength=.7).double()
    with torch.no_grad():
        for p in loss.parameters(): p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    term = R.REGULARISERS[name](R.centres_of(loss.objective, z, y), -3.)
    inner = loss.objective.eval().parts(z, y)
    assert_close(tuple(loss.eval().parts(z, y)), (inner.tightness, inner.contrast + .7 * term), rtol=1e-12, atol=1e-12)
    groups = loss.param_groups()
    assert {k: len(v) for k, v in groups.items()} == {k: len(v) for k, v in loss.objective.param_groups().items()}
    leaf = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tuple(loss.parts(z, y)), leaf)
    if kind:
        centres = R.centres_of(loss.objective, z, y)
        assert centres.shape == (5, 4) and any(centres.data_ptr() == w.data_ptr() for w in groups[kind])
        contrast = torch.autograd.grad(loss.parts(z, y).contrast - inner.contrast.detach(), groups[kind], allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in contrast)


@pytest.mark.parametrize("name, formula", [("mhe", "mhe 3.5"), ("mhe_angular", "mhe a2"), ("mhe_half", "mhe half"),
                                           ("mhe_half_angular", "mhe half a1")])
def test_each_variant_of_mhe_has_a_name_that_recipes_reach(name, formula):
    z, y = batch()
    lam = {"mhe 3.5": -3.5, "mhe half a1": -1.}.get(formula, -2.)
    loss = objectives.make("regularised", 5, 4, regulariser=name, lam=lam, strength=.7).double()
    extra = loss.parts(z, y).contrast - loss.objective.parts(z, y).contrast
    assert_close(extra, .7 * plain(formula, loss.objective.weight.detach()), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in R.REGULARISERS if n.startswith("mhe")])
@pytest.mark.parametrize("lam", [1., -13., -inf, float("nan"), "near"])
def test_every_energy_refuses_an_exponent_that_it_cannot_take(name, lam):
    with pytest.raises(ValueError, match=rf"lam must be in \[-12, 0\] for {name}, got"): R.check_lambda(name, lam)
    for fine in (0, -.5, -12.): R.check_lambda(name, fine)


def test_regularised_takes_a_built_objective_and_passes_its_counts_on():
    base = MultiSimilarityLoss()
    loss = R.Regularised(base=base, strength=.5)
    z, y = batch(6)
    y = torch.tensor([0, 0, 1, 1, 2, 3])
    loss(z, y)
    assert loss.objective is base and loss.base == "MultiSimilarityLoss"
    assert loss.counts["anchors_without_positives"] == 2 and not loss.param_groups()


def test_class_means_are_the_centres_of_an_objective_without_weights():
    z, _ = batch(6)
    y = torch.tensor([9, 9, 2, 2, 2, 40])
    means = R.centres_of(MultiSimilarityLoss(), z, y)
    u = normalize(z)
    assert_close(means, torch.stack([u[2:5].mean(0), u[:2].mean(0), u[5]]), rtol=0, atol=1e-12)


def test_training_with_a_few_centres_spreads_proxies():
    torch.manual_seed(0)
    def cosine(strength):
        loss = objectives.make("regularised", 30, 8, strength=strength, regulariser="power", lam=-8., centres=10).double()
        with torch.no_grad(): loss.objective.weight.add_(1.)                     # a clustered start
        sgd = torch.optim.SGD(loss.parameters(), .5)
        z, y = batch(30, 8, 30, dtype=torch.float64)
        for _ in range(60): sgd.zero_grad(); loss(z, y).backward(); sgd.step()
        return R.regular_face(loss.objective.weight).item()
    assert cosine(20.) < cosine(1e-9) - .05


# ---- danml

DANML = [{}, dict(alpha=3.), dict(alpha=-2., beta=5.), dict(near=.9, far=.1), dict(normalize=False)]


def danml_loop(Z, y, alpha=-10., beta=50., near=.5, far=.5, normalize=True):
    Z, T, C = (Z / Z.norm(dim=1, keepdim=True) if normalize else Z), 0., 0.
    for i in range(len(y)):
        s = [(Z[i] @ Z[j]).item() for j in range(len(y))]
        P, N = [j for j in range(len(y)) if y[j] == y[i] and j != i], [j for j in range(len(y)) if y[j] != y[i]]
        if P:
            b = log(sum(exp(alpha * (near - s[j])) for j in P) / len(P)) / alpha
            T += log(1 + exp(abs(alpha) * b)) / abs(alpha) / len(y)
        if N: C += log(1 + sum(exp(beta * (s[j] - far)) for j in N) / len(N)) / beta / len(y)
    return [T, C]


@pytest.mark.parametrize("options", DANML)
@pytest.mark.parametrize("seed", range(3))
def test_danml_equals_its_loop(options, seed):
    z, y = batch(seed=seed, classes=[2, 5, 9][seed])
    if seed == 1: z[1], y[1] = z[0], y[0]
    loss = objectives.make("danml", **options)
    assert_close([p.item() for p in loss.parts(z, y)], danml_loop(z, y, **options), rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda z: tuple(loss.parts(z, y)), z.requires_grad_())


def test_danml_is_multi_similarity_where_both_mean_the_same():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, _ = batch(24)
    y = torch.arange(24) // 4                                   # three positives and twenty negatives each
    ours = R.DANMLLoss(alpha=2., beta=50., near=.5 + log(3) / 2, far=.5 - log(20) / 50)
    for theirs in (MultiSimilarityLoss(), losses.MultiSimilarityLoss(2, 50, .5)):
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        assert_close(ours(a, y), theirs(b, y), rtol=0, atol=1e-9)
        assert_close(torch.autograd.grad(ours(a, y), a)[0], torch.autograd.grad(theirs(b, y), b)[0], rtol=0, atol=1e-9)


def test_the_sign_of_alpha_decides_which_positive_is_heard():
    s = torch.tensor([[1., .9, -.5], [.9, 1., -.3], [-.5, -.3, 1.]], dtype=torch.float64)
    positives = ~torch.eye(3, dtype=torch.bool)
    for alpha in (-20., 20.):
        sums, weights = R.soft_rows(alpha * (.95 - s), positives, -inf)
        pull = R.soft_hinge(sums, weights, torch.full((3,), 2), alpha)[1]
        assert (pull[0, 1] > 100 * pull[0, 2]) == (alpha < 0) and (pull[0, 2] > 100 * pull[0, 1]) == (alpha > 0)


# ---- the contract

def poor_batches(dtype):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    twos = torch.arange(6) // 2
    return {"one sample a class": (x[:5], torch.arange(5)), "one class": (x, torch.zeros(6).long()), "one sample": (x[:1], torch.tensor([2])),
            "coincident": (torch.ones_like(x), twos), "zeros": (torch.zeros_like(x), twos), "antipodal": (torch.cat([x[:3], -x[:3]]), twos),
            "tiny": (x * 1e-3, twos), "large": (x * 1e3, twos)}


CASES = [("danml", o) for o in DANML] + [("regularised", o) for o in (
    {}, dict(base="cross_entropy", regulariser="mhe"), dict(base="snca", regulariser="log_exp"), dict(regulariser="regular_face", centres=3))]


@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_poor_batches_are_finite(name, options, dtype):
    loss = objectives.make(name, 5, 4, **options)
    for case, (x, y) in poor_batches(dtype).items():
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            parts = loss.parts(leaf, y)
            grads = [torch.autograd.grad(p, leaf, retain_graph=True, allow_unused=True)[0] for p in parts if p.requires_grad]
        assert all(p.isfinite() and p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for p in parts), case
        assert all(g is None or g.isfinite().all() and g.dtype == dtype for g in grads), case


def test_danml_without_a_kind_of_pair_is_zero_there():
    x = torch.randn(5, 4, requires_grad=True)
    for labels, part in ((torch.arange(5), 0), (torch.zeros(5).long(), 1)):
        p = R.DANMLLoss().parts(x, labels)[part]
        assert p == 0 and not torch.autograd.grad(p, x)[0].any()


@pytest.mark.parametrize("name, options", [c for c in CASES if "centres" not in c[1]])
def test_sum_order_and_dtype(name, options):
    z, y = batch(14)
    loss = objectives.make(name, 5, 4, **options).double()
    parts = loss.parts(z, y)
    assert isinstance(parts, Parts) and loss(z, y) == parts.tightness + parts.contrast
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    assert_close(tuple(loss.parts(z[order], y[order])), tuple(parts), rtol=1e-10, atol=1e-11)
    narrow = objectives.make(name, 5, 4, **options)
    with torch.autocast("cpu", torch.bfloat16): inside = narrow.parts(z.bfloat16(), y)
    assert tuple(inside) == tuple(narrow.parts(z.bfloat16().float(), y))


@pytest.mark.parametrize("call, words", [
    (lambda: R.hyperspherical_energy(torch.ones(2, 2), -1.), ["s must be", "-1.0", "power_separation"]),
    (lambda: R.hyperspherical_energy(torch.ones(2, 2), 40), ["[0, 12]", "40"]),
    (lambda: R.gaussian_uniformity(torch.ones(2, 2), 0.), ["t must be", "> 0"]),
    (lambda: R.tail_mean(torch.ones(3), 0), ["k must be", "-3..-1", "0"]),
    (lambda: R.tail_mean(torch.ones(3), 4), ["1..3", "4"]),
    (lambda: R.draw_centres(torch.ones(3, 2), 1), ["at least 2", "1"]),
    (lambda: objectives.make("regularised", 5, 4, base="proxy"), ["unknown objective 'proxy'", "normalized_softmax"]),
    (lambda: objectives.make("regularised", 5, 4, base_options={"temprature": 1}), ["temprature", "did you mean 'temperature'"]),
    (lambda: objectives.make("regularised"), ["num_classes", "dim"]),
    (lambda: objectives.make("regularised", 5, 4, regulariser="mse"), ["regulariser 'mse'", "'mhe'"]),
    (lambda: objectives.make("regularised", 5, 4, regulariser="mhe", lam=1.), ["lam", "[-12, 0]", "1.0", "'power'"]),
    (lambda: objectives.make("regularised", 5, 4, regulariser="mhe_half", lam=-12.5), ["lam", "[-12, 0] for mhe_half", "-12.5", "'power'"]),
    (lambda: objectives.make("regularised", 5, 4, regulariser="gaussian", lam=0.), ["below 0", "gaussian"]),
    (lambda: objectives.make("regularised", 5, 4, regulariser="gaussian", lam=-inf), ["below 0", "gaussian", "-inf"]),
    (lambda: objectives.make("regularised", 5, 4, lam=inf), ["finite", "inf"]),
    (lambda: objectives.make("regularised", 5, 4, lam="near"), ["lam", "'near'"]),
    (lambda: objectives.make("regularised", 5, 4, strength=0), ["strength", "> 0"]),
    (lambda: objectives.make("regularised", 5, 4, centres=1), ["centres", "at least 2"]),
    (lambda: objectives.make("danml", alpha=0), ["alpha", "other than 0", "below 0"]),
    (lambda: objectives.make("danml", beta=-1), ["beta", "-1"]),
    (lambda: NormalizedSoftmax(3, 2)(torch.ones(2, 2), torch.tensor([3, 0])), ["3", "0 to 2"]),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError) as e: call()
    for word in words: assert word in str(e.value)


def test_weights_have_kinds_and_an_objective_without_split_says_so():
    assert set(objectives.make("regularised", 5, 4).param_groups()) == {"proxies"}
    assert set(objectives.make("regularised", 5, 4, base="cross_entropy").param_groups()) == {"classifier"}
    assert isinstance(objectives.make("regularised", 5, 4).objective, Objective)


def test_the_audit_s_words_on_the_means_are_checked_where_they_stand():
    "`Base a > 1, or the order reverses`, `convex for K > 0, concave for K < 0`: the cells of notebook 24 fail if either is wrong."
    import json
    from pathlib import Path
    book = json.loads((Path(__file__).parents[1] / "nbs/03_objectives/24_centre_regularisers.ipynb").read_text(encoding="utf-8"))
    first, second = ("".join(c["source"]) for c in book["cells"] if c["id"] in ("c31", "c33"))
    scope = {**vars(R), "torch": torch, "np": np, "log": log, "assert_close": assert_close, "PAPER": "", "claim": lambda **told: None}
    exec(first, scope), exec(second, dict(scope))
    swapped = first.replace("(2., 10.), (.1, .5)", "(2., .5), (.1, 10.)")
    assert swapped != first
    with pytest.raises(AssertionError): exec(swapped, dict(scope))
    with pytest.raises(AssertionError): exec(second, scope | {"tail_mean": lambda values, K: R.tail_mean(values, -K)})
    with pytest.raises(AssertionError): exec(second, scope | {"tail_mean": lambda values, K: values.square().mean(-1).sqrt()})     # bends
