"indexes: against loops and exact search, options refused, files whole or refused, both commands, the benchmark once, tiny."
import csv, json, os, subprocess, sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from commands import refused, run
from dml_companion import indexes as I, retrieval as R

pytest.importorskip("faiss")
few = settings(derandomize=True, deadline=None, max_examples=25)
METRICS, KINDS = ("cosine", "euclidean"), tuple(I.AT_QUERY)
SMALL = {"ivf_flat": dict(nlist=12), "ivf_pq": dict(nlist=6, m=4, bits=4), "hnsw": dict(M=8, ef_construction=40)}
BOTH = I.synthetic_embeddings(640, 12, latent=6)
X, Q = BOTH[:600], BOTH[600:]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(): return {(kind, metric): I.make_index(X, metric, kind, **SMALL[kind]) for kind in KINDS for metric in METRICS}


def judge(q, x, metric):
    "Cosines or distances in float64, one matrix."
    q, x = torch.as_tensor(q, dtype=torch.float64), torch.as_tensor(x, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    return unit(q) @ unit(x).T if metric == "cosine" else torch.cdist(q, x)


def same(a, b): return all(x.equal(y) for x, y in zip(a, b))


# ---- what is found

@pytest.mark.parametrize("metric", METRICS)
def test_exact_is_the_search_of_03(metric):
    assert same(I.search(Q, X, 7, metric), R.nearest(Q, 7, X, metric)) and same(I.search(X, None, 7, metric), R.nearest(X, 7, metric=metric))
    assert same(I.search(Q, X, 7, metric, chunk=5, backend="torch"), R.nearest(Q, 7, X, metric, chunk=5))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("where", [X, None])
def test_all_cells_are_exact_search(metric, where):
    asked = Q if where is not None else X
    found, exact = I.search(asked, where, 6, metric, "ivf_flat", nlist=12, nprobe=12), R.nearest(asked, 6, where, metric)
    assert_close(found[0], exact[0], atol=1e-4, rtol=1e-4)
    assert I.recall_of(found[1], exact[1]) > .999


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nprobe", [1, 3])
def test_cells_equal_the_loop(made, metric, nprobe):
    index = made["ivf_flat", metric]
    unit = torch.nn.functional.normalize if metric == "cosine" else lambda x: x
    q, x = unit(torch.from_numpy(Q)).double(), unit(torch.from_numpy(X)).double()
    centres = torch.from_numpy(index.handle.quantizer.reconstruct_n(0, 12)).double()
    own, scores = torch.cdist(x, centres).argmin(1), index.search(Q, 5, nprobe=nprobe)[0]
    for i in range(len(q)):
        probed = (centres - q[i]).norm(dim=1).argsort()[:nprobe]
        inside = [j for j, c in enumerate(own.tolist()) if c in probed.tolist()]
        far = sorted(float((x[j] - q[i]).norm()) for j in inside)[:5]
        expected = [1 - d * d / 2 for d in far] if metric == "cosine" else far
        assert_close(scores[i, :len(far)].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_codes_answer_about_the_rebuilt_vectors(metric):
    index = I.make_index(X, metric, "ivf_pq", **SMALL["ivf_pq"])
    index.handle.make_direct_map()
    rebuilt = index.handle.reconstruct_n(0, len(X))
    asked = torch.nn.functional.normalize(torch.from_numpy(Q)) if metric == "cosine" else torch.from_numpy(Q)
    far = torch.cdist(asked.double(), torch.from_numpy(rebuilt).double()).sort(1).values[:, :9]
    scores = index.search(Q, 9, nprobe=6)[0].double()
    assert_close(scores, 1 - far.square() / 2 if metric == "cosine" else far, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["ivf_flat", "hnsw"])
@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_what_they_say_and_lists_are_in_order(made, kind, metric):
    index = made[kind, metric]
    scores, rows = index.search(Q, 10, **({"ef_search": 200} if kind == "hnsw" else {"nprobe": 8}))
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64 and scores.shape == rows.shape == (40, 10)
    assert_close(scores.double(), judge(Q, X, metric).gather(1, rows), atol=1e-5, rtol=1e-5)
    assert ((scores.diff(dim=1) <= 0) if metric == "cosine" else (scores.diff(dim=1) >= 0)).all()
    assert all(len(set(row)) == 10 for row in rows.tolist())
    assert I.recall_of(rows, R.nearest(Q, 10, X, metric)[1]) > .9


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_of_the_gallery_is_left_out_by_its_row(kind):
    twins = np.concatenate([X[:150], X[:150]])
    options = SMALL[kind] | ({"nprobe": SMALL[kind]["nlist"]} if kind != "hnsw" else dict(ef_search=100))
    rows = I.search(twins, None, 4, index=kind, **options)[1]
    assert (rows != torch.arange(300)[:, None]).all()
    if kind == "ivf_flat": assert (rows[:, 0] == torch.arange(300).roll(150)).all()                   # the twin is no self


def test_where_too_few_were_visited_there_is_no_row(made):
    scores, rows = made["ivf_flat", "cosine"].search(Q, 300, nprobe=1)
    empty = rows < 0
    assert empty.any() and (rows[empty] == -1).all() and (scores[empty] == -torch.inf).all() and scores[~empty].isfinite().all()
    assert (empty.int().diff(dim=1) >= 0).all()                                                       # they are last
    assert (made["ivf_flat", "euclidean"].search(Q, 300, nprobe=1)[0] == torch.inf).any()


@few
@given(seed=st.integers(0, 10**6), c=st.integers(1, 12), k=st.integers(1, 12), own=st.booleans())
def test_arranging_is_a_sort_by_distance_and_row(seed, c, k, own):
    random, k = np.random.default_rng(seed), min(k, c)
    squares, rows = random.integers(0, 4, (5, c)).astype(np.float32), np.stack([random.permutation(40)[:c] for _ in range(5)])
    rows[random.random((5, c)) < .2] = -1
    mine = rows[:, 0].clip(0) if own else np.full(5, -9)
    scores, found = I._arrange(torch.from_numpy(squares), torch.from_numpy(rows), k, "euclidean", torch.from_numpy(mine) if own else None)
    for i in range(5):
        order = sorted((s, r) for s, r in zip(squares[i], rows[i]) if r >= 0 and r != mine[i])[:k]
        order += [(np.inf, -1)] * (k - len(order))
        assert found[i].tolist() == [r for _, r in order]
        assert_close(scores[i], torch.tensor([s ** .5 for s, _ in order], dtype=torch.float32))


def test_reranking_all_candidates_is_exact_search_and_refine_uses_it(made):
    for metric in METRICS:
        exact, every = R.nearest(Q, 8, X, metric), torch.arange(600).repeat(40, 1)
        found = I.rerank(Q, every, X, 8, metric)
        assert_close(found[0], exact[0], atol=1e-5, rtol=1e-4)
        assert I.recall_of(found[1], exact[1]) > .999
        plain, refined = (I.recall_of(I.search(Q, X, 8, metric, "ivf_pq", refine=r, nprobe=6, **SMALL["ivf_pq"])[1], exact[1]) for r in (1, 8))
        assert plain < refined
    some = I.rerank(Q[:2], torch.tensor([[5, -1, 7], [-1, -1, 3]]), X, 2)[1]
    assert sorted(some[0].tolist()) == [5, 7] and some[1].tolist() == [3, -1]


def test_tensors_lists_and_half_precision_are_accepted():
    expected = I.search(Q, X, 3, index="ivf_flat", nlist=5)
    for q, x in ((torch.from_numpy(Q), torch.from_numpy(X).double()), (Q.tolist(), X), (torch.from_numpy(Q).requires_grad_(), X)):
        assert same(I.search(q, x, 3, index="ivf_flat", nlist=5), expected)
    assert I.search(torch.from_numpy(Q).bfloat16(), X, 3, index="ivf_flat", nlist=5)[1].shape == (40, 3)


# ---- the same input, the same index

@pytest.mark.parametrize("kind", KINDS)
def test_building_is_deterministic_and_does_not_depend_on_where_the_rows_lie(kind, made, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", X[:101]); np.save(tmp_path / "b.npy", X[101:])
    answers = made[kind, "cosine"].search(Q, 5)
    assert same(I.make_index(X, index=kind, **SMALL[kind]).search(Q, 5), answers)
    other = I.make_index(I.open_embeddings(tmp_path), index=kind, **SMALL[kind])
    assert same(other.search(Q, 5), answers) and other.embeddings == made[kind, "cosine"].embeddings
    if kind != "hnsw":                                                                                # its graph depends on how many come at once
        monkeypatch.setattr(I, "_BLOCK", 12 * 50)
        assert same(I.make_index(X, index=kind, **SMALL[kind]).search(Q, 5), answers)
        other = I.make_index(X, index=kind, seed=1, **SMALL[kind])
        assert not np.array_equal(other.handle.quantizer.reconstruct_n(0, 6), made[kind, "cosine"].handle.quantizer.reconstruct_n(0, 6))


def test_training_takes_a_sample_of_the_rows():
    o = I.index_options("ivf_flat", 600, 12, nlist=12, train=50)
    rows = I._train_rows(I.Stack((X,)), o)
    assert len(set(rows)) == 50 and (np.diff(rows) > 0).all() and (rows == I._train_rows(I.Stack((X[:300], X[300:])), o)).all()
    assert I.make_index(X, index="ivf_flat", nlist=12, train=50).count == 600


# ---- numbers

def test_recall_equals_the_loop_and_break_even_the_formula():
    random = np.random.default_rng(0)
    found, exact = (np.stack([random.permutation(30)[:c] for _ in range(20)]) for c in (7, 5))
    assert I.recall_of(found, exact) == pytest.approx(np.mean([j in f for f, e in zip(found.tolist(), exact.tolist()) for j in e]))
    assert I.recall_of(torch.full((2, 3), -1), exact[:2]) == 0
    for wrong in (found[:3], found[0]):
        with pytest.raises(ValueError, match="rows of the same queries"): I.recall_of(wrong, exact)
    assert I.break_even(10, .003, .001) == pytest.approx(5000) and I.break_even(1, 1, 2) == I.break_even(1, 2, 2) == float("inf")
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="build must be seconds"): I.break_even(wrong, 1, 1)


def test_visits_are_counted_and_bytes_are_as_stored(made, tmp_path):
    flat = made["ivf_flat", "cosine"]
    assert I.visited_share(flat, Q, nprobe=12) == pytest.approx(1 + 12 / 600)
    assert I.visited_share(flat, Q, nprobe=1) < I.visited_share(flat, Q, nprobe=4) < 1
    assert 0 < I.visited_share(made["hnsw", "cosine"], Q, ef_search=10) < I.visited_share(made["hnsw", "cosine"], Q, ef_search=100)
    for kind in KINDS:
        size = I.save_index(made[kind, "cosine"], tmp_path / kind).stat().st_size
        said = I.index_bytes(kind, 600, 12, **made[kind, "cosine"].options)
        assert abs(size - said) < .02 * said + 1500                                                   # headers
    assert I.index_bytes("exact", 60_502, 2048) == 4 * 60_502 * 2048


def test_a_sweep_is_a_row_for_each_setting_that_exists(made):
    truth = R.nearest(Q, 5, X)[1]
    rows = I.sweep(made["ivf_flat", "cosine"], Q, truth, (1, 4, 12, 13), rounds=1)
    assert [r["setting"] for r in rows] == [1, 4, 12] and rows[-1]["recall"] > .999 and rows[0]["recall"] <= rows[1]["recall"]
    assert all(r["seconds"] > 0 for r in rows) and rows[0]["visited"] < rows[2]["visited"]
    plain, better = (I.sweep(made["ivf_pq", "cosine"], Q, truth, (6,), gallery=g, rounds=1)[0]["recall"] for g in (None, X))
    assert plain < better


def test_short_calls_are_repeated_and_long_ones_are_not():
    calls = []
    assert 0 < I.quickest(lambda: calls.append(1), 1) < 1 and len(calls) == 20
    import time
    calls.clear()
    assert I.quickest(lambda: (time.sleep(.11), calls.append(1)), 2) >= .11 and len(calls) == 2


def test_made_up_embeddings_have_near_neighbours():
    assert BOTH.dtype == np.float32 and (BOTH == I.synthetic_embeddings(640, 12, latent=6)).all()
    cosine = judge(Q, X, "cosine")
    assert cosine.amax(1).mean() > .8 and abs(cosine.mean()) < .2


# ---- what lies on disk

@few
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_a_stack_reads_like_one_matrix(sizes, seed):
    whole, random = np.arange(sum(sizes) * 2).reshape(-1, 2), np.random.default_rng(seed)
    stack = I.Stack(tuple(np.split(whole, np.cumsum(sizes)[:-1])))
    a, b = sorted(random.integers(0, len(whole) + 1, 2))
    rows = np.flatnonzero(random.random(len(whole)) < .5)
    assert stack.shape == whole.shape and (stack.read(slice(a, b)) == whole[a:b]).all() and (stack.take(rows) == whole[rows]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_in_blocks_breaks_ties_as_in_memory(metric, monkeypatch, tmp_path):
    grid = torch.randint(-1, 2, (200, 3), generator=torch.Generator().manual_seed(0)).float() + (metric == "cosine") * torch.tensor([0., 0., 5.])
    monkeypatch.setattr(I, "_BLOCK", 3 * 17)
    np.save(tmp_path / "g.npy", grid.numpy())
    for k in (1, 10, 200):
        found, exact = I.search(grid[:40], np.load(tmp_path / "g.npy", mmap_mode="r"), k, metric), R.nearest(grid[:40], k, grid, metric)
        assert_close(found[0], exact[0], atol=1e-5, rtol=1e-5)
        if metric == "euclidean": assert found[1].equal(exact[1])                                     # exact in float32
    with pytest.raises(ValueError, match="k=201, but there are only 200"): I.nearest_in_blocks(grid, grid, 201, metric)


def test_embeddings_are_mapped_not_read_and_bad_files_are_named(tmp_path):
    np.save(tmp_path / "a.npy", X[:10]); np.save(tmp_path / "b.npy", X[10:30].astype(np.float64))
    np.savez(tmp_path / "e.npz", embeddings=X[:7], files=["x"] * 7)
    stack = I.open_embeddings(tmp_path)
    assert stack.shape == (30, 12) and all(isinstance(p, np.memmap) for p in stack.parts) and I.open_embeddings(tmp_path / "e.npz").shape == (7, 12)
    bad = tmp_path / "bad"
    bad.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .npy"): I.open_embeddings(bad)
    with pytest.raises(FileNotFoundError, match="there is no"): I.open_embeddings(bad / "x.npy")
    (bad / "text.npy").write_text("hello"); (bad / "empty.npy").touch(); np.savez(bad / "other.npz", z=X); np.save(bad / "vector.npy", X[0])
    (bad / "torn.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9]); (bad / "torn.npz").write_bytes((tmp_path / "e.npz").read_bytes()[:-9])
    np.save(bad / "objects.npy", np.array([[None]]), allow_pickle=True); np.save(bad / "words.npy", np.array([["a"]]))
    for name, message in (("text.npy", "not a matrix"), ("empty.npy", "not a matrix"), ("torn.npy", "cut off"), ("torn.npz", "cut off"),
                          ("objects.npy", "not a matrix"), ("other.npz", "no array 'embeddings'"), ("vector.npy", r"must be a matrix \(n, d\)"),
                          ("words.npy", "must be real numbers")):
        with pytest.raises(ValueError, match=message) as e: I.open_embeddings(bad / name)
        assert name in str(e.value)
    torch.save(torch.from_numpy(np.asarray(X)), bad / "x.pt"); np.savez(bad / "many.npz", **{f"a{i}": X for i in range(12)}); np.savez(bad / "none.npz")
    for name, message in (("other.npz", "no array 'embeddings', it holds 'z': .* numpy.save"), ("many.npz", "'a8', ...: "), ("none.npz", "it holds nothing"),
                          ("x.pt", r"x.pt is a file of torch: .* numpy.save\('.*/bad/x.npy', tensor.numpy\(\)\)")):
        with pytest.raises(ValueError, match=message): I.open_embeddings(bad / name)
    np.save(tmp_path / "c.npy", X[:5, :6])
    with pytest.raises(ValueError, match="c.npy has 6 columns and .*a.npy 12"): I.open_embeddings(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_an_index_comes_back_from_disk_as_it_was(kind, metric, made, tmp_path):
    np.save(tmp_path / "x.npy", X)
    built, index = I.build_index(tmp_path / "x.npy", tmp_path / "new/x.index", metric, kind, **SMALL[kind]), made[kind, metric]
    read = I.open_index(tmp_path / "new/x.index", metric)
    assert same(read.search(Q, 9), index.search(Q, 9)) and same(built.search(Q, 9), index.search(Q, 9))
    assert (read.kind, read.metric, read.count, read.dim, read.options) == (kind, metric, 600, 12, index.options) and np.isnan(read.seconds)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["x.index", "x.index.json"]
    facts = json.loads((tmp_path / "new/x.index.json").read_text())
    assert {"dml_companion", "faiss", "numpy", "torch"} == set(facts["versions"]) and str(tmp_path) not in json.dumps(facts)
    assert I.indexed(read, I.open_embeddings(tmp_path / "x.npy")).shape == (600, 12)
    for other in (X[::-1], X[:599]):
        with pytest.raises(ValueError, match="not those that the index was built of, 600 x 12"): I.indexed(read, I.Stack((other,)))


def test_a_torn_or_foreign_file_is_refused(made, tmp_path):
    path, other = I.save_index(made["ivf_flat", "cosine"], tmp_path / "a"), I.save_index(made["ivf_flat", "euclidean"], tmp_path / "b")
    data, side = path.read_bytes(), I.sidecar_of(path)
    text = side.read_text()

    def refused(message, kind=ValueError):
        with pytest.raises(kind, match=message): I.open_index(path)
        path.write_bytes(data); side.write_text(text)
        assert I.open_index(path).count == 600
    path.write_bytes(data[:-100]); refused("was cut off or replaced")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])); refused("is not the file that a.json describes")
    side.write_text(I.sidecar_of(other).read_text()); refused("is not the file|cut off or replaced")
    side.write_text(text.replace('"cosine"', '"euclidean"')); refused("was changed after it was written")
    side.write_text(text[:-20]); refused("is no JSON")
    side.write_text("[]"); refused("not a sidecar of format 1")
    side.write_text(text.replace('"format": 1', '"format": 2')); refused("not a sidecar of format 1")
    side.unlink(); refused("has no sidecar a.json")
    path.unlink(); refused("there is no index", FileNotFoundError)


def test_what_is_written_is_whole_or_the_old_one(made, tmp_path, monkeypatch):
    path = I.save_index(made["hnsw", "cosine"], tmp_path / "a")
    def killed(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt): I.save_index(made["ivf_pq", "cosine"], path)
    assert I.open_index(path).kind == "hnsw" and sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.json"]
    with pytest.raises(ValueError, match="is a folder"): I.save_index(made["hnsw", "cosine"], tmp_path)


# ---- refusals

BAD, ZERO, LATE = X.copy(), X.copy(), X.copy()
BAD[4, 1], ZERO[3], LATE[599, 0] = np.nan, 0, np.nan


@pytest.mark.parametrize("call,message", [
    (lambda: I.search(Q, X, 3, index="annoy"), "unknown index 'annoy': use one of 'exact', 'ivf_flat', 'ivf_pq', 'hnsw'"),
    (lambda: I.make_index(X, index="exact"), "unknown index to build 'exact': use one of 'ivf_flat', 'ivf_pq', 'hnsw'"),
    (lambda: I.search(Q, X, 3, metric="dot", index="hnsw"), "unknown metric 'dot': use one of 'cosine', 'euclidean'"),
    (lambda: I.search(Q, X, 3, metric="dot"), "unknown metric 'dot'"),
    (lambda: I.search(Q, X, 3, nlist=4), "unknown option 'nlist' of exact: it takes chunk, backend"),
    (lambda: I.search(Q, X, 3, refine=2), "exact search has nothing to refine"),
    (lambda: I.search(Q, X, 3, index="hnsw", nprobe=4), "unknown option 'nprobe' of hnsw: it takes M, ef_construction, ef_search, threads"),
    (lambda: I.search(Q, X, 601, index="ivf_flat"), "k=601, but there are only 600 candidates in the gallery: use k <= 600"),
    (lambda: I.search(X, None, 600, index="ivf_flat"), "k=600, but there are only 599 candidates .the query itself is left out."),
    (lambda: I.search(Q, X, 0, index="hnsw"), "k must be a whole number of at least 1, got 0"),
    (lambda: I.search(Q, X, 3, index="hnsw", refine=.5), "refine must be a whole number of at least 1, got 0.5"),
    (lambda: I.search(Q[:, :5], X, 3, index="hnsw"), "queries have 5 columns and the gallery 12"),
    (lambda: I.search(Q, BAD, 3, index="hnsw"), "gallery: 1 of 600 rows have a NaN, .*the first is row 4"),
    (lambda: I.make_index(LATE, "euclidean", "ivf_flat", train=400), "training rows of the gallery: 1 of 400 rows have a NaN, .*the first is row 599"),
    (lambda: I.search(BAD, X, 3, index="hnsw"), "queries: 1 of 600 rows have a NaN"),
    (lambda: I.search(Q, ZERO, 3, index="hnsw"), "gallery: 1 of 600 rows are zero and have no direction: .*the first is row 3"),
    (lambda: I.search(Q, X * 1e20, 3, "euclidean", "hnsw"), "above 1e17, whose squares overflow"),
    (lambda: I.search(Q, X[0], 3, index="hnsw"), r"gallery must be a matrix \(n, d\)"),
    (lambda: I.search(Q, X[:0], 3, index="hnsw"), "at least one row"),
    (lambda: I.search(Q, np.array([["a"]]), 3, index="hnsw"), "gallery must be real numbers"),
    (lambda: I.index_options("ivf_flat", 600, 12, nlist=601), "nlist=601, but there are only 600 training points: use nlist <= 600"),
    (lambda: I.index_options("ivf_flat", 600, 12, nlist=100, train=99), "nlist=100, but there are only 99 training points"),
    (lambda: I.index_options("ivf_flat", 600, 12, train=601), "train=601, but the gallery has only 600 rows: use train <= 600"),
    (lambda: I.index_options("ivf_flat", 600, 12, nlist=10, nprobe=11), "only nlist=10 cells: use nprobe <= 10"),
    (lambda: I.index_options("ivf_pq", 600, 12, m=5), "m=5 does not divide the dimension 12: use one of 1, 2, 3, 4, 6, 12"),
    (lambda: I.index_options("ivf_pq", 600, 12, bits=9), "bits=9: use bits <= 8"),
    (lambda: I.index_options("ivf_pq", 600, 12, bits=10**9), "use bits <= 8"),
    (lambda: I.index_options("ivf_pq", 1, 12), "1 training point makes no codewords: use index='exact'"),
    (lambda: I.index_options("ivf_pq", 200, 12, bits=8), "256 codewords, but there are only 200 training points: use bits <= 7"),
    (lambda: I.index_options("hnsw", 600, 12, M=1), "at least 2 links"),
    (lambda: I.index_options("hnsw", 600, 12, M=True), "M must be a whole number of at least 1, got True"),
    (lambda: I.index_options("ivf_flat", 600, 12, nlist=None), "nlist must be a whole number of at least 1, got None"),
    (lambda: I.index_options("ivf_flat", 600, 12, seed=-1), "seed must be a whole number of at least 0, got -1"),
    (lambda: I.index_options("exact", 600, 12), "unknown index 'exact'"),
    (lambda: I.rerank(Q, torch.zeros(40, 2, dtype=torch.int64), X, 3), "k=3 of 2 candidates"),
    (lambda: I.found_ending("x.txt"), "give a name with one of these endings"),
    (lambda: I.open_index("x", "dot"), "unknown metric 'dot'"),
])
def test_refusals_say_which_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_a_built_index_refuses_other_queries_and_options(made):
    index = made["ivf_flat", "cosine"]
    for call, message in ((lambda: index.search(Q[:, :5], 3), "queries have 5 columns and the gallery 12"),
                          (lambda: index.search(Q, 3, nlist=5), "unknown option 'nlist' of a search by ivf_flat: it takes nprobe"),
                          (lambda: index.search(Q, 3, nprobe=13), "use nprobe <= 12"), (lambda: index.search(Q, 601), "use k <= 600"),
                          (lambda: index.search(np.concatenate([X, X]), 3, own=True), "1200 queries cannot be rows of a gallery of 600")):
        with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("count,dim", [(2, 1), (3, 2), (40, 7), (300, 13), (10**6, 128), (10**9, 2048)])
def test_defaults_can_always_be_built(count, dim):
    for kind in KINDS:
        o = I.index_options(kind, count, dim)
        assert None not in o.values() and I.index_options(kind, count, dim, **o) == o
        if count < 50: assert I.search(BOTH[:3, :dim], BOTH[:count, :dim], 1, "euclidean", kind)[1].shape == (3, 1)


def test_without_faiss_exact_search_goes_on_and_the_rest_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert I.search(Q, X, 3)[1].shape == (40, 3)
    with pytest.raises(ImportError, match="index='hnsw' needs the package faiss-cpu .*index='exact'"): I.search(Q, X, 3, index="hnsw")


# ---- the commands

@pytest.fixture
def shelf(tmp_path):
    np.save(tmp_path / "x.npy", X); np.save(tmp_path / "q.npy", Q); np.save(tmp_path / "narrow.npy", Q[:, :5])
    every = ("--set", "nlist=12", "--set", "nprobe=12")
    run("index", "build", tmp_path / "x.npy", "--index", "ivf_flat", "--metric", "euclidean", "--out", tmp_path / "i", *every)
    return tmp_path


def test_build_and_query(shelf):
    said = run("index", "query", shelf / "i", shelf / "q.npy", "--k", 4, "--out", shelf / "f.npz", "--check", shelf / "x.npy")
    exact = R.nearest(Q, 4, X, "euclidean")
    assert "4 neighbours of 40 queries among 600" in said and "recall 1.0000 of the exact neighbours" in said
    with np.load(shelf / "f.npz", allow_pickle=False) as z:
        assert I.recall_of(z["rows"], exact[1]) > .999 and z["metric"] == "euclidean"
        assert_close(torch.from_numpy(z["scores"]), exact[0], atol=1e-4, rtol=1e-4)
        rows = z["rows"]
    run("index", "query", shelf / "i", shelf / "q.npy", "-k", 4, "-o", shelf / "f.csv", "--metric", "euclidean")
    lines = list(csv.DictReader(open(shelf / "f.csv")))
    assert len(lines) == 160 and list(lines[0]) == ["query", "rank", "row", "distance"]
    assert [int(line["row"]) for line in lines] == rows.ravel().tolist() and [int(line["rank"]) for line in lines[:5]] == [1, 2, 3, 4, 1]
    run("index", "query", shelf / "i", shelf / "q.npy", "-k", 4, "-o", shelf / "g.npz", "--set", "nprobe=1")
    assert I.recall_of(np.load(shelf / "g.npz")["rows"], exact[1]) < .999
    said = run("index", "build", shelf / "x.npy", "--out", shelf / "j", "--set", "m=4", "--set", "bits=4")
    assert "ivf_pq of 600 x 12, cosine" in said and "m 4, bits 4" in said


def test_commands_refuse_in_a_sentence(shelf):
    query, answer = ("query", shelf / "i"), ("--out", shelf / "f.npz")
    assert "queries have 5 columns and the gallery 12" in refused("index", *query, shelf / "narrow.npy", *answer)
    assert "was built for metric 'euclidean', not 'cosine'" in refused("index", *query, shelf / "q.npy", *answer, "--metric", "cosine")
    assert "unknown metric 'dot'" in refused("index", "build", shelf / "x.npy", "--metric", "dot", "--out", shelf / "k")
    assert "unknown index to build 'flat': use one of 'ivf_flat', 'ivf_pq', 'hnsw'" in refused("index", "build", shelf / "x.npy", "--index", "flat", "--out", shelf / "k")
    assert "unknown option 'metric' of ivf_pq" in refused("index", "build", shelf / "x.npy", "--out", shelf / "k", "--set", "metric=1")
    assert "write name=value" in refused("index", "build", shelf / "x.npy", "--out", shelf / "k", "--set", "nlist")
    assert "nlist must be a whole number" in refused("index", "build", shelf / "x.npy", "--out", shelf / "k", "--set", "nlist=many")
    assert "m=5 does not divide" in refused("index", "build", shelf / "x.npy", "--out", shelf / "k", "--set", "m=5")
    assert "it takes nprobe; the rest was fixed" in refused("index", *query, shelf / "q.npy", *answer, "--set", "nlist=3")
    assert "unknown option 'k' of ivf_flat" in refused("index", *query, shelf / "q.npy", *answer, "--set", "k=3")
    assert "use k <= 600" in refused("index", *query, shelf / "q.npy", *answer, "--k", 601)
    assert ".npz or .csv" in refused("index", *query, shelf / "q.npy", "--out", shelf / "f.txt")
    assert "there is no" in refused("index", *query, shelf / "none.npy", *answer)
    assert "there is no index" in refused("index", "query", shelf / "none", shelf / "q.npy", *answer)
    assert "not those that the index was built of, 600 x 12" in refused("index", *query, shelf / "q.npy", *answer, "--check", shelf / "q.npy")
    (shelf / "i").write_bytes((shelf / "i").read_bytes()[:-1])
    assert "cut off" in refused("index", *query, shelf / "q.npy", *answer)
    assert not (shelf / "f.npz").exists() and not (shelf / "k").exists()


def test_nothing_that_is_read_is_written_over(tmp_path):
    np.save(tmp_path / "g.npy", X); np.savez(tmp_path / "q.npz", embeddings=X[:5])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    g, q, i = (tmp_path / name for name in ("g.npy", "q.npz", "i"))
    for target in (g, tmp_path / "sub/../g.npy"):
        assert "is read here, and writing would replace it" in refused("index", "build", g, "-o", target, "--index", "ivf_flat")
    run("index", "build", g, "-o", i, "--index", "ivf_flat")
    assert "is read here" in refused("index", "query", i, q, "-o", q, "-k", "3")
    for target in (i, g): assert "npz or .csv" in refused("index", "query", i, q, "-o", target, "--check", g, "-k", "3")
    assert "use one of 'ivf_flat', 'ivf_pq', 'hnsw'" in refused("index", "build", g, "-o", i, "--index", "exact")
    assert {n: (tmp_path / n).read_bytes() for n in before} == before


def test_help_needs_no_torch_and_the_module_no_faiss():
    code = ("import sys; from typer.testing import CliRunner; from dml_companion import cli\n"
            "for w in ('build', 'query'): print(CliRunner().invoke(cli.app, ['index', w, '--help']).output)\n"
            "light = [m for m in ('torch', 'numpy', 'faiss') if m in sys.modules]\n"
            "import dml_companion.indexes; print(light, [m for m in ('faiss', 'pandas', 'matplotlib', 'sklearn') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[] []") and "--metric" in done.stdout and "--check" in done.stdout, done.stderr


# ---- the benchmark, tiny

def test_benchmark_writes_its_files(tmp_path, monkeypatch):
    from pathlib import Path
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    pd = pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    from benchmarks.__main__ import PARTS, main
    np.save(tmp_path / "mine.npy", X)
    words = "search --exact 70 8 --sizes 300 --dim 8 --queries 30 --rounds 1 --threads 1".split()
    main([*words, "--embeddings", str(tmp_path / "mine.npy"), "--out", str(tmp_path / "bench")])
    assert {p.name for p in (tmp_path / "bench").iterdir()} == {*(f"search.{kind}" for kind in ("csv", "md", "svg", "png")), "search_exact.csv"}
    table = pd.read_csv(tmp_path / "bench/search.csv")
    assert table[table["index"] == "exact"].n.tolist() == [300, 570] and set(table.data) == {"synthetic", "mine"}
    assert table.recall.between(0, 1).all() and (table.seconds > 0).all()
    text = (tmp_path / "bench/search.md").read_text()
    assert "times the product" in text and "pays after" in text and str(tmp_path) not in text
    exact = pd.read_csv(tmp_path / "bench/search_exact.csv")
    assert {"cosine", "euclidean"} == set(exact.way) and (exact.peak_gb > 0).all() and (exact.rounds == 1).all() and "medians of 1 rounds" in text
    assert "search" not in PARTS
    for wrong in (["retrieval", "--dim", "3"], ["serch"]):
        with pytest.raises(SystemExit): main(wrong)


def test_a_gallery_of_views(tmp_path):
    "The images as they are, then other views of them, as a trained run's encoder sees them; a folder without a run is named."
    from pathlib import Path
    pd = pytest.importorskip("pandas")
    pytest.importorskip("matplotlib").use("Agg")
    from benchmarks import bench_search as S
    from dml_companion.engine import run_cells
    small = dict(data_options={"max_train_classes": 24, "max_test_classes": 24}, encoder_options={"width": 4}, epochs=1, batch_size=32, warmup=2, snapshots=0)
    run = run_cells(Path(__file__).parents[1] / "nbs/04_experiments/30_train.ipynb", dict(folder=str(tmp_path / "run"), device="cpu", watch_test=False, **small))
    images = len(run["benchmark"].train) + len(run["benchmark"].query)
    x, name = S.views(tmp_path / "run", 2 * images + 5, block=100)
    assert name == "views of glyphs" and np.allclose(x[len(run["benchmark"].train):images], run["z"].numpy(), atol=1e-5)
    near = (x[:images] - x[images:2 * images]); far = x[:images] - np.roll(x[images:2 * images], images // 2, 0)
    assert 0 < (near ** 2).sum(1).mean() < .8 * (far ** 2).sum(1).mean() and np.array_equal(x, S.views(tmp_path / "run", 2 * images + 5, block=100)[0])
    S.main(tmp_path / "bench", exact=(0, 0), sizes=(300,), dim=8, queries=30, rounds=1, threads=1, run=str(tmp_path / "run"))
    table = pd.read_csv(tmp_path / "bench/search.csv")
    assert table[table["index"] == "exact"].n.tolist() == [300, 300] and set(table.data) == {"synthetic", "views of glyphs"}
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert f"Views of glyphs: the run {record['row']}, seed 0, {record['run']}." in (tmp_path / "bench/search.md").read_text()
    with pytest.raises(ValueError, match="has no record.json, so it is no finished run: give a folder"): S.views(tmp_path, 10)
    with pytest.raises(ValueError, match="has no record.json"): S.main(tmp_path / "none", exact=(10**6, 10**4), run=str(tmp_path))     # before anything is measured
