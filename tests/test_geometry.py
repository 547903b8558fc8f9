"geometry: naive loops as oracles, float64 as the judge, and the corners where gradients break."
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dml_companion import geometry as G

few = settings(derandomize=True, deadline=None, max_examples=25)
sizes = dict(n=st.integers(1, 9), m=st.integers(1, 9), d=st.integers(1, 17), seed=st.integers(0, 10**6))


def points(n, d, seed, scale=1.): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale


def loop(a, b, f): return torch.stack([torch.stack([f(x, y) for y in b]) for x in a])


# similarities and distances

@few
@given(**sizes)
def test_cosine_equals_the_loop(n, m, d, seed):
    a, b = points(n, d, seed), points(m, d, seed + 1)
    assert_close(G.cosine_similarity(a, b), loop(a, b, lambda x, y: x @ y / (x.norm() * y.norm())), atol=1e-5, rtol=1e-5)
    assert_close(G.cosine_similarity(a), G.cosine_similarity(a, a))
    assert (G.cosine_similarity(a, b).abs() <= 1 + 1e-5).all()


@few
@given(**sizes, offset=st.sampled_from([0., 1., 300., 1e5]), scale=st.sampled_from([1e-3, 1., 1e4]))
def test_distances_equal_the_float64_loop_at_any_offset_and_scale(n, m, d, seed, offset, scale):
    a, b = points(n, d, seed, scale) + offset, points(m, d, seed + 1, scale) + offset
    truth = loop(a.double(), b.double(), lambda x, y: (x - y).square().sum())
    bound = 1e-5 * ((a - G.centre(b)).double().square().sum(1)[:, None] + (b - G.centre(b)).double().square().sum(1)) + 1e-30
    assert ((G.squared_distances(a, b) - truth).abs() <= bound).all()
    assert ((G.euclidean_distances(a, b).double().square() - truth).abs() <= bound).all()
    own = loop(a.double(), a.double(), lambda x, y: (x - y).square().sum())
    size = (a - G.centre(a)).double().square().sum(1)
    assert ((G.squared_distances(a) - own).abs() <= 1e-5 * (size[:, None] + size) + 1e-30).all()


@few
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), d=st.integers(1, 9), offset=st.integers(-10**5, 10**5))
def test_integer_distances_are_exact(seed, n, d, offset):
    x = torch.randint(-9, 10, (n, d), generator=torch.Generator().manual_seed(seed)).float() + offset
    truth = (x[:, None] - x).square().sum(2)
    assert G.squared_distances(x).equal(truth)
    assert_close(G.euclidean_distances(x), truth.sqrt())


def test_distances_ignore_a_common_move_where_the_plain_product_form_does_not():
    x = points(64, 32, 0)
    moved = x + 1e4
    truth = torch.cdist(moved.double(), moved.double()).square()
    plain = moved.square().sum(1)[:, None] + moved.square().sum(1) - 2 * moved @ moved.T
    assert (plain - truth).abs().max() > 10
    assert (G.squared_distances(moved) - truth).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cosine_similarity", "squared_distances", "euclidean_distances", "normalize"])
def test_half_precision_is_computed_and_returned_in_float32_also_under_autocast(dtype, name):
    f, x, y = getattr(G, name), points(12, 64, 0).to(dtype), points(5, 64, 1).to(dtype)
    rest = () if name == "normalize" else (y,)
    expected = f(x.float(), *(r.float() for r in rest))
    with torch.autocast("cpu", torch.bfloat16):
        for out in (f(x, *rest), f(x.float(), *(r.float() for r in rest))): assert out.dtype == torch.float32 and out.equal(expected)
    assert f(x.double(), *(r.double() for r in rest)).dtype == torch.float64


def test_normalize_neither_overflows_nor_underflows_and_leaves_zero_alone():
    x = torch.tensor([[3e30, 4e30], [3e-11, 4e-11], [-3., 4.], [0., 0.]], requires_grad=True)
    u = G.normalize(x)
    assert_close(u, torch.tensor([[.6, .8], [.6, .8], [-.6, .8], [0., 0.]]))
    u.sum().backward()
    assert x.grad.isfinite().all() and x.grad[3].abs().sum() == 0


@few
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-10, 1., 1e15]))
def test_normalized_rows_have_length_one(seed, scale):
    u = G.normalize(points(6, 5, seed, scale))
    assert_close(u.norm(dim=1), torch.ones(6))


# gradients

@pytest.mark.parametrize("f", [G.cosine_similarity, G.squared_distances, G.euclidean_distances])
@pytest.mark.parametrize("own", [True, False])
def test_gradients_by_finite_differences(f, own):
    a, b = points(4, 3, 0).double().requires_grad_(), points(3, 3, 1).double().requires_grad_()
    weight = torch.rand(4, 4 if own else 3, dtype=torch.float64)
    off = ~torch.eye(4, dtype=torch.bool) if own else torch.ones(4, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck((lambda a: (f(a) * weight)[off].sum()) if own else (lambda a, b: (f(a, b) * weight).sum()),
                                    (a,) if own else (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 2, 64, 512])
def test_coincident_points_have_distance_zero_and_a_finite_gradient(dtype, d):
    x = points(8, d, 0).to(dtype).repeat(2, 1).requires_grad_()
    distances = G.euclidean_distances(x)
    assert (distances[range(8), range(8, 16)] == 0).all() and (distances.diagonal() == 0).all()
    distances.sum().backward()
    assert x.grad.isfinite().all()
    same = torch.full((5, d), .3, dtype=dtype, requires_grad=True)
    G.euclidean_distances(same).sum().backward()
    assert (same.grad == 0).all()


def test_safe_sqrt():
    x = torch.tensor([0., 1e-30, 4.], requires_grad=True)
    G.safe_sqrt(x).sum().backward()
    assert G.safe_sqrt(x).equal(x.sqrt()) and x.grad[0] == 0 and x.grad[2] == .25
    assert G.safe_sqrt(x.detach(), 1e-20).tolist() == [0, 0, 2]


# classes and pairs

@few
@given(seed=st.integers(0, 10**6), n=st.integers(0, 30), K=st.integers(1, 8))
def test_class_sums_counts_and_means_equal_the_loop(seed, n, K):
    z, y = points(n, 3, seed), torch.randint(0, K, (n,), generator=torch.Generator().manual_seed(seed))
    for k in range(K + 1):
        mine = z[y == k]
        assert_close(G.class_sums(z, y, K + 1)[k], mine.sum(0))
        assert G.class_counts(y, K + 1)[k] == len(mine)
        assert_close(G.class_means(z, y, K + 1)[k], mine.mean(0) if len(mine) else torch.zeros(3))


def test_class_sums_of_half_inputs_add_in_float32():
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)          # bf16 alone would stop at 256
    assert G.class_sums(ones, torch.zeros(1000, dtype=torch.int64), 1).item() == 1000


@few
@given(y=st.lists(st.integers(0, 4), min_size=1, max_size=12), other=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_pair_masks_equal_the_loop_and_leave_self_out_by_index(y, other):
    positives, negatives = G.pair_masks(torch.tensor(y))
    for i, a in enumerate(y):
        for j, b in enumerate(y): assert (positives[i, j], negatives[i, j]) == (a == b and i != j, a != b)
    positives, negatives = G.pair_masks(torch.tensor(y), torch.tensor(other))
    assert positives.tolist() == [[a == b for b in other] for a in y] and negatives.equal(~positives)


# masked log sum exp

@few
@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), m=st.integers(1, 8), p=st.floats(0, 1), scale=st.sampled_from([1., 50., 1e4]))
def test_masked_logsumexp_equals_the_loop(seed, n, m, p, scale):
    g = torch.Generator().manual_seed(seed)
    x, mask = (torch.randn(n, m, generator=g) * scale).requires_grad_(), torch.rand(n, m, generator=g) < p
    out = G.masked_logsumexp(x, mask)
    oracle = torch.stack([row[take].logsumexp(0) if take.any() else row.sum() * 0 for row, take in zip(x.double(), mask)])
    assert_close(out.double(), oracle, atol=1e-5, rtol=1e-5)
    weight = torch.randn(n, generator=g)
    grad, = torch.autograd.grad((out * weight).sum(), x)
    expected, = torch.autograd.grad((oracle * weight).sum(), x)
    assert_close(grad, expected, atol=1e-5, rtol=1e-4)
    assert (grad[~mask] == 0).all()
    assert_close(G.masked_logsumexp(x.T, mask.T, dim=0), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_masked_logsumexp_empty_rows_and_dtypes(dtype):
    x = torch.tensor([[1., 2.], [300., -300.], [5., 6.]], dtype=dtype, requires_grad=True)
    out = G.masked_logsumexp(x, torch.tensor([[True, True], [True, True], [False, False]]))
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and out[2] == 0
    out.sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all() and (x.grad[2] == 0).all()


def test_masked_logsumexp_broadcasts_gradchecks_and_refuses_a_second_derivative():
    x = points(3, 4, 0).double().requires_grad_()
    mask = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda x: G.masked_logsumexp(x, mask), (x,))
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(G.masked_logsumexp(x, mask).sum(), x, create_graph=True)


# chunks

@few
@given(n=st.integers(0, 40), size=st.integers(1, 50))
def test_chunks_cover_everything_once(n, size):
    assert [i for s in G.chunks(n, size) for i in range(s.start, s.stop)] == list(range(n))
    assert all(s.stop - s.start <= size for s in G.chunks(n, size))
    x = points(n, 2, n)
    assert G.map_chunks(lambda rows: rows.sum(1), x, size).equal(x.sum(1))


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"): G.chunks(3, 0)


def test_inputs_are_not_changed():
    a, b = points(5, 3, 0), points(4, 3, 1)
    before = copy.deepcopy((a, b))
    G.cosine_similarity(a, b), G.squared_distances(a), G.euclidean_distances(a, b), G.masked_logsumexp(a, a > 0), G.centre(a)
    assert a.equal(before[0]) and b.equal(before[1])
