"Notebooks 32 and 33: their measuring functions on constructions with known answers, mutants caught, and both run from end to end."
import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
pytest.importorskip("papermill")


def functions(name):
    "Functions, imports and upper-case constants of a notebook, without running it."
    nb = json.loads((ROOT / f"nbs/04_experiments/{name}.ipynb").read_text(encoding="utf-8"))
    scope = {}
    for cell in nb["cells"]:
        if cell["cell_type"] != "code": continue
        for node in ast.parse("".join(cell["source"])).body:
            constant = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()
            if isinstance(node, (ast.FunctionDef, ast.Import, ast.ImportFrom)) or constant:
                exec(compile(ast.Module([node], []), name, "exec"), scope)
    return scope


@pytest.fixture(scope="module")
def two(): return functions("33_two_views_in_training")


def simplex(K=7, copies=5, seed=1000):
    "A rotated simplex, several points on each corner, and the corners themselves."
    gen = torch.Generator().manual_seed(seed)
    corners = (torch.eye(K, dtype=torch.float64) - 1 / K) @ torch.linalg.qr(torch.randn(K, K, generator=gen, dtype=torch.float64))[0]
    return corners.repeat_interleave(copies, 0), torch.arange(K).repeat_interleave(copies), corners


# ---- neural collapse

def check_frame(collapse):
    "Zero at a simplex of any size, place and part; not zero where one property is broken."
    z, y, corners = simplex()
    assert max(collapse(z, y, 2 * corners).values()) < 1e-7                       # a root of float64 rounding
    assert max(list(collapse(z[y < 4] + 3, y[y < 4], corners[:4]).values())) < 1e-7
    longer = collapse(torch.where(y[:, None] == 0, 2 * z, z), y)
    assert longer["NC2 norm"] > .1 and longer["NC1"] < 1e-7
    flat = collapse(torch.eye(7, dtype=torch.float64)[y % 2] + .3 * z, y)         # two heaps of classes
    assert flat["NC2 angle"] > .3
    assert collapse(z, y, corners.roll(1, 0))["NC3"] > .5
    K, gen = 4, torch.Generator().manual_seed(1001)                               # NC1 with a known answer: +-e around corners of length r
    corner = simplex(K, 1)[2]
    e = torch.zeros(2 * K, K, dtype=torch.float64); e[::2, 0], e[1::2, 0] = .1, -.1
    got = collapse(corner.repeat_interleave(2, 0) + e, torch.arange(K).repeat_interleave(2))["NC1"]
    assert got == pytest.approx(.01 / (1 - 1 / K), rel=1e-9)


def mutate(source, name, old, new, scope):
    assert source.count(old) >= 1, old
    out = dict(scope); exec(source.replace(old, new), out)
    return out[name]


def source_of(name, function):
    nb = json.loads((ROOT / f"nbs/04_experiments/{name}.ipynb").read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and f"def {function}(" in text:
            return next(ast.unparse(n) for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function)


COLLAPSE = [("1 / (K - 1)", "1 / K"), ("means - means.mean(0)", "means"), (".sum(1).mean()", ".sum(1).sum()"), ("weight - weight.mean(0)", "weight + 1")]

def test_collapse(two): check_frame(two["collapse"])

@pytest.mark.parametrize("old, new", COLLAPSE)
def test_collapse_mutants(two, old, new):
    mutant = mutate(source_of("33_two_views_in_training", "collapse"), "collapse", old, new, two)
    with pytest.raises(AssertionError): check_frame(mutant)

def test_no_classifier_no_third_measure(two):
    z, y, corners = simplex()
    assert math.isnan(two["collapse"](z, y)["NC3"]) and math.isnan(two["collapse"](z, y, 0 * corners)["NC3"])


# ---- entropies

def check_entropies(two_entropies):
    "Against a double loop; zero for one point; the ceiling for collapsed, distant classes."
    gen = torch.Generator().manual_seed(1002)
    y = torch.randperm(14, generator=gen) % 3; y[:2] = 2
    z = F.normalize(torch.randn(14, 6, generator=gen, dtype=torch.float64)); S = z @ z.T
    def loop(inside):
        logs = [math.log(np.mean([math.exp(20 * (S[i, j] - 1)) for j in range(14) if j != i and (not inside or y[i] == y[j])])) for i in range(14)]
        return -np.mean(logs)
    assert np.allclose(two_entropies(S, y, 20.), [loop(False), loop(True)], rtol=0, atol=1e-10)
    z, y, _ = simplex(5, 4); z = F.normalize(z)
    h, h_y = two_entropies(z @ z.T, y, 200.)
    assert abs(h_y) < 1e-9 and h == pytest.approx(math.log(19 / 3), abs=1e-9)

def test_entropies(two): check_entropies(two["two_entropies"])

@pytest.mark.parametrize("old, new", [("fill_diagonal_(-torch.inf)", "fill_diagonal_(0)"), ("kappa * (S - 1)", "kappa * (1 - S)"), ("sizes - 1", "sizes"), ("len(y) - 1", "len(y)")])
def test_entropy_mutants(two, old, new):
    mutant = mutate(source_of("33_two_views_in_training", "two_entropies"), "two_entropies", old, new, two)
    with pytest.raises(AssertionError): check_entropies(mutant)


# ---- paths

def check_path(distance):
    "Zero for one path at any pace, symmetric, growing with a shift, and exact for a shift and a scale."
    rng = np.random.default_rng(1003)
    a = rng.normal(size=(6, 2)).cumsum(0)
    finer = np.concatenate([np.linspace(p, q, 5)[:-1] for p, q in zip(a, a[1:])] + [a[-1:]])
    assert distance(a, a) == 0 and distance(a, finer) < 1e-12
    shifts = [distance(a, a + [0, s]) for s in (.5, 1, 3)]
    assert np.allclose(shifts, (.5, 1, 3), atol=1e-12)
    b = rng.normal(size=(4, 2)).cumsum(0)
    assert distance(a, b) == pytest.approx(distance(b, a)) and distance(a, b) > 0
    line = np.stack([np.linspace(0, 3, 7), np.linspace(0, 4, 7)], 1)
    assert distance(line, 2 * line) == pytest.approx(2.5) and distance(line, line[::-1]) == pytest.approx(2.5, rel=.01)

def test_path_distance(two): check_path(two["path_distance"])

def test_path_mutants(two):
    source, at = source_of("33_two_views_in_training", "path_distance"), source_of("33_two_views_in_training", "at_shares")
    for old, new in ((".mean()", ".max()"), ("at_shares(a, shares) - at_shares(b, shares)", "at_shares(a, shares) + at_shares(b, shares)"),
                     ("at_shares(b, shares)", "at_shares(b, shares[::-1])")):
        with pytest.raises(AssertionError): check_path(mutate(source, "path_distance", old, new, two))
    by_epoch = dict(two); exec(at.replace("np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()", "np.arange(1, len(path))"), by_epoch)
    uneven = np.array([[0, 0], [1, 0], [4, 0]], float)
    mutant = mutate(source, "path_distance", "points", "points", by_epoch)
    assert two["path_distance"](uneven, uneven[[0, 2]]) < 1e-12 < .1 < mutant(uneven, uneven[[0, 2]])   # epochs are not shares

def test_road_forgives_an_early_stop(two):
    line = np.stack([np.linspace(0, 3, 7), np.linspace(0, 4, 7)], 1)
    assert two["road_distance"](line, line / 2) < 1e-12 < .02 < two["path_distance"](line, line / 2)
    assert two["road_distance"](line, line + [-4, 3]) == pytest.approx(5, abs=1e-12)      # a parallel road, five away

def check_road(road):
    "The nearest point may lie between two corners, and how finely a road is read does not matter."
    assert road(np.array([[1., 1], [3, 1]]), np.array([[0., 0], [10, 0]])) == pytest.approx(1, abs=1e-12)
    assert road(np.array([[5., 1], [6, 1]]), np.array([[0., 0], [1, 0]])) > 4          # a road ends at its ends
    a = np.array([[0., 0], [2, 0], [2, 3]])
    assert road(a, np.concatenate([a, a[-1:]])) < 1e-12                           # a step of length zero
    for rng in map(np.random.default_rng, range(1010, 1016)):
        a, b = (rng.normal(size=(9, 2)).cumsum(0) for _ in "ab")
        for near in (b, a + .01):
            got = [road(a, near, points=points) for points in (51, 101, 401)]
            assert max(got) / min(got) < 1.05 and road(a, near) == pytest.approx(road(near, a))   # kinks: 2.4 % seen

def test_road_does_not_depend_on_points(two): check_road(two["road_distance"])

@pytest.mark.parametrize("function, old, new", [("off_road", "share.clip(0, 1)", "share.clip(0, 0)"), ("off_road", "share.clip(0, 1)", "share"), ("off_road", ".min(1)", ".mean(1)"),
                                                ("road_distance", "min(", "max("), ("road_distance", "off_road(at_shares(a, shares), b)", "off_road(at_shares(a, shares), a)")])
def test_road_mutants(two, function, old, new):
    scope = dict(two); exec(source_of("33_two_views_in_training", function).replace(old, new), scope)
    if function == "off_road": exec(source_of("33_two_views_in_training", "road_distance"), scope)
    with pytest.raises(AssertionError):
        check_road(scope["road_distance"])
        line = np.stack([np.linspace(0, 3, 7), np.linspace(0, 4, 7)], 1)
        assert scope["road_distance"](line, line / 2) < 1e-12

def test_road_from_corner_to_corner_would_depend_on_points():
    "What the check is for: nearest *sampled* points of the other road."
    scope = functions("33_two_views_in_training")
    def corners(a, b, points=101):
        x, y = (scope["at_shares"](p, np.linspace(0, 1, points)) for p in (a, b))
        apart = np.linalg.norm(x[:, None] - y[None], axis=2)
        return min(apart.min(1).mean(), apart.min(0).mean())
    with pytest.raises(AssertionError): check_road(corners)

def test_ratio_sees_objectives_and_only_them(two):
    rng, names, seeds = np.random.default_rng(1004), np.repeat(list("abc"), 3), np.tile([0, 1, 2], 3)
    def D(shift): x = np.array([shift * "abc".index(n) for n in names]) + rng.normal(size=9); return abs(x[:, None] - x[None])
    assert .6 < np.mean([two["ratio"](D(0), names, seeds) for _ in range(200)]) < 1.5 and two["ratio"](D(50), names, seeds) > 5
    far = D(50)
    null = two["null_ratios"](far, names, seeds, np.random.default_rng(1), draws=20)
    again = np.random.default_rng(1)
    assert np.allclose(null, [two["ratio"](far, two["shuffled"](names, seeds, again), seeds) for _ in range(20)])   # all at once is one by one
    drawn = two["resampled_ratios"](far, names, seeds, np.random.default_rng(2), draws=50)
    assert np.nanmin(drawn) > 5 and np.nanmin(drawn) <= two["ratio"](far, names, seeds) <= np.nanmax(drawn)
    class Each:                                                                   # every objective once: the ratio itself
        def multinomial(self, n, p, draws): return np.ones((draws, n), int)
    assert np.allclose(two["resampled_ratios"](far, names, seeds, Each(), draws=2), two["ratio"](far, names, seeds))
    assert two["one_less"](far, names, seeds)["b"] == pytest.approx(two["ratio"](far[np.ix_(names != "b", names != "b")], names[names != "b"], seeds[names != "b"]))


# ---- the counts behind the claims

def check_halves(halves):
    tighter, wider = np.array([-1., .5, -1, .5]), np.array([1., 1, -.3, -.3])
    assert halves(tighter, wider).tolist() == [-1, .5, .3, .5]
    assert (halves(tighter, wider) > .1).tolist() == [False, True, True, True]

def test_halves(two):
    check_halves(two["halves_hold"])
    for old, new in (("-wider", "wider"), ("tighter, -", "-tighter, -"), ("maximum", "minimum")):
        mutant = mutate(source_of("33_two_views_in_training", "halves_hold"), "halves_hold", old, new, two)
        with pytest.raises(AssertionError): check_halves(mutant)

def check_separated(separated):
    names, seeds = np.repeat(list("abc"), 3), np.tile([0, 1, 2], 3)
    x = np.array([0., .5, 1, 5, 6, 7, 6.5, 8, 9])                                 # b and c overlap, a is apart
    D = abs(x[:, None] - x)
    gaps = separated(D, names, seeds)
    assert gaps == {("a", "b"): 4 - 2, ("a", "c"): 5.5 - 2.5, ("b", "c"): .5 - 2.5}
    assert [pair for pair, gap in gaps.items() if gap > 0] == [("a", "b"), ("a", "c")]

def test_separated(two):
    check_separated(two["separated"])
    for old, new in (("- within", "+ within"), ("max()", "min()"), (".min()", ".max()"), ("!=", "==")):
        mutant = mutate(source_of("33_two_views_in_training", "separated"), "separated", old, new, two)
        with pytest.raises(AssertionError): check_separated(mutant)


# ---- one cloud

def check_watch(watch):
    "T, C and Recall@1 against a loop over pairs, on the sphere and from the centre."
    gen = torch.Generator().manual_seed(1008)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0, 1, 2, 0])
    z = torch.randn(11, 4, generator=gen, dtype=torch.float64) + 1 + torch.eye(4, dtype=torch.float64)[y]
    for centred in (False, True):
        u = F.normalize(z - z.mean(0) if centred else z)
        near = {True: [], False: []}; hits = 0
        for i in range(11):
            gaps = {j: float((u[i] - u[j]).square().sum()) for j in range(11) if j != i}
            for j, gap in gaps.items(): near[bool(y[i] == y[j])].append(gap)
            hits += bool(y[min(gaps, key=gaps.get)] == y[i])
        got = watch(z, y, centred=centred)
        assert got["T"] == pytest.approx(np.mean(near[True]), abs=1e-12) and got["C"] == pytest.approx(-np.mean(near[False]), abs=1e-12)
        assert got["R@1"] == pytest.approx(hits / 11, abs=1e-6)                     # a mean in float32
        assert 0 < hits < 11

def test_watch(two): check_watch(two["watch"])

@pytest.mark.parametrize("old, new", [("z - z.mean(0) if centred", "z if centred"), ("same.sum().item() - n", "same.sum().item()"), ("2 - 2 * inner", "1 - inner"),
                                      ("total - inner", "total"), ("S.fill_diagonal_(-torch.inf)", "S"), ("/ pairs - 2", "/ pairs")])
def test_watch_mutants(two, old, new):
    source = source_of("33_two_views_in_training", "watch")
    if old == "/ pairs - 2": old, new = "(n * (n - 1) - pairs) - 2", "(n * (n - 1) - pairs) + 2"
    mutant = mutate(source, "watch", old, new, two)
    with pytest.raises(AssertionError): check_watch(mutant)


# ---- the held-out bound

def check_held_out(bound):
    "Almost H(Y) for distant classes; about zero, never far below, for noise, also in more dimensions than points."
    gen = torch.Generator().manual_seed(1005)
    y = torch.arange(5).repeat(40)
    apart = 6 * torch.eye(8, dtype=torch.float64)[y] + torch.randn(200, 8, generator=gen, dtype=torch.float64)
    assert math.log(5) - .1 < bound(apart, y) <= math.log(5) + 1e-9
    for d, copies in ((8, 40), (150, 8)):
        y = torch.arange(5).repeat(copies)
        for _ in range(3): assert -.1 < bound(torch.randn(len(y), d, generator=gen, dtype=torch.float64), y) < .1

def test_held_out_bound(two): check_held_out(two["held_out_bound"])

def check_left_out(left_out):
    "Against taking each point out of its class mean and of the covariance, and inverting again."
    gen = torch.Generator().manual_seed(1009)
    z, y, share = torch.randn(15, 4, generator=gen, dtype=torch.float64), torch.tensor([0, 1, 2] * 4 + [0, 0, 1]), .03
    means = torch.stack([z[y == k].mean(0) for k in range(3)])
    got = left_out(means, z, y, share)
    def scatter(z, y): return sum((z[y == k] - z[y == k].mean(0)).T @ (z[y == k] - z[y == k].mean(0)) for k in range(3))
    for i in range(15):
        rest = torch.arange(15) != i
        cov = torch.eye(4, dtype=torch.float64) - share * (scatter(z, y) - scatter(z[rest], y[rest]))
        for k in range(3):
            gap = z[i] - z[rest & (y == k)].mean(0)
            assert abs(got[i, k] + gap @ torch.linalg.inv(cov) @ gap / 2) < 1e-10

def test_left_out(two):
    check_left_out(two["left_out_logits"])
    for old, new in (("1 - pull *", "1 + pull *"), ("share * n_k / (n_k - 1)", "share"), ("further * own", "own"), ("further[:, None] * own", "own"), ("logits - pull", "logits + pull")):
        mutant = mutate(source_of("33_two_views_in_training", "left_out_logits"), "left_out_logits", old, new, two)
        with pytest.raises(AssertionError): check_left_out(mutant)

@pytest.mark.parametrize("old, new", [("probe_logits(means, z[b] @ white), y[b]", "probe_logits(means, za), ya"),          # judged on what it was fitted to
                                      ("left_out_logits(means, za, ya, (1 - shrink) / (len(za) - K))", "probe_logits(means, za)"),  # nobody left out
                                      ("- ce", "+ ce"), ("/ 2\n    share", "\n    share")])
def test_held_out_mutants(two, old, new):
    mutant = mutate(source_of("33_two_views_in_training", "held_out_bound"), "held_out_bound", old, new, two)
    with pytest.raises(AssertionError): check_held_out(mutant)


# ---- bad input

def test_33_names_what_it_refuses(two, tmp_path):
    z, y, corners = simplex()
    S, holed = z @ z.T, z.clone(); holed[3, 2] = math.nan
    with pytest.raises(ValueError, match="1 class"): two["collapse"](z, torch.zeros_like(y))
    with pytest.raises(ValueError, match="nan in row 3"): two["collapse"](holed, y)
    with pytest.raises(ValueError, match=r"7 classes.*\(6, 7\)"): two["collapse"](z, y, corners[:6])
    with pytest.raises(ValueError, match="34 labels"): two["two_entropies"](S, y[:-1], 10.)
    for kappa in (0., -1., math.inf, math.nan):
        with pytest.raises(ValueError, match=f"kappa.*{kappa}"): two["two_entropies"](S, y, kappa)
    with pytest.raises(ValueError, match="cosines must be finite"): two["two_entropies"](holed @ holed.T, y, 10.)
    with pytest.raises(ValueError, match="class 7 has 1 images"): two["two_entropies"](S, torch.where(torch.arange(35) == 34, 7, y), 10.)
    with pytest.raises(ValueError, match="class 6 has 3 images"): two["held_out_bound"](z[:-2], y[:-2])
    with pytest.raises(ValueError, match="nan in row 3"): two["held_out_bound"](holed, y)
    with pytest.raises(ValueError, match="no run records"): two["runs_of"]([], {})

def test_33_refuses_strange_rows_and_mixed_data(two, tmp_path):
    from dml_companion.reproduction import write_record
    paths = []
    for row, digest, epochs in (("snca", "d", 3), ("spce", "e", 3), ("untrained", "d", 0)):
        write_record(tmp_path / row, run=row, row=row, seed=0, recipe={"objective": row, "dataset": "toy", "epochs": epochs}, code="c", provenance={}, metrics={},
                     data={"name": "toy", "digest": digest}, history=[])
        paths.append(str(tmp_path / row / "record.json"))
    with pytest.raises(ValueError, match="different data"): two["runs_of"](paths, {})
    with pytest.raises(ValueError, match="nonsense.*snca"): two["runs_of"](paths, {"nonsense": "N"})
    with pytest.raises(ValueError, match="was trained"): two["runs_of"](paths[2:], {})
    runs, labels = two["runs_of"](paths, {"untrained": "no epochs", "snca": "mine", "nonsense": "N"})
    assert list(runs) == [("snca", 0)] and labels == {"snca": "mine"}


# ---- from end to end

def execute(name, folder, **parameters):
    import papermill
    out = folder / f"{name}.ipynb"
    papermill.execute_notebook(str(ROOT / f"nbs/04_experiments/{name}.ipynb"), str(out), parameters, cwd=str(ROOT), progress_bar=False, log_output=False)
    return out.read_text(encoding="utf-8")

def test_33_runs_on_tiny_runs(tmp_path):
    "Two runs made to hold 33.1 (a spot becomes six tight, distant classes) and two made to violate it (their classes widen)."
    from dml_companion.reproduction import write_record
    rng, y, records = np.random.default_rng(1006), np.repeat(np.arange(6), 8), []
    for row, width in (("cross_entropy", 1.), ("snca", .05)):
        for seed in (0, 1):
            centres, spot = np.eye(6, 8), np.ones(8)
            clouds = np.stack([(1 - e / 3) * spot + e / 3 * centres[y] + ((1 - e / 3) * .35 + e / 3 * width) * rng.normal(size=(48, 8)) for e in range(4)]).astype("float32")
            folder = tmp_path / f"{row}-{seed}"; folder.mkdir()
            extra = {"weight": np.stack([e * centres for e in range(4)]).astype("float32")} if row == "cross_entropy" else {}
            np.savez(folder / "epochs.npz", epoch=np.arange(4), seen=clouds, unseen=clouds[:, ::-1], seen_labels=y, unseen_labels=y[::-1], **extra)
            write_record(folder, run=f"{row[:4]}{seed}", row=row, seed=seed, recipe={"objective": row, "dataset": "toy", "epochs": 3}, code="c", provenance={}, metrics={},
                         data={"name": "toy", "digest": "d"}, history=[{"epoch": e, **({"tightness": -e, "contrast": float(e)} if e else {})} for e in range(4)])
            records.append(str(folder / "record.json"))
    execute("33_two_views_in_training", tmp_path, records=records, figures=str(tmp_path / "figures"))
    claims = {c: json.loads((tmp_path / f"figures/claims/{c}.json").read_text()) for c in ("33.1", "33.2")}
    assert (claims["33.1"]["cases"], claims["33.1"]["violations"]) == (4, 2) and claims["33.1"]["worst"] > .1
    assert (claims["33.2"]["cases"], claims["33.2"]["violations"]) == (1, 1) and claims["33.2"]["worst"] > 0
    assert all(len(c["instead"]) < 200 for c in claims.values()), [c["instead"] for c in claims.values()]
    assert {p.stem for p in (tmp_path / "figures").glob("*.svg")} == {"33_by_epoch", "33_phase", "33_paths_apart", "33_collapse"}

def test_33_names_a_run_without_embeddings(two, tmp_path):
    from dml_companion.reproduction import load_records
    record = load_records(ROOT / "figures/quick")[0].model_copy(update={"run": "0" * 12})
    with pytest.raises(ValueError, match=record.label): two["snapshots_of"](tmp_path / "record.json", record)

def test_32_runs_with_the_smallest_parameters(tmp_path):
    execute("32_ce_and_spce", tmp_path, sets=["digits"], seeds=[0], iterations=6, checkpoints=3, device="cpu", figures=str(tmp_path / "figures"))
    first, second = (json.loads((tmp_path / f"figures/claims/32.{c}.json").read_text()) for c in (1, 2))
    assert first["cases"] == 2 and second["cases"] == 2 and (tmp_path / "figures/32_ce_and_spce.svg").exists()

def test_correlations_of_32():
    import pandas as pd
    scope = functions("32_ce_and_spce")
    x = np.random.default_rng(1007).normal(size=9).cumsum()
    run = pd.DataFrame({"iteration": range(9), "CE": x, "SPCE": 2 * x + 1, "SPCE as printed": -x})
    assert scope["correlations"](run.sample(frac=1, random_state=0)) == pytest.approx({"CE, SPCE": 1., "steps": 1., "CE, SPCE as printed": -1.})
    train, held = scope["halves"](scope["digits"]())
    assert len(train) + len(held) == 1797 and train.images.shape[1:] == (1, 16, 16)
    kept, read = scope["anchors"](train)
    assert set(train.labels[kept]) == set(range(10)) and len(read) <= 1000
