"""Objectives: double loops and pytorch-metric-learning as oracles, the contract for poor batches, names and options."""
import subprocess, sys
from importlib import import_module
from itertools import product
from math import exp, log, nan
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dml_companion import objective as protocol
from dml_companion import objectives
from dml_companion.geometry import normalize
from dml_companion.losses.classification import CrossEntropy, NormalizedSoftmax, softmax_parts, torch_smoothing
from dml_companion.losses.pairwise import CenterLoss, ContrastiveLoss, MultiSimilarityLoss, SNCALoss, SPCELoss, batch_classes, own_class_sizes
from dml_companion.objective import Objective, Parts, register, unit_rows

import test_classification, test_contextual, test_proxies, test_regularisers, test_virtual

K, D = 5, 4
# A new objective needs a line here, and a double loop `<name>_loop(Z, y, <its options>)` below as its oracle.
# Every option that changes a computation, at a value that is not its default.
OTHER = {
    "center": dict(center_weight=.5, centers="batch", center_rate=.9, reduction="sum", bias=False, label_smoothing=.2,
                   normalize=True),
    "contrastive": dict(margin=1.6, positive_margin=.2, squared=False, reduction="pair", normalize=False),
    "cross_entropy": dict(bias=False, label_smoothing=.2, smoothing="paper"),
    "mined_triplet": dict(miner="hard", margin=.5, squared=False, reduction="nonzero", normalize=False),
    "multi_similarity": dict(alpha=1., beta=10., threshold=.1, mining=.1, self_pairs=True, reduction="valid",
                             normalize=False),
    "normalized_softmax": dict(temperature=.3, label_smoothing=.2, smoothing="paper"),
    "snca": dict(temperature=.7, self_pairs=True, reduction="valid", normalize=False),
    "spce": dict(lam=.3, self_pairs=True, normalize=False),
}
# The modules of other families bring their OTHER; LOOPS: name -> loop(loss, Z, y); and SPECIAL: (name, option) -> {a test below: why it
# does not apply}.
LOOPS, SPECIAL = {}, {}
for module in (test_classification, test_contextual, test_proxies, test_regularisers, test_virtual):
    OTHER |= module.OTHER; LOOPS |= module.LOOPS; SPECIAL |= getattr(module, "SPECIAL", {})
NAMES = sorted(OTHER)
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def batch(n=12, d=D, classes=K, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=dtype), torch.randint(classes, (n,), generator=g)


def filled(loss, seed=1):
    "The objective in float64, its weights random where they start at zero, and not moving its running centres."
    g = torch.Generator().manual_seed(seed)
    loss = loss.double().eval()
    with torch.no_grad():
        for weight in [*loss.parameters(), *(b for b in loss.buffers() if b.is_floating_point())]:
            weight.copy_(torch.randn(weight.shape, generator=g, dtype=torch.float64))
    return loss


def _variants():
    "Every objective with its defaults and with each other option in turn."
    for name in NAMES:
        yield pytest.param(name, {}, id=name)
        for option, value in OTHER[name].items():
            extra = dict(label_smoothing=.1) if option == "smoothing" else {}
            yield pytest.param(name, {option: value, **extra}, id=f"{name}-{option}")
    yield pytest.param("center", dict(centers="learned"), id="center-learned")
    yield pytest.param("contrastive", dict(reduction="nonzero", squared=False), id="contrastive-nonzero")


VARIANTS = list(_variants())


def skip_special(test, name, options):
    for option in options:
        if why := SPECIAL.get((name, option), {}).get(test): pytest.skip(why)


def gradients(parts, leaf):
    return [torch.autograd.grad(part, leaf, retain_graph=True, allow_unused=True)[0] for part in parts]


# ---------------------------------------------------------------- oracle 1: double loops from the formulas

def contrastive_loop(Z, y, margin=1., positive_margin=0., squared=True, reduction="anchor", normalize=True):
    Z, power = (unit_rows(Z) if normalize else Z), 2 if squared else 1
    terms = {True: [], False: []}
    for i in range(len(y)):
        for j in range(len(y)):
            if i == j: continue
            d, same = (Z[i] - Z[j]).norm().item(), bool(y[i] == y[j])
            terms[same].append(max(d - positive_margin if same else margin - d, 0) ** power)
    count = {"anchor": lambda t: len(y), "pair": len, "nonzero": lambda t: sum(x > 0 for x in t)}[reduction]
    return [sum(t) / max(count(t), 1) for t in (terms[True], terms[False])]


def snca_loop(Z, y, temperature=.1, self_pairs=False, reduction="anchor", normalize=True):
    Z, n = unit_rows(Z) if normalize else Z, len(y)
    T, C = [], []
    for i in range(n):
        e = [exp((Z[i] @ Z[j]).item() / temperature) for j in range(n)]
        mine = [e[j] for j in range(n) if y[i] == y[j] and (self_pairs or j != i)]
        if reduction == "valid" and not any(y[i] == y[j] for j in range(n) if j != i): continue
        T.append(-log(sum(mine)) if mine else 0.)
        C.append(log(sum(e[j] for j in range(n) if j != i)) if n > 1 else 0.)
    return [sum(t) / max(len(t), 1) for t in (T, C)]


def multi_similarity_loop(Z, y, alpha=2., beta=50., threshold=.5, mining=None, self_pairs=False, reduction="anchor",
                          normalize=True):
    Z, n, T, C = unit_rows(Z) if normalize else Z, len(y), [], []
    for i in range(n):
        s = [(Z[i] @ Z[j]).item() for j in range(n)]
        P, N = [j for j in range(n) if y[j] == y[i] and j != i], [j for j in range(n) if y[j] != y[i]]
        if mining is not None:
            easy, hard = min((s[j] for j in P), default=float("inf")), max((s[j] for j in N), default=-float("inf"))
            P, N = [j for j in P if s[j] < hard + mining], [j for j in N if s[j] > easy - mining]
        if reduction == "valid" and not P + N: continue
        if self_pairs: P = [*P, i]
        T.append(log(1 + sum(exp(-alpha * (s[j] - threshold)) for j in P)) / alpha)
        C.append(log(1 + sum(exp(beta * (s[j] - threshold)) for j in N)) / beta)
    return [sum(t) / max(len(t), 1) for t in (T, C)]


def mined_triplet_loop(Z, y, miner="semihard", margin=.2, squared=True, reduction="mined", normalize=True):
    Z, n, T, C, mined = unit_rows(Z) if normalize else Z, len(y), [], [], 0
    d = [[(Z[i] - Z[j]).norm().item() ** (2 if squared else 1) for j in range(n)] for i in range(n)]
    for i in range(n):
        P, N = [d[i][j] for j in range(n) if y[j] == y[i] and j != i], [d[i][j] for j in range(n) if y[j] != y[i]]
        chosen = [(p, min(far)) for p in P if (far := [k for k in N if k > p])] if miner == "semihard" else \
            [(max(P), min(N))] if P and N else []
        mined += len(chosen)
        active = [(p, k) for p, k in chosen if p - k + margin > 0]
        T += [p for p, _ in active]; C += [margin - k for _, k in active]
    return [sum(t) / max(len(t) if reduction == "nonzero" else mined, 1) for t in (T, C)]


def spce_loop(Z, y, lam=.002, self_pairs=False, normalize=True):
    Z, n, T, C = unit_rows(Z) if normalize else Z, len(y), 0., 0.
    for i in range(n):
        logits = {k: sum((Z[i] @ Z[j]).item() for j in range(n) if y[j] == k and (self_pairs or j != i)) / (lam * n)
                  for k in set(y.tolist())}
        T -= logits[y[i].item()] / n
        C += torch.tensor(list(logits.values()), dtype=torch.float64).logsumexp(0).item() / n
    return [T, C]


def softmax_loop(logits, y, eps=0., smoothing="torch"):
    n, k, T, C = *logits.shape, 0., 0.
    for i in range(n):
        for c in range(k):
            own = c == y[i].item()
            q = (1 - eps) * own + eps / k if smoothing == "torch" else 1 - eps if own else eps / (k - 1)
            T -= q * logits[i, c].item() / n
        C += log(sum(exp(l.item()) for l in logits[i])) / n
    return [T, C]


def center_loop(loss, Z, y):
    X, T = unit_rows(Z) if loss.normalize else Z, 0.
    for i in range(len(y)):
        mine = [X[j] for j in range(len(y)) if y[j] == y[i]]
        c = sum(mine) / len(mine) if loss.centers == "batch" else loss.means[y[i]]
        T += loss.center_weight / 2 * ((X[i] - c) ** 2).sum().item() / (1 if loss.reduction == "sum" else len(y))
    logits = Z @ loss.weight.T + (0 if loss.bias is None else loss.bias)
    return [T, sum(softmax_loop(logits, y, loss.label_smoothing))]


def loop(name, loss, Z, y, settings):
    with torch.no_grad():
        if name in LOOPS: return LOOPS[name](loss, Z, y)
        if name == "center": return center_loop(loss, Z, y)
        if f"{name}_loop" in globals(): return globals()[f"{name}_loop"](Z, y, **settings)
        W = loss.weight
        logits = Z @ W.T + (0 if loss.bias is None else loss.bias) if name == "cross_entropy" else \
            torch.stack([torch.stack([z @ w / z.norm() / w.norm() for w in W]) for z in Z]) / loss.temperature
        return softmax_loop(logits, y, loss.label_smoothing, loss.smoothing)


@pytest.mark.parametrize("name, settings_", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_parts_equal_the_double_loop(name, settings_, seed):
    skip_special("loop", name, settings_)
    Z, y = batch(seed=seed, classes=[2, K, K][seed])
    if seed == 2: Z[1], y[1] = Z[0], y[0]                        # a duplicate
    loss = filled(objectives.make(name, K, D, **settings_))
    assert_close([p.item() for p in loss.parts(Z, y)], loop(name, loss, Z, y, settings_), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_gradcheck(name, settings_):
    skip_special("gradcheck", name, settings_)
    if name == "contextual_similarity" and "step" not in settings_:
        pytest.skip("a straight-through gradient is not the derivative: see test_contextual")
    Z, y = batch(7, seed=3, classes=3)
    loss = filled(objectives.make(name, K, D, **settings_))
    assert torch.autograd.gradcheck(lambda Z: tuple(loss.parts(Z, y)), Z.requires_grad_())


@pytest.mark.parametrize("name", ["center", "cross_entropy", "normalized_softmax"])
def test_gradcheck_of_the_weights(name):
    Z, y = batch(6)
    loss = filled(objectives.make(name, K, D))
    names, values = zip(*loss.named_parameters())
    def run(*weights): return tuple(torch.func.functional_call(loss, dict(zip(names, weights)), (Z, y)).unsqueeze(0))
    assert torch.autograd.gradcheck(run, [v.detach().requires_grad_() for v in values])


# ---------------------------------------------------------------- oracle 2: pytorch-metric-learning

def peers():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.reducers import MeanReducer
    ms, miner = losses.MultiSimilarityLoss(2, 50, .5), miners.MultiSimilarityMiner(.1)
    plain = losses.ContrastiveLoss(pos_margin=.1, neg_margin=1.2)
    return {
        "contrastive": (ContrastiveLoss(margin=1.2, positive_margin=.1, squared=False, reduction="nonzero"), plain),
        "contrastive unnormalised": (
            ContrastiveLoss(margin=3., positive_margin=.1, squared=False, reduction="pair", normalize=False),
            losses.ContrastiveLoss(.1, 3., distance=LpDistance(normalize_embeddings=False), reducer=MeanReducer())),
        "snca": (SNCALoss(temperature=.1), losses.NCALoss(softmax_scale=5)),
        "multi_similarity": (MultiSimilarityLoss(), ms),
        "multi_similarity mined": (MultiSimilarityLoss(mining=.1), lambda z, y: ms(z, y, miner(z, y))),
    }


@pytest.mark.parametrize("which", ["contrastive", "contrastive unnormalised", "snca", "multi_similarity",
                                   "multi_similarity mined"])
@pytest.mark.parametrize("seed", range(4))
def test_pairwise_equal_pytorch_metric_learning(which, seed):
    ours, theirs = peers()[which]
    z, _ = batch(24, seed=seed)
    y = torch.arange(24) // 4                                    # PML drops anchors without positives, so none here
    values, grads = [], []
    for loss in (ours, theirs):
        leaf = z.clone().requires_grad_()
        values.append(value := loss(leaf, y))
        grads.append(torch.autograd.grad(value, leaf)[0])
    assert_close(*values, rtol=0, atol=1e-9)
    assert_close(*grads, rtol=0, atol=1e-9)


def test_normalized_softmax_equals_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, y = batch(24)
    ours, theirs = NormalizedSoftmax(K, D).double(), losses.NormalizedSoftmaxLoss(K, D, temperature=.05).double()
    with torch.no_grad(): theirs.W.copy_(ours.weight.T)
    assert_close(ours(z, y), theirs(z, y), rtol=0, atol=1e-9)
    grads = [torch.autograd.grad(loss(z, y), w)[0] for loss, w in ((ours, ours.weight), (theirs, theirs.W))]
    assert_close(grads[0], grads[1].T, rtol=0, atol=1e-9)


def test_cross_entropy_equals_torch():
    z, y = batch(24)
    loss = filled(CrossEntropy(K, D, label_smoothing=.15))
    torchs = F.cross_entropy(F.linear(z, loss.weight, loss.bias), y, label_smoothing=.15)
    assert_close(loss(z, y), torchs, rtol=0, atol=1e-12)


@PROPERTY
@given(st.integers(2, 50), st.floats(0, .45), st.integers(0, 10**6))
def test_smoothing_conventions(k, eps, seed):
    "Official code: q_y = 1 - eps, others eps / (K - 1); torch: eps * K / (K - 1)."
    g = torch.Generator().manual_seed(seed)
    logits, y = torch.randn(6, k, generator=g, dtype=torch.float64), torch.randint(k, (6,), generator=g)
    q = torch.full_like(logits, eps / (k - 1)).scatter_(1, y[:, None], 1 - eps)
    exact, same = F.cross_entropy(logits, q), torch_smoothing(eps, k)
    assert_close(F.cross_entropy(logits, y, label_smoothing=same), exact, rtol=0, atol=1e-12)
    assert_close(softmax_parts(logits, y, same).total, exact, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the contract

def poor_batches(dtype):
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    twos = torch.arange(6) // 2
    return {"one sample a class": (x[:5], torch.arange(5)), "all labels equal": (x, torch.zeros(6).long()),
            "one sample": (x[:1], torch.tensor([2])), "coincident": (torch.ones_like(x), twos),
            "coincident classes": (x[[0, 0, 1, 1, 2, 2]], torch.tensor([0, 0, 1, 1, 1, 2])),
            "antipodal positives": (torch.stack([x[:3], -x[:3]], 1).flatten(0, 1), twos),
            "antipodal negatives": (torch.cat([x[:3], -x[:3]]), twos),
            "zero vectors": (torch.zeros_like(x), twos), "two equal": (torch.ones_like(x[:2]), torch.zeros(2).long()),
            "tiny": (x * 1e-6, twos), "large": (x * 1e3, twos)}


BEYOND_FLOAT16 = {"group_loss"} # who resembles nobody has a slope of 1 / floor, a million: here, as torch advises for all,
# the backward pass stays outside of float16's autocast, which would run its products in float16
HALVES = {torch.float32: [torch.bfloat16, torch.float16], torch.float64: [torch.bfloat16], # autocast, by what comes in
          torch.bfloat16: [torch.bfloat16], torch.float16: [torch.float16]}


@pytest.mark.parametrize("name, settings_", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_poor_batches_are_finite(name, settings_, dtype):
    loss = objectives.make(name, K, D, **settings_)
    for half, (case, (x, y)) in product(HALVES[dtype], poor_batches(dtype).items()):
        if case == "tiny" and dtype == torch.float16: continue      # a slope of a million does not fit float16
        if case == "large" and dtype == torch.float16 and name == "spce": continue     # nor does 1,000 / lam
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", half):
            parts = loss.parts(x, y)
            inside = half == torch.bfloat16 or name not in BEYOND_FLOAT16
            grads = gradients(parts, x) if inside else None      # the backward pass under autocast too
        grads = grads or gradients(parts, x)
        for part, grad in zip(parts, grads):
            assert part.isfinite() and part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), case
            assert grad is None or (grad.isfinite().all() and grad.dtype == dtype), case


@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_absent_parts_are_differentiable_zeros(name, settings_):
    if name not in ("contrastive", "snca", "multi_similarity", "spce") or settings_.get("self_pairs"):
        pytest.skip("its parts are never absent")
    loss, x = objectives.make(name, **settings_), torch.randn(5, D, requires_grad=True)
    T = loss.parts(x, torch.arange(5)).tightness
    assert T == 0 and T.requires_grad and torch.autograd.grad(T, x)[0].abs().max() == 0
    assert loss.counts["anchors_without_positives"] == 5 and loss.counts["anchors_without_negatives"] == 0
    C = loss.parts(x, torch.zeros(5).long()).contrast
    assert loss.counts["anchors_without_positives"] == 0 and loss.counts["anchors_without_negatives"] == 5
    if name not in ("snca", "spce"): assert C == 0 and C.requires_grad and torch.autograd.grad(C, x)[0].abs().max() == 0
    both = loss.parts(x[:1], torch.tensor([0]))
    assert both.tightness == 0 and both.contrast == 0
    assert torch.autograd.grad(both.total, x)[0].abs().max() == 0


@PROPERTY
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_counts(labels):
    y = torch.tensor(labels)
    sizes = own_class_sizes(y)
    assert sizes.tolist() == [labels.count(l) for l in labels]
    loss = SNCALoss()
    loss(torch.randn(len(labels), 3), y)
    assert loss.counts["anchors_without_positives"] == sum(labels.count(l) == 1 for l in labels)
    assert loss.counts["anchors_without_negatives"] == (len(labels) if len(set(labels)) == 1 else 0)
    assert all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in loss.counts.values())


@pytest.mark.parametrize("name, settings_", VARIANTS)
def test_forward_is_the_sum_of_the_parts(name, settings_):
    z, y = batch(16, dtype=torch.float32)
    skip_special("repeat", name, settings_)
    loss = objectives.make(name, K, D, **settings_).eval()
    parts = loss.parts(z, y)
    assert isinstance(parts, Parts) and all(p.ndim == 0 for p in parts)
    assert loss(z, y) == parts.tightness + parts.contrast


@pytest.mark.parametrize("name, settings_", VARIANTS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_order_and_names_do_not_matter(name, settings_, data):
    skip_special("order", name, settings_)
    seed = data.draw(st.integers(0, 10**6))
    z, y = batch(data.draw(st.integers(2, 12)), seed=seed)
    loss = filled(objectives.make(name, K, D, **settings_))
    order = torch.tensor(data.draw(st.permutations(range(len(y)))))
    assert_close(tuple(loss.parts(z[order], y[order])), tuple(loss.parts(z, y)), rtol=1e-9, atol=1e-10)
    rename = torch.tensor(data.draw(st.permutations(range(K))))
    before = loss.parts(z, y)
    with torch.no_grad():                                        # class k is now called rename[k], with its weights
        for weight in [*loss.parameters(), *(b for b in loss.buffers() if b.is_floating_point())]:
            if weight.shape[0] == K: weight[rename] = weight.clone()
    assert_close(tuple(loss.parts(z, rename[y])), tuple(before), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name, settings_", VARIANTS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_batches_are_computed_in_float32(name, settings_, half):
    skip_special("repeat", name, settings_)
    z, y = batch(16, dtype=half)
    loss = objectives.make(name, K, D, **settings_).eval()
    with torch.autocast("cpu", half): inside = loss.parts(z, y)
    assert tuple(inside) == tuple(loss.parts(z.float(), y))


ANGLES = ["contextual_similarity", "contrastive", "danml", "mined_triplet", "multi_similarity", "snca", "spce"]


def turned(loss, turn):
    "The objective for embeddings that are turned: whatever reads their coordinates is turned along, and what writes them."
    with torch.no_grad():
        for name, w in loss.named_parameters():
            if name.endswith(("out.weight", "narrow.weight")): w.copy_(turn.T @ w)
            elif w.ndim == 2 or name.endswith(("out.bias", "narrow.bias")): w.copy_(w @ turn)
    return loss


@PROPERTY
@given(st.sampled_from([*ANGLES, "group_loss", "intra_batch"]), st.integers(0, 10**6))
def test_rotations_and_lengths(name, seed):
    "The angular ones know no axes and no lengths; correlations and layer norms see each mean, and their logits the length."
    Z, y = batch(10, seed=seed)
    g = torch.Generator().manual_seed(seed)
    def rotation(d): return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=Z.dtype))[0]
    loss, turn = made(name, K, D).double(), rotation(D)
    with torch.no_grad():
        for w in loss.parameters():
            if w.ndim == 2: w.copy_(torch.randn(w.shape, generator=g, dtype=w.dtype))
    if name not in ANGLES:                                       # keep the axis (1, ..., 1), turn what is across it
        axes = torch.linalg.qr(torch.cat([torch.ones(D, 1).double(), torch.randn(D, D - 1, generator=g, dtype=Z.dtype)], 1))[0]
        turn = axes @ torch.block_diag(torch.ones(1, 1).double(), rotation(D - 1)) @ axes.T
    before, longer = tuple(loss.parts(Z, y)), loss(Z * (torch.rand(10, 1, generator=g, dtype=Z.dtype) + .5), y)
    assert_close(tuple(turned(loss, turn).parts(Z @ turn, y)), before, rtol=1e-9, atol=1e-9)
    assert (abs(longer - sum(before)) <= 1e-9 * (1 + abs(longer))) == (name in ANGLES)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_accurate(name):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(256) // 4
    z = (torch.randn(64, 32, generator=g)[y] + torch.randn(256, 32, generator=g)).float()
    loss, wide = objectives.make(name, 64, 32), objectives.make(name, 64, 32).double()
    wide.load_state_dict(loss.state_dict())
    a, b = z.clone().requires_grad_(), z.double().requires_grad_()
    ours, exact = loss.parts(a, y), wide.parts(b, y)
    for p, q in zip(ours, exact): assert_close(p.double(), q, rtol=2e-5, atol=2e-6)
    got, want = torch.autograd.grad(ours.total, a)[0], torch.autograd.grad(exact.total, b)[0]
    assert_close(got.double(), want, rtol=1e-3, atol=1e-6)


def test_cold_temperature_does_not_underflow():
    "At sigma = 0.005 the weights span e^400, far beyond float32: the far positive must still be felt."
    z = torch.tensor([[1., 0.], [-1., 0.], [1., .01]], requires_grad=True)
    parts = SNCALoss(temperature=.005).parts(z, torch.tensor([0, 0, 1]))
    assert_close(parts.tightness.item(), 2 / 3 / .005, rtol=1e-5, atol=0)
    assert torch.autograd.grad(SNCALoss(temperature=.005)(z, torch.tensor([0, 0, 1])), z)[0].abs().max() > 1


def test_parts_weigh_independently():
    z, y = batch()
    for loss in (ContrastiveLoss(), SNCALoss(), MultiSimilarityLoss(mining=.1), filled(CrossEntropy(K, D))):
        leaf = z.clone().requires_grad_()
        T, C = loss.parts(leaf, y)
        gT, gC = gradients((T, C), leaf)
        assert_close(torch.autograd.grad(3 * T - .5 * C, leaf)[0], 3 * gT - .5 * gC, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- center

def test_running_centers_follow_wen_and_only_in_training():
    loss, by_hand = CenterLoss(3, 2, center_rate=.5).double(), torch.zeros(3, 2, dtype=torch.float64)
    a, b = torch.tensor([[1., 2.], [3., 4.], [5., 5.]]).double(), torch.tensor([0, 0, 1])
    loss(a, b)
    by_hand[0], by_hand[1] = a[:2].mean(0), a[2]                 # first sight: the batch mean
    assert_close(loss.means, by_hand)
    loss(-a, b)
    by_hand[0] += .5 * (-a[:2] - by_hand[0]).sum(0) / 3
    by_hand[1] += .5 * (-a[2] - by_hand[1]) / 2
    assert_close(loss.means, by_hand)
    with torch.no_grad(): loss(a, b)
    loss.eval()(a, b)
    assert_close(loss.means, by_hand)
    copy = CenterLoss(3, 2).double()
    copy.load_state_dict(loss.state_dict())
    assert_close(copy.eval()(a, b), loss(a, b))


def test_center_identity_with_contrastive():
    "T_contrastive = 2/n sum_k n_k sum_i |z_i - c_k|^2 (core identity, unbalanced too)."
    z, y = batch(20, seed=5)
    T = ContrastiveLoss(normalize=False).parts(z, y).tightness
    total = sum(2 / 20 * (y == k).sum().item() * (z[y == k] - z[y == k].mean(0)).square().sum() for k in y.unique())
    assert_close(T, total, rtol=1e-10, atol=0)


def test_spce_does_not_see_absent_classes():
    "The value depends on the classes of the batch alone, whatever their numbers and however many others there are."
    z, y = batch(14, seed=1007)
    renamed = torch.tensor([903, 17, 5, 440, 12])[y]
    for options in ({}, dict(self_pairs=True), dict(normalize=False, lam=.5)):
        a, b = (objectives.make("spce", k, D, **options).parts(z, labels) for k, labels in ((K, y), (1000, renamed)))
        assert_close(list(a), list(b), rtol=0, atol=1e-12)


def test_spce_is_cross_entropy_of_the_class_sums():
    z, y = batch(20, seed=1003)
    y = y.unique(return_inverse=True)[1]
    for lam in (1., .1, .01):
        sums = torch.stack([z[y == k].sum(0) for k in range(int(y.max()) + 1)]) / (lam * len(y))
        assert_close(SPCELoss(lam=lam, self_pairs=True, normalize=False)(z, y), F.cross_entropy(z @ sums.T, y), rtol=1e-12, atol=1e-12)


@PROPERTY
@given(st.lists(st.integers(-3, 300), min_size=1, max_size=15))
def test_batch_classes_numbers_without_gaps(labels):
    y = torch.tensor(labels)
    assert batch_classes(y).tolist() == y.unique(return_inverse=True)[1].tolist()


# ---------------------------------------------------------------- names, options, protocol

def every_option():
    "OTHER with the ranking losses, whose module imports this one, and what is put behind a miner."
    import test_mining, test_ranking
    return OTHER | test_ranking.OTHER | test_mining.OTHER


def test_catalogue_and_static_location_agree():
    table, other = protocol.catalogue(), every_option()
    assert list(table) == sorted(other) and {n: e.path for n, e in table.items()} == protocol.locate()
    for name, entry in table.items():
        assert set(entry.defaults) == set(other[name]), f"{name}: the tests do not try every option"
        kinds = set(objectives.make(name, K, D).param_groups())
        assert kinds <= set(entry.own) and bool(kinds) == bool(entry.own)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_the_loss(name):
    torch.manual_seed(0)                                         # sub-centres start at random, and the guard must be met
    for option, value in OTHER[name].items():
        if "change" in SPECIAL.get((name, option), {}): continue
        base = dict(label_smoothing=.1) if option == "smoothing" else {}
        if option == "reduction" and name == "multi_similarity": base = dict(mining=0.)
        z, y = batch(14, seed=2)
        y[y == 4] = torch.arange(4, 4 + (y == 4).sum()).clamp_max(4)
        y[0] = 4
        y[1:] %= 4                                               # class 4 has one member
        a, b = (objectives.make(name, K, D, **base, **extra).double() for extra in ({}, {option: value}))
        shapes = {k: v.shape for k, v in b.state_dict().items()}
        b.load_state_dict({k: v for k, v in a.state_dict().items() if shapes.get(k) == v.shape}, strict=False)
        results = []
        for loss in (a, b):
            with torch.no_grad():
                if hasattr(loss, "weight"):
                    loss.weight.copy_(torch.linspace(-7, 7, K * D).sin().view(K, D).double())
                    z[0] = -loss.weight[y[0]] - 1                # beyond pi - m, where ArcFace has its guard
                if getattr(loss, "bias", None) is not None: loss.bias.copy_(torch.linspace(0, 1, K).double())
            loss(z, y), results.append(loss(z + 1, y).item())    # twice, so that running centres have moved
        assert abs(results[0] - results[1]) > 1e-6, option


@pytest.mark.parametrize("call, words", [
    (lambda: objectives.make("snac"), ["'snac'", "did you mean 'snca'", "Known: snca", "cross_entropy"]),
    (lambda: objectives.make("zzzz"), ["'zzzz'", "almn, angular"]),
    (lambda: objectives.make("snca", temprature=1), ["option of snca 'temprature'", "'temperature'", "self_pairs"]),
    (lambda: objectives.make("cross_entropy"), ["num_classes", "None"]),
    (lambda: objectives.make("normalized_softmax", 3), ["dim", "None"]),
    (lambda: objectives.make("center", 3), ["CenterLoss", "dim"]),
    (lambda: objectives.make("snca", temperature=0), ["temperature", "0"]),
    (lambda: objectives.make("spce", lam=0), ["lam", "0"]),
    (lambda: objectives.make("contrastive", reduction="mean"), ["reduction 'mean'", "anchor", "nonzero"]),
    (lambda: objectives.make("contrastive", margin=-1), ["margin", "-1"]),
    (lambda: objectives.make("multi_similarity", mining=-.1), ["mining", "-0.1"]),
    (lambda: objectives.make("center", 3, 2, centers="bach"), ["centers 'bach'", "did you mean 'batch'"]),
    (lambda: objectives.make("cross_entropy", 3, 2, label_smoothing=1.), ["label_smoothing", "1.0"]),
    (lambda: objectives.make("cross_entropy", 3, 2, smoothing="uniform"), ["smoothing 'uniform'", "paper", "torch"]),
    (lambda: objectives.make("margin", 4, learn="sample", num_samples=-1), ["num_samples=-1", "Its defaults: margin=0.2"]),
    (lambda: objectives.make("mined", miner="multi_similarity", miner_options={"epsilon": "no"}), ["epsilon", "a number", "'no'", "0.1"]),
    (lambda: objectives.make("mined", base_options={"normalize": "no"}), ["normalize", "True or False", "'no'"]),
    (lambda: objectives.make("mined", base_options="no"), ["base_options", "a dictionary", "'no'"]),
    (lambda: objectives.make("regularised", 3, 2, base="contrastive", base_options={"positive_margin": "x"}), ["positive_margin", "'x'"]),
    (lambda: objectives.make("multi_similarity", threshold=float("inf")), ["threshold", "finite", "inf", "0.5"]),
    (lambda: objectives.make("contrastive", positive_margin=2.), ["positive_margin", "below 2", "2.0", "0.0"]),
    (lambda: objectives.make("circle", margin=2.5), ["margin", "below 2", "2.5", "0.4"]),
    (lambda: objectives.make("snca", temperature=-1), ["-1", "the default is 0.1"]),
    (lambda: objectives.make("snca")(torch.ones(2, 2).numpy(), torch.arange(2)), ["embeddings", "ndarray", "torch.as_tensor"]),
    (lambda: objectives.make("snca")(torch.ones(2, 2), [0, 1]), ["labels", "list", "torch.as_tensor"]),
    (lambda: objectives.make("n_pair")(torch.ones(2, 0), torch.arange(2)), ["no columns", "(2, 0)", "encoder"]),
    (lambda: CrossEntropy(3, 2)(torch.ones(2, 2), torch.tensor([0, 3])), ["3", "0 to 2"]),
    (lambda: CenterLoss(3, 2)(torch.ones(2, 2), torch.tensor([-1, 0])), ["-1", "0 to 2"]),
    (lambda: NormalizedSoftmax(3, 2)(torch.ones(2, 2), torch.tensor([9, 0])), ["9", "0 to 2"]),
    (lambda: SNCALoss()(torch.ones(3), torch.arange(3)), ["(n, d)", "(3,)"]),
    (lambda: SNCALoss()(torch.ones(3, 2).long(), torch.arange(3)), ["floating point", "int64"]),
    (lambda: SNCALoss()(torch.ones(3, 2), torch.ones(3)), ["integers", "float32"]),
    (lambda: SNCALoss()(torch.ones(3, 2), torch.eye(3).long()), ["(n,)", "one-hot"]),
    (lambda: SNCALoss()(torch.ones(3, 2), torch.arange(4)), ["3 embeddings", "4 labels"]),
    (lambda: SNCALoss()(torch.ones(0, 2), torch.arange(0)), ["empty"]),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError) as e: call()
    for word in words: assert word in str(e.value)


TABLE = protocol.catalogue()


def made(name, *sizes, **given):
    "The class itself, without the checks of `objectives.make`."
    module, cls = TABLE[name].path.split(":")
    return getattr(import_module(module), cls)(*sizes, **given)


def wrong_values(default):
    "Not a number, a word, and a float where a whole number or a switch belongs."
    return ["x", nan] + ([1.] if isinstance(default, bool) else [default + .5] if isinstance(default, int) else [])


@pytest.mark.parametrize("name, option", [pytest.param(n, o, id=f"{n}-{o}") for n, e in TABLE.items() for o in e.defaults])
def test_no_option_takes_a_value_of_another_kind(name, option):
    for value in wrong_values(TABLE[name].defaults[option]):
        with pytest.raises(ValueError) as e: made(name, K, D, **{option: value})
        assert (option in str(e.value) or "unknown o" in str(e.value)) and repr(value) in str(e.value)


OWNERS = [n for n, e in TABLE.items() if e.own and n not in ("margin", "mined")]     # these own distances, no vectors


@pytest.mark.parametrize("name", OWNERS)
def test_embeddings_of_another_dimension_are_refused(name):
    for width in (1, D - 1, D + 1):
        for call in (made(name, K, D), made(name, K, D).parts):
            with pytest.raises(ValueError) as e: call(torch.ones(4, width), torch.tensor([0, 0, 1, 1]))
        assert f"{width} columns" in str(e.value) and f"dim={D}" in str(e.value) and f"dim={width}" in str(e.value)


@pytest.mark.parametrize("name", OWNERS)
def test_sizes_are_whole_numbers(name):
    for sizes in ((2.5, D), (-1, D), (K, 2.5), (K, -1), ("x", D), (K, nan)):
        with pytest.raises(ValueError) as e: made(name, *sizes)
        assert ("num_classes" if sizes[1] == D else "dim") in str(e.value) and "whole number of at least 1" in str(e.value)


@pytest.mark.parametrize("name", sorted(protocol.locate()))
def test_what_is_no_tensor_is_refused_by_parts_too(name):
    z, y = batch(12, D, K)
    for bad in ((z.numpy(), y), (z, y.tolist())):
        with pytest.raises(ValueError, match="must be a tensor, got .*torch.as_tensor"): made(name, K, D).parts(*bad)


def test_labels_out_of_range_say_what_to_do():
    with pytest.raises(ValueError, match="from 0 to 7, but there are 3 classes: 0 to 2; number the classes from 0 .*build the objective with more"):
        objectives.make("softmax", 3, D)(torch.randn(2, D), torch.tensor([0, 7]))


def fitting(name):
    "A base with options that leave the choice to a miner."
    return made(name, K, D, **{"n_pair": {"pairs": "all"}, "multi_similarity": {"mining": None}, "snr": {"form": "triplet"}}.get(name, {}))


@pytest.mark.parametrize("miner", ("semihard_all", "distance_weighted"))
def test_a_miner_s_indices_are_a_third_argument_as_in_pytorch_metric_learning(miner):
    "For every base the same number and gradient as `make('mined', base=...)`; for all others a sentence."
    from dml_companion.losses.mined import BASES
    from dml_companion.mining import make_miner
    z, y = batch(24, D, K)
    told = make_miner(miner)(z, y)
    for name in BASES:
        x, w = (z.clone().requires_grad_() for _ in range(2))
        torch.manual_seed(0)                                                     # the quadruplet loss draws a stranger
        ours = fitting(name)(x, y, told)
        torch.manual_seed(0)
        wrapped = objectives.make("mined", K, D, base=fitting(name), miner=None)(w, y, told)
        ours.backward(); wrapped.backward()
        assert_close(ours, wrapped, rtol=0, atol=0); assert_close(x.grad, w.grad, rtol=0, atol=0)
        if name not in ("margin",): assert ours != fitting(name)(z, y), name
    for name in sorted(set(protocol.locate()) - set(BASES) - {"mined"}):
        with pytest.raises(ValueError, match="train it without a miner"): objectives.make(name, K, D)(z, y, told)


@pytest.mark.parametrize("bad", (nan, float("inf")))
@pytest.mark.parametrize("name", sorted(protocol.locate()))
def test_a_diverged_embedding_shows_in_the_loss(name, bad):
    "A loss that hides it lets a training run go on with weights that are no numbers."
    z, y = batch(12, 8, 4)
    z[3, 2] = bad
    assert not objectives.make(name, 4, 8)(z.float(), y).isfinite()


def test_a_diverged_embedding_shows_in_a_mined_loss():
    from dml_companion.losses.mined import BASES
    from dml_companion.mining import make_miner
    z, y = batch(12, 8, 4)
    mined = make_miner("semihard_all")(z, y)                                     # chosen before anything went wrong
    assert 3 in torch.cat(tuple(mined))
    z[3, 2] = nan
    for base in BASES:
        options = dict(pairs="all") if base == "n_pair" else {}
        assert objectives.make("mined", base=base, base_options=options, miner=None)(z.float(), y, mined).isnan(), base


def test_known_names_come_nearest_first():
    with pytest.raises(ValueError) as e: objectives.make("centre")
    assert str(e.value).split("Known: ")[1].startswith("center")


def test_a_user_objective_can_be_made_by_name():
    @register("mean_norm", "demo", "-")
    class MeanNorm(Objective):
        def __init__(self, num_classes=None, dim=None, *, scale=1.):
            super().__init__(num_classes, dim); self.scale = scale
        def split(self, z, y): return Parts(self.scale * z.norm(dim=1).mean(), z.new_zeros(()))
    globals()["MeanNorm"] = MeanNorm
    MeanNorm.__qualname__ = "MeanNorm"
    protocol.CATALOGUE["mean_norm"] = protocol.CATALOGUE["mean_norm"]._replace(path=f"{__name__}:MeanNorm")
    try:
        assert objectives.make("mean_norm", scale=2.)(torch.ones(2, 4), torch.arange(2)) == 4
        with pytest.raises(ValueError, match="already"): register("mean_norm", "demo", "-")(SNCALoss)
    finally: del protocol.CATALOGUE["mean_norm"]


def test_weights_have_a_kind():
    for name in NAMES:
        loss = objectives.make(name, K, D)
        assert sum(map(len, loss.param_groups().values())) == len(list(loss.parameters()))
    assert set(CenterLoss(K, D, centers="learned").param_groups()) == {"classifier", "proxies"}
    class Forgot(Objective):
        def __init__(self): super().__init__(); self.weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="Forgot.weight"): Forgot().param_groups()


def test_unit_rows_equals_normalize():
    x = torch.randn(9, 5, dtype=torch.float64)
    x[3] = 0
    a, b, g = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn_like(x)
    assert_close(unit_rows(a), normalize(b), rtol=0, atol=1e-14)
    unit_rows(a).backward(g), normalize(b).backward(g)
    assert_close(a.grad, b.grad, rtol=0, atol=1e-13)
    for scale in (1e-30, 1e-11, 1e30): assert unit_rows(torch.full((2, 3), scale)).isfinite().all()


def test_labels_of_any_integer_type():
    z, y = batch()
    for dtype in (torch.int32, torch.int16, torch.uint8): assert SNCALoss()(z, y.to(dtype)) == SNCALoss()(z, y)


def test_import_is_light_and_make_imports_one_module():
    code = """if 1:
        import sys
        import torch
        import dml_companion.objectives as o
        o.make("cross_entropy", 3, 2)
        heavy = {"torchvision", "accelerate", "matplotlib", "pandas", "sklearn", "PIL", "pydantic", "nbdev"}
        heavy &= set(sys.modules)
        assert not heavy, heavy
        assert "dml_companion.losses.pairwise" not in sys.modules
        import dml_companion.losses.pairwise
        from dml_companion.objective import locate
        print(len(locate()))"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip() == str(len(every_option())), out.stderr


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")     # in pytorch-metric-learning
def test_benchmark_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    pytest.importorskip("pandas"), pytest.importorskip("matplotlib"), pytest.importorskip("pytorch_metric_learning")
    from benchmarks.bench_losses import main, targets
    from benchmarks.contenders import CONTENDERS, EXEMPT, PANELS
    assert {c.name for c in CONTENDERS.values()} >= set(protocol.locate()) and {c.panel for c in CONTENDERS.values()} == set(PANELS)
    threads = torch.get_num_threads()
    main(tmp_path, sizes=(16, 32), threads=1, seconds=.01)
    assert torch.get_num_threads() == threads
    assert {f.name for f in tmp_path.iterdir()} == {
        *(f"losses.{kind}" for kind in ("csv", "md", "svg", "png")), "losses_peers.svg", "losses_peers.png", "losses_targets.csv"}
    import pandas as pd
    table = pd.read_csv(tmp_path / "losses.csv")
    assert list(table.objective) == [*CONTENDERS] * 2 and sorted(table.batch.unique()) == [16, 32]
    assert (table.ours_ms > 0).all() and (table.times_floor > 0).all()
    assert table.peer_times_ours.notna().sum() == 2 * sum(c.peer is not None for c in CONTENDERS.values())
    text = (tmp_path / "losses.md").read_text()
    assert "torch 2." in text and "cores" in text and "/" + "work" not in text
    written = pd.read_csv(tmp_path / "losses_targets.csv").set_index("batch").verdict
    assert set(written.get(512)) == {"not measured"} and {16., 32., 512.} == {*written.index.dropna()}    # no B = 512 here
    row = dict(batch=512, times_floor=2.1, best_times_floor=2.1, peer_times_ours=499., best_peer_times_ours=499., peer="lifted",
               peer_times_floor=1000., times_autograd=1.)
    made = pd.DataFrame([dict(row, objective="lifted"), dict(row, objective="circle", times_floor=1.9, best_times_floor=1.9),
                         dict(row, objective="histogram", peer_times_ours=.9, best_peer_times_ours=.9, ours_ms=3., floor_ms=1.)])
    found = targets(made).set_index(["objective", "kind"])
    verdict = {name: tuple(found.verdict[name, kind] for kind in ("peer / ours", "ours / floor"))
               for name in ("lifted", "circle", "histogram")}
    assert verdict == {"lifted": ("not met", "not met"), "circle": ("met", "met"), "histogram": ("not met", "exempt")}
    assert found.why["histogram", "ours / floor"] == EXEMPT["histogram"]


def test_benchmark_peers_mean_the_same(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    pytest.importorskip("pytorch_metric_learning")
    from benchmarks.contenders import PAIRWISE, make_batch, make_peers, peer_bytes
    (z, y), theirs = make_batch(24), make_peers()
    compared = [label for label, c in PAIRWISE.items() if c.peer and c.peer != "margin mined"]            # which draws
    assert len(compared) > 10
    for label in compared:
        c = PAIRWISE[label]
        assert_close(c.make()(z, y), theirs[c.peer](z, y), rtol=1e-3, atol=1e-5, msg=lambda m: f"{label}: {m}", check_dtype=False)
    assert peer_bytes("lifted", 1024) > 50e9 and peer_bytes("lifted", 128) < 1e9 and peer_bytes("circle", 4096) == 0 and peer_bytes("snr", 4096) > 100e9


def test_benchmark_of_memory_and_of_compilation(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    pytest.importorskip("pandas")
    from benchmarks import bench_compile, bench_memory
    import pandas as pd
    bench_memory.main(tmp_path, size=32, labels=("contrastive", "no such loss"), threads=1)
    table = pd.read_csv(tmp_path / "memory.csv").set_index("objective")
    assert table.verdict.to_dict() == {"contrastive": "met", "no such loss": "failed"}
    assert 0 < table.torch_gb["contrastive"] < .1 and "KeyError" in table.why["no such loss"]
    assert bench_memory.verdict(dict(resident_gb=4.1, limit_gb=4.)) == "not met"
    bench_compile.main(tmp_path, size=16, labels=("softmax", "contrastive"))
    table = pd.read_csv(tmp_path / "compile.csv").set_index("objective")
    assert (table.equal == "yes").all() and (table.breaks >= 0).all()
    assert {f.name for f in tmp_path.iterdir()} == {f"{n}.{kind}" for n in ("memory", "compile") for kind in ("csv", "md")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_no_wait_for_the_gpu(name):
    z, y = (t.cuda() for t in batch(64, dtype=torch.float32))
    loss = objectives.make(name, K, D).cuda()
    loss(z.requires_grad_(), y).backward()
    torch.cuda.set_sync_debug_mode("error")
    try: loss(z, y).backward()
    finally: torch.cuda.set_sync_debug_mode("default")
