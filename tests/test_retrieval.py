"retrieval: the loop as oracle, ties by rule, memory by chunk, and every refusal; metrics against PML and scikit-learn."
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dml_companion import retrieval as R

few = settings(derandomize=True, deadline=None, max_examples=30)
METRICS, BACKENDS = ("cosine", "euclidean"), ("torch", "faiss")


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(*shape, seed=0, low=-1, high=2): return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def oracle(queries, k, gallery=None, metric="cosine"):
    "Sort by (distance, index) in float64, one pair at a time."
    points, lists = (queries if gallery is None else gallery).double().numpy(), []
    for i, q in enumerate(queries.double().numpy()):
        if metric == "cosine":
            far = lambda p: -(q @ p) / (np.sqrt(q @ q) * np.sqrt(p @ p) or 1)
        else: far = lambda p: ((q - p) ** 2).sum()
        lists.append([j for _, j in sorted((round(far(p), 12), j) for j, p in enumerate(points) if gallery is not None or j != i)][:k])
    return torch.tensor(lists)


def metrics_by_loop(lists, labels, gallery_labels, own):
    "Recall@1, R-precision and MAP@R from full neighbour lists, by their formulas."
    recall, precision, average = [], [], []
    for q, order in enumerate(lists):
        hit = [gallery_labels[j] == labels[q] for j in order]
        r = sum(hit)
        if r == 0: continue
        recall.append(hit[0]), precision.append(sum(hit[:r]) / r)
        average.append(sum(sum(hit[:i + 1]) / (i + 1) for i in range(r) if hit[i]) / r)
    return np.mean(recall), np.mean(precision), np.mean(average)


# neighbours

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_equal_the_loop(metric, backend):
    x, g = randn(60, 9), randn(45, 9, seed=1)
    for chunk in (None, 1, 7, 60):
        assert R.nearest(x, 59, metric=metric, backend=backend, chunk=chunk)[1].equal(oracle(x, 59, metric=metric))
        assert R.nearest(x, 45, g, metric, backend=backend, chunk=chunk)[1].equal(oracle(x, 45, g, metric))


@few
@given(seed=st.integers(0, 10**6), n=st.integers(2, 70), d=st.integers(1, 4), k=st.integers(1, 69), chunk=st.integers(1, 80),
       tile=st.integers(1, 80), own=st.booleans())
def test_ties_go_to_the_lower_index_for_every_chunk_tile_and_backend(seed, n, d, k, chunk, tile, own):
    x, g = ints(n, d, seed=seed), None if own else ints(n + 1, d, seed=seed + 1)
    k = min(k, n - 1)
    expected = oracle(x, k, g, "euclidean")
    kept, R._TILE = R._TILE, tile                        # columns are cut into tiles of this many
    try:
        for backend in BACKENDS: assert R.nearest(x, k, g, "euclidean", chunk, backend)[1].equal(expected)
    finally: R._TILE = kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [5, 40])
def test_ties_among_thousands_of_columns(backend, k):
    x = ints(4000, 3, low=-2, high=3)                    # 125 different points, 32 copies of each
    distance = (x[:50, None] - x).square().sum(2)
    distance[range(50), range(50)] = torch.inf
    expected = distance.sort(dim=1, stable=True).indices[:, :k]
    assert R.nearest(x, k, metric="euclidean", backend=backend)[1][:50].equal(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_without_duplicates_among_thousands_of_columns(backend):
    x = torch.cartesian_prod(*[torch.arange(13.)] * 3)[torch.randperm(2197, generator=torch.Generator().manual_seed(0))]   # a cube: all different
    assert R._groups(x) is None
    distance = (x[:, None] - x).square().sum(2).fill_diagonal_(torch.inf)
    for k in (4, 20, 50): assert R.nearest(x, k, metric="euclidean", backend=backend)[1].equal(distance.sort(dim=1, stable=True).indices[:, :k])


@pytest.mark.parametrize("m,k", [(64 * 40, 7), (64 * 40, 39), (32 * 90, 50), (32 * 90, 89), (100, 100)])
@pytest.mark.parametrize("kind", ["distinct", "tied", "equal"])
def test_top_keys_is_the_stable_sort(m, k, kind):
    scores = {"distinct": randn(9, m), "tied": ints(9, m), "equal": torch.zeros(9, m)}[kind]
    scores[0, ::3] = -torch.inf
    value, column = R.read_keys(R.top_keys(scores, k, first=10))
    stable = scores.sort(dim=1, descending=True, stable=True)
    assert value.equal(stable.values[:, :k]) and (column - 10).equal(stable.indices[:, :k])


@few
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_keys_sort_as_score_then_column(values):
    s = torch.tensor(values, dtype=torch.float32)
    score, column = R.read_keys(R.sort_keys(s, torch.arange(len(s))).sort(descending=True).values)
    assert column.tolist() == sorted(range(len(s)), key=lambda j: (-s[j].item(), j)) and score.equal(s[column])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [3, 64, 512])
def test_real_valued_duplicates_tie_exactly(metric, backend, d):
    order = torch.randperm(900, generator=torch.Generator().manual_seed(d))
    x, who = randn(300, d).repeat(3, 1)[order], torch.arange(300).repeat(3)[order]
    for chunk in (2, 256, 900):
        found = R.nearest(x, 11, metric=metric, backend=backend, chunk=chunk)[1]
        assert (found != torch.arange(900)[:, None]).all()
        assert (who[found[:, :2]] == who[:, None]).all()                                 # its two twins first
        triples = found[:, 2:].view(900, 3, 3)
        assert (who[triples] == who[triples[..., :1]]).all()
        assert (triples.diff(dim=2) > 0).all() and (found[:, 0] < found[:, 1]).all()     # each group by index


def test_row_groups_survive_a_hash_that_collides(monkeypatch):
    x = ints(50, 2)
    expected = R._groups(x)
    monkeypatch.setattr(R, "_row_hash", lambda x: torch.zeros(len(x), dtype=torch.int64))
    for a, b in zip(R._groups(x), expected): assert a.equal(b)
    firsts = x[expected.members[expected.starts]]
    assert len(firsts) == len(x.unique(dim=0)) and expected.counts.sum() == 50
    assert (expected.members[expected.starts].diff() > 0).all()


def test_self_is_left_out_by_index_and_a_gallery_copy_is_not():
    x = randn(10, 4).repeat(2, 1)
    assert R.nearest(x, 1)[1][:, 0].tolist() == [*range(10, 20), *range(10)]
    assert R.nearest(x, 1, gallery=x)[1][:, 0].tolist() == [*range(10)] * 2
    same = torch.ones(5, 3)
    for metric in METRICS:
        assert R.nearest(same, 4, metric=metric)[1].tolist() == [[j for j in range(5) if j != i] for i in range(5)]


@pytest.mark.parametrize("metric", METRICS)
def test_backends_agree_on_real_numbers_and_scores_are_what_they_say(metric):
    x, g = randn(700, 64), randn(3000, 64, seed=1)
    (s, i), (t, j) = (R.nearest(x, 25, g, metric, backend=b) for b in BACKENDS)
    assert_close(s, t, atol=1e-5, rtol=1e-5)
    unit = torch.nn.functional.normalize
    exact = unit(x.double()) @ unit(g.double()).T if metric == "cosine" else torch.cdist(x.double(), g.double())
    for score, column in ((s, i), (t, j)): assert_close(score.double(), exact.gather(1, column), atol=1e-5, rtol=1e-5)
    apart = exact.gather(1, i).diff(dim=1).abs().amin(1) > 1e-5                             # rows without near-ties
    assert apart.sum() > 500 and i[apart].equal(j[apart])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_or_a_large_scale_does_not_change_the_neighbours(backend):
    x = ints(200, 8, low=-20, high=20)
    expected = oracle(x, 10, metric="euclidean")
    for moved in (x + 4096, x * 2.**60, x * 2.**-60, x.double() + 2.**40):
        assert R.nearest(moved, 10, metric="euclidean", backend=backend)[1].equal(expected)
    assert_close(R.nearest(x * 2.**60, 3, metric="euclidean")[0] / 2.**60, R.nearest(x, 3, metric="euclidean")[0])


def test_numpy_lists_integers_and_half_precision_are_accepted():
    x = ints(30, 5)
    expected = R.nearest(x, 3)[1]
    for same in (x.numpy(), x.tolist(), x.int(), x.bfloat16(), x.half(), x.double().numpy(), x.clone().requires_grad_()):
        assert R.nearest(same, 3)[1].equal(expected)
    assert R.nearest(x.numpy(), 3, gallery=x.double())[1].shape == (30, 3)
    with torch.autocast("cpu", torch.bfloat16): assert R.nearest(randn(50, 64), 5)[1].equal(oracle(randn(50, 64), 5))


# memory

class Largest(TorchDispatchMode):
    "Remembers the largest tensor any operation made."
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor): self.size = max(self.size, x.numel())
        return out


@pytest.mark.parametrize("metric", METRICS)
def test_no_tensor_is_larger_than_a_chunk_of_scores(metric):
    x, chunk = randn(3000, 16), 50
    with Largest() as seen:
        for _ in R.search(x, 10, metric=metric, chunk=chunk): pass
    assert seen.size <= max(chunk * 3008, 1024 * 16, x.numel()) < 3000 * 3000 / 50


def test_memory_of_a_large_search_stays_far_below_its_matrix():
    code = """
import resource, torch
from dml_companion.retrieval import evaluate, nearest
torch.set_num_threads(1)
x, y = torch.randn(24000, 16), torch.arange(24000) // 100
nearest(x[:500], 5); evaluate(x[:500], y[:500], clustering=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest(x, 10); evaluate(x, y, clustering=False, metrics=("euclidean",))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 200, f"{grown:.0f} MiB; the matrix of scores would be 2197 MiB"


# metrics

LINE, CLASSES = [[0.], [1.], [3.], [7.], [12.]], ["a", "b", "a", "a", "b"]


def test_five_points_by_hand():
    assert R.recall_at_k(LINE, CLASSES, (1, 2, 3, 4), metric="euclidean") == {1: .2, 2: .6, 3: .8, 4: 1.}
    assert R.r_precision(LINE, CLASSES, metric="euclidean") == pytest.approx(.3)
    assert R.map_at_r(LINE, CLASSES, metric="euclidean") == pytest.approx(.2)


@few
@given(seed=st.integers(0, 10**6), n=st.integers(4, 40), classes=st.integers(1, 6), own=st.booleans(), metric=st.sampled_from(METRICS))
def test_metrics_equal_the_loop(seed, n, classes, own, metric):
    x, g = randn(n, 3, seed=seed), None if own else randn(n + 3, 3, seed=seed + 1)
    random = np.random.default_rng(seed)
    y = random.integers(0, classes, n)
    other = y if own else random.integers(0, classes, n + 3)
    expected = metrics_by_loop(oracle(x, n - 1 if own else n + 3, g, metric).tolist(), y, other, own)
    if not np.isfinite(expected[0]): return
    more = {} if own else dict(gallery=g, gallery_labels=other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = R.evaluate(x, y, **more, ks=(1,), metrics=(metric,), clustering=False)
        assert R.recall_at_k(x, y, [1], **more, metric=metric)[1] == found[f"{metric}/recall@1"]
    assert [found[f"{metric}/{name}"] for name in ("recall@1", "r_precision", "map@r")] == pytest.approx(expected)


@pytest.mark.parametrize("own", [True, False])
def test_metrics_equal_pytorch_metric_learning(own):
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    x, y = randn(400, 8), torch.randint(0, 25, (400,), generator=torch.Generator().manual_seed(1))
    g, gy = (x, y) if own else (randn(300, 8, seed=2), torch.randint(0, 25, (300,), generator=torch.Generator().manual_seed(3)))

    def knn(query, k, reference, same=False):          # PML's interface: same says that the queries are the reference
        far = torch.cdist(query.double(), reference.double())
        if same: far.fill_diagonal_(torch.inf)
        near = far.topk(k, largest=False)
        return near.values, near.indices
    peer = calculator.AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r", "r_precision"), k="max_bin_count",
                                         knn_func=knn)
    theirs = peer.get_accuracy(x, y) if own else peer.get_accuracy(x, y, g, gy)
    more = {} if own else dict(gallery=g, gallery_labels=gy)
    assert R.recall_at_k(x, y, [1], **more, metric="euclidean")[1] == pytest.approx(theirs["precision_at_1"])
    assert R.map_at_r(x, y, **more, metric="euclidean") == pytest.approx(theirs["mean_average_precision_at_r"])
    assert R.r_precision(x, y, **more, metric="euclidean") == pytest.approx(theirs["r_precision"])


def test_duplicates_are_no_free_hits():
    x, y = randn(50, 6).repeat(2, 1), torch.arange(100) // 2 * 2 % 50                 # the twin of i is i + 50, of the same class as i
    assert R.recall_at_k(x, y, [1])[1] == 1
    assert R.recall_at_k(x, torch.arange(100) // 2, [1])[1] == 0                      # twins of another class


def test_perfect_and_hopeless_embeddings():
    y = torch.arange(60) // 6
    perfect = torch.eye(10)[y]
    found = R.evaluate(perfect, y)
    retrieval = {f"{m}/{name}" for m in METRICS for name in ("recall@1", "recall@2", "recall@4", "recall@8", "map@r", "r_precision")}
    assert set(found) == retrieval | {"nmi", "ami"} and all(found[name] == pytest.approx(1) for name in retrieval)
    assert found["nmi"] > .8                                                            # k-means may split one class and join two
    assert abs(R.ami(randn(600, 8), np.arange(600) // 2)) < .1 < .7 < R.nmi(randn(600, 8), np.arange(600) // 2)


@few
@given(seed=st.integers(0, 10**6))
def test_metrics_do_not_depend_on_the_order_of_samples_names_of_classes_or_scale(seed):
    x, y = randn(40, 5, seed=seed), torch.arange(40) // 4
    p = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    first = R.evaluate(x, y, clustering=False)
    for other in (R.evaluate(x[p], y[p], clustering=False), R.evaluate(x * 4, [f"class {i}" for i in y], clustering=False),
                  R.evaluate(x, -y * 1000, clustering=False)):
        assert other == pytest.approx(first)
    assert first["cosine/recall@1"] <= first["cosine/recall@2"] <= first["cosine/recall@8"]
    assert first["cosine/map@r"] <= first["cosine/r_precision"]


def test_one_search_serves_all_metrics_of_a_geometry(monkeypatch):
    calls, search = [], R.search
    monkeypatch.setattr(R, "search", lambda *a, **k: calls.append(a[3]) or search(*a, **k))
    R.evaluate(randn(40, 4), torch.arange(40) // 4)
    assert calls == ["cosine", "euclidean"]


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_clusters_are_reproducible_and_find_clear_groups(backend):
    y = np.arange(200) // 20
    x = torch.eye(10)[y] + .01 * randn(200, 10)
    c = R.clusters(x, 10, seed=4, backend=backend)
    assert c.shape == (200,) and (c == R.clusters(x, 10, seed=4, backend=backend)).all() and 0 <= c.min() and c.max() < 10


def test_without_faiss_the_search_says_what_to_do_and_clustering_falls_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    x, y = randn(40, 4), torch.arange(40) // 4
    with pytest.raises(ImportError, match="backend='torch'"): R.nearest(x, 1, backend="faiss")
    with pytest.raises(ImportError, match="faiss-cpu"): R.clusters(x, 3, backend="faiss")
    assert 0 <= R.nmi(x, y) <= 1
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match="scikit-learn"): R.nmi(x, y)


# refusals

X, Y = randn(6, 3), [0, 0, 1, 1, 2, 2]
BAD = X.clone()
BAD[4, 1] = float("nan")


@pytest.mark.parametrize("call,message", [
    (lambda: R.recall_at_k(BAD, Y, [1]), "embeddings: 1 of 6 rows have a NaN or an infinity, the first is row 4"),
    (lambda: R.map_at_r(X / 0, Y), "6 of 6 rows"),
    (lambda: R.r_precision(X, Y, gallery=BAD, gallery_labels=Y), "gallery: 1 of 6 rows"),
    (lambda: R.recall_at_k(X, Y, [1], gallery=X[:0], gallery_labels=[]), "gallery is empty"),
    (lambda: R.nearest([], 1), r"must be a matrix"),
    (lambda: R.nearest(X[:0], 1), "embeddings is empty"),
    (lambda: R.recall_at_k(X, Y, [1, 6]), "ks has 6, but a query has only 5 candidates: use ranks <= 5"),
    (lambda: R.recall_at_k(X, Y, [7], gallery=X, gallery_labels=Y), "only 6 candidates"),
    (lambda: R.nearest(X, 6), "k=6, but there are only 5 candidates .the query itself is left out.: use k <= 5"),
    (lambda: R.nearest(X, 7, gallery=X), "only 6 candidates in the gallery"),
    (lambda: R.recall_at_k(X, Y[:5], [1]), "6 embeddings but 5 labels"),
    (lambda: R.recall_at_k(X, Y, [1], gallery=X, gallery_labels=Y[:2]), "6 embeddings but 2 gallery_labels"),
    (lambda: R.recall_at_k(X, Y, [0]), "each of ks must be a positive int, got 0"),
    (lambda: R.recall_at_k(X, Y, [1.5]), "positive int, got 1.5"),
    (lambda: R.recall_at_k(X, Y, [True]), "positive int, got True"),
    (lambda: R.recall_at_k(X, Y, ["1"]), "positive int, got '1'"),
    (lambda: R.recall_at_k(X, Y, []), "ks is empty"),
    (lambda: R.recall_at_k(X, Y, [1], metric="manhattan"), "unknown metric 'manhattan': use one of 'cosine', 'euclidean'"),
    (lambda: R.evaluate(X, Y, ks=(1,), metrics=("cosine", "dot")), "unknown metric 'dot'"),
    (lambda: R.nearest(X, 1, backend="annoy"), "unknown backend 'annoy': use one of 'torch', 'faiss'"),
    (lambda: R.nearest(X, 1, chunk=0), "chunk must be a positive int, got 0"),
    (lambda: R.nearest(X, 1, gallery=X[:, :2]), "embeddings have 3 columns and the gallery 2"),
    (lambda: R.map_at_r(X, Y, gallery=X), "give both or neither"),
    (lambda: R.map_at_r(X, range(6)), "every query's class has no other member"),
    (lambda: R.map_at_r(X, Y, gallery=X, gallery_labels=[9] * 6), "no member in the gallery"),
    (lambda: R.map_at_r(X, [.5] * 6), "whole numbers or strings, got float64"),
    (lambda: R.map_at_r(X, [Y] * 6), r"must be a vector \(n,\), got shape \(6, 6\)"),
    (lambda: R.map_at_r(X, Y, gallery=X, gallery_labels=list("aabbcc")), "a number never equals a string"),
    (lambda: R.clusters(X, 7), "7 clusters of 6 rows"),
    (lambda: R.clusters(X, 2, backend="magic"), "unknown backend 'magic'"),
])
def test_refusals_say_which_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_search_refuses_before_the_first_chunk():
    with pytest.raises(ValueError): R.search(BAD, 1)


def test_queries_without_a_relevant_item_are_excluded_and_counted():
    with pytest.warns(UserWarning, match="2 of 5 queries are excluded: their class has no other member"):
        assert R.recall_at_k(LINE, [0, 1, 0, 0, 2], [1], metric="euclidean")[1] == pytest.approx(1 / 3)
    with pytest.warns(UserWarning, match="2 of 6 queries are excluded: their class has no member in the gallery"):
        assert R.map_at_r(X, Y, gallery=X, gallery_labels=[0, 0, 1, 1, 1, 1]) >= 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        R.recall_at_k(X, Y, [1])


def test_a_single_rank_is_accepted(): assert R.recall_at_k(X, Y, 2) == R.recall_at_k(X, Y, np.array([2]))


def test_the_module_is_light():
    code = ("import sys, dml_companion.retrieval; heavy = {'faiss', 'sklearn', 'pandas', 'matplotlib', 'torchvision', 'scipy'}; "
            "print(sorted(heavy & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
