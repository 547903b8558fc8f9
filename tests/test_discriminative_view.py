"""Notebook 14 on fresh seeds: Lemma 2 and its refinement, smoothing as a channel, invertible maps, correlations."""
import ast, json
from math import log, pi
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from dml_companion.reproduction import load_claims, write_record

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs/02_theory/14_discriminative_view.ipynb"
CODE = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
TOLERANCE = 1e-9                                          # float64, values up to about 100
fresh = settings(derandomize=True, deadline=None, max_examples=20)


def is_definition(node):
    constant = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()
    return constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))


@pytest.fixture(scope="module")
def nb():
    "Imports, functions and constants of the notebook, without running it."
    import matplotlib
    matplotlib.use("Agg")
    space = {}
    for text in CODE:
        body = [node for node in ast.parse(text).body if is_definition(node)]
        exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), space)
    return type("Notebook", (), {k: staticmethod(v) if callable(v) else v for k, v in space.items()})


def generator(seed): return torch.Generator().manual_seed(seed)
def randn(*shape, seed): return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
def caught(check, *mutants):
    for mutant in mutants:
        with pytest.raises(AssertionError): check(mutant)


# ---- Lemma 2

def test_lemma_2_is_an_identity(nb):
    def check(terms):
        for seed in range(1000, 1050):
            K = 2 + seed % 7
            p, log_q = randn(20, K, seed=seed).softmax(1), (3 * randn(20, K, seed=-seed)).log_softmax(1)
            ce, h, kl = terms(p, log_q)
            assert abs(ce - h - kl) < TOLERANCE and kl >= -1e-12
            assert abs(ce - F.cross_entropy(log_q, p)) < TOLERANCE                 # torch's soft targets as oracle
            assert abs(ce + (p * log_q).sum() / 20) < TOLERANCE
    ce, h, kl = nb.cross_entropy, nb.conditional_entropy, nb.divergence
    check(lambda p, lq: (ce(p, lq), h(p), kl(p, lq)))
    caught(check, lambda p, lq: (ce(p, lq), h(p), kl(lq.exp(), p.log())),          # KL the other way round
           lambda p, lq: (ce(p, lq), -h(p), kl(p, lq)), lambda p, lq: (ce(p, lq), 0, kl(p, lq)),
           lambda p, lq: (ce(p, lq), h(lq.exp()), kl(p, lq)), lambda p, lq: (ce(p, lq), h(p), 2 * kl(p, lq)))


def test_the_loop_is_the_formula(nb):
    p, q = (randn(8, 5, seed=s).softmax(1) for s in (1000, 1001))
    terms = nb.cross_entropy(p, q.log()), nb.conditional_entropy(p), nb.divergence(p, q.log())
    assert np.allclose([t.item() for t in terms], nb.three_terms_loop(p, q), atol=1e-12)


def test_a_certain_posterior_has_no_entropy(nb):
    p = torch.eye(4, dtype=torch.float64)
    assert nb.conditional_entropy(p) == 0 and nb.divergence(p, (p + .1).log_softmax(1)).isfinite()


def test_gaussian_posterior_is_bayes_rule(nb):
    K, M, d = 3, 2, 4
    means = randn(K, M, d, seed=1002)
    scales = torch.eye(d, dtype=torch.float64) * torch.tensor([.5, 1., 2.], dtype=torch.float64)[:, None, None]
    scales = scales + .3 * randn(K, d, d, seed=1003).tril(-1)
    z, y = nb.draw(means, scales, 60, generator(1004))
    modes = torch.distributions.MultivariateNormal(means, scale_tril=scales[:, None])
    density = modes.log_prob(z[:, None, None]).exp().mean(2)

    def check(posterior):
        assert torch.allclose(posterior(z, means, scales), density / density.sum(1, keepdim=True), atol=1e-10)
    check(nb.gaussian_posterior)
    caught(check, lambda z, m, s: nb.gaussian_posterior(z, m, s / s.diagonal(dim1=1, dim2=2).prod(1)[:, None, None]),
           lambda z, m, s: nb.gaussian_posterior(z, m[:, :1], s),
           lambda z, m, s: nb.gaussian_posterior(z, m, s.mT.tril()))
    assert y.bincount().tolist() == [20, 20, 20]


@pytest.mark.parametrize("seed", range(1000, 1006))
def test_what_a_linear_classifier_reaches(nb, seed):
    z, p = nb.random_problem(seed, linear=True)
    reached = nb.cross_entropy(p, (nb.with_bias(z) @ nb.best_linear(z, p)).log_softmax(1))
    assert abs(reached - nb.conditional_entropy(p)) < TOLERANCE
    z, p = nb.random_problem(seed, linear=False)
    reached = nb.cross_entropy(p, (nb.with_bias(z) @ nb.best_linear(z, p)).log_softmax(1))
    assert reached > nb.conditional_entropy(p) + 1e-4


def test_best_linear_is_the_optimum(nb):
    from scipy.optimize import minimize
    z, p = nb.random_problem(1010, linear=False)
    x, theta = nb.with_bias(z), nb.best_linear(z, p)

    def value(flat): return nb.cross_entropy(p, (x @ torch.from_numpy(flat).view_as(theta)).log_softmax(1)).item()
    oracle = minimize(value, np.zeros(theta.numel()), method="L-BFGS-B", options=dict(maxiter=500, maxfun=100000))
    assert value(theta.flatten().numpy()) <= oracle.fun + TOLERANCE
    assert oracle.fun - value(theta.flatten().numpy()) < 1e-4                      # L-BFGS with numerical slopes


def test_the_gap_splits_at_the_best_classifier(nb):
    def check(split):
        for seed in range(1000, 1008):
            z, p = nb.random_problem(seed, linear=False, n=120)
            x = nb.with_bias(z)
            best, theta = nb.best_linear(z, p), randn(x.shape[1], p.shape[1], seed=seed)
            assert abs(nb.divergence(p, (x @ theta).log_softmax(1)) - split(x, p, best, theta)) < TOLERANCE
    soft = lambda x, t: (x @ t).log_softmax(1)
    right = lambda x, p, b, t: nb.divergence(p, soft(x, b)) + nb.divergence(soft(x, b).exp(), soft(x, t))
    check(right)
    caught(check, lambda x, p, b, t: right(x, p, .9 * b, t),                       # not stationary
           lambda x, p, b, t: nb.divergence(p, soft(x, b)) + nb.divergence(soft(x, t).exp(), soft(x, b)),
           lambda x, p, b, t: nb.divergence(p, soft(x, b)) - nb.divergence(soft(x, b).exp(), soft(x, t)),
           lambda x, p, b, t: nb.divergence(soft(x, b).exp(), soft(x, t)))         # nothing that stays


def test_descent_starts_at_log_k_and_never_passes_below_the_entropy(nb):
    z, p = nb.random_problem(1020, linear=True)
    losses = nb.curve(z, p, nb.descend(z, p, 60))
    assert abs(losses[0] - log(p.shape[1])) < 1e-12
    assert (losses >= nb.conditional_entropy(p).item() - 1e-12).all() and losses[-1] < losses[0]


# ---- label smoothing

@fresh
@given(st.integers(2, 12), st.floats(.01, .95), st.integers(1000, 10**6))
def test_official_smoothing_is_pytorchs(nb, K, share, seed):
    eps, y = share * (K - 1) / K, torch.randint(K, (9,), generator=generator(seed))
    logits, q = 3 * randn(9, K, seed=seed), nb.smooth_targets(y, K, eps)
    assert torch.allclose(q.sum(1), torch.ones(9, dtype=torch.float64))
    official = F.kl_div(logits.log_softmax(1), q, reduction="batchmean")

    def check(factor, constant):
        mine = F.cross_entropy(logits, y, label_smoothing=eps * factor) - constant
        assert abs(mine - official) < TOLERANCE
    check(K / (K - 1), nb.conditional_entropy(q))
    mine = nb.smoothed_loss(F.one_hot(y, K).double(), logits.log_softmax(1), nb.channel(K, eps))
    assert abs(mine - official) < TOLERANCE
    caught(lambda wrong: check(*wrong), (1., nb.conditional_entropy(q)), (K / (K - 1), 0.))


def test_infimum_of_the_smoothed_loss(nb):
    def check(floor):
        for seed in range(1000, 1030):
            K, eps = 2 + seed % 6, .05 + .01 * (seed % 30)
            T, p = nb.channel(K, eps), (2 * randn(15, K, seed=seed)).softmax(1)
            best = nb.smoothed_loss(p, (p @ T).log(), T)
            assert abs(best - floor(p, T)) < TOLERANCE
            for other in range(3):
                assert nb.smoothed_loss(p, randn(15, K, seed=seed + 50 + other).log_softmax(1), T) > best
    h = nb.conditional_entropy
    check(lambda p, T: h(p @ T) - h(T))
    check(lambda p, T: torch.stack([nb.table_information(row[:, None] * T) for row in p]).mean())
    caught(check, lambda p, T: h(p @ T), lambda p, T: h(p) - h(T), lambda p, T: h(p @ T) + h(T))


def test_smoothing_contracts_information(nb):
    def check(factor):
        for seed in range(1000, 1060):
            K = 2 + seed % 9
            a = .02 + .015 * (seed % 60)
            T = nb.channel(K, a * (K - 1) / K)
            joint = torch.softmax(3 * randn(12 * K, seed=seed), 0).view(12, K)
            clean, noisy = nb.table_information(joint), nb.table_information(joint @ T)
            assert 0 <= noisy <= factor(a) * clean + 1e-12
    check(lambda a: 1 - a)
    check(lambda a: 1.)                                                            # data processing
    caught(check, lambda a: a, lambda a: (1 - a) / 2, lambda a: 1 - 4 * a, lambda a: (1 - a) ** 4)


def test_table_information(nb):
    joint = torch.diag(torch.tensor([.5, .25, .25], dtype=torch.float64))
    assert abs(nb.table_information(joint) - 1.5 * log(2)) < 1e-12
    p, q = randn(5, seed=1000).softmax(0), randn(4, seed=1001).softmax(0)
    assert abs(nb.table_information(p[:, None] * q)) < 1e-12


def test_optimal_logit_gap(nb):
    from scipy.optimize import minimize_scalar
    def check(gap):
        for K, eps in ((2, .1), (7, .02), (100, .1), (3997, .1)):
            q = nb.channel(K, eps)[:1]
            def loss(g):
                logits = torch.zeros(1, K, dtype=torch.float64)
                logits[0, 0] = g
                return nb.divergence(q, logits.log_softmax(1)).item()
            found = minimize_scalar(loss, bounds=(0, 30), method="bounded", options=dict(xatol=1e-8)).x
            assert abs(found - gap(K, eps)) < 1e-4                                 # a flat minimum in float64
    check(nb.optimal_gap)
    caught(check, lambda K, eps: log((1 - eps) * K / eps), lambda K, eps: log((1 - eps) / eps),
           lambda K, eps: log((K - 1) / eps))


# ---- equal information, another retrieval

def test_maps_are_invertible(nb):
    def check(there, back):
        for seed in range(1000, 1010):
            z = randn(200, 2, seed=seed)
            assert (back(there(z)) - z).abs().max() < TOLERANCE
    check(lambda z: nb.swirl(z, 28.), lambda z: nb.swirl(z, -28.))
    check(lambda z: nb.squash(z, 1e-3), lambda z: nb.squash(z, 1e3))
    caught(lambda pair: check(*pair), (lambda z: nb.swirl(z, 28.), lambda z: nb.swirl(z, 28.)),
           (lambda z: nb.squash(z, 0.), lambda z: nb.squash(z, 1e3)),              # not invertible
           (lambda z: nb.swirl(nb.squash(z, .5), 28.), lambda z: nb.squash(nb.swirl(z, -28.), .5)))


def test_a_swirl_keeps_volume_and_radius(nb):
    for p in randn(10, 2, seed=1011):
        slope = torch.autograd.functional.jacobian(lambda p: nb.swirl(p[None], 28.)[0], p)
        assert abs(slope.det() - 1) < TOLERANCE
    z = randn(50, 2, seed=1012)
    assert torch.allclose(nb.swirl(z, 28.).norm(dim=1), z.norm(dim=1), atol=1e-12)


def test_discs_are_disjoint_so_their_information_is_log_k(nb):
    z, y = nb.discs(1013, per_class=500)
    angle = 2 * pi * torch.arange(4) / 4
    reach = torch.cdist(z, torch.stack([angle.cos(), angle.sin()], 1).double())
    assert (reach.argmin(1) == y).all() and reach.amin(1).max() <= .3 < 2 ** .5 / 2


def test_same_information_other_retrieval(nb):
    def check(transform):                                 # the claim as stated: retrieval within 0.05
        for seed in range(1000, 1006):
            z, y = nb.discs(seed)
            assert abs(nb.r1(transform(z), y) - nb.r1(z, y)) < .05
    turn = torch.linalg.qr(randn(2, 2, seed=1014)).Q
    check(lambda z: 3 * z @ turn + 7)                     # similarities keep it
    caught(check, lambda z: nb.squash(z, 1e-3), lambda z: nb.swirl(z, 28.))


def test_the_neighbour_estimate_falls_where_information_does_not(nb):
    z, y = nb.discs(1015)
    assert abs(nb.mutual_information(z, y) - log(4)) < .05 < log(4) - nb.mutual_information(nb.swirl(z, 28.), y)


# ---- seen and unseen

def test_spearman_is_scipys(nb):
    from scipy.stats import spearmanr
    for seed in range(1000, 1010):
        a, b = np.random.default_rng(seed).integers(0, 6, (2, 15)).astype(float)   # many ties
        assert abs(nb.spearman(a, b) - spearmanr(a, b)[0]) < 1e-12
    assert np.isnan(nb.spearman(np.ones(5), np.arange(5.)))


def test_fisher_interval_covers(nb):
    from scipy.stats import spearmanr
    rng, m, rho = np.random.default_rng(1016), 20, .6
    truth = 6 / pi * np.arcsin(rho / 2)                   # Spearman's of a bivariate normal
    found = [spearmanr(*rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], m).T)[0] for _ in range(400)]

    def check(interval):
        low, high = zip(*(interval(r, m) for r in found))
        assert .92 < np.mean([l <= truth <= h for l, h in zip(low, high)]) < .99
    check(nb.fisher)
    caught(check, lambda r, m: nb.fisher(r, 4 * m), lambda r, m: nb.fisher(r, 6), lambda r, m: nb.fisher(-r, m))
    assert nb.fisher(.5, 3) == (-1, 1) and nb.fisher(float("nan"), 9) == (-1, 1) and nb.fisher(1., 9)[0] > .9


def test_jackknife_covers_where_runs_of_one_objective_agree(nb):
    rng, hits = np.random.default_rng(1019), {"jackknife": [], "fisher": []}
    groups = np.split(np.arange(24), 8)
    for _ in range(300):                                  # no correlation, but seeds nearly repeat each other
        pairs = np.repeat(rng.normal(size=(8, 2)), 3, axis=0) + .1 * rng.normal(size=(24, 2))
        low, high = nb.jackknife(pairs, groups)
        assert low <= nb.spearman(*pairs.T) <= high
        hits["jackknife"].append(low <= 0 <= high)
        low, high = nb.fisher(nb.spearman(*pairs.T), 24)
        hits["fisher"].append(low <= 0 <= high)
    assert np.mean(hits["jackknife"]) > .88 and np.mean(hits["fisher"]) < .8       # 24 runs are not 24 facts
    assert nb.jackknife(pairs[:9], groups[:3]) == (-1, 1)
    perfect = np.arange(24.)[:, None].repeat(2, 1)
    assert nb.jackknife(perfect, groups) == nb.fisher(1., 8) and nb.jackknife(perfect, groups)[0] < 1


def simpson(seed, objectives=8, seeds=3):
    "Up across objectives, down within each."
    rng, lines = np.random.default_rng(seed), []
    for k in range(objectives):
        for s in range(seeds):
            step = rng.normal()
            lines.append(dict(row=f"o{k}", x=5. * k + step, unseen=3. * k - step + .05 * rng.normal()))
    return pd.DataFrame(lines)


def test_levels_are_told_apart(nb):
    def check(correlate):
        for seed in range(1000, 1003):
            found = correlate(simpson(seed), "x")
            assert found["all"][0] > .8 and found["across"][0] > .9 and found["within"][0] < -.9
            assert found["within"][2] < 0 < found["across"][1]
            assert all(low <= rho <= high for rho, low, high in found.values())
    check(nb.rank_correlations)
    caught(check, lambda runs, x: nb.rank_correlations(runs.assign(row="one objective"), x),
           lambda runs, x: {k: (-r, -h, -l) for k, (r, l, h) in nb.rank_correlations(runs, x).items()},
           lambda runs, x: nb.rank_correlations(runs, x) | {"within": nb.rank_correlations(runs, x)["all"]})


def test_controls_can_make_a_correlation(nb):
    rng = np.random.default_rng(1017)
    runs = pd.DataFrame(dict(row=np.repeat([f"o{k}" for k in range(7)], 3), x=rng.random(21), unseen=rng.random(21)))
    far = pd.DataFrame(dict(row=["untrained"] * 10, x=-9 + rng.random(10), unseen=-9 + rng.random(10)))
    alone, joined = nb.rank_correlations(runs, "x")["all"], nb.rank_correlations(pd.concat([runs, far]), "x")["all"]
    assert alone[1] < 0 < alone[2] and joined[0] > alone[0] + .3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Records of six objectives and the controls with embeddings beside them; the noisier, the worse."
    folder, rng, paths = tmp_path_factory.mktemp("runs"), np.random.default_rng(1018), []
    centres, y = rng.normal(size=(12, 8)), np.repeat(np.arange(12), 10)
    rows = ["cross_entropy", "snca", "contrastive", "center", "multi_similarity", "normalized_softmax", "untrained"]
    for k, row in enumerate(rows + ["raw_pixels"]):
        for seed in range(1 if row == "raw_pixels" else 2):
            noise = .3 + .1 * k + .02 * rng.random()
            seen = (centres[y] + noise * rng.normal(size=(120, 8))).astype("float32")
            here = folder / row / f"s{seed}"
            here.mkdir(parents=True)
            np.savez(here / "epochs.npz", epoch=np.arange(2), seen=np.stack([rng.normal(size=seen.shape), seen]),
                     seen_labels=7 * y, unseen=seen[None], unseen_labels=y)
            write_record(here, run=f"{k:06d}{seed:06d}", row=row, seed=seed, recipe={}, code="0" * 64, provenance={},
                         data=dict(name="made up", digest="0" * 64), metrics={"cosine/recall@1": 1 - noise / 2})
            paths.append(str(here / "record.json"))
    return paths


def test_runs_are_measured_at_their_last_epoch(nb, runs):
    table = nb.measure_runs(runs)
    assert len(table) == len(runs) == 15 and (table.classes == 12).all() and table.seen_r1[0] > .9
    assert (table.linear <= log(12)).all() and np.isfinite(table[list(nb.MEASURES)]).all().all()
    assert nb.spearman(table.knn.to_numpy(), table.unseen.to_numpy()) > .8


def test_what_cannot_be_measured_is_refused(nb, runs, tmp_path):
    write_record(tmp_path, run="0" * 12, row="snca", seed=0, recipe={}, code="0" * 64, provenance={},
                 data=dict(name="another", digest="1" * 64), metrics={"cosine/recall@1": .5})
    lone = str(tmp_path / "record.json")
    with pytest.raises(ValueError, match="2 data sets"): nb.measure_runs([runs[0], lone])
    with pytest.raises(ValueError, match="epochs.npz is missing.*snapshots"): nb.measure_runs([lone])
    with pytest.raises(ValueError, match="no run record"): nb.measure_runs([str(tmp_path / "none" / "record.json")])


def test_the_notebook_writes_its_claims(runs, tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    space = {}
    for text in CODE:
        exec(compile(text, str(NOTEBOOK), "exec"), space)
        if text.startswith("figures ="): space |= dict(figures=str(tmp_path), records=runs)
        plt.close("all")
    claims = {c.id: c for c in load_claims(tmp_path)}
    status = {k: c.status for k, c in claims.items()}
    assert list(status) == ["14.1", "14.2", "14.3", "14.4"]
    assert [status[k] for k in ("14.1", "14.2", "14.3")] == ["holds", "holds with conditions", "fails as stated"]
    assert all(len(c.claim) < 160 and len(c.instead) < 200 for c in claims.values())
    assert claims["14.4"].cases == 9 and space["trained"].row.nunique() == 6
    names = {p.name for p in tmp_path.glob("14_*.png")}
    assert len(names) == 5 and (tmp_path / "14_seen_and_unseen.csv").exists()
