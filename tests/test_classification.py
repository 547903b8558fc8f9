"""The angular family: loops over eq. (3), pytorch-metric-learning, guards, annealing, invariances. OTHER and LOOPS also
feed the tests that every objective goes through, in test_objectives.py."""
from math import acos, cos, degrees, exp, log, pi, sin

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dml_companion import objectives
from dml_companion.geometry import normalize
from dml_companion.losses import classification as C
from dml_companion.objective import Objective

K, D = 5, 4
OTHER = { # every option at a value that is not its default
    "softmax": dict(bias=True),
    "modified_softmax": {},
    "sphereface": dict(margin=3, anneal_from=10., anneal_to=2000., anneal_rate=1000.),
    "cosface": dict(margin=.1, scale=16.),
    "arcface": dict(margin=.3, scale=16., guard="none"),
    "subcenter_arcface": dict(margin=.3, scale=16., guard="easy", sub_centers=2),
}
ANGULAR = ["cosface", "arcface", "subcenter_arcface"]


def bend(name, loss, a):
    if name == "cosface": return cos(a) - loss.margin
    if "arcface" in name:
        m = loss.margin
        if loss.guard == "easy" and a >= pi / 2: return cos(a)
        if loss.guard == "linear" and a >= pi - m: return cos(a) - m * sin(m)
        return cos(a + m)
    if name == "sphereface":
        k, m = min(int(a * loss.margin / pi), loss.margin - 1), loss.margin
        lam = max(loss.anneal_from / (1 + loss.anneal_rate * loss.batches.item()), loss.anneal_to)
        return (lam * cos(a) + (-1) ** k * cos(m * a) - 2 * k) / (1 + lam)
    return cos(a)


def family_loop(name):
    "Eq. (3) with angles, from the definitions."
    def run(loss, Z, y):
        centres, T, total = loss.centers if hasattr(loss, "centers") else loss.weight[:, None], 0., 0.
        for z, own in zip(Z, y.tolist()):
            row = []
            for k, ws in enumerate(centres):
                angle = min(acos(max(-1, min(1, (z @ w / z.norm() / w.norm()).item()))) for w in ws)
                length = getattr(loss, "scale", z.norm().item()) * (ws[0].norm().item() if name == "softmax" else 1)
                bias = loss.bias[k].item() if getattr(loss, "bias", None) is not None else 0
                row.append(length * (bend(name, loss, angle) if k == own else cos(angle)) + bias)
            T -= row[own] / len(Z)
            total += (max(row) + log(sum(exp(r - max(row)) for r in row))) / len(Z)
        return [T, total]
    return run


LOOPS = {name: family_loop(name) for name in OTHER}


def batch(n=12, seed=0, classes=K):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


def both_gradients(ours, theirs, z, y, weights):
    leaf = z.clone().requires_grad_()
    return [torch.autograd.grad(loss(leaf, y), [leaf, w]) for loss, w in zip((ours, theirs), weights)]


# ---------------------------------------------------------------- pytorch-metric-learning

def peer(name):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    return {
        "cosface": lambda: (C.CosFace(K, D), losses.CosFaceLoss(K, D, margin=.35, scale=64)),
        "arcface": lambda: (C.ArcFace(K, D), losses.ArcFaceLoss(K, D, margin=degrees(.5), scale=64)),
        "sphereface": lambda: (C.SphereFace(K, D, anneal_from=0, anneal_to=0), losses.SphereFaceLoss(K, D, margin=4, scale=1)),
        "sphereface 3": lambda: (C.SphereFace(K, D, margin=3, anneal_from=0, anneal_to=0), losses.SphereFaceLoss(K, D, margin=3, scale=1)),
        "modified_softmax": lambda: (C.ModifiedSoftmax(K, D), losses.SphereFaceLoss(K, D, margin=1, scale=1)),
        "subcenter_arcface": lambda: (C.SubCenterArcFace(K, D), losses.SubCenterArcFaceLoss(
            num_classes=K, embedding_size=D, margin=degrees(.5), scale=64, sub_centers=3))}[name]()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")           # theirs
@pytest.mark.parametrize("name", ["cosface", "arcface", "sphereface", "sphereface 3", "modified_softmax", "subcenter_arcface"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_pytorch_metric_learning(name, seed):
    z, y = batch(24, seed)
    ours, theirs = (loss.double() for loss in peer(name))
    mine = ours.centers if name.startswith("sub") else ours.weight
    with torch.no_grad():
        if name == "arcface" and seed == 1: z[:5] = -mine[y[:5]] + .05 * z[:5]      # beyond pi - m: the guard
        theirs.W.copy_(mine.reshape(-1, D).T)
    assert_close(ours(z, y), theirs(z, y).squeeze(), rtol=0, atol=1e-9)
    (gz, gw), (hz, hw) = both_gradients(ours, theirs, z, y, (mine, theirs.W))
    assert_close(gz, hz, rtol=0, atol=1e-9)
    assert_close(gw.reshape(-1, D), hw.T, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- the family among itself

def test_softmax_is_cross_entropy_without_bias():
    z, y = batch()
    a, b = C.SoftmaxLoss(K, D).double(), C.CrossEntropy(K, D, bias=False).double()
    with torch.no_grad():
        for loss in (a, b): loss.weight.copy_(torch.arange(K * D).view(K, D).double().sin())
    assert tuple(a.parts(z, y)) == tuple(b.parts(z, y)) and set(a.param_groups()) == {"classifier"}
    assert_close(a(z, y), F.cross_entropy(z @ a.weight.T, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss, same", [
    (lambda: C.CosFace(K, D, margin=0, scale=20), lambda: C.NormalizedSoftmax(K, D, temperature=.05)),
    (lambda: C.ArcFace(K, D, margin=0, scale=20), lambda: C.NormalizedSoftmax(K, D, temperature=.05)),
    (lambda: C.SphereFace(K, D, margin=1), lambda: C.ModifiedSoftmax(K, D)),
    (lambda: C.SphereFace(K, D, anneal_from=1e6, anneal_to=1e6), lambda: C.ModifiedSoftmax(K, D))])
def test_without_margin_they_are_plain(loss, same):
    z, y = batch()
    a, b = loss().double(), same().double()
    with torch.no_grad(): b.weight.copy_(a.weight)
    tolerance = 1e-4 if getattr(a, "anneal_to", 0) == 1e6 else 1e-9
    assert_close(list(a.parts(z, y)), list(b.parts(z, y)), rtol=0, atol=tolerance)


def test_one_sub_center_is_arcface():
    z, y = batch()
    a, b = C.SubCenterArcFace(K, D, sub_centers=1).double(), C.ArcFace(K, D).double()
    with torch.no_grad(): b.weight.copy_(a.centers[:, 0])
    assert_close(list(a.parts(z, y)), list(b.parts(z, y)), rtol=0, atol=1e-12)


def test_equal_sub_centers_feel_together_what_one_would():
    "Ties are broken somehow, but no force is lost or doubled."
    z, y = batch()
    loss, one = C.SubCenterArcFace(K, D, sub_centers=2).double(), C.ArcFace(K, D).double()
    with torch.no_grad(): loss.centers[:, 1] = loss.centers[:, 0]; one.weight.copy_(loss.centers[:, 0])
    loss(z, y).backward(), one(z, y).backward()
    assert_close(loss.centers.grad.sum(1), one.weight.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(OTHER))
@pytest.mark.parametrize("seed", range(2))
def test_rotation_and_scale(name, seed):
    z, y = batch(seed=seed)
    loss = objectives.make(name, K, D).double().eval()
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    with torch.no_grad():
        for w in loss.parameters(): w.copy_(torch.randn(w.shape, dtype=torch.float64))
        before, longer = list(loss.parts(z, y)), list(loss.parts(z * torch.rand(12, 1).double().add(.1), y))
        for w in loss.parameters(): w.copy_(w @ turn * (1 if name == "softmax" else 3))
        assert_close(list(loss.parts(z @ turn, y)), before, rtol=1e-9, atol=1e-9)
    same = all(abs(a - b) < 1e-9 for a, b in zip(before, longer))
    assert same == (name in ANGULAR)                            # only those divide by the embedding's length


# ---------------------------------------------------------------- margins

ANGLES = torch.linspace(0, pi, 5001, dtype=torch.float64)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(.05, 1.5))
def test_the_linear_guard_falls_and_the_formula_rises(m):
    linear, formula = (C.arc_margin(ANGLES.cos(), m, g)[0] for g in ("linear", "none"))
    assert (linear.diff() <= 1e-12).all()
    rise = formula.diff().clamp_min(0).sum().item()
    assert abs(rise - (1 - cos(m))) < 2e-3                       # .122 at m = .5
    before = ANGLES < pi - m - 1e-3
    assert_close(linear[before], (ANGLES[before] + m).cos(), rtol=0, atol=2e-3)
    middle = before & (ANGLES > .01)
    assert_close(linear[middle], (ANGLES[middle] + m).cos(), rtol=0, atol=1e-9)
    assert_close(linear[-1].item(), -1 - m * sin(m), rtol=0, atol=1e-9)


def test_the_easy_margin_jumps_up_at_a_right_angle():
    easy = C.arc_margin(ANGLES.cos(), .5, "easy")[0]
    assert abs(easy.diff().max().item() - sin(.5)) < 1e-3


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7])
def test_sphere_margin_is_monotone_and_continuous(m):
    psi = C.sphere_margin(ANGLES.cos()[:, None], m)[0][:, 0]
    assert psi[0] == 1 and abs(psi[-1] - (1 - 2 * m)) < 1e-12
    assert (psi.diff() <= 1e-12).all() and psi.diff().abs().max() < 1.01 * m * pi / 5000
    for p in (.1, .4, .9):
        a = torch.tensor([[p * pi]], dtype=torch.float64)
        k = int(p * m)
        assert_close(C.sphere_margin(a.cos(), m)[0].item(), (-1) ** k * cos(m * p * pi) - 2 * k, rtol=0, atol=1e-12)


BENDS = {"linear": lambda c: C.arc_margin(c, .5), "easy": lambda c: C.arc_margin(c, .5, "easy"),
         "none": lambda c: C.arc_margin(c, .5, "none"), "sphere 4": lambda c: C.sphere_margin(c, 4),
         "sphere 7": lambda c: C.sphere_margin(c, 7), "annealed": lambda c: C.SphereFace(K, D).bend(c)}


@pytest.mark.parametrize("which", BENDS)
def test_slopes_of_the_bends(which):
    "Finite at both ends, autograd's in between, and eq. (4) for the chain through scores and lengths."
    assert all(v.isfinite().all() for v in BENDS[which](torch.tensor([[-1.], [1.]])))
    cosine = torch.linspace(-.99, .99, 200, dtype=torch.float64)[:, None].requires_grad_()
    psi, slope = BENDS[which](cosine)
    assert_close(torch.autograd.grad(psi.sum(), cosine)[0], slope.detach(), rtol=1e-9, atol=1e-9)
    g = torch.Generator().manual_seed(0)
    y, lengths = torch.arange(6) % K, torch.rand(6, 1, generator=g, dtype=torch.float64) + .5
    scores = (lengths * (torch.rand(6, K, generator=g, dtype=torch.float64) * 1.8 - .9)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, l: tuple(C.bent_softmax(s, l, y, BENDS[which])), (scores, lengths.requires_grad_()))


def test_annealing_counts_training_batches_only_and_is_saved():
    z, y = batch()
    loss = C.SphereFace(K, D).double()
    for _ in range(3): loss(z, y)
    with torch.no_grad(): loss(z, y)
    loss.eval()(z, y)
    assert loss.batches == 3 and abs(loss.share().item() - 1000 / 1.36) < 1e-9
    copy = C.SphereFace(K, D).double().eval()
    copy.load_state_dict(loss.state_dict())
    assert copy(z, y) == loss(z, y)
    loss.batches.fill_(10**7)
    assert loss.share() == 5


def test_a_margin_makes_every_loss_larger():
    z, y = batch(30)
    for cls in (C.CosFace, C.ArcFace):
        values = []
        for m in (0., .1, .3, .6):
            loss = cls(K, D, margin=m).double()
            with torch.no_grad(): loss.weight.copy_(normalize(torch.arange(K * D).view(K, D).double().cos()))
            values.append(loss(z, y).item())
        assert values == sorted(values) and values[0] < values[-1]


# ---------------------------------------------------------------- weights, labels, dimensions

@pytest.mark.parametrize("name", sorted(OTHER))
def test_gradcheck_of_the_weights(name):
    z, y = batch(6)
    loss = objectives.make(name, K, D).double().eval()
    with torch.no_grad():
        for w in loss.parameters(): w.copy_(torch.randn(w.shape, dtype=torch.float64))
    names, values = zip(*loss.named_parameters())
    def run(*weights): return tuple(torch.func.functional_call(loss, dict(zip(names, weights)), (z, y)).unsqueeze(0))
    assert torch.autograd.gradcheck(run, [v.detach().requires_grad_() for v in values])


@pytest.mark.parametrize("name", ANGULAR + ["sphereface", "modified_softmax"])
def test_points_on_their_proxies_and_opposite(name):
    loss = objectives.make(name, K, D)
    at = (loss.centers[:, 0] if "sub" in name else loss.weight).detach()
    for z in (at, -at, 0 * at, 1e-20 * at):
        for dtype in (torch.float32, torch.bfloat16):
            leaf = z.to(dtype).requires_grad_()
            parts = loss.parts(leaf, torch.arange(K))
            assert all(p.isfinite() for p in parts) and torch.autograd.grad(parts.total, leaf)[0].isfinite().all()


def test_one_class_in_the_world_is_a_loss_of_zero():
    z, _ = batch()
    for name in OTHER:
        assert objectives.make(name, 1, D).double()(z, torch.zeros(12).long()).abs() < 1e-12


@pytest.mark.parametrize("call, words", [
    (lambda: C.ArcFace(K, D, margin=28.6), ["margin", "28.6", "1.571", "radians"]),
    (lambda: C.ArcFace(K, D, guard="line"), ["guard 'line'", "did you mean 'linear'"]),
    (lambda: C.ArcFace(K, D, scale=0), ["scale", "0"]),
    (lambda: C.CosFace(K, D, margin=-1), ["margin", "-1", "0 to 2"]),
    (lambda: C.CosFace(K, D, margin="wide"), ["margin", "'wide'"]),
    (lambda: C.SphereFace(K, D, margin=1.7), ["margin", "1.7", "whole"]),
    (lambda: C.SphereFace(K, D, anneal_to=-1), ["anneal_to", "-1"]),
    (lambda: C.SubCenterArcFace(K, D, sub_centers=0), ["sub_centers", "0"]),
    (lambda: C.ModifiedSoftmax(K), ["ModifiedSoftmax", "dim"]),
    (lambda: C.CosFace(2.5, D), ["num_classes", "2.5", "whole"]),
    (lambda: C.SoftmaxLoss(K, D, bias="no"), ["bias", "'no'", "True or False"]),
    (lambda: C.SoftmaxLoss(K, D)(torch.ones(2, D + 1), torch.arange(2)), ["5 columns", "dim=4", "dim=5"]),
    (lambda: C.check_count(0, warmup=-1), ["warmup", "at least 0", "-1"]),
    (lambda: C.check_count(size=True), ["size", "at least 1", "True"]),
    (lambda: C.ArcFace(K, D)(torch.ones(2, D + 1), torch.arange(2)), ["5 columns", "dim=4", "dim=5"]),
    (lambda: C.SubCenterArcFace(K, D)(torch.ones(2, 2), torch.arange(2)), ["2 columns", "dim=4"]),
    (lambda: C.CosFace(K, D)(torch.ones(2, D), torch.arange(2) + K), ["5 to 6", "0 to 4"]),
    (lambda: C.ModifiedSoftmax(K, D)(torch.ones(2, D), -torch.ones(2).long()), ["-1", "0 to 4"]),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError) as e: call()
    for word in words: assert word in str(e.value)


def test_bases_say_what_is_missing():
    class Bare(C.MarginSoftmax): scale = 1.
    with pytest.raises(NotImplementedError, match="Bare must define bend"): Bare(K, D)(torch.ones(2, D), torch.arange(2))
    assert issubclass(C.UnitProxies, Objective)
