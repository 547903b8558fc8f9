"""ALMN, a reconstruction: points built by hand, double loops and the N-pair loss as oracles."""
from math import acos, cos, pi, sin

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dml_companion import objectives
from dml_companion.losses import ranking
from dml_companion.losses.ranking import first_pairs
from dml_companion.losses.virtual import GENERATORS, ALMNLoss, virtual_cosine
from dml_companion.objective import Parts, unit_rows

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
VARIANTS = [{}, dict(beta=0.), dict(beta=1.7), dict(generator="unit_chord"), dict(generator="slerp"), dict(generator="slerp", beta=1.),
            dict(temperature=1.), dict(pairs="first"), dict(stop_gradient=True), dict(normalize=False, temperature=1.)]

# For the tests that every objective goes through, in test_objectives.py.
OTHER = {"almn": dict(beta=1.7, generator="unit_chord", temperature=1., pairs="first", stop_gradient=True, normalize=False)}
LOOPS = {"almn": lambda loss, Z, y: [v.item() for v in loops(Z, y, **{k: getattr(loss, k) for k in OTHER["almn"]})]}
SPECIAL = {("almn", "pairs"): {"order": "the first two of each class are those of the order"},
           ("almn", "stop_gradient"): {"gradcheck": "a held point has no derivative", "change": "changes the gradient only"}}


def batch(n=12, d=4, classes=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=dtype), torch.randint(classes, (n,), generator=g)


def point(x, p, beta, generator):
    "The virtual point itself."
    v = p + beta * (p - x)
    if generator == "unit_chord": return v / v.norm()
    if generator == "slerp":
        theta = (x @ p).clamp(-1, 1).arccos()
        k = int((1 + beta) * theta / pi)                         # half turns: past the antipode it goes on falling
        return (-1) ** k * ((-beta * theta).sin() * x + ((1 + beta) * theta).sin() * p) / theta.sin() - 2 * k * x
    return v


def loops(x, y, beta=.5, generator="chord", temperature=.1, pairs="all", stop_gradient=False, normalize=True):
    "Eq. (1) pair by pair; `first` by a scan of the labels."
    x, n, T, C = (unit_rows(x) if normalize else x), len(y), [], []
    firsts = {}
    for i, label in enumerate(y.tolist()): firsts.setdefault(label, []).append(i)
    couples = {k: rows[:2] for k, rows in firsts.items() if len(rows) > 1}
    chosen = [(a, p) for a, p in couples.values()] if pairs == "first" else [(i, j) for i in range(n) for j in range(n) if i != j and y[i] == y[j]]
    for i, j in chosen:
        negatives = [p for k, (_, p) in couples.items() if k != y[i].item()] if pairs == "first" else [k for k in range(n) if y[k] != y[i]]
        if not negatives: continue
        v = point(x[i], x[j], beta, generator)
        own = x[i] @ (v.detach() if stop_gradient else v) / temperature
        T.append(-own)
        C.append(torch.stack([own, *(x[i] @ x[k] / temperature for k in negatives)]).logsumexp(0))
    return Parts(torch.stack(T).mean(), torch.stack(C).mean()) if T else Parts(x.sum() * 0, x.sum() * 0)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [3., 0.], ids=["near", "past the antipode"])
def test_values_and_gradients_equal_the_loops(options, seed, offset):
    z, y = batch(seed=seed, classes=[4, 2, 7][seed])
    z = z + offset                                               # with 3 all angles are below 90 degrees
    past = (unit_rows(z) @ unit_rows(z).T)[y[:, None] == y].clamp(-1, 1).arccos() * (1 + options.get("beta", .5)) > pi
    if offset or options.get("beta") == 1.: assert past.any() == (not offset)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours, plain = objectives.make("almn", **options).parts(a, y), loops(b, y, **options)
    assert_close(tuple(ours), tuple(plain), rtol=1e-10, atol=1e-10)
    for p, q in zip(ours, plain):
        assert_close(torch.autograd.grad(p, a, retain_graph=True)[0], torch.autograd.grad(q, b, retain_graph=True)[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [o for o in VARIANTS if not o.get("stop_gradient")])
def test_gradcheck(options):
    z, y = batch(7, 3, 3, seed=3)
    assert torch.autograd.gradcheck(lambda z: tuple(objectives.make("almn", **options).parts(z, y)), z.requires_grad_())


@pytest.mark.parametrize("which", ["raw", "sphere"])
def test_beta_zero_is_pytorch_metric_learnings_n_pair(which):
    losses, distances = pytest.importorskip("pytorch_metric_learning.losses"), pytest.importorskip("pytorch_metric_learning.distances")
    raw = which == "raw"
    theirs = losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=not raw))
    ours = ALMNLoss(beta=0., pairs="first", temperature=1., normalize=not raw)
    for seed in range(4):
        z, _ = batch(12, seed=seed)
        y = torch.arange(12) // 2
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        assert_close(ours(a, y), theirs(b, y), rtol=0, atol=1e-9)
        assert_close(torch.autograd.grad(ours(a, y), a)[0], torch.autograd.grad(theirs(b, y), b)[0], rtol=0, atol=1e-9)


@PROPERTY
@given(st.integers(0, 10**6), st.floats(0, 3), st.sampled_from(GENERATORS), st.sampled_from(["all", "first"]), st.integers(2, 14))
def test_never_below_n_pair_on_the_sphere(seed, beta, generator, pairs, n):
    z, y = batch(n, seed=seed)
    plain = ALMNLoss(beta=0., pairs=pairs)(z, y)
    assert ALMNLoss(beta=beta, generator=generator, pairs=pairs)(z, y) >= plain - 1e-9
    more = ALMNLoss(beta=beta + .2, generator=generator, pairs=pairs)(z, y)
    assert more >= ALMNLoss(beta=beta, generator=generator, pairs=pairs)(z, y) - 1e-9     # and it grows with beta


def test_off_the_sphere_it_can_be_below():
    x = torch.tensor([[1., 0.], [3., 0.], [0., 1.], [0., 3.]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1])
    hard, plain = (ALMNLoss(beta=b, pairs="first", normalize=False, temperature=1.)(x, y) for b in (.5, 0.))
    assert hard < plain


@pytest.mark.parametrize("generator", GENERATORS)
@PROPERTY
@given(st.floats(0., pi), st.floats(0, 2))
def test_a_virtual_point_is_where_it_should_be(generator, theta, beta):
    s = torch.tensor(cos(theta), dtype=torch.float64)
    phi, slope, share = (t.item() for t in virtual_cosine(s, beta, generator))
    assert phi <= s + 1e-9 and slope >= -1e-9
    turn = (1 + beta) * theta
    if generator == "slerp": assert abs(phi - (-1) ** int(turn / pi) * cos(turn) + 2 * int(turn / pi)) < 1e-6
    if generator != "slerp" and .01 < theta < pi - .01:
        x, p = torch.tensor([[1., 0.], [cos(theta), sin(theta)]], dtype=torch.float64)
        v = point(x, p, beta, generator)
        assert abs(phi - (x @ v).item()) < 1e-9
        assert acos(max(min((x @ v / v.norm()).item(), 1), -1)) >= theta - 1e-7
    if theta == 0: assert abs(phi - 1) < 1e-9


@pytest.mark.parametrize("generator", GENERATORS)
def test_slopes_are_finite_at_both_ends_and_right_between(generator):
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([1., -1., 1 + 1e-6, -1 - 1e-6], dtype=dtype)
        assert all(t.isfinite().all() for t in virtual_cosine(ends, 1., generator))
    s = torch.linspace(-.95, .9999, 200, dtype=torch.float64)
    for beta in (.1, .5, 1.5):
        up, down = (virtual_cosine(s + h, beta, generator)[0] for h in (1e-7, -1e-7))
        assert_close((up - down) / 2e-7, virtual_cosine(s, beta, generator)[1], rtol=1e-4, atol=1e-4)
    near = torch.tensor([1 - 1e-9, 1 - 1e-12], dtype=torch.float64)
    if generator == "slerp": assert_close(virtual_cosine(near, .5, generator)[1], torch.full_like(near, 2.25), rtol=1e-6, atol=0)


def test_a_constant_virtual_point_pulls_the_anchor_only():
    x = unit_rows(torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    y = torch.tensor([0, 0, 1, 1])
    for stop in (False, True):
        leaf = x.clone().requires_grad_()
        T = ALMNLoss(pairs="first", stop_gradient=stop).parts(leaf, y).tightness
        g = torch.autograd.grad(T, leaf)[0].norm(dim=1)
        assert (g[[0, 2]] > .1).all() and ((g[[1, 3]] == 0).all() if stop else (g[[1, 3]] > .1).all())


@PROPERTY
@given(st.lists(st.integers(-2, 9), min_size=1, max_size=14))
def test_pairs(labels):
    y = torch.tensor(labels)
    rows = {k: [i for i, l in enumerate(labels) if l == k] for k in labels}
    wanted = {tuple(r[:2]) for r in rows.values() if len(r) > 1}
    anchors, others, real = first_pairs(y)
    assert set(zip(anchors[real].tolist(), others[real].tolist())) == wanted


@pytest.mark.parametrize("options", VARIANTS)
def test_the_fixed_shapes_of_a_gpu_give_the_same(options, monkeypatch):
    z, y = batch(16, seed=4)
    loss, results = objectives.make("almn", **options), []
    for look in (True, False):
        monkeypatch.setattr(ranking, "may_look", lambda x: look)
        for labels in (y, y * 0, torch.arange(16)):
            parts = loss.parts(leaf := z.clone().requires_grad_(), labels)
            results.append([*parts, *(torch.autograd.grad(p, leaf, retain_graph=True)[0] for p in parts)])
    for plain, fixed in zip(results[:3], results[3:]): assert_close(plain, fixed, rtol=1e-11, atol=1e-12)


def poor_batches(dtype):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    twos = torch.arange(6) // 2
    return {"one sample a class": (x[:5], torch.arange(5)), "one class": (x, torch.zeros(6).long()), "one sample": (x[:1], torch.tensor([2])),
            "coincident": (torch.ones_like(x), twos), "zeros": (torch.zeros_like(x), twos), "antipodal": (torch.stack([x[:3], -x[:3]], 1).flatten(0, 1), twos),
            "tiny": (x * 1e-3, twos), "large": (x * 1e2, twos), "coincident classes": (x[[0, 0, 1, 1, 2, 2]], twos)}


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_poor_batches_are_finite(options, dtype):
    loss = objectives.make("almn", 5, 4, **options)
    for case, (x, y) in poor_batches(dtype).items():
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            parts = loss.parts(leaf, y)
            grads = [torch.autograd.grad(p, leaf, retain_graph=True)[0] for p in parts]
        for part, grad in zip(parts, grads):
            assert part.isfinite() and part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), case
            assert grad.isfinite().all() and grad.dtype == dtype, case
        if case.startswith("one"): assert parts == (0, 0) and not any(g.any() for g in grads)


@pytest.mark.parametrize("options", [o for o in VARIANTS if o.get("pairs") != "first"])
def test_sum_order_axes_and_dtype(options):
    z, y = batch(14)
    loss = objectives.make("almn", 5, 4, **options)
    parts = loss.parts(z, y)
    assert loss(z, y) == parts.tightness + parts.contrast
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(z[:4]).Q
    assert_close(tuple(loss.parts(z[order] @ turn, y[order] * 7 - 3)), tuple(parts), rtol=1e-9, atol=1e-10)
    with torch.autocast("cpu", torch.bfloat16): inside = loss.parts(z.bfloat16(), y)
    assert tuple(inside) == tuple(loss.parts(z.bfloat16().float(), y))
    if options.get("normalize", True): assert_close(loss(3 * z, y), loss(z, y), rtol=1e-10, atol=0)


@pytest.mark.parametrize("options", VARIANTS)
def test_float32_is_accurate(options):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(128) // 4
    z = torch.randn(32, 32, generator=g)[y] + torch.randn(128, 32, generator=g)
    if not options.get("normalize", True): z = z / 6
    loss, a, b = objectives.make("almn", **options), z.clone().requires_grad_(), z.double().requires_grad_()
    ours, exact = loss.parts(a, y), loss.parts(b, y)
    for p, q in zip(ours, exact): assert_close(p.double(), q, rtol=2e-5, atol=2e-5)
    got, want = torch.autograd.grad(ours.total, a)[0].double(), torch.autograd.grad(exact.total, b)[0]
    assert (got - want).norm() < 1e-4 * want.norm()


def test_counts_and_training():
    z, y = batch(40, 8, dtype=torch.float32)
    y[0] = 99
    loss = ALMNLoss()
    loss(z, y)
    assert loss.counts["anchors_without_positives"] == 1 and loss.counts["anchors_without_negatives"] == 0
    for generator in GENERATORS:
        points, loss = torch.nn.Parameter(z.clone()), ALMNLoss(generator=generator)
        adam = torch.optim.Adam([points], .05)
        for _ in range(60): adam.zero_grad(); loss(points, y).backward(); adam.step()
        u = F.normalize(points.detach())
        S = (u @ u.T).fill_diagonal_(-2)
        assert (y[S.argmax(1)] == y)[1:].float().mean() > .95, generator


@pytest.mark.parametrize("call, words", [
    (lambda: objectives.make("almn", beta=-1), ["beta", "-1", "N-pair"]),
    (lambda: objectives.make("almn", beta=float("nan")), ["beta", "nan"]),
    (lambda: objectives.make("almn", generator="arc"), ["generator 'arc'", "slerp"]),
    (lambda: objectives.make("almn", pairs="some"), ["pairs 'some'", "first"]),
    (lambda: objectives.make("almn", temperature=0), ["temperature", "> 0"]),
    (lambda: objectives.make("almn", stop_gradient="yes"), ["stop_gradient", "'yes'", "True or False"]),
    (lambda: objectives.make("almn", generator="slerp", normalize=False), ["'slerp'", "normalize=True", "'chord'"]),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError) as e: call()
    for word in words: assert word in str(e.value)
