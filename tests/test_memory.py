"""Memory: the queue, losses between two sets, gathering over processes, cross-entropy over chunks of classes."""
import copy
from functools import partial

import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dml_companion.losses.classification import CrossEntropy, softmax_parts
from dml_companion.losses.pairwise import MultiSimilarityLoss, SNCALoss
from dml_companion.memory import (ACROSS, ChunkedCrossEntropy, CrossBatchMemory, EmbeddingQueue, across, chunk_size,
                                  chunked_softmax_parts, contrastive_across, gather, multi_similarity_across, peak_bytes,
                                  snca_across, streamed)
from dml_companion.objective import unit_rows

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def batch(n=12, d=4, classes=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=dtype), torch.randint(classes, (n,), generator=g)


# ---------------------------------------------------------------- the queue

@PROPERTY
@given(st.integers(1, 7), st.lists(st.integers(1, 10), max_size=6))
def test_queue_keeps_the_last(size, pushes):
    queue, all_, count = EmbeddingQueue(size, 1), [], 0
    for n in pushes:
        x = torch.arange(count, count + n).float()[:, None]
        queue.push(x, x[:, 0].long())
        all_, count = all_ + x[:, 0].tolist(), count + n
        z, y = queue.read()
        assert sorted(y.tolist()) == sorted(all_[-size:]) and z[:, 0].tolist() == y.tolist() and len(queue) == len(y)


def test_queue_is_saved_and_takes_no_gradient():
    queue = EmbeddingQueue(4, 2)
    queue.push(torch.ones(3, 2, requires_grad=True), torch.arange(3))
    assert not queue.read()[0].requires_grad
    other = EmbeddingQueue(4, 2)
    other.load_state_dict(queue.state_dict())
    assert_close(other.read(), queue.read())
    other.push(torch.zeros(2, 2), torch.tensor([8, 9]))
    assert sorted(other.read()[1].tolist()) == [1, 2, 8, 9]
    with pytest.raises(ValueError, match="2 numbers, got 3"): queue.push(torch.zeros(1, 3), torch.zeros(1).long())
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="size"): EmbeddingQueue(wrong, 2)


# ---------------------------------------------------------------- losses between two sets

@pytest.mark.parametrize("name", ACROSS)
def test_gradients_between_sets(name):
    z, y = batch(5)
    r, yr = batch(8, seed=1)
    yr[0] = 9
    for other in ((), (unit_rows(r), yr)):
        assert torch.autograd.gradcheck(lambda z: tuple(across(ACROSS[name], unit_rows(z), y, *other)), z.clone().requires_grad_())


@pytest.mark.parametrize("ours, theirs", [
    (SNCALoss(), partial(across, snca_across)), (MultiSimilarityLoss(), partial(across, multi_similarity_across))])
def test_of_the_batch_with_itself_it_is_the_loss_of_10b(ours, theirs):
    z, y = batch()
    assert_close(tuple(ours.parts(z, y)), tuple(theirs(unit_rows(z), y)), rtol=0, atol=1e-12)


def test_multi_similarity_equals_pytorch_metric_learning_with_references():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    (z, y), (r, yr) = batch(12), batch(20, seed=2)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours = across(multi_similarity_across, unit_rows(a), y, unit_rows(r), yr).total
    peer = losses.MultiSimilarityLoss(2, 50, .5)(b, y, ref_emb=r, ref_labels=yr)
    assert_close(ours, peer, rtol=0, atol=1e-9)
    assert_close(torch.autograd.grad(ours, a)[0], torch.autograd.grad(peer, b)[0], rtol=0, atol=1e-9)


def test_memory_term_equals_pytorch_metric_learning():
    "Their memory holds the batch itself, without gradient and without self pairs; ours is asked for the same set."
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    peer = losses.CrossBatchMemory(losses.MultiSimilarityLoss(2, 50, .5), 4, memory_size=64).double()
    queue = EmbeddingQueue(64, 4).double()
    for seed in range(3):
        z, y = batch(8, seed=seed)
        theirs = peer(z, y)
        past, labels = queue.read()
        each = [across(multi_similarity_across, unit_rows(z[i:i + 1]), y[i:i + 1], torch.cat([past, unit_rows(z[torch.arange(8) != i])]),
                       torch.cat([labels, y[torch.arange(8) != i]])).total for i in range(8)]
        assert_close(torch.stack(each).mean(), theirs, rtol=0, atol=1e-9)
        queue.push(unit_rows(z), y)


@pytest.mark.parametrize("name", ACROSS)
def test_poor_batches(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(6, 4, dtype=dtype)
        cases = [(x, torch.arange(6)), (x, torch.zeros(6).long()), (x[:1], torch.tensor([2])), (torch.ones_like(x), torch.arange(6) // 2),
                 (torch.zeros_like(x), torch.arange(6) // 2), (torch.cat([x[:3], -x[:3]]), torch.arange(6) // 2)]
        loss = CrossBatchMemory(dim=4, size=8, warmup=1, pairs=name)
        for z, y in cases:
            z = z.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                parts = loss.parts(z, y)
                grads = [torch.autograd.grad(p, z, retain_graph=True)[0] for p in parts]
            assert all(p.isfinite() and p.dtype == torch.float32 for p in parts)
            assert all(g.isfinite().all() and g.dtype == dtype for g in grads)
        assert len(loss.queue) == 8


def test_memory_follows_the_steps():
    z, y = batch(6, dtype=torch.float32)
    loss = CrossBatchMemory(dim=4, size=10, warmup=2, memory_weight=.5)
    alone = across(contrastive_across, unit_rows(z), y).total
    lengths = []
    for _ in range(4):
        value = loss(z.requires_grad_(), y)
        value.backward()                                          # the queue has moved before the gradient is asked for
        lengths.append((len(loss.queue), value.item()))
    assert [n for n, _ in lengths] == [0, 0, 6, 10]
    assert [v for _, v in lengths[:3]] == [alone.item()] * 3
    assert_close(lengths[3][1], (alone + .5 * across(contrastive_across, unit_rows(z), y, unit_rows(z), y).total).item())
    twin = CrossBatchMemory(dim=4, size=10, warmup=2, memory_weight=.5)
    twin.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert twin.steps == 4 and twin(z, y) == loss(z, y)
    before = len(loss.queue), loss.steps
    with torch.no_grad(): loss(z, y)
    loss.eval()(z, y)
    assert (len(loss.queue), loss.steps) == before


@pytest.mark.parametrize("options, words", [
    (dict(), ["dim", "None"]), (dict(dim=4, pairs="contrastiv"), ["contrastiv'", "did you mean 'contrastive'"]),
    (dict(dim=4, size=0), ["size", "0"]), (dict(dim=4, warmup=-1), ["warmup", "-1"]),
    (dict(dim=4, warmup=1.5), ["warmup", "1.5", "whole"]), (dict(dim=4, warmup="x"), ["warmup", "'x'"]),
    (dict(dim=2.5), ["dim", "2.5"]), (dict(dim=4, pairs="multi_similarity", threshold=float("nan")), ["threshold", "nan", "cosine"]),
    (dict(dim=4, pairs="snca", temperature="x"), ["temperature", "'x'"]),
    (dict(dim=4, memory_weight=0), ["memory_weight"]), (dict(dim=4, margin=-1.5), ["margin", "-1.5", "-1 to 1"])])
def test_memory_refuses(options, words):
    with pytest.raises(ValueError) as e: CrossBatchMemory(**options)
    for word in words: assert word in str(e.value)


def test_a_margin_of_zero_is_a_cosine():
    z, y = batch()
    loss = CrossBatchMemory(dim=4, margin=0.)
    assert loss(z, y) == across(partial(contrastive_across, margin=0.), unit_rows(z), y).total


@pytest.mark.parametrize("name", ACROSS)
def test_a_batch_of_nan_leaves_the_next_ones_alone(name):
    loss, (z, y), (r, yr) = CrossBatchMemory(dim=4, size=20, warmup=0, pairs=name).double(), batch(6), batch(6, seed=1)
    bad = r.clone()
    bad[[0, 3]], bad[4, 1] = torch.nan, torch.inf
    alone = loss.eval()(z, y)
    assert loss.train()(torch.full_like(r, torch.nan), yr).isnan() and len(loss.queue) == 6
    assert loss.eval()(z, y) == alone                            # six stored rows, of nobody
    loss.train()(bad, yr)
    leaf, kept = z.clone().requires_grad_(), [1, 2, 5]
    value = loss.eval()(leaf, y)
    want = alone + across(ACROSS[name], unit_rows(z), y, unit_rows(r[kept]), yr[kept]).total
    assert_close(value, want, rtol=0, atol=1e-12)
    assert torch.autograd.grad(value, leaf)[0].isfinite().all()


@pytest.mark.parametrize("loss", [CrossBatchMemory(dim=4, warmup=9), CrossBatchMemory(dim=4, warmup=0), ChunkedCrossEntropy(3, 4)])
def test_embeddings_of_another_dimension(loss):
    if isinstance(loss, CrossBatchMemory): loss(*batch(dtype=torch.float32))
    with pytest.raises(ValueError, match="5 columns.*dim=4.*dim=5"): loss(torch.ones(2, 5), torch.arange(2))


def test_memory_refuses_an_option_of_another_loss():
    with pytest.raises(ValueError, match="temperature.*margin"): CrossBatchMemory(dim=4, temperature=.1)


# ---------------------------------------------------------------- several processes

def worker(rank, file, cuts, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(cuts) - 1)
    x, y = batch(12, seed=5)
    torch.manual_seed(0)
    encoder, proxies = torch.nn.Linear(4, 3).double(), CrossEntropy(3, 3).double()
    proxies.weight.data.normal_()
    mine = slice(cuts[rank], cuts[rank + 1])
    found = []
    for loss in (SNCALoss(), MultiSimilarityLoss(), proxies):
        encoder.zero_grad(); proxies.zero_grad()
        z, labels = gather(encoder(x[mine]), y[mine])
        value = loss(z, labels)
        value.backward()
        weights = [encoder.weight, *loss.parameters()]
        for w in weights: dist.all_reduce(w.grad); w.grad /= dist.get_world_size()
        found.append((value.item(), [w.grad.clone() for w in weights], labels.tolist()))
    encoder.zero_grad()                                            # own anchors only: another loss in each process
    z, labels = gather(encoder(x[mine]), y[mine])
    across(contrastive_across, unit_rows(encoder(x[mine])), y[mine], unit_rows(z.detach()), labels)   # runs on what was gathered
    (z * z.detach()).mul(rank + 1.).sum().backward()
    dist.all_reduce(encoder.weight.grad)
    found.append(encoder.weight.grad)
    errors = []
    for wrong in ((torch.ones(2, 3 + rank), torch.zeros(2).long()), (torch.ones(2, 3, dtype=[torch.float32, torch.float64][rank]), torch.zeros(2).long()),
                  (torch.ones(2, 3), torch.zeros(2 + rank).long()), (torch.ones(0, 3), torch.zeros(0).long())):
        try: gather(*wrong); errors.append("accepted")
        except ValueError as e: errors.append(str(e))
    if rank == 0: torch.save((found, errors), results)
    else: assert all("every process" in e for e in errors)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
@pytest.mark.parametrize("cuts", [(0, 6, 12), (0, 9, 12)], ids=["equal", "unequal"])
def test_two_processes_have_the_gradient_of_one(tmp_path, cuts):
    mp.spawn(worker, (str(tmp_path / "meet"), cuts, str(tmp_path / "found")), nprocs=2)
    found, errors = torch.load(tmp_path / "found")
    x, y = batch(12, seed=5)
    torch.manual_seed(0)
    encoder, proxies = torch.nn.Linear(4, 3).double(), CrossEntropy(3, 3).double()
    proxies.weight.data.normal_()
    for loss, (value, gradients, labels) in zip((SNCALoss(), MultiSimilarityLoss(), proxies), found):
        whole = loss(encoder(x), y)
        assert labels == y.tolist()
        assert_close(value, whole.item(), rtol=0, atol=1e-12)
        assert_close(gradients, list(torch.autograd.grad(whole, [encoder.weight, *loss.parameters()])), rtol=0, atol=1e-12)
    z = encoder(x)                                                 # process 0 weighs 1, process 1 weighs 2: their sum reaches each row
    assert_close(found[3], torch.autograd.grad((3. * z * z.detach()).sum(), encoder.weight)[0], rtol=0, atol=1e-12)
    assert len(errors) == 4 and all("every process" in e for e in errors)
    assert "[3, 4]" in errors[0] and "[2, 3]" in errors[2] and "[0, 0]" in errors[3]


def test_gather_alone_returns_what_it_was_given():
    z, y = batch()
    assert gather(z, y)[0] is z and gather(z, y)[1] is y


# ---------------------------------------------------------------- many classes

@PROPERTY
@given(st.integers(1, 9), st.integers(1, 23), st.integers(1, 30), st.sampled_from([0., .1, .5]), st.booleans(), st.integers(0, 10**6))
def test_chunks_equal_all_logits(n, k, chunk, eps, with_bias, seed):
    g = torch.Generator().manual_seed(seed)
    z, w, b = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((n, 3), (k, 3), (k,)))
    y, leaves = torch.randint(k, (n,), generator=g), [z, w, b][:2 + with_bias]
    fast = chunked_softmax_parts(z, w, y, b if with_bias else None, eps, chunk)
    plain = softmax_parts(F.linear(z, w, b if with_bias else None), y, eps)
    assert_close(tuple(fast), tuple(plain), rtol=0, atol=1e-11)
    for weights in ((1., 1.), (2., -3.), (0., 1.)):
        grads = [torch.autograd.grad(weights[0] * p.tightness + weights[1] * p.contrast, leaves, retain_graph=True) for p in (fast, plain)]
        assert_close(*grads, rtol=0, atol=1e-11)


def test_chunks_stay_exact_where_exponentials_overflow():
    z, w = torch.tensor([[1.]]), torch.tensor([[-3e4], [2e4], [2e4], [-1e30]])
    assert_close(streamed(z, w, None, 1)[0], torch.tensor([2e4 + torch.tensor(2.).log().item()]))
    z, w = torch.randn(64, 16), torch.randn(5000, 16) * 3
    y = torch.randint(5000, (64,))
    wide = chunked_softmax_parts(z.double(), w.double(), y, chunk=77)
    for chunk in (1, 77, None): assert_close(tuple(p.double() for p in chunked_softmax_parts(z, w, y, chunk=chunk)), tuple(wide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(bias=False), dict(label_smoothing=.2), dict(label_smoothing=.2, smoothing="paper"), dict(chunk=2)])
def test_class_equals_cross_entropy(options):
    z, y = batch(classes=5, dtype=torch.bfloat16)
    plain = {k: v for k, v in options.items() if k != "chunk"}
    a, b = ChunkedCrossEntropy(5, 4, **options), CrossEntropy(5, 4, **plain)
    for w in b.parameters(): w.data.normal_()
    a.load_state_dict(b.state_dict())
    grads = []
    for loss in (a, b):
        leaf = z.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(leaf, y)
        value.backward()
        assert value.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
        grads.append([value.detach(), *(w.grad for w in loss.parameters())])
    assert_close(*grads)
    assert set(a.param_groups()) == {"classifier"}


def test_only_what_is_asked_for():
    z, y = batch(classes=3)
    w = torch.randn(3, 4, dtype=torch.float64)
    grad, = torch.autograd.grad(chunked_softmax_parts(z.requires_grad_(), w, y).total, z)
    assert_close(grad, torch.autograd.grad(F.cross_entropy(z @ w.T, y), z)[0], rtol=0, atol=1e-12)
    w.requires_grad_()
    with pytest.raises(ValueError, match="0 to 2"): chunked_softmax_parts(z, w, y + 1)
    with pytest.raises(ValueError, match="chunk"): chunked_softmax_parts(z, w, y, chunk=0)
    with pytest.raises(ValueError, match="num_classes"): ChunkedCrossEntropy()
    assert chunk_size(256, 10**6, "cpu", None) == 4096 and chunk_size(256, 100, "cpu", None) == 100 and chunk_size(2**21, 9, "cpu", None) == 1


def test_peak_memory_is_that_of_the_weights():
    "Peak below 1.5 x (weights + gradient), where all logits would take several times that."
    K, d, n = 30_000, 16, 128
    z, y = torch.randn(n, d, requires_grad=True), torch.randint(K, (n,))
    peaks = {}
    for cls, options in ((CrossEntropy, {}), (ChunkedCrossEntropy, dict(chunk=1024))):
        loss = cls(K, d, bias=False, **options)
        def step():
            loss(z, y).backward()
            z.grad = loss.weight.grad = None
        step()
        peaks[cls] = (peak_bytes(step) + K * d * 4) / (2 * K * d * 4)
    assert peaks[ChunkedCrossEntropy] < 1.5 < 5 < peaks[CrossEntropy]


def test_peak_bytes_counts():
    def step():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b * 2
    assert 8000 <= peak_bytes(step) < 8200


def test_benchmark_of_many_classes_writes_its_table(tmp_path):
    import pandas as pd
    from benchmarks.bench_classes import main
    threads = torch.get_num_threads()
    main(tmp_path, counts=(50, 9000), threads=1, rounds=1, plain_up_to=50)
    assert torch.get_num_threads() == threads
    table = pd.read_csv(tmp_path / "classes.csv")
    assert table.classes.tolist() == [50, 9000] and (table.chunks_peak >= 1).all() and table.times_plain.isna().tolist() == [False, True]
    assert "| 9,000 |" in (tmp_path / "classes.md").read_text()
