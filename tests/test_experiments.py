"The committed results: every number recomputed from its records, hyper-parameters as the search found them."
import csv
import hashlib
import json
import math
from pathlib import Path

import pytest

from dml_companion.profiles import checked_recipes, load_profile
from dml_companion.reproduction import load_claims, load_records, mean_interval

ROOT = Path(__file__).parents[1]
REFERENCE = [p.parent for p in sorted((ROOT / "figures").glob("*/provenance.json")) if p.parent.name != "smoke"]
names = lambda folder: folder.name


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def test_the_reference_is_there():
    assert {"quick", "glyphs", "omniglot", "grocery", "grocery_128", "sweeps", "tune_glyphs", "tune_grocery"} <= {p.name for p in REFERENCE}
    for name, last in (("glyphs", "snca_norm"), ("omniglot", "snca_norm"), ("grocery", "spce")):
        for row in ("cross_entropy", last): assert len({r.seed for r in load_records(ROOT / "figures" / name) if r.row == row}) == 5
    assert {(r.row, r.seed) for r in load_records(ROOT / "figures/grocery_128")} >= {(row, s) for row in ("cross_entropy", "multi_similarity") for s in range(3)}


@pytest.mark.parametrize("folder", REFERENCE, ids=names)
def test_files_are_the_ones_that_were_made(folder):
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["profile"] == folder.name and provenance["commits"] and provenance["versions"] and provenance["cpu"]
    for name, sha in provenance["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha, f"{name} was edited by hand"
    records = {r.run: r for r in load_records(folder)}
    assert set(provenance["runs"]) == set(records)
    for run, entry in provenance["runs"].items():
        assert (records[run].row, records[run].seed) == (entry["row"], entry["seed"])


@pytest.mark.parametrize("folder", [p for p in REFERENCE if (p / "retrieval_cosine.csv").exists()], ids=names)
@pytest.mark.parametrize("table, metric", [("retrieval_cosine", "cosine"), ("retrieval_euclidean", "euclidean")])
def test_tables_come_from_the_records(folder, table, metric):
    records = load_records(folder)
    for line in rows_of(folder / f"{table}.csv"):
        mine = [r for r in records if r.row == line["row"]]
        assert line["runs"].split() == [r.run for r in sorted(mine, key=lambda r: line["runs"].index(r.run))] and int(line["seeds"]) == len(mine) > 0
        for heading, key in {"R@1": "recall@1", "R@8": "recall@8", "MAP@R": "map@r"}.items():
            mean, half = mean_interval([r.metrics[f"{metric}/{key}"] for r in mine])
            assert float(line[heading]) == pytest.approx(mean, abs=1e-12)
            assert (line[f"{heading} ±"] == "" and math.isnan(half)) or float(line[f"{heading} ±"]) == pytest.approx(half, abs=1e-12)


CLAIMED = [p for p in REFERENCE if (p / "claims.md").exists()]


def claims_of(folder): return {c.id: c for c in load_claims(folder)}


def test_claims_are_published_where_notebooks_make_them():
    assert {p.name for p in CLAIMED if not p.name.endswith("_full")} == {"quick", "omniglot", "grocery", "family", "family_omniglot", "family_device"}
    made = {c.notebook.split("/")[-1][:2] for c in load_claims(ROOT / "figures/quick")}
    assert made == {"10", "11", "12", "13", "14", "24", "31", "32", "33"}


@pytest.mark.parametrize("folder", CLAIMED, ids=names)
def test_the_claim_table_shows_the_claims(folder):
    text = (folder / "claims.md").read_text(encoding="utf-8")
    for c in load_claims(folder):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {c.id} |")]
        assert f"**{c.status}**" in line and f"{c.cases:,} cases" in line and c.claim in line
    assert len(text.splitlines()) == len(load_claims(folder)) + 2


@pytest.mark.parametrize("folder", [p for p in REFERENCE if (p / "claims/31.1.json").exists()], ids=names)
def test_claims_about_retrieval_are_recounted_from_the_records(folder):
    by_row = {}
    for r in load_records(folder): by_row.setdefault(r.row, {})[r.seed] = r.metrics["cosine/recall@1"]
    few = ["multi_similarity"] if folder.name == "grocery_128" else ["center", "contrastive", "snca", "multi_similarity"]
    assert ("31.2" in claims_of(folder)) == (folder.name != "grocery_128")
    for id, base in (("31.1", "cross_entropy"), ("31.2", "cross_entropy_norm"))[:len(claims_of(folder).keys() & {"31.1", "31.2"})]:
        rivals = [f"{row}_norm" if "norm" in base and f"{row}_norm" in by_row else row for row in few]
        gaps = [mean_interval([by_row[row][s] - by_row[base][s] for s in sorted(by_row[row])]) for row in rivals]
        found = claims_of(folder)[id]
        assert (found.cases, found.violations) == (len(few), sum(mean - half > 0 for mean, half in gaps))
        assert found.worst == pytest.approx(max(mean for mean, _ in gaps), abs=1e-12)


def test_turns_are_recounted_from_the_records():
    score = {}
    for r in load_records(ROOT / "figures/sweeps"): score.setdefault(r.row, {})[r.seed] = r.metrics["cosine/recall@1"]
    profile, turns, cases = load_profile("sweeps"), [], 0
    bases = [row for row in score if f"{row}_dim16" in score]
    assert len(bases) == 8 and all(len(v) == 3 for v in score.values()) and set(score) == set(profile.rows)
    for axis, values in profile.vary.items():
        for row in set(bases) - {"cross_entropy"}:
            gaps = [mean_interval([score[row + end][s] - score["cross_entropy" + end][s] for s in range(3)]) for end in ("", *(f"_{axis}{v}" for v in values))]
            cases += 1
            if any(m - h > 0 for m, h in gaps) and any(m + h < 0 for m, h in gaps): turns.append((axis, row))
    (found,) = load_claims(ROOT / "figures/sweeps")
    assert (found.id, found.cases, found.violations) == ("31.3", cases, len(turns))


@pytest.mark.parametrize("folder", [p for p in CLAIMED if (p / "claims/32.1.json").exists()], ids=names)
def test_claims_about_spce_are_recounted_from_the_curves(folder):
    from scipy.stats import spearmanr
    runs = {}
    for line in rows_of(folder / "32_ce_and_spce.csv"): runs.setdefault((line["set"], line["trained with"], line["seed"]), []).append(line)
    curve = lambda run, key: [float(line[key]) for line in sorted(run, key=lambda line: int(line["iteration"]))]
    levels = {k: spearmanr(curve(run, "CE"), curve(run, "SPCE"))[0] for k, run in runs.items()}
    moving = [levels[k] for k, run in runs.items() if curve(run, "CE")[-1] > .01]
    found = claims_of(folder)["32.1"]
    assert (found.cases, found.violations) == (len(runs), sum(not v >= .9 for v in levels.values()))
    assert (found.conditional_cases, found.conditional_violations) == (len(moving), sum(not v >= .9 for v in moving))
    own = {"ce": "accuracy, classifier", "spce": "accuracy, class sums"}
    ends = {k: (curve(run, own[k[1]])[-1], max(float(line["R@1"] or "nan") for line in run[-1:])) for k, run in runs.items()}
    leads = [a - b for (name, loss, seed) in runs if loss == "spce" for a, b in zip(ends[name, "spce", seed], ends[name, "ce", seed])]
    found = claims_of(folder)["32.2"]
    assert (found.cases, found.violations) == (len(leads), sum(not v >= -.02 for v in leads))


@pytest.mark.parametrize("folder", REFERENCE, ids=names)
def test_form(folder):
    notebooks = list((folder / "notebooks").glob("*.ipynb"))
    assert notebooks and sum(p.stat().st_size for p in notebooks) < 16e6
    for path in notebooks:
        text = path.read_text(encoding="utf-8")
        source = next((ROOT / "nbs").rglob(f"{path.stem.split('-')[0]}.ipynb"))
        cells = [c for c in json.loads(text)["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])]
        assert [c["source"] for c in cells] == [c["source"] for c in json.loads(source.read_text(encoding="utf-8"))["cells"]], f"{path.name} is stale"
        assert str(ROOT) not in text and "/site-packages/" not in text
        assert any(c.get("outputs") for c in json.loads(text)["cells"] if c["cell_type"] == "code"), f"{path.name} shows nothing"
    for svg in folder.glob("*.svg"): assert svg.with_suffix(".png").exists()


def searched(recipe, field):
    outer, _, inner = field.partition(".")
    return recipe[outer][inner] if inner else recipe[outer]


@pytest.mark.parametrize("folder", [p for p in REFERENCE if (p / "norm_layer.csv").exists()], ids=names)
def test_what_the_norm_layer_adds_is_recomputed(folder):
    score, lines = {}, rows_of(folder / "norm_layer.csv")
    for r in load_records(folder): score.setdefault(r.row, {})[r.seed] = r.metrics["cosine/recall@1"]
    pairs = [(row, row.removesuffix("_norm")) for row in score if row.endswith("_norm")]
    for line in lines: assert any(float(line["R@1"]) == pytest.approx(mean_interval([score[a][s] - score[b][s] for s in score[a]])[0], abs=1e-12) for a, b in pairs)
    assert len(lines) == len(pairs) > 0


SEARCHES = {"tune_glyphs": 12, "tune_grocery": 8, "tune_family": 31} # rows of each


@pytest.mark.parametrize("name, tuned_by", [(n, "tune_glyphs") for n in ("quick", "glyphs", "omniglot", "sweeps")] + [("grocery", "tune_grocery"), ("grocery_128", "tune_grocery")])
def test_profiles_hold_the_winners_of_the_search(name, tuned_by):
    "Every contestant is a row of the search with the best trial's values, and nothing else is changed."
    profile, search = load_profile(name), load_profile(tuned_by)
    assert profile.tuned_by == tuned_by
    winners = {line["objective"]: line for line in rows_of(ROOT / f"figures/{tuned_by}/search_winners.csv")}
    contestants = {row for row in profile.rows if not profile.rows[row].control} - {row for row in profile.rows if name == "sweeps" and row not in search.search.own}
    few = {row for row in winners if not row.endswith("_norm")} | {"cross_entropy_norm"}
    asked = {"glyphs": set(winners), "omniglot": set(winners), "grocery_128": {"cross_entropy", "multi_similarity"}}
    assert contestants == asked.get(name, few) and len(few) == 8
    for row in contestants:
        line = winners[row]
        recipe, trial = profile.rows[row].recipe, search.rows[f"{row}_t{line['trial']}"].recipe
        assert recipe == trial and recipe["lr"] == float(line["lr"])
        for i in (1, 2): assert float(searched(recipe, line[f"own {i}"])) == float(line[f"value {i}"])


AUTHORS = { # commands in the README of the paper's code, and its defaults
    "cub": dict(epochs=30, lr=.02, momentum=0, norm="none", nesterov=False), "cars196": dict(epochs=100, lr=.05, momentum=0, norm="batch", nesterov=False),
    **{name: dict(epochs=100, lr=.003, momentum=.99, norm="batch", nesterov=True) for name in ("sop", "inshop")}}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_papers_benchmarks_have_their_profiles(name):
    "The authors' command is a row, and all others are rows of the benchmark's own search, with the parameters that it searches."
    profile, search = load_profile(name), load_profile(f"tune_{name}")
    assert profile.data.name == search.data.name == name and profile.tuned_by == f"tune_{name}" and len(profile.seeds) == 5
    recipes = checked_recipes(profile)
    said = dict(encoder="resnet50", pretrained=True, size=224, batch_size=128, warmup=100, schedule="warmcos", weight_decay=5e-4, dim=None)
    authors = recipes["authors"] | {"smoothing": recipes["authors"]["objective_options"]["label_smoothing"]}
    assert {k: authors[k] for k in {**said, **AUTHORS[name], "dropout": 0, "smoothing": 0}} == {**said, **AUTHORS[name], "dropout": .5, "smoothing": .1}
    assert set(profile.rows) == {*search.search.own, "untrained", "authors"}
    for row in search.search.own:
        given = {k for k, v in profile.rows[row].recipe.items() if not isinstance(v, dict)} | {f"objective_options.{k}" for k in profile.rows[row].recipe["objective_options"]}
        assert set(search.search.space(row)) <= given
        trial = checked_recipes(search)[f"{row}_t0"]
        assert all(trial[k] == recipes[row][k] for k in said) and trial["objective"] == recipes[row]["objective"]


@pytest.mark.parametrize("search", SEARCHES)
def test_the_winner_is_the_best_trial(search):
    log = rows_of(ROOT / f"figures/{search}/search_log.csv")
    collapsed = {r.run for r in load_records(ROOT / f"figures/{search}") if any(n.startswith("collapsed") for n in r.notes)}
    for line in rows_of(ROOT / f"figures/{search}/search_winners.csv"):
        assert float(line["R@1"]) == max(float(t["R@1"]) for t in log if t["objective"] == line["objective"] and t["run"] not in collapsed)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_search_gave_equal_budgets_and_never_saw_test_classes(search):
    log, trials, own = rows_of(ROOT / f"figures/{search}/search_log.csv"), {}, {}
    for line in log:
        trials.setdefault(line["objective"], []).append(float(line["lr"]))
        own.setdefault(line["objective"], set()).add((line["own 1"], line["own 2"]))
    assert len({tuple(sorted(v)) for v in trials.values()}) == 1 and len(trials) == SEARCHES[search]     # the same learning rates for all
    assert {len(v) for v in trials.values()} == {12} and all(len(v) == 1 for v in own.values())
    records = load_records(ROOT / f"figures/{search}")
    assert len(records) == len(log)
    for r in records:
        assert r.metrics and all(k.startswith("validation/") for k in r.metrics)
        assert "embeddings.npz" not in r.files and not any(k.startswith("test/") for e in r.history for k in e)


@pytest.mark.parametrize("folder", [p for p in REFERENCE if (p / "paired_differences.csv").exists()], ids=names)
def test_verdicts_are_read_off_the_intervals(folder):
    differences = {line["label"]: line for line in rows_of(folder / "paired_differences.csv")}
    told = rows_of(folder / "verdicts.csv")
    assert [line["label"] for line in told] == list(differences) and len(told[0]) == 6
    for line in told:
        for name, word in list(line.items())[1:]:
            mean, half = (float(differences[line["label"]][k]) for k in (name, f"{name} ±"))
            assert word == ("-" if abs(mean) <= half else "above" if mean > 0 else "below")


@pytest.mark.parametrize("folder", [p for p in REFERENCE if (p / "epoch_selection.csv").exists()], ids=names)
def test_the_three_readings_of_an_epoch_are_what_their_headings_say(folder):
    records = [r for r in load_records(folder) if r.recipe["epochs"]]
    for r in records:
        path = [e["test/cosine/recall@1"] for e in r.history[1:]]
        room = 1e-12 if r.provenance["device"] == "cpu" else .01        # on a GPU an epoch is looked at in the precision of training, the end in fp32
        assert path[-1] == pytest.approx(r.metrics["cosine/recall@1"], abs=room) and max(path) == r.metrics["best_on_test/cosine/recall@1"]
    for line in rows_of(folder / "epoch_selection.csv"):
        mine = [r for r in records if r.row == line["row"]]
        for heading, key in (("cosine last", "cosine/recall@1"), ("cosine selected", "selected/cosine/recall@1"), ("cosine best on test", "best_on_test/cosine/recall@1"),
                             ("Euclidean best on test", "best_on_test/euclidean/recall@1")):
            assert float(line[heading]) == pytest.approx(mean_interval([r.metrics[key] for r in mine])[0], abs=1e-12)
