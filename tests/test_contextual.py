"""Contextual objectives: loops as oracles, what is published, no leak of the batch into evaluation."""
from math import exp, log

import pytest, torch
import torch.nn.functional as F
from torch.testing import assert_close

from dml_companion import objectives
from dml_companion.losses.contextual import (ContextualSimilarityLoss, GroupLoss, IntraBatchLoss, MessagePassing, class_ranks,
                                             contextual_similarity, correlations)
from dml_companion.objective import unit_rows

# For test_objectives: every option at a value that is not its default, and the oracle of each name.
OTHER = {
    "group_loss": dict(anchors=1, choose="confident", steps=3, temperature=2., auxiliary=.5, self_pairs=True, bias=False),
    "intra_batch": dict(layers=2, heads=1, temperature=.5, auxiliary=.3, label_smoothing=.3, bias=False),
    "contextual_similarity": dict(neighbours=2, slack=.3, context_weight=.2, mean_weight=.3, mean_similarity=.6,
                                  positive_margin=.95, negative_margin=.2, step="sigmoid"),
}
K, D = 5, 4


def batch(n=12, d=D, classes=K, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


def filled(loss, seed=1):
    g = torch.Generator().manual_seed(seed)
    loss = loss.double().eval()
    with torch.no_grad():
        for w in loss.parameters(): w.copy_(torch.randn(w.shape, generator=g, dtype=torch.float64))
    return loss


# ---------------------------------------------------------------- oracles

def softmax_loop(logits, y, eps=0.):
    n, k, T, C = *logits.shape, 0., 0.
    for i in range(n):
        for c in range(k): T -= ((1 - eps) * (c == y[i].item()) + eps / k) * logits[i, c].item() / n
        C += logits[i].logsumexp(0).item() / n
    return T, C


def group_loop(loss, Z, y):
    "By hand, in probabilities; in evaluation the anchors are the most confident of each class."
    n, logits = len(y), Z @ loss.weight.T + (0 if loss.bias is None else loss.bias)
    P, centred = (logits / loss.temperature).softmax(1), Z - Z.mean(1, keepdim=True)
    W = [[max((centred[i] @ centred[j] / centred[i].norm() / centred[j].norm()).item(), 0) if i != j or loss.self_pairs else 0.
          for j in range(n)] for i in range(n)]
    anchors = set()
    for k in set(y.tolist()):
        mine = sorted((i for i in range(n) if y[i] == k), key=lambda i: -P[i, k].item())
        anchors |= set(mine[:min(loss.anchors, len(mine) - 1)])
    X = [[float(k == y[i]) if i in anchors else P[i, k].item() for k in range(P.shape[1])] for i in range(n)]
    for _ in range(loss.steps):
        U = [[X[i][k] * (sum(W[i][j] * X[j][k] for j in range(n)) + 1e-6) for k in range(P.shape[1])] for i in range(n)]
        X = [[u / sum(row) for u in row] for row in U]
    scored = [i for i in range(n) if i not in anchors]
    T, C = softmax_loop(logits, y)
    return [sum(-log(U[i][y[i]]) for i in scored) / len(scored) + loss.auxiliary * T,
            sum(log(sum(U[i])) for i in scored) / len(scored) + loss.auxiliary * C]


def refine_loop(layer, Z):
    n, size, heard = len(Z), Z.shape[1] // layer.heads, torch.zeros_like(Z)
    for h in range(layer.heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(n):
            e = [exp((layer.query(Z[i])[part] @ layer.key(Z[j])[part]).item() / size ** .5) for j in range(n)]
            heard[i, part] = sum(e[j] / sum(e) * layer.value(Z[j])[part] for j in range(n))
    h = layer.first(Z + layer.out(heard))
    return layer.second(h + layer.narrow(layer.widen(h).relu()))


def intra_loop(loss, Z, y):
    refined = Z
    for layer in loss.layers: refined = refine_loop(layer, refined)
    logits = refined @ loss.weight.T + (0 if loss.bias is None else loss.bias)
    pairs = [softmax_loop(x / loss.temperature, y, loss.label_smoothing) for x in (logits, Z @ loss.plain.T)]
    return [r + loss.auxiliary * p for r, p in zip(*pairs)]


def neighbours_loop(S, k, slack, soft):
    "By sets where counts are whole, by the same sums over soft indicators where they are not."
    n, D2 = len(S), [[max(2 - 2 * s, 0.) for s in row] for row in S.tolist()]
    def near(k):
        level = [sorted(row)[min(k, n) - 1] + slack for row in D2]
        return [[1 / (1 + exp(-40 * (level[i] - D2[i][j]))) if soft else float(D2[i][j] <= level[i]) for j in range(n)] for i in range(n)]
    N, H = near(k), near(max(min(k, n) // 2, 1))
    def w(i, j):
        both, out = sum(a * b for a, b in zip(N[i], N[j])), sum((1 - a) * (1 - b) for a, b in zip(N[i], N[j]))
        return N[i][j] / 2 * (both / sum(N[i]) + out / max(n - sum(N[i]), 1))
    table = [[w(i, j) for j in range(n)] for i in range(n)]
    R = [[H[i][j] * H[j][i] for j in range(n)] for i in range(n)]
    v = [[sum(R[i][l] * table[l][j] for l in range(n)) / sum(R[i]) for j in range(n)] for i in range(n)]
    return [[(v[i][j] + v[j][i]) / 2 for j in range(n)] for i in range(n)]


def context_loop(loss, Z, y):
    n, S = len(y), unit_rows(Z) @ unit_rows(Z).T
    J = neighbours_loop(S, loss.neighbours, loss.slack, loss.step == "sigmoid")
    pairs = [(i, j, bool(y[i] == y[j])) for i in range(n) for j in range(n) if i != j]
    lam, rest = loss.context_weight, 1 - loss.context_weight - loss.mean_weight
    hinge = {True: [max(loss.positive_margin - S[i, j].item(), 0) for i, j, same in pairs if same],
             False: [max(S[i, j].item() - loss.negative_margin, 0) for i, j, same in pairs if not same]}
    mean = {same: sum(h) / max(sum(x > 0 for x in h), 1) for same, h in hinge.items()}
    T = lam * sum((1 - J[i][j]) ** 2 for i, j, same in pairs if same) / n ** 2 + rest * mean[True]
    C = lam * sum(J[i][j] ** 2 for i, j, same in pairs if not same) / n ** 2 + rest * mean[False]
    return [T, C + loss.mean_weight * (S.mean().item() - loss.mean_similarity) ** 2]


LOOPS = {"group_loss": group_loop, "intra_batch": intra_loop, "contextual_similarity": context_loop}


# ---------------------------------------------------------------- group loss

@pytest.mark.parametrize("name", OTHER)
def test_all_options_together_equal_the_loop(name):
    Z, y = batch(seed=4)
    loss = filled(objectives.make(name, K, D, **OTHER[name]))
    with torch.no_grad(): assert_close([p.item() for p in loss.parts(Z, y)], LOOPS[name](loss, Z, y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["group_loss", "intra_batch"])
def test_gradcheck_of_the_weights(name):
    Z, y = batch(6)
    loss = filled(objectives.make(name, K, D))
    names, values = zip(*loss.named_parameters())
    def run(*weights): return tuple(torch.func.functional_call(loss, dict(zip(names, weights)), (Z, y)).unsqueeze(0))
    assert torch.autograd.gradcheck(run, [v.detach().requires_grad_() for v in values], fast_mode=True)


def test_anchors_are_the_first_in_training_and_never_a_whole_class():
    y = torch.tensor([2, 0, 2, 0, 2, 1, 0])
    assert class_ranks(y, torch.tensor([3., 1, 9, 2, 5, 0, 7])).tolist() == [2, 2, 0, 1, 1, 0, 0]
    loss, log_x = GroupLoss(3, D), torch.tensor([.1, .2, .7, .3, .4, .5, .9])[:, None].expand(7, 3)
    assert loss.certain(y, log_x).tolist() == [True, True, True, True, False, False, False]
    assert loss.eval().certain(y, log_x).tolist() == [False, False, True, True, True, False, True]
    Z, _ = batch(7)
    loss(Z.float(), y)
    assert loss.counts["labelled_anchors"] == 4 and loss.counts["anchors_without_positives"] == 1
    assert GroupLoss(3, D, anchors=0).certain(y, log_x).sum() == 0


def test_who_resembles_nobody_keeps_the_own_opinion():
    "Orthogonal after centring, so that no correlation is positive: one step changes nothing, and nothing is NaN."
    Z = torch.tensor([[1., -1, 0, 0], [-1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    y = torch.arange(3)
    loss = filled(GroupLoss(3, D, auxiliary=0, temperature=2.))
    assert_close(loss(Z, y), F.cross_entropy(loss.logits(Z) / 2, y), rtol=0, atol=1e-12)
    assert torch.autograd.grad(loss(Z, y), Z)[0].isfinite().all()


def test_correlations_are_pearsons():
    Z, _ = batch(8)
    assert_close(correlations(Z, True), torch.corrcoef(Z).relu(), rtol=0, atol=1e-12)
    assert correlations(Z).diagonal().abs().max() == 0


# ---------------------------------------------------------------- intra-batch

@pytest.mark.parametrize("name", OTHER)
def test_evaluation_does_not_depend_on_the_batch(name):
    "After training through the context, the encoder alone embeds: any company, any order, the same vector."
    torch.manual_seed(0)
    encoder, loss = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, D)), objectives.make(name, K, D)
    start = encoder[0].weight.detach().clone()
    x, y = torch.randn(40, 6), torch.arange(40) % K
    sgd = torch.optim.SGD([*encoder.parameters(), *loss.parameters()], lr=.1)
    for _ in range(5):
        rows = torch.randperm(40)[:20]
        sgd.zero_grad(); loss(encoder(x[rows]), y[rows]).backward(); sgd.step()
    assert (encoder[0].weight - start).abs().max() > 1e-4
    encoder.eval()
    with torch.no_grad():
        together, order = encoder(x), torch.randperm(40)
        assert_close(encoder(x[order]), together[order], rtol=1e-5, atol=1e-6)
        assert_close(torch.cat([encoder(row[None]) for row in x]), together, rtol=1e-5, atol=1e-6)
        assert_close(encoder(torch.cat([x[:3], 100 * x[3:9]]))[:3], together[:3], rtol=1e-5, atol=1e-6)
        if name == "intra_batch":                                    # which is no matter of course: the refined ones do
            assert (loss.refine(together[:3]) - loss.refine(together)[:3]).abs().max() > 1e-2


def test_messages_are_torchs_transformer_layer():
    torch.manual_seed(0)
    ours = MessagePassing(8, 2).double()
    peer = torch.nn.TransformerEncoderLayer(8, 2, 32, dropout=0., batch_first=True).double()
    with torch.no_grad():
        peer.self_attn.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        peer.self_attn.in_proj_bias.zero_()
        for mine, theirs in ((ours.out, peer.self_attn.out_proj), (ours.widen, peer.linear1), (ours.narrow, peer.linear2)):
            theirs.weight.copy_(mine.weight); theirs.bias.copy_(mine.bias)
    Z, _ = batch(9, 8)
    assert_close(ours(Z), peer(Z[None])[0], rtol=0, atol=1e-12)


def test_gradient_reaches_the_others():
    Z, y = batch(6)
    loss, leaf = filled(IntraBatchLoss(K, D)), Z.clone().requires_grad_()
    grad, = torch.autograd.grad(loss.refine(leaf)[0].square().sum() + loss.refine(leaf)[0, 0], leaf)
    assert (grad[1:].abs().amax(1) > 1e-9).all()


# ---------------------------------------------------------------- contextual similarity

def test_similarity_of_neighbourhoods():
    y = torch.arange(12) // 4
    S = (y[:, None] == y).double()                                   # three tight classes, far apart: 1 inside, 0 outside
    assert_close(contextual_similarity(S), S, rtol=0, atol=1e-12)
    x = unit_rows(batch(20, 3)[0])
    for step in ("straight_through", "sigmoid"):
        J = contextual_similarity(x @ x.T, step=step)
        assert_close(J, J.T, rtol=0, atol=1e-12)
        assert 0 <= J.min() and J.max() <= 1 + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_gradient_is_the_straight_through_one(seed):
    "A step with the slope of a line; thresholds and the first two denominators constant, all products written out."
    Z, y = batch(16, seed=seed)
    def line(x): return (x >= 0).to(x.dtype) + 10 * (x - x.detach())
    def published(z):
        near = -(2 - 2 * z @ z.T)
        best = near.detach().topk(4, 1).values
        N, H = line(near + .05 - best[:, 3:]), line(near + .05 - best[:, 1:2])
        M = 1 - N
        w = .5 * (N @ N.T / N.detach().sum(1, keepdim=True) + M @ M.T / M.detach().sum(1, keepdim=True)) * N
        R = H * H.T
        v = R @ w / R.sum(1, keepdim=True)
        return (v + v.T) / 2
    grads = []
    for form in (published, lambda z: contextual_similarity(z @ z.T)):
        leaf = Z.clone().requires_grad_()
        J = form(unit_rows(leaf))                                    # which also drops what the diagonal's rounding clamps
        grads.append((J.detach(), torch.autograd.grad(((y[:, None] == y).double() - J).square().sum(), leaf)[0]))
    assert_close(*grads, rtol=0, atol=1e-10)
    assert grads[0][1].abs().max() > 1e-3


def test_smooth_step_is_differentiated_exactly():
    Z, y = batch(8, seed=2)
    assert torch.autograd.gradcheck(lambda Z: tuple(ContextualSimilarityLoss(step="sigmoid").parts(Z, y)), Z.requires_grad_())


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("name, options, words", [
    ("group_loss", dict(steps=0), ["steps", "0"]), ("group_loss", dict(steps=1.5), ["whole", "1.5"]),
    ("group_loss", dict(anchors=-1), ["anchors", "-1"]), ("group_loss", dict(auxiliary=-.5), ["auxiliary", "-0.5"]),
    ("group_loss", dict(choose="firts"), ["choose 'firts'", "did you mean 'first'"]), ("group_loss", dict(temperature=0), ["temperature"]),
    ("intra_batch", dict(heads=3), ["multiple", "4", "3"]), ("intra_batch", dict(heads=0), ["heads", "0"]),
    ("intra_batch", dict(layers=0), ["layers", "0"]), ("intra_batch", dict(label_smoothing=1.), ["label_smoothing", "1.0"]),
    ("intra_batch", dict(auxiliary=-1), ["auxiliary", "-1"]),
    ("contextual_similarity", dict(neighbours=0), ["neighbours", "0"]), ("contextual_similarity", dict(slack=-.1), ["slack", "-0.1"]),
    ("contextual_similarity", dict(context_weight=.8, mean_weight=.3), ["at most 1", "0.8 + 0.3"]),
    ("contextual_similarity", dict(step="hard"), ["step 'hard'", "sigmoid"]),
    ("contextual_similarity", dict(slack=float("nan")), ["slack", "nan", "0 to 4"]),
    ("contextual_similarity", dict(mean_similarity=2), ["mean_similarity", "2", "cosine"]),
    ("group_loss", dict(anchors=float("nan")), ["anchors", "nan", "at least 0"]),
    ("group_loss", dict(auxiliary=float("nan")), ["auxiliary", "nan", "0 leaves"]),
    ("intra_batch", dict(layers=1.5), ["layers", "1.5", "whole"]), ("intra_batch", dict(heads=3), ["heads=1", "divisor"])])
def test_options_out_of_range(name, options, words):
    with pytest.raises(ValueError) as e: objectives.make(name, K, D, **options)
    for word in words: assert word in str(e.value)


@pytest.mark.parametrize("name", ["group_loss", "intra_batch"])
def test_labels_out_of_range(name):
    with pytest.raises(ValueError, match="0 to 4"): objectives.make(name, K, D)(torch.ones(2, D), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="num_classes"): objectives.make(name)
