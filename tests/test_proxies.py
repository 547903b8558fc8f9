"""Proxy losses: loops over the papers' formulas, pytorch-metric-learning, published gradients. OTHER and LOOPS also
feed the tests that every objective goes through, in test_objectives.py."""
from math import exp, log

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dml_companion import objectives
from dml_companion.geometry import normalize
from dml_companion.losses import proxies as P
from dml_companion.losses.classification import CosFace, NormalizedSoftmax

K, D = 5, 4
OTHER = { # every option at a value that is not its default
    "proxy_nca": dict(scale=2., normalize=False),
    "proxy_nca_pp": dict(scale=2.),
    "proxy_anchor": dict(alpha=8., margin=.3),
    "soft_triple": dict(centers_per_class=3, scale=7., gamma=.5, margin=.2, spread_weight=0.),
}


def unit(rows): return [[(w / w.norm()) for w in row] for row in rows]


def lse(values):
    top = max(values)
    return top + log(sum(exp(v - top) for v in values))


def nca_loop(plus):
    def run(loss, Z, y):
        sphere, T, C = plus or loss.normalize, 0., 0.
        for z, own in zip(Z, y.tolist()):
            z, ps = (z / z.norm(), loss.weight / loss.weight.norm(dim=1, keepdim=True)) if sphere else (z, loss.weight)
            near = [-loss.scale * ((z - p) ** 2).sum().item() for p in ps]
            T -= near[own] / len(Z)
            C += lse([v for c, v in enumerate(near) if plus or c != own]) / len(Z)
        return [T, C]
    return run


def cosine_table(loss, Z): return [[(z @ w / z.norm() / w.norm()).item() for w in loss.weight] for z in Z]


def anchor_loop(loss, Z, y):
    S, y, a, m = cosine_table(loss, Z), y.tolist(), loss.alpha, loss.margin
    pull = [log(1 + sum(exp(-a * (S[i][p] - m)) for i in range(len(y)) if y[i] == p)) for p in range(loss.num_classes)]
    push = [log(1 + sum(exp(a * (S[i][p] + m)) for i in range(len(y)) if y[i] != p)) for p in range(loss.num_classes)]
    return [sum(pull) / len(set(y)), sum(push) / loss.num_classes]


def soft_triple_loop(loss, Z, y):
    W, T, C = unit(loss.centers), 0., 0.
    for z, own in zip(Z, y.tolist()):
        row = []
        for c, ws in enumerate(W):
            s = [(z @ w / z.norm()).item() for w in ws]
            q = [exp(v / loss.gamma) for v in s]
            row.append(loss.scale * (sum(a * b for a, b in zip(q, s)) / sum(q) - loss.margin * (c == own)))
        T -= row[own] / len(Z)
        C += lse(row) / len(Z)
    S = len(W[0])
    spread = sum((2 + 1e-5 - 2 * (ws[k] @ ws[l]).item()) ** .5 for ws in W for k in range(S) for l in range(k + 1, S))
    return [T + loss.spread_weight * spread / max(len(W) * S * (S - 1), 1), C]


LOOPS = {"proxy_nca": nca_loop(False), "proxy_nca_pp": nca_loop(True), "proxy_anchor": anchor_loop, "soft_triple": soft_triple_loop}


def batch(n=12, seed=0, classes=K):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


# ---------------------------------------------------------------- pytorch-metric-learning

def peer(name):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    return {
        "proxy_nca_pp": lambda: (P.ProxyNCAPlusPlus(K, D), losses.ProxyNCALoss(K, D, softmax_scale=9)),
        "proxy_anchor": lambda: (P.ProxyAnchor(K, D), losses.ProxyAnchorLoss(K, D, margin=.1, alpha=32)),
        "soft_triple": lambda: (P.SoftTriple(K, D, centers_per_class=3, spread_weight=0),
                                losses.SoftTripleLoss(K, D, centers_per_class=3, la=20, gamma=.1, margin=.01))}[name]()


@pytest.mark.parametrize("name", ["proxy_nca_pp", "proxy_anchor", "soft_triple"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_pytorch_metric_learning(name, seed):
    z, y = batch(24, seed, classes=[K, K, 2][seed])              # seed 2: three classes are not in the batch
    ours, theirs = (loss.double() for loss in peer(name))
    mine, other = (ours.centers, theirs.fc) if name == "soft_triple" else (ours.weight, theirs.proxies)
    with torch.no_grad(): other.copy_(mine.reshape(-1, D).T if name == "soft_triple" else mine)
    leaf = z.clone().requires_grad_()
    a, b = ours(leaf, y), theirs(leaf, y).squeeze()
    assert_close(a, b, rtol=0, atol=1e-9)
    (gz, gw), (hz, hw) = torch.autograd.grad(a, [leaf, mine]), torch.autograd.grad(b, [leaf, other])
    assert_close(gz, hz, rtol=0, atol=1e-9)
    assert_close(gw.reshape(-1, D), hw.T if name == "soft_triple" else hw, rtol=0, atol=1e-9)


def test_spread_equals_pytorch_metric_learning():
    regularizers = pytest.importorskip("pytorch_metric_learning.regularizers")
    from pytorch_metric_learning.utils.common_functions import small_val
    centers = normalize(torch.randn(K, 4, D, dtype=torch.float64))
    theirs = regularizers.SparseCentersRegularizer(K, 4)(centers.reshape(-1, D))
    assert_close(P.center_spread(centers.transpose(0, 1), small_val(torch.float64)), theirs, rtol=0, atol=1e-9)
    assert (P.center_spread(centers.transpose(0, 1)) - theirs).abs() < 1e-4     # theirs has another epsilon


# ---------------------------------------------------------------- Proxy-NCA

def test_plus_plus_is_normalized_softmax():
    z, y = batch()
    for scale in (1., 9., 32.):
        a, b = P.ProxyNCAPlusPlus(K, D, scale=scale).double(), NormalizedSoftmax(K, D, temperature=.5 / scale).double()
        b.load_state_dict(a.state_dict())
        assert_close(a(z, y), b(z, y), rtol=0, atol=1e-10)


def test_original_has_no_floor_without_the_sphere_and_a_negative_one_on_it():
    simplex = normalize(torch.eye(K, dtype=torch.float64) - 1 / K)
    y = torch.arange(K)
    ball, free, plus = P.ProxyNCA(K, K).double(), P.ProxyNCA(K, K, normalize=False).double(), P.ProxyNCAPlusPlus(K, K).double()
    with torch.no_grad():
        for loss in (ball, free, plus): loss.weight.copy_(simplex)
    assert_close(ball(simplex, y).item(), log(K - 1) - 18 * K / (K - 1), rtol=0, atol=1e-9)
    assert 0 < plus(simplex, y) < 1e-6
    values = []
    for length in (1., 10., 100.):
        with torch.no_grad(): free.weight.copy_(length * simplex)
        values.append(free(length * simplex, y).item())
    assert values[1] < 50 * values[0] and values[2] < 50 * values[1]             # quadratic in the length


def test_the_original_never_stops_pulling():
    "Eq. (2): the slopes in the own cosine are -2 tau, those in the others sum to 2 tau; ++ has both times 1 - p."
    z, y = batch()
    for cls in (P.ProxyNCA, P.ProxyNCAPlusPlus):
        loss, proxies = cls(K, D).double(), {}
        W = normalize(loss.weight.detach())
        x = normalize(z).requires_grad_()
        total = loss(x, y)
        got = torch.autograd.grad(total, x)[0]
        s = x.detach() @ W.T
        p = (18 * s).softmax(1)
        others = (18 * s).scatter(1, y[:, None], -torch.inf).softmax(1)
        keep = 1 if cls is P.ProxyNCA else (1 - p.gather(1, y[:, None]))
        slopes = 18 * keep * (others - F.one_hot(y, K)) / len(y)
        want = slopes @ W
        assert_close(got, want - (want * x.detach()).sum(1, keepdim=True) * x.detach(), rtol=0, atol=1e-10)


def test_one_class_has_no_contrast():
    x = torch.randn(4, D, requires_grad=True)
    parts = P.ProxyNCA(1, D).parts(x, torch.zeros(4).long())
    assert parts.contrast == 0 and torch.autograd.grad(parts.contrast, x, retain_graph=True)[0].abs().max() == 0
    assert torch.autograd.grad(parts.tightness, x)[0].abs().max() > 0


# ---------------------------------------------------------------- Proxy-Anchor

@pytest.mark.parametrize("seed", range(4))
def test_published_gradient_of_proxy_anchor(seed):
    "Kim et al. 2020, eq. 5, also where classes are absent."
    g = torch.Generator().manual_seed(seed)
    S, y = torch.rand(9, K, generator=g, dtype=torch.float64) * 2 - 1, torch.randint(1 + seed, (9,), generator=g)
    alpha, delta = 32., .1
    leaf = S.clone().requires_grad_()
    parts = P.closed_form(alpha * leaf, P.partial(P.anchor_rule, y, alpha * delta))
    got = [torch.autograd.grad(p, leaf, retain_graph=True)[0] for p in parts]
    own = F.one_hot(y, K).bool()
    hp, hm = torch.exp(-alpha * (S - delta)) * own, torch.exp(alpha * (S + delta)) * ~own
    assert_close(got[0], -alpha * hp / (len(y.unique()) * (1 + hp.sum(0))), rtol=0, atol=1e-10)
    assert_close(got[1], alpha * hm / (K * (1 + hm.sum(0))), rtol=0, atol=1e-10)


def test_proxy_anchor_in_log_space():
    "alpha = 500 overflows e^x in float32; the parts are then alpha times the worst violation."
    loss = P.ProxyAnchor(2, 2, alpha=500.)
    with torch.no_grad(): loss.weight.copy_(torch.eye(2))
    z = torch.tensor([[0., 1.], [1., 0.]], requires_grad=True)
    parts = loss.parts(z, torch.arange(2))                       # both lie on the other's proxy
    assert_close([p.item() for p in parts], [500 * .1, 500 * 1.1], rtol=1e-5, atol=0)
    assert torch.autograd.grad(parts.total, z)[0].isfinite().all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 10**6), st.floats(.1, 300))
def test_class_logsumexp(labels, seed, size):
    y = torch.tensor(labels)
    x = size * torch.randn(len(y), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value, share = P.class_logsumexp(x, y, K)
    zero = torch.zeros(1, dtype=torch.float64)
    for k in range(K):
        mine = torch.cat([zero, x[y == k]])
        assert_close(value[k], mine.logsumexp(0), rtol=1e-12, atol=1e-12)
        assert_close(share[y == k], mine.softmax(0)[1:], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- SoftTriple

def test_one_center_is_cosface_and_sharp_centers_are_the_nearest():
    z, y = batch()
    one, cosface = P.SoftTriple(K, D, centers_per_class=1, margin=.2).double(), CosFace(K, D, margin=.2, scale=20.).double()
    with torch.no_grad(): cosface.weight.copy_(one.centers[:, 0])
    assert_close(list(one.parts(z, y)), list(cosface.parts(z, y)), rtol=0, atol=1e-10)
    sharp = P.SoftTriple(K, D, centers_per_class=4, gamma=1e-4, margin=0., spread_weight=0).double()
    nearest = torch.einsum("nd,ksd->nks", normalize(z), normalize(sharp.centers)).amax(2)
    assert_close(sharp(z, y), F.cross_entropy(20 * nearest, y), rtol=0, atol=1e-3)
    assert P.SoftTriple(K, D, gamma=1e-6)(z.float(), y).isfinite()


def test_slope_of_the_soft_maximum_can_be_negative():
    "Eq. (5): centres more than gamma below the mean are pushed away by samples of their own class."
    s = torch.tensor([[[.9], [.2]]], dtype=torch.float64, requires_grad=True)    # one sample, two centres, one class
    score = (s / .1).softmax(1).mul(s).sum()
    slope = torch.autograd.grad(score, s)[0].flatten()
    q = (s.detach() / .1).softmax(1).flatten()
    assert_close(slope, q * (1 + (s.detach().flatten() - score.detach()) / .1), rtol=0, atol=1e-12)
    assert slope[1] < 0 < slope[0]


def test_spread_merges_centers():
    "The last term alone draws the centres of a class together; merged ones have a finite gradient."
    torch.manual_seed(0)
    centers = torch.nn.Parameter(normalize(torch.randn(4, 2, 3)))
    before = P.center_spread(normalize(centers)).item()
    sgd = torch.optim.SGD([centers], lr=.5)
    for _ in range(60):
        sgd.zero_grad(); P.center_spread(normalize(centers)).backward(); sgd.step()
    assert P.center_spread(normalize(centers)).item() < .2 * before
    same = normalize(torch.ones(3, 2, 4)).requires_grad_()
    assert torch.autograd.grad(P.center_spread(same), same)[0].isfinite().all()
    assert_close(P.center_spread(same.detach().double()).item(), 1e-5 ** .5 / 2, rtol=1e-2, atol=0)


# ---------------------------------------------------------------- all four

@pytest.mark.parametrize("name", sorted(OTHER))
def test_gradcheck_of_the_weights(name):
    z, y = batch(6)
    loss = objectives.make(name, K, D).double()
    names, values = zip(*loss.named_parameters())
    def run(*weights): return tuple(torch.func.functional_call(loss, dict(zip(names, weights)), (z, y)).unsqueeze(0))
    assert torch.autograd.gradcheck(run, [v.detach().requires_grad_() for v in values])


@pytest.mark.parametrize("name", sorted(OTHER))
def test_rotation_and_scale(name):
    z, y = batch()
    loss = objectives.make(name, K, D).double()
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    before = list(loss.parts(z, y))
    assert_close(list(loss.parts(z * torch.linspace(.1, 9, 12).double()[:, None], y)), before, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for w in loss.parameters(): w.copy_(3 * w @ turn)
    assert_close(list(loss.parts(z @ turn, y)), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(OTHER))
def test_weights_are_proxies(name):
    loss = objectives.make(name, K, D)
    assert set(loss.param_groups()) == {"proxies"}
    rows = loss.param_groups()["proxies"][0].reshape(-1, D)
    assert_close(rows.norm(dim=1), torch.ones(len(rows)))


@pytest.mark.parametrize("call, words", [
    (lambda: P.ProxyAnchor(K, D, alpha=0), ["alpha", "0"]),
    (lambda: P.ProxyAnchor(K, D, margin=1.5), ["margin", "1.5", "0 to 1", "cosine"]),
    (lambda: P.ProxyNCA(K, D, scale=-9), ["scale", "-9"]),
    (lambda: P.SoftTriple(K, D, centers_per_class=2.5), ["centers_per_class", "2.5", "whole"]),
    (lambda: P.SoftTriple(K, D, gamma=0), ["gamma", "0"]),
    (lambda: P.SoftTriple(K, D, spread_weight=-1), ["spread_weight", "-1"]),
    (lambda: P.SoftTriple(K), ["SoftTriple", "dim"]),
    (lambda: P.ProxyNCA(K, D)(torch.ones(2, D + 3), torch.arange(2)), ["7 columns", "dim=4", "dim=7"]),
    (lambda: P.SoftTriple(K, D)(torch.ones(2, 2), torch.arange(2)), ["2 columns", "dim=4"]),
    (lambda: P.ProxyAnchor(K, D)(torch.ones(2, D), torch.tensor([0, K])), ["0 to 5", "0 to 4"]),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError) as e: call()
    for word in words: assert word in str(e.value)
