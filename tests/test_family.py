"The family under one protocol: measures against loops, tests against other routes, made-up worlds with known answers, profiles against searches."
import csv
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dml_companion import measures as M, reproduction as R
from dml_companion.objective import locate
from dml_companion.profiles import load_profile
from dml_companion.reproduction import load_claims, load_records, mean_interval, write_record

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "nbs/04_experiments/34_family.ipynb"
CELLS = [("".join(c["source"]), c["metadata"].get("tags", [])) for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
PROFILES = {"family": "glyphs", "family_omniglot": "omniglot"}
DRAWN = [*PROFILES, "family_device"] # by 34


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


# ---- the shape of a cloud

def cloud(n=11, d=5, K=3, seed=0, offset=0.):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=gen, dtype=torch.float64) + offset, torch.arange(n) % K * 7 + 2       # labels with gaps


def naive_density(z, y):
    u, classes = [v / v.norm() for v in z], sorted(set(y.tolist()))
    within, means = [], []
    for k in classes:
        mine = [v for v, label in zip(u, y.tolist()) if label == k]
        pairs = [1 - float(a @ b) for i, a in enumerate(mine) for j, b in enumerate(mine) if i != j]
        if pairs: within.append(np.mean(pairs))
        m = sum(mine) / len(mine); means.append(m / m.norm())
    return np.mean(within), np.mean([1 - float(a @ b) for i, a in enumerate(means) for j, b in enumerate(means) if i != j])


def naive_parts(z, y):
    u = [v / v.norm() for v in z]
    pairs = [(float((a - b).square().sum()), bool(y[i] == y[j])) for i, a in enumerate(u) for j, b in enumerate(u) if i != j]
    return np.mean([d for d, same in pairs if same]), -np.mean([d for d, same in pairs if not same])


@pytest.mark.parametrize("seed, K, offset", [(0, 3, 0), (1, 2, 2), (2, 7, .5)])
def test_density_and_parts_are_the_loops(seed, K, offset):
    z, y = cloud(seed=seed, K=K, offset=offset)                                   # K = 7: three classes of one image
    assert M.density(z, y) == pytest.approx(naive_density(z, y), abs=1e-12)
    assert M.tightness_contrast(z, y) == pytest.approx(naive_parts(z, y), abs=1e-12)
    scales = torch.rand(len(z), 1, generator=torch.Generator().manual_seed(9)) + .1
    assert M.density(z * scales, y) == pytest.approx(M.density(z, y), abs=1e-12)    # angles only
    turn = torch.linalg.qr(cloud(5, 5, seed=5)[0])[0]
    for f in (M.density, M.tightness_contrast): assert f(z @ turn, y) == pytest.approx(f(z, y), abs=1e-12)


@pytest.mark.parametrize("n, d", [(30, 6), (6, 30), (7, 7)])
@pytest.mark.parametrize("centred", [False, True])
def test_spectral_decay_is_the_divergence_of_numpy_singular_values(n, d, centred):
    from scipy.stats import entropy
    z, _ = cloud(n, d, offset=1)
    u = (z / z.norm(dim=1, keepdim=True)).numpy()
    s = np.linalg.svd(u - u.mean(0) if centred else u, compute_uv=False)
    s = s[:-1] if centred and n <= d else s                                       # centring n <= d points leaves n - 1 directions
    for skip in (0, 2):
        shares = s[skip:] / s[skip:].sum()
        flat = np.full(len(shares), 1 / len(shares))
        assert M.spectral_decay(z, centred, skip) == pytest.approx(entropy(flat, shares), abs=1e-10)
        assert M.spectral_decay(z, centred, skip, reverse=True) == pytest.approx(entropy(shares, flat), abs=1e-10)
    assert M.spectrum(z, centred).sum() == pytest.approx(1)


def test_known_clouds():
    frame = torch.cat([torch.eye(6)] * 4)
    assert M.spectral_decay(frame) == pytest.approx(0, abs=1e-9) and M.spectral_decay(frame, reverse=True) == pytest.approx(0, abs=1e-9)
    dead = torch.cat([frame, torch.zeros(24, 2)], 1)
    assert M.spectral_decay(dead) == math.inf and M.spectral_decay(dead, reverse=True) == pytest.approx(math.log(8 / 6), abs=1e-9)
    point = torch.ones(8, 4)
    assert M.spectral_decay(point, centred=True) == math.inf and M.spectral_decay(point, centred=True, reverse=True) == pytest.approx(math.log(4))
    y = torch.arange(24) % 6                                                      # classes are the corners
    assert M.density(frame, y) == pytest.approx((0, 1)) and M.tightness_contrast(frame, y) == pytest.approx((0, -2))
    z, y = cloud(12, 5, 3)
    assert M.tightness_contrast(z, y)[0] == pytest.approx(2 * M.density(z, y)[0])   # equal sizes: one number, two names


def test_clouds_that_cannot_be_measured_are_refused():
    z, y = cloud()
    for f in (M.density, M.tightness_contrast):
        with pytest.raises(ValueError, match="every class has one image"): f(z, torch.arange(11))
        with pytest.raises(ValueError, match="at least 2 are needed"): f(z, torch.zeros(11, dtype=torch.int64))
    for bad in (-1, 5):
        with pytest.raises(ValueError, match="skip must be from 0 to 4"): M.spectral_decay(z, skip=bad)
    with pytest.raises(ValueError, match="finite"): M.spectral_decay(torch.where(torch.arange(11)[:, None] == 3, torch.nan, z))


# ---- comparing

def test_holm_is_the_definition():
    rng = np.random.default_rng(1)
    for p in (rng.random(9), np.array([.01, .01, .5, np.nan, .02]), np.array([]), np.full(3, np.nan)):
        made = sorted(v for v in p if not np.isnan(v))
        wanted = [math.nan if np.isnan(v) else max(min(1, (len(made) - i) * w) for i, w in enumerate(made) if w <= v) for v in p]
        assert np.allclose(M.holm(p), wanted, equal_nan=True)
    with pytest.raises(ValueError, match="0 to 1"): M.holm([.2, 1.2])


def test_paired_and_block_p():
    from scipy.stats import ttest_rel
    a = np.random.default_rng(2).normal(size=(4, 5))
    assert M.paired_p(a[0] - a[1]) == pytest.approx(ttest_rel(a[0], a[1]).pvalue, abs=1e-12)
    p, error = M.block_p(a)
    assert np.allclose(p, p.T) and np.allclose(np.diag(p), 1)
    cells = [(i, s) for i in range(4) for s in range(5)]                     # the same by least squares with dummies
    X = np.array([[i == k for k in range(4)] + [s == k for k in range(1, 5)] for i, s in cells], float)
    b, rest, *_ = np.linalg.lstsq(X, a.ravel(), rcond=None)
    cov = np.linalg.inv(X.T @ X) * rest[0] / (20 - 8)
    from scipy.stats import t
    for i, j in itertools.combinations(range(4), 2):
        se = math.sqrt(cov[i, i] + cov[j, j] - 2 * cov[i, j])
        assert se == pytest.approx(error) and p[i, j] == pytest.approx(2 * t.sf(abs(b[i] - b[j]) / se, 12))


def test_ties_and_too_few_seeds():
    assert M.paired_p([0., 0, 0]) == 1 and M.paired_p([.1, .1, .1]) == 0 and math.isnan(M.paired_p([.1])) and math.isnan(M.paired_p([]))
    same, error = M.block_p(np.tile([.5, .6, .7], (3, 1)))
    assert (same == 1).all() and error == pytest.approx(0, abs=1e-12)
    apart, _ = M.block_p(np.array([[.5, .6], [.6, .7], [.5, .6]]))                 # no noise at all: apart where the means are
    assert apart.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    for few in (np.ones((1, 3)), np.ones((3, 1))): assert np.isnan(M.block_p(few)[0]).all()
    with pytest.raises(ValueError, match="finite table"): M.block_p([[1., math.nan], [1, 2]])


def test_rank_correlation():
    from scipy.stats import spearmanr
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 5, 15).astype(float), rng.normal(size=15)
    got, low, high, n = M.rank_correlation(x, y)
    assert got == pytest.approx(spearmanr(x, y)[0]) and low < got < high and n == 15
    assert M.rank_correlation(np.arange(9.), np.exp(np.arange(9.)))[:3] == pytest.approx((1, 1, 1))
    x[2] = math.nan
    assert M.rank_correlation(x, y)[3] == 14 and M.rank_correlation(x, y)[0] == pytest.approx(spearmanr(np.delete(x, 2), np.delete(y, 2))[0])
    assert M.rank_correlation([1, 2, 3, math.inf, math.inf], [5, 4, 3, 1, 2])[0] == pytest.approx(spearmanr([1, 2, 3, 4, 4], [5, 4, 3, 1, 2])[0])
    for none in (M.rank_correlation([1, 1, 1, 1, 1], y[:5]), M.rank_correlation([1, 2, 3], y[:3]), M.rank_correlation([math.nan] * 6, y[:6])): assert np.isnan(none[:3]).all()
    with pytest.raises(ValueError, match="one length"): M.rank_correlation(x, y[:4])


# ---- the notebook on made-up worlds

def made_up(folder, rows, seeds, score, width, snapshots=lambda row, seed: True, seeds_of=lambda row: None):
    "Records of runs that nobody made: Recall@1 `score(i, seed)`, clouds of class spread `width(i)`; paths in the order of the rows."
    y, paths, names = np.repeat(np.arange(5), 6), [], sorted(locate())
    for i, row in enumerate(rows):
        for seed in seeds_of(row) or seeds:
            rng = np.random.default_rng([i, seed])
            home = folder / f"{row}-{seed}"; home.mkdir(parents=True)
            z = (np.eye(5, 8)[y] + width(i) * rng.normal(size=(30, 8))).astype("float32")
            if i % 5 == 3: z[:, 7] = 0                                            # a dead channel: rho is infinite
            files = []
            if snapshots(row, seed):
                np.savez(home / "epochs.npz", epoch=np.arange(2), seen=np.stack([0 * z + 1, z]), unseen=np.stack([0 * z + 1, z[::-1]]), seen_labels=y, unseen_labels=y[::-1])
                files = ["epochs.npz"]
            value = score(i, seed)
            write_record(home, run=f"{i:06d}{seed:06d}", row=row, seed=seed, recipe={"objective": base if (base := row.removesuffix("_norm")) in names else names[i % len(names)], "dataset": "toy", "epochs": 1}, code="c", provenance={}, files=files,
                         metrics={"cosine/recall@1": value, "cosine/map@r": value / 2, "nmi": value}, timings={"step_seconds": .05 + .001 * i, "step_megabytes": 40. + i},
                         data={"name": "toy", "digest": "d", "query_classes": 5}, history=[{"epoch": 0}, {"epoch": 1, "tightness": 1., "contrast": -1.}])
            paths.append(str(home / "record.json"))
    return paths


def numbers_only(fig, name, folder, records=(), data=None):
    "In place of save_figure where no picture is looked at: drawing takes most of the time."
    if data is not None: R.write_atomic(R.output_folder(folder) / f"{name}.csv", R.csv_text(data))


def run_notebook(draw=False, **parameters):
    "Execute the cells in this process and return their names."
    import matplotlib
    matplotlib.use("Agg")
    with pytest.MonkeyPatch.context() as patch:
        if not draw: patch.setattr(R, "save_figure", numbers_only)
        return cells_run(parameters)


def cells_run(parameters):
    scope = {"display": lambda *a: None, "__name__": "notebook"}
    for source, tags in CELLS:
        exec(compile(source, "34_family", "exec"), scope)
        if "parameters" in tags: scope.update(parameters)
    import matplotlib.pyplot as plt
    plt.close("all")
    return scope


def claims_in(folder): return {c.id: c for c in load_claims(folder)}


ROWS = [f"objective_{i:02d}" for i in range(33)] + ["cross_entropy", "cross_entropy_norm"]

@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "35 rows, three seeds; pairs of rows tie exactly, one row has one seed, every seventh kept no embeddings."
    folder = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(4).normal(size=(35, 3)) * .004
    score = lambda i, s: .9 - .002 * (i // 2) + .003 * s + (noise[i // 2 * 2, s])
    paths = made_up(folder / "runs", ROWS, (0, 1, 2), score, lambda i: .05 + .02 * i, snapshots=lambda row, s: ROWS.index(row) % 7 != 6, seeds_of=lambda row: (1,) if row == "objective_05" else None)
    return folder, paths, run_notebook(draw=True, profile="made", records=paths, figures=str(folder / "figures"))


def test_many_rows_claims_are_recounted(many):
    folder, paths, scope = many
    recall = {}
    for r in load_records(paths): recall.setdefault(r.row, {})[r.seed] = r.metrics["cosine/recall@1"]
    full = [row for row in recall if len(recall[row]) == 3]
    a = np.array([[recall[row][s] for s in range(3)] for row in full])
    from scipy.stats import t
    rest = a - a.mean(1, keepdims=True) - a.mean(0) + a.mean()
    se = math.sqrt(2 / 3 * (rest ** 2).sum() / (33 * 2))
    p = sorted((2 * t.sf(abs(a[i].mean() - a[j].mean()) / se, 66), i, j) for i, j in itertools.combinations(range(34), 2))
    corrected, worst = {}, 0
    for k, (v, i, j) in enumerate(p): worst = max(worst, min(1, (len(p) - k) * v)); corrected[i, j] = worst
    apart = [pair for pair, v in corrected.items() if v < .05]
    found = claims_in(folder / "figures")["34.1"]
    assert (found.cases, found.violations) == (34 * 33 // 2, len(apart)) and 0 < len(apart) < found.cases
    assert found.worst == pytest.approx(max(abs(a[i].mean() - a[j].mean()) for i, j in apart))
    rivals = [row for row in full if row not in ("cross_entropy", "cross_entropy_norm")]
    base = full.index("cross_entropy")
    mine = M.holm([2 * t.sf(abs(a[full.index(r)].mean() - a[base].mean()) / se, 66) for r in rivals])
    above = sum(v < .05 and a[full.index(r)].mean() > a[base].mean() for r, v in zip(rivals, mine))
    found = claims_in(folder / "figures")["34.2"]
    assert (found.cases, found.violations) == (32, above) and above > 0
    other = claims_in(folder / "figures")["34.7"]                                  # MAP@R is half of Recall@1 in this world
    assert (other.cases, other.violations, other.worst) == (32, above, pytest.approx(found.worst / 2)) and "MAP@R" in other.claim
    told = {l["metric"]: l for l in rows_of(folder / "figures/34_against_ce.csv")}
    assert {m: int(l["above"]) for m, l in told.items()} == {"Recall@1": above, "MAP@R": above, "NMI": above}
    assert all(int(l["above"]) + int(l["below"]) + int(l["not shown"]) == 32 == int(l["rivals"]) for l in told.values())
    low = [r for r in rivals if (d := mean_interval([recall[r][s] - recall["cross_entropy"][s] for s in range(3)])) and abs(d[0]) <= d[1]]
    sure = {r for r, v in zip(rivals, mine) if v < .05 and a[full.index(r)].mean() < a[base].mean()}
    assert told["Recall@1"]["below, but zero in the paired interval"].count("±") == len(sure & set(low))


def test_many_rows_named_pairs(many):
    folder, paths, scope = many
    recall = {}
    for r in load_records(paths): recall.setdefault(r.row, []).append(r.metrics["cosine/recall@1"])
    (line,) = rows_of(folder / "figures/34_named_pairs.csv")
    mean, half = mean_interval([x - y for x, y in zip(recall["cross_entropy_norm"], recall["cross_entropy"])])
    assert (line["row"], line["against"]) == ("cross_entropy_norm", "cross_entropy") and (float(line["gain"]), float(line["±"])) == (pytest.approx(mean), pytest.approx(half))
    pair = next(l for l in rows_of(folder / "figures/34_pairs.csv") if {l["a"], l["b"]} == {line["row"], line["against"]})
    assert float(line["p, block"]) == float(pair["p block Holm"])
    assert scope["restless"] == max((r for r in recall if len(recall[r]) > 1), key=lambda r: np.std(recall[r])) and len(scope["calm"]) == 34 * 33 // 2
    assert scope["differs"]("cross_entropy_norm", "cross_entropy") == line["differ in"]


def test_what_differs_between_two_recipes_is_named(many):
    scope = dict(many[2])
    recipes = scope["recipes"]; before = dict(recipes)
    recipes |= {"x": {"norm": "none", "lr": 1.0, "margin": .1}, "y": {"norm": "batch", "lr": 1.0, "miner": "hard"}}
    try: assert scope["differs"]("x", "y") == "margin 0.1 / -, miner - / hard, norm none / batch"
    finally: recipes.clear(); recipes.update(before)


def test_many_rows_pairs_and_ties(many):
    folder, _, scope = many
    pairs = {(l["a"], l["b"]): l for l in rows_of(folder / "figures/34_pairs.csv")}
    assert len(pairs) == 35 * 34 // 2
    tie = next(l for (a, b), l in pairs.items() if {a, b} == {"objective_00", "objective_01"})
    assert float(tie["difference"]) == 0 and float(tie["p"]) == 1 and float(tie["p Holm"]) == 1
    lone = [l for l in pairs.values() if "objective_05" in (l["a"], l["b"])]
    assert len(lone) == 34 and all(l["seeds"] == "1" and l["±"] == "" and l["p"] == "" and l["p block"] == "" for l in lone)
    wins = scope["wins"].set_index("row")
    for what in scope["APART"]: assert wins[f"{what}: above"].sum() == wins[f"{what}: below"].sum() == scope["APART"][what].sum()
    assert wins.loc["objective_05"].filter(like="above").sum() == 0


def test_many_rows_are_all_drawn(many):
    folder, _, scope = many
    figures = folder / "figures"
    assert {p.stem for p in figures.glob("*.svg")} == {"34_seeds", "34_pairs", "34_correlations", "34_measures"}
    assert all(p.with_suffix(".png").stat().st_size > 5000 and p.with_suffix(".csv").exists() for p in figures.glob("*.svg"))
    assert len(rows_of(figures / "34_seeds.csv")) == 34 * 3 + 1 and len(scope["rows_at"]) == 35 and len(set(scope["rows_at"].values())) == 35
    heights = sorted([*scope["rows_at"].values(), *scope["heads_at"].values()])
    assert min(b - a for a, b in zip(heights, heights[1:])) > .85                  # no label on another
    for f, y in scope["heads_at"].items(): assert y > max(scope["rows_at"][r] for r in scope["ranked"] if scope["family_of"][r] == f)


def test_many_rows_some_measured(many):
    folder, paths, scope = many
    lines = rows_of(folder / "figures/34_measures.csv")
    unmeasured = {row for i, row in enumerate(ROWS) if i % 7 == 6}
    assert {l["row"] for l in lines} == set(ROWS) - unmeasured and len(scope["without"]) == 3 * len(unmeasured)
    assert {l["row"] for l in lines if l["rho"] == "inf"} == {row for i, row in enumerate(ROWS) if i % 5 == 3} - unmeasured
    told = {(l["measure"], l["set"]): l for l in rows_of(folder / "figures/34_correlations.csv")}
    assert all(int(l["rows"]) == 35 - len(unmeasured) for (m, s), l in told.items() if s)
    from scipy.stats import spearmanr
    recall, T = {}, {}
    for r in load_records(paths): recall.setdefault(r.row, []).append(r.metrics["cosine/recall@1"])
    for l in lines: T.setdefault(l["row"], []).append(float(l["T"])) if l["set"] == "seen" else None
    rho = lambda rows: pytest.approx(spearmanr([np.mean(T[r]) for r in rows], [np.mean(recall[r]) for r in rows])[0], abs=1e-12)
    assert float(told["T", "seen"]["spearman"]) == rho(list(T))
    assert float(told["T", "seen"]["no norm layer: spearman"]) == rho([r for r in T if not r.endswith("_norm")])
    best = scope["by_level"][:-6]
    assert [np.mean(recall[r]) for r in best] == sorted((np.mean(v) for v in recall.values()), reverse=True)[:29]
    assert float(told["T", "seen"]["without the last 6: spearman"]) == rho([r for r in best if r in T]) and int(told["another seed", ""]["without the last 6: rows"]) <= 29
    text = (folder / "figures/34_correlations.md").read_text()
    assert all(f"{float(l['spearman']):+.2f} ({float(l['low']):+.2f} to {float(l['high']):+.2f})" in text for l in told.values() if l["spearman"])


def test_the_year_is_that_of_the_catalogue_and_of_the_softmax_beside_it(many):
    scope = many[2]
    year, other = (dict(zip(scope["by_level"], scope["asked"][k, ""])) for k in ("year", "year, cross-entropy 1990"))
    assert (year["cross_entropy"], other["cross_entropy"], other["cross_entropy_norm"]) == (2020, 1990, 1990)
    assert {row for row in year if year[row] != other[row]} == {row for row in year if scope["objective_of"][row] == "cross_entropy"}


def test_the_table_for_people_has_sensible_digits(many):
    lines = (many[0] / "figures/34_family.md").read_text().splitlines()
    assert lines[0].split(" | ")[1:] == ["family", "seeds", "R@1", "MAP@R", "NMI", "ms a step", "MB a step |"]
    for line in lines[2:37]: assert re.search(r"\| 0\.\d{3} (± 0\.\d{3}|\(n=1\)) \| \d+ (± \d+|\(n=1\)) \| \d+\.\d \|$", line), line


def test_the_axis_holds_all_seeds_of_whoever_has_a_mean_on_it(many):
    scope = many[2]
    for metric, scale in (("cosine/recall@1", 1), ("timings/step_seconds", 1000)):
        low, high = scope["window"](metric, scale)
        drawn = [v for row in ROWS if low <= np.mean(v := scope["scores_of"](row, metric, scale)) <= high]
        assert len(drawn) > 17 and all(low < x < high for v in drawn for x in v)


@pytest.mark.parametrize("better, holds, fails", [("tight", ("34.5", "34.6"), ("34.4",)), ("loose", ("34.4",), ("34.5", "34.6"))])
def test_planted_worlds_decide_between_the_papers(tmp_path, better, holds, fails):
    "Recall@1 falls, or rises, with the spread of the classes: the claims must say so, and count all readings."
    score = lambda i, s: (.9 - .02 * i if better == "tight" else .5 + .02 * i) + .001 * s
    paths = made_up(tmp_path / "runs", ROWS[-12:], (0, 1), score, lambda i: .1 + .05 * i)
    run_notebook(profile="made", records=paths, figures=str(tmp_path / "figures"))
    found = claims_in(tmp_path / "figures")
    assert set(found) == {f"34.{i}" for i in range(1, 9)} and all(len(c.instead) < 200 for c in found.values())
    text = (tmp_path / "figures/claims.md").read_text()
    assert all(f"| {c.id} | {c.claim} ({c.source}) | **{c.status}** |" in text for c in found.values())
    for id in holds: assert found[id].violations == 0 and found[id].worst < 0
    for id in fails: assert found[id].violations == found[id].cases > 0 and found[id].worst > .5
    told = {(l["measure"], l["set"]): l for l in rows_of(tmp_path / "figures/34_correlations.csv")}
    readings = {"34.3": ("rho", "rho centred", "rho reversed", "rho reversed, centred"), "34.4": ("pi",), "34.5": ("I", "I50", "I knn"), "34.6": ("T", "HY"), "34.8": ("C", "H")}
    for id, keys in readings.items():
        off = [float(told[k, "seen"]["high"]) if float(told[k, "seen"]["expected"]) < 0 else -float(told[k, "seen"]["low"]) for k in keys]
        assert (found[id].cases, found[id].violations) == (len(keys), sum(v >= 0 for v in off)) and found[id].worst == pytest.approx(max(off))


def test_one_seed_and_no_embeddings(tmp_path):
    "Nothing can be compared or measured: no claim is made, and the tables are still there."
    paths = made_up(tmp_path / "runs", ROWS[-5:], (0,), lambda i, s: .9 - .01 * i, lambda i: .1, snapshots=lambda *a: False)
    scope = run_notebook(draw=True, profile="made", records=paths, figures=str(tmp_path / "figures"))
    assert not (tmp_path / "figures/claims").exists() and len(scope["without"]) == 5 and not len(scope["geometry"])
    assert {p.stem for p in (tmp_path / "figures").glob("*.svg")} == {"34_seeds", "34_pairs", "34_correlations"}
    assert all(l["R@1 ±"] == "" for l in rows_of(tmp_path / "figures/34_family.csv"))


def test_measures_of_runs_whose_embeddings_are_gone_come_from_the_table(tmp_path, monkeypatch):
    paths = made_up(tmp_path / "runs", ROWS[-6:], (0, 1), lambda i, s: .9 - .01 * i, lambda i: .1 + .1 * i)
    monkeypatch.setenv("DML_ROOT", str(tmp_path))
    first = run_notebook(profile="made", records=paths, figures="figures/made")["geometry"]
    for p in paths: (Path(p).parent / "epochs.npz").unlink()
    again = run_notebook(profile="made", records=paths, figures="figures/made")
    assert not again["without"] and np.allclose(again["geometry"].select_dtypes(float), first.select_dtypes(float))
    np.savez(Path(paths[0]).parent / "epochs.npz", epoch=np.arange(2))
    with pytest.raises(ValueError, match="is not what the record"): run_notebook(profile="made", records=paths, figures="figures/made")


def test_records_that_do_not_belong_together_are_refused(tmp_path):
    paths = made_up(tmp_path / "runs", ROWS[-2:], (0,), lambda i, s: .9, lambda i: .1)
    with pytest.raises(ValueError, match="there twice"): run_notebook(profile="made", records=paths + paths[:1], figures=str(tmp_path / "f"))
    other = json.loads(Path(paths[0]).read_text()); other["data"]["digest"] = "e"; other["seed"] = 9
    Path(paths[0]).write_text(json.dumps(other))
    with pytest.raises(ValueError, match="2 different data sets"): run_notebook(profile="made", records=paths, figures=str(tmp_path / "f"))
    with pytest.raises(ValueError, match="no trained run"): run_notebook(profile="made", records=[], figures=str(tmp_path / "f"))


# ---- profiles and searches

def searched(recipe, field):
    outer, _, inner = field.partition(".")
    return recipe[outer][inner] if inner else recipe[outer]


def test_both_searches_are_one_protocol():
    old, new = load_profile("tune_glyphs"), load_profile("tune_family")
    assert (old.base, old.seeds, old.data) == (new.base, new.seeds, new.data)
    assert (old.search.trials, old.search.design, old.search.shared) == (new.search.trials, new.search.design, new.search.shared)
    assert not set(old.search.own) & set(new.search.own) and {len(f) for p in (old, new) for f in p.search.own.values()} == {2}
    for k in range(12): assert len({p.rows[f"{row}_t{k}"].recipe["lr"] for p in (old, new) for row in p.search.own}) == 1     # the same points
    assert {spec.recipe["objective"] for p in (old, new) for spec in p.rows.values()} == set(locate())                       # nobody is left out


def test_the_decision_table_of_29_holds_the_committed_means():
    "Its last column: a row of the profile, its mean on Glyphs, its mean on Omniglot; every family of objectives is there."
    text = "\n".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/03_objectives/29_objectives.ipynb").read_text())["cells"] if c["cell_type"] == "markdown")
    means = []
    for profile in ("family", "family_omniglot"):
        scores = {}
        for line in rows_of(ROOT / f"figures/{profile}/34_seeds.csv"): scores.setdefault(line["row"], []).append(float(line["R@1"]))
        means.append({row: sum(v) / len(v) for row, v in scores.items()})
    told = re.findall(r"\b([a-z][a-z_]+) (0\.\d{3}) / (0\.\d{3})\b", text)
    assert len(told) > 30 and all((f"{means[0][row]:.3f}", f"{means[1][row]:.3f}") == (a, b) for row, a, b in told), told
    assert {row for row, *_ in told} >= {"cross_entropy", "cross_entropy_norm", "proxy_anchor", "margin_distance", "multi_similarity", "group_loss", "lifted"}
    assert not (missing := [name for name in locate() if not re.search(rf"\b{name}\b", text.split("## Where to start")[1].split("\n## ")[0])]), missing


def test_what_29_recommends_is_what_was_measured():
    "An option with a value, or a miner, beside a number: a row named there has that value, or the clause says `not measured`."
    text = next(t for c in json.loads((ROOT / "nbs/03_objectives/29_objectives.ipynb").read_text())["cells"] if (t := "".join(c["source"])).startswith("## Where to start"))
    rows, seen = load_profile("family").rows, 0
    for line in text.splitlines():
        if not (named := re.findall(r"\b([a-z][a-z_]+) 0\.\d{3} / 0\.\d{3}\b", line)): continue
        recipes = [{**rows[row].recipe, **rows[row].recipe.get("objective_options", {})} for row in named] + [rows[f"{row}_norm"].recipe for row in named if f"{row}_norm" in rows]
        for clause in re.split(r"[;.|] ", line):
            if "not measured" in clause: continue
            for option, value in [*re.findall(r"`(\w+)(?:=|: )\"?([\w.]+)\"?`", clause), *(("miner", m) for m in re.findall(r'`"(\w+)"`', clause))]:
                assert any(str(r.get(option)) == value or option == "base" and r["objective"] == value for r in recipes), (option, value, line[:60]); seen += 1
    assert seen >= 6 and text.count("not measured") >= 4


@pytest.mark.parametrize("name, like", PROFILES.items())
def test_family_profiles_hold_winners_and_nothing_else(name, like):
    "Rows of tune_glyphs with its winners; rows of tune_family exactly when that search is committed, then all of them."
    profile, base = load_profile(name), load_profile(like)
    assert profile.base == base.base and profile.data == base.data and len(profile.seeds) >= 3 and profile.tuned_by == "tune_family"
    winners = {}
    for search in ("tune_glyphs", "tune_family"):
        log = ROOT / f"figures/{search}/search_winners.csv"
        assert log.exists() or search == "tune_family"
        winners |= {line["objective"]: (line, load_profile(search)) for line in (rows_of(log) if log.exists() else []) if line["below start"] == "False"}
    assert {row for row, spec in profile.rows.items() if not spec.control} == set(winners)
    assert {row for row, spec in profile.rows.items() if spec.control} == {"raw_pixels", "untrained"}
    for row, (line, search) in winners.items():
        recipe, trial = profile.rows[row].recipe, search.rows[f"{row}_t{line['trial']}"].recipe
        assert recipe == trial and recipe["lr"] == float(line["lr"]) and profile.rows[row].label == search.rows[f"{row}_t{line['trial']}"].label
        for i in (1, 2): assert str(searched(recipe, line[f"own {i}"])) == line[f"value {i}"] or float(searched(recipe, line[f"own {i}"])) == float(line[f"value {i}"])


def test_both_family_profiles_hold_the_same_rows():
    one, two = (load_profile(name) for name in PROFILES)
    assert {k: (v.label, v.recipe) for k, v in one.rows.items()} == {k: (v.label, v.recipe) for k, v in two.rows.items()} and two.seeds == one.seeds


def test_the_notebook_says_what_was_run():
    "Without records of a family profile it says so; with them it may not, and the claims are recounted below."
    text = NOTEBOOK.read_text(encoding="utf-8")
    made = [name for name in PROFILES if list((ROOT / f"figures/{name}").glob("records/*.json"))]
    assert ("The runs have not been made" in text) == (not made)


@pytest.mark.parametrize("name", DRAWN)
def test_committed_results_are_recounted(name):
    folder = ROOT / f"figures/{name}"
    if not list(folder.glob("records/*.json")):
        assert not list(folder.glob("34_*")) and not folder.joinpath("claims").exists(), "results without records"
        return
    recall = {}
    for r in load_records(folder): recall.setdefault(r.row, {})[r.seed] = r.metrics["cosine/recall@1"]
    trained = [row for row, spec in load_profile(name).rows.items() if not spec.control]
    assert set(trained) <= set(recall)
    for line in rows_of(folder / "34_family.csv"): assert float(line["R@1"]) == pytest.approx(mean_interval(recall[line["row"]].values())[0], abs=1e-12)
    a = np.array([[recall[row][s] for s in sorted(recall[row])] for row in trained])
    p = M.block_p(a)[0][np.triu_indices(len(trained), 1)]
    found = claims_in(folder)
    assert (found["34.1"].cases, found["34.1"].violations) == (len(p), int((M.holm(p) < .05).sum()))
    told = {(l["measure"], l["set"]): l for l in rows_of(folder / "34_correlations.csv")}
    lines = rows_of(folder / "34_measures.csv")
    assert len(lines) == 2 * sum(map(len, (recall[row] for row in trained)))
    for (key, which), l in told.items():
        if not which: continue
        mean = {row: np.mean([float(x[key]) for x in lines if x["row"] == row and x["set"] == which]) for row in trained}
        again = M.rank_correlation([mean[row] for row in trained], [np.mean(list(recall[row].values())) for row in trained])
        assert float(l["spearman"]) == pytest.approx(again[0], abs=1e-12)
    b = next(i for i, row in enumerate(trained) if row == "cross_entropy")
    rivals = [i for i, row in enumerate(trained) if i != b and not row.endswith("_norm")]
    for id, metric in (("34.2", "cosine/recall@1"), ("34.7", "cosine/map@r")):
        scores = {}
        for r in load_records(folder): scores.setdefault(r.row, {})[r.seed] = r.metrics[metric]
        a = np.array([[scores[row][s] for s in sorted(scores[row])] for row in trained])
        above = [trained[i] for i, p in zip(rivals, M.holm(M.block_p(a)[0][b][rivals])) if p < .05 and a[i].mean() > a[b].mean()]
        assert (found[id].cases, found[id].violations) == (len(rivals), len(above)) and found[id].instead.startswith(f"Above: {len(above)}")
    for id, keys in {"34.3": ("rho", "rho centred", "rho reversed", "rho reversed, centred"), "34.4": ("pi",), "34.5": ("I", "I50", "I knn"), "34.6": ("T", "HY"), "34.8": ("C", "H")}.items():
        off = [float(told[k, "seen"]["high"]) if float(told[k, "seen"]["expected"]) < 0 else -float(told[k, "seen"]["low"]) for k in keys]
        assert (found[id].cases, found[id].violations) == (len(keys), sum(v >= 0 for v in off))


def test_the_prose_of_34_quotes_the_committed_tables():
    "Correlations with intervals, and differences with half widths, of `What we found`."
    text = next(t for c in json.loads(NOTEBOOK.read_text())["cells"] if (t := "".join(c["source"])).startswith("## What we found"))
    tables = "".join((ROOT / f"figures/{name}/34_{table}.md").read_text() for name in DRAWN for table in ("correlations", "named_pairs", "against_ce"))
    tables = re.sub(r"[+-]0\.00\b", "0.00", tables)
    told = re.findall(r"[+-]\d\.\d\d \([+-]?\d\.\d\d to [+-]?\d\.\d\d\)", text)
    assert len(told) > 25 and not (off := [t for t in told if t not in tables]), off
    halves = re.findall(r"[+-]?0\.\d{3} ± 0\.\d{3}", text)
    pi = {(l["row"], l["seed"]): float(l["pi"]) for l in rows_of(ROOT / "figures/family/34_measures.csv") if l["set"] == "seen"}
    density = mean_interval([pi["triplet_rho", s] - pi["triplet_distance", s] for s in "012"])
    elsewhere = {"0.044 ± 0.018", "0.017 ± 0.006", "+{:.3f} ± {:.3f}".format(*density)}   # five seeds, 31; the printed line on the rho miner
    assert len(halves) > 18 and not (off := [t for t in halves if t.lstrip("+") not in tables and t not in elsewhere and t.lstrip("-") not in tables]) , off
    for table, quoted in (("glyphs", "0.044 ± 0.018"), ("omniglot", "0.017 ± 0.006")): assert quoted in (ROOT / f"figures/{table}/norm_layer.md").read_text()


def test_the_prose_of_34_counts_the_five_seeds():
    "Of `family_device`, against the three of `family`."
    text = next(t for c in json.loads(NOTEBOOK.read_text())["cells"] if (t := "".join(c["source"])).startswith("## What we found"))
    said = text[text.index("On Glyphs again"):text.index("What this notebook cannot say")]
    three, five = ({c.id: c for c in R.load_claims(ROOT / f"figures/{name}")} for name in ("family", "family_device"))
    assert len(five) == 8 and {id: c.status for id, c in five.items()} == {id: c.status for id, c in three.items()} and "All eight verdicts stand" in said
    paired = [c["34.1"].instead.split(":")[1].split()[0] for c in (five, three)]
    below = [[re.search(r"below: (\d+)", c[id].instead)[1] for c in (five, three)] for id in ("34.2", "34.7")]
    assert below[1][0] == below[1][1] and [c["34.2"].violations for c in (three, five)] == [0, 0] and five["34.7"].instead.startswith("Above: 2, contrastive, margin, distance-weighted;")
    for words in (f"{five['34.1'].violations} of 861 in the block layout for {three['34.1'].violations}, {paired[0]} by paired tests after Holm for {paired[1]}",
                  f"{below[0][0]} of 36 are below for {below[0][1]}", f"{below[1][0]} are below, as before"): assert words in said, words


def test_what_34_says_was_not_run():
    from dml_companion.losses.regularisers import REGULARISERS
    from dml_companion.mining import MINERS
    text = NOTEBOOK.read_text()
    recipes = {row: spec.recipe for row, spec in load_profile("family").rows.items() if not spec.control}
    rows, names = len(recipes), {r["objective"] for r in recipes.values()}
    assert (rows, len(names), len(MINERS), len(REGULARISERS)) == (42, 34, 10, 9) and set(locate()) - names == {"intra_batch"} and "42 rows of 34 objectives" in text
    assert {r.get("objective_options", {}).get("miner") for r in recipes.values()} - {None} == {"semihard", "distance_weighted", "rho_distance"} and {r.get("objective_options", {}).get("regulariser") for r in recipes.values()} - {None} == {"power", "mhe"}
    assert sum(row.endswith("_norm") for row in recipes) == 5
    for name in DRAWN: assert {(r.provenance["device"], r.provenance["threads"]) for r in load_records(ROOT / f"figures/{name}")} == {("cpu", 1)}
