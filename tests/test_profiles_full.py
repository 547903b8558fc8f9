"Profiles of full size, for whoever has a GPU, and of the CPU's size on the device's path; `like`, `against`, and notebook 31d, on runs of a size that a test can pay."
import csv
import math
from pathlib import Path

import matplotlib.pyplot
import pytest
import yaml

from dml_companion import reproduction as R
from dml_companion.engine import run_cells
from dml_companion.profiles import Job, Plan, checked_recipes, load_profile, plan, profile_names, read_yaml

ROOT = Path(__file__).parents[1]
AGAIN = "nbs/04_experiments/31d_the_same_rows_again.ipynb"
FULL = {"omniglot_full": "omniglot", "grocery_full": "grocery", "family_full": "family"}
PATH = {"grocery_device": "grocery", "family_device": "family", "omniglot_device": "omniglot"} # the same size
LARGER = {"omniglot_full": dict(size=64, encoder_options={"width": 64}, epochs=40, patience=40), "family_full": dict(size=64, encoder_options={"width": 64}, epochs=40, patience=40),
          "grocery_full": dict(size=128, epochs=30, patience=30, warmup=100)}


@pytest.mark.parametrize("name, small", FULL.items())
def test_every_row_is_there_larger_and_otherwise_the_same(name, small):
    full, base = load_profile(name), load_profile(small)
    assert set(full.rows) == set(base.rows) and list(full.rows) == list(base.rows) and full.seeds == [0, 1, 2, 3, 4] and full.minutes is None
    assert (full.data, full.tuned_by, full.keeps, full.train) == (base.data, base.tuned_by, base.keeps, base.train)
    recipes, before = checked_recipes(full), checked_recipes(base)
    for row, recipe in recipes.items():
        assert recipe["pipeline"] == "device" and recipe["precision"] == "bf16" and full.rows[row].label == base.rows[row].label
        changed = {k: v for k, v in recipe.items() if before[row].get(k) != v} | {k: None for k in before[row].keys() - recipe.keys()}
        wanted = {"pipeline": "device", "precision": "bf16", "size": LARGER[name]["size"]} if full.rows[row].control else {"pipeline": "device", "precision": "bf16", **LARGER[name]}
        assert {k: v for k, v in changed.items() if not (full.rows[row].control and k == "encoder_options")} == wanted, row
    assert {r["objective"] for r in recipes.values()} == {r["objective"] for r in before.values()}
    assert recipes["untrained"]["encoder_options"] == LARGER[name].get("encoder_options", {}) and recipes["raw_pixels"]["encoder_options"] == {}


@pytest.mark.parametrize("name, small", FULL.items())
def test_the_same_tables_are_drawn_and_compared(name, small):
    "32 trains by itself and reads no records: it would say the same again."
    full, base = load_profile(name), load_profile(small)
    of = lambda profile: {t.notebook for t in profile.notebooks} - {AGAIN, "nbs/04_experiments/32_ce_and_spce.ipynb"}
    assert of(full) == of(base) and [t.against for t in full.notebooks if t.notebook == AGAIN] == [small]


@pytest.mark.parametrize("name, host", PATH.items())
def test_the_path_alone_is_changed(name, host):
    path, base = load_profile(name), load_profile(host)
    recipes, before = checked_recipes(path), checked_recipes(base)
    assert list(path.rows) == list(base.rows) and (path.data, path.tuned_by) == (base.data, base.tuned_by) and path.seeds == [0, 1, 2, 3, 4] and path.minutes
    for row, recipe in recipes.items():
        assert before[row] | {"pipeline": "device", "precision": "bf16"} == recipe != before[row] and path.rows[row] == base.rows[row], row
    assert [t.against for t in path.notebooks if t.notebook == AGAIN] == [host]
    path.data.options, path.notebooks = {"max_train_classes": 24, "max_test_classes": 24}, []
    if host == "family": assert plan(path, device="cpu", root=ROOT).slow() == ""                       # its minutes are known


def test_runs_of_both_sizes_never_meet():
    "Same data set, row and seed: another digest, so another folder."
    few = []
    for name in ("family", "family_full"):
        profile = load_profile(name)
        profile.rows = {row: profile.rows[row] for row in ("raw_pixels", "untrained", "snca")}
        profile.data.options, profile.notebooks = {"max_train_classes": 24, "max_test_classes": 24}, []
        few.append(plan(profile, device="cpu", root=ROOT))
    runs = [{j.id for j in p.jobs} for p in few]
    assert len(runs[0]) == 1 + 3 + 3 and len(runs[1]) == 1 + 5 + 5 and not runs[0] & runs[1]
    assert few[0].slow() == "" and few[1].slow().startswith("5 training runs are left that are meant for a GPU")


def test_a_gpu_has_nothing_to_say():
    job = dict(id="train/x", kind="train", title="x", notebook="n", parameters={}, output="o", log="l", recipe={"pipeline": "device", "epochs": 2})
    common = dict(profile="x", device="auto", runs_per_gpu=1, threads=1, figures="")
    assert Plan(jobs=[Job(**job)], gpus=0, **common).slow() and not Plan(jobs=[Job(**job)], gpus=1, **common).slow()
    assert not Plan(jobs=[Job(**job, state="finished")], gpus=0, **common).slow()


# ---- like

@pytest.fixture
def project(tmp_path):
    "A root with two profiles, and how to write a third."
    def write(name, **said): return R.write_atomic(tmp_path / f"workflow/profiles/{name}.yaml", yaml.safe_dump({"name": name, **said}))
    R.write_atomic(tmp_path / "settings.ini", "")
    write("small", description="d", minutes=3, data={"name": "glyphs"}, seeds=[0, 1], base={"lr": .1, "epochs": 2}, rows={"a": {"recipe": {"objective": "snca"}}, "b": {}})
    write("large", like="small", base={"epochs": 9, "dim": 8}, rows={"b": {"label": "B"}, "c": {"label": "C"}})
    return tmp_path, write


def test_base_and_rows_are_laid_over_and_the_rest_is_taken(project):
    root, write = project
    large = load_profile("large", root)
    assert large.base == {"lr": .1, "epochs": 9, "dim": 8} and large.seeds == [0, 1] and large.data.name == "glyphs"
    assert list(large.rows) == ["a", "b", "c"] and large.rows["a"].recipe == {"objective": "snca"} and large.rows["b"].label == "B"
    assert (large.description, large.minutes, large.like) == ("", None, "small")
    write("other", like="small", seeds=[7], data=None)
    assert load_profile("other", root).seeds == [7] and load_profile("other", root).data is None
    assert load_profile("small", root).base == {"lr": .1, "epochs": 2} and load_profile("small", root).like is None


@pytest.mark.parametrize("like, words", [
    ("smal", "no profile, did you mean 'small'"), ("bad", "which is itself; name another profile: large, small"), (["small"], "no profile"), (3, "no profile"),
    ("large", "itself like 'small'; one level only"), ("../small", "no profile")])
def test_like_refuses_what_means_nothing(like, words, project):
    root, write = project
    write("bad", like=like)
    with pytest.raises(ValueError, match="profile bad.yaml: like names") as caught: load_profile("bad", root)
    assert words in str(caught.value)


def test_a_circle_and_a_bad_key_are_refused(project):
    root, write = project
    write("small", like="large")
    with pytest.raises(ValueError, match="itself like"): load_profile("large", root)
    write("small", base=["epochs"])
    with pytest.raises(ValueError, match="profile small.yaml: base"): load_profile("large", root)
    write("small"); write("large", like="small", sedes=[1])
    with pytest.raises(ValueError, match="did you mean 'seeds'"): load_profile("large", root)


def test_no_other_profile_is_like_one(project):
    assert {name for name in profile_names(ROOT) if "like" in read_yaml(ROOT / f"workflow/profiles/{name}.yaml")} == {*FULL, *PATH}


# ---- against

def test_a_comparison_is_made_again_when_the_other_records_change(project):
    from test_engine import write_notebook
    root, write = project
    write_notebook(root / "table.ipynb", "# params\nagainst = ''\nfigures = ''")
    write_notebook(root / "plain.ipynb", "# params\nfigures = ''")
    def job(notebook="table.ipynb", **more):
        write("reader", notebooks=[{"notebook": notebook, **more}])
        return plan("reader", root=root).jobs[0]
    first = job(against="small")
    assert first.parameters["against"] == "small" and "against" not in job().parameters and job().id != first.id
    R.write_atomic(root / "figures/small/records/a-s0-0123.json", "{}")
    assert job(against="small").id != first.id and job("plain.ipynb").parameters == {"figures": "figures/reader"}
    for more, words in ((dict(against="smal"), "no other profile, did you mean 'small'"), (dict(against="reader"), "no other profile"),
                        (dict(against="small", notebook="plain.ipynb"), "no parameter `against`; it has: figures")):
        with pytest.raises(ValueError, match="profile 'reader'") as caught: job(**more)
        assert words in str(caught.value)


# ---- a run through both sizes

@pytest.fixture(scope="module")
def both_sizes(tmp_path_factory):
    "Records of a tiny profile and of one that is like it, through the device's path: one epoch, two seeds, in bf16."
    matplotlib.use("Agg")
    root, records = tmp_path_factory.mktemp("sizes"), {}
    base = dict(encoder_options={"width": 4}, epochs=1, batch_size=32, warmup=2, validation=.2, lr=.1)
    profiles = {"tiny": dict(data={"name": "glyphs", "options": {"max_train_classes": 24, "max_test_classes": 24}}, seeds=[0, 1], base=base,
                             rows={"untrained": {"control": True, "seeds": [0], "recipe": {"epochs": 0}}, "cross_entropy": {}, "snca": {"recipe": {"objective": "snca", "sampler": "balanced", "per_class": 4}}}),
                "tiny_full": dict(like="tiny", base=dict(pipeline="device", precision="bf16", size=48, encoder_options={"width": 8}))}
    for name, said in profiles.items(): R.write_atomic(root / f"workflow/profiles/{name}.yaml", yaml.safe_dump({"name": name, **said}))
    for name in profiles:
        made = plan(load_profile(name, root), device="cpu", root=ROOT)
        for job in made.jobs:
            run_cells(ROOT / job.notebook, {**job.parameters, "folder": str(root / Path(job.output).parent)})
            matplotlib.pyplot.close("all")
        records[name] = [str(root / Path(job.output).parent / "record.json") for job in made.jobs]
    return records


def test_a_larger_profile_leaves_records_of_its_own(both_sizes):
    runs = [R.load_record(p) for p in both_sizes["tiny_full"]]
    assert sorted((r.row, r.seed) for r in runs) == [("cross_entropy", 0), ("cross_entropy", 1), ("snca", 0), ("snca", 1), ("untrained", 0)]
    for r in runs:
        assert (r.recipe["pipeline"], r.recipe["size"]) == ("device", 48) and math.isfinite(r.metrics["cosine/recall@1"])
    assert not {r.run for r in runs} & {R.load_record(p).run for p in both_sizes["tiny"]}


def test_the_result_table_reads_them(both_sizes, tmp_path):
    table = run_cells(ROOT / "nbs/04_experiments/31_retrieval_table.ipynb", dict(profile="tiny_full", records=both_sizes["tiny_full"], figures=str(tmp_path)))["table"]
    assert dict(zip(table.row, table.seeds)) == {"untrained": 1, "cross_entropy": 2, "snca": 2} and (tmp_path / "retrieval_cosine.md").exists()


def test_both_sizes_are_compared(both_sizes, tmp_path, capsys):
    found = run_cells(ROOT / AGAIN, dict(profile="tiny_full", against="tiny", records=both_sizes["tiny_full"], others=both_sizes["tiny"], figures=str(tmp_path)))
    settings = found["settings"].set_index("what")
    assert set(settings.index) >= {"pipeline", "precision", "size", "encoder options"} and list(settings.loc["size", ["tiny", "tiny_full"]]) == ["None", "48"]
    assert not {"lr", "epochs", "objective", "batch size"} & set(settings.index)
    line = found["levels"].set_index("row").loc["snca"]
    score = {name: [R.load_record(p).metrics["cosine/recall@1"] for p in paths if "/snca/" in p] for name, paths in both_sizes.items()}
    assert line["R@1 moved by"] == pytest.approx(sum(score["tiny_full"]) / 2 - sum(score["tiny"]) / 2) and line["R@1 moved by ±"] > 0
    assert list(found["told"]["R@1"].row) == ["snca"] and "a correlation wants five or more" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} >= {"again_settings.md", "again_levels.csv", "again_verdicts_recall.md", "again_verdicts_map.csv", "again_rows.svg"}


@pytest.mark.parametrize("missing", ["profile", "against"])
def test_what_has_no_records_is_said_to_be_not_run(missing, both_sizes, tmp_path, capsys):
    given = dict(profile="nobody", others=both_sizes["tiny"]) if missing == "profile" else dict(against="nobody", records=both_sizes["tiny"])
    run_cells(ROOT / AGAIN, {**given, "figures": str(tmp_path)})
    assert "not run: figures/nobody holds no records; `dml-companion reproduce --profile nobody` makes them" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_two_sets_of_data_on_one_side_are_refused(both_sizes):
    with pytest.raises(ValueError, match="come from 2 different data sets"):
        run_cells(ROOT / AGAIN, dict(records=both_sizes["tiny"] + both_sizes["tiny_full"], others=both_sizes["tiny"]))


@pytest.mark.parametrize("then, now, word", [("-", "-", "same"), ("above", "above", "same"), ("above", "below", "turned"), ("below", "above", "turned"), ("-", "below", "new"), ("above", "-", "gone")])
def test_words_for_a_verdict(then, now, word, both_sizes, tmp_path):
    space = run_cells(ROOT / AGAIN, dict(profile="nobody", against="nobody", figures=str(tmp_path)))
    assert space["change"](then, now) == word


# ---- what is committed

def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def committed(): return {p.name: next(t.against for t in load_profile(p.name).notebooks if t.notebook == AGAIN) for p in sorted((ROOT / "figures").iterdir()) if (p / "again_levels.csv").exists()}


def test_comparisons_of_cpu_tables_are_committed():
    assert ({"omniglot": "glyphs", "grocery_128": "grocery"} | PATH).items() <= committed().items()


def test_31d_says_what_its_tables_say():
    "Every number of its last cell that a table holds, as the table has it."
    import json
    said = "".join(json.loads((ROOT / AGAIN).read_text(encoding="utf-8"))["cells"][-1]["source"])
    def of(name, table): return {line["row"]: line for line in rows_of(ROOT / f"figures/{name}/again_{table}.csv")}
    def gap(line, what, digits=3): return f"{float(line[what]):.{digits}f} ± {float(line[what + ' ±']):.3f}"
    large, wide, path = of("grocery_128", "levels"), of("omniglot", "verdicts_recall"), of("grocery_device", "levels")
    kinds = {metric: {row: (v["verdict"], v["now"]) for row, v in of("grocery_device", f"verdicts_{metric}").items() if v["verdict"] != "same"} for metric in ("recall", "map")}
    assert kinds == {"recall": {"center": ("new", "above"), "snca": ("gone", "-")}, "map": {"snca": ("new", "below")}}
    trained = [line for row, line in path.items() if row not in ("raw_pixels", "untrained")]
    for metric in ("R@1", "MAP@R"): assert len(trained) == 8 and all(abs(float(v[f"{metric} moved by"])) <= float(v[f"{metric} moved by ±"]) for v in trained)
    assert max(float(v["MAP@R moved by"]) for v in trained) < 0 and f"up to {-min(float(v['MAP@R moved by']) for v in trained):.3f}" in said
    order = {(v["metric"], v["correlation"]): v for v in rows_of(ROOT / "figures/omniglot/again_order.csv")}
    for text in (f"cross-entropy by {gap(large['cross_entropy'], 'R@1 moved by')}", f"multi-similarity by {gap(large['multi_similarity'], 'R@1 moved by')}",
                 f"{float(large['untrained']['R@1 moved by']):.3f}", f"({gap(of('grocery_128', 'verdicts_map')['multi_similarity'], 'gap changed by')})",
                 f"({gap(wide['contrastive_norm'], 'gap changed by')})", f"({gap(wide['multi_similarity'], 'gap changed by')})",
                 f"{-float(path['contrastive']['R@1 moved by']):.3f} lower (contrastive, ± {float(path['contrastive']['R@1 moved by ±']):.3f})",
                 f"{float(path['snca']['R@1 moved by']):.3f} higher (SNCA, ± {float(path['snca']['R@1 moved by ±']):.3f})",
                 *("{:+.2f} ({:+.2f} to {:+.2f})".format(*(float(order[m, "Spearman"][k]) for k in ("value", "low", "high"))) for m in ("R@1", "MAP@R"))):
        assert text in said, text


def test_31d_says_what_the_table_of_every_objective_says():
    import json
    from collections import Counter
    said = next(line for line in json.loads((ROOT / AGAIN).read_text(encoding="utf-8"))["cells"][-1]["source"] if "every objective**" in line)
    levels = [v for v in rows_of(ROOT / "figures/family_device/again_levels.csv") if v["row"] not in ("raw_pixels", "untrained")]
    moved = {v["row"]: (float(v["R@1 moved by"]), float(v["R@1 moved by ±"])) for v in levels}
    for metric in ("R@1", "MAP@R"): assert all(abs(float(v[f"{metric} moved by"])) <= float(v[f"{metric} moved by ±"]) for v in levels)
    tables = [rows_of(ROOT / f"figures/family_device/again_verdicts_{m}.csv") for m in ("recall", "map")]
    assert all(abs(float(v["gap changed by"])) <= float(v["gap changed by ±"]) for table in tables for v in table)
    counts = [Counter(v["verdict"] for v in table) for table in tables]
    assert counts == [{"same": 23, "new": 18}, {"same": 31, "new": 10}] and sum(map(len, tables)) == 82
    assert min(moved.values())[0] == moved["angular"][0] and max(moved.values())[0] == moved["lifted"][0]
    order = {v["metric"]: "{:+.2f} ({:+.2f} to {:+.2f})".format(*(float(v[k]) for k in ("value", "low", "high"))) for v in rows_of(ROOT / "figures/family_device/again_order.csv") if v["correlation"] == "Spearman"}
    for words in (f"{len(levels)} trained rows", "{:.3f} lower (angular, ± {:.3f})".format(-moved["angular"][0], moved["angular"][1]), "{:.3f} higher (lifted structure, ± {:.3f})".format(*moved["lifted"]),
                  f"by {sum(m for m, _ in moved.values()) / len(moved):.3f}.", f"{order['R@1']} by Recall@1, {order['MAP@R']} by MAP@R", "28 of 82 verdicts are new, 18 by Recall@1 and 10 by MAP@R"): assert words in said, words


def test_31d_says_what_the_table_of_the_drawings_says():
    import json
    from statistics import median
    said = next(line for line in json.loads((ROOT / AGAIN).read_text(encoding="utf-8"))["cells"][-1]["source"] if "on drawings**" in line)
    def of(profile, table): return [v for v in rows_of(ROOT / f"figures/{profile}/again_{table}.csv") if v["row"] not in ("raw_pixels", "untrained")]
    levels = of("omniglot_device", "levels")
    moved = {v["row"]: (float(v["R@1 moved by"]), float(v["R@1 moved by ±"])) for v in levels}
    for metric in ("R@1", "MAP@R"):
        assert len(levels) == 12 and all(abs(float(v[f"{metric} moved by"])) <= float(v[f"{metric} moved by ±"]) for v in levels)
        assert all(max(levels, key=lambda v: float(v[f"{metric} {name}"]))["row"] == "center_norm" for name in ("omniglot", "omniglot_device"))
    tables = [of("omniglot_device", f"verdicts_{m}") for m in ("recall", "map")]
    assert [{v["row"]: (v["then"], v["now"]) for v in table if v["verdict"] != "same"} for table in tables] == [{"contrastive_norm": ("below", "-")}, {"snca": ("-", "above"), "snca_norm": ("-", "above")}]
    assert sum(map(len, tables)) == 22 and all(abs(float(v["gap changed by"])) <= float(v["gap changed by ±"]) for table in tables for v in table)
    assert min(moved.values()) == moved["center"] and max(moved.values()) == moved["normalized_softmax"]
    for name in ("omniglot", "omniglot_device"):
        places = sorted(float(v[f"R@1 {name}"]) for v in levels)
        assert max(sum(low <= p <= low + .01 for p in places) for low in places) == 7
    widths = [median(float(v["R@1 moved by ±"]) for v in of(profile, "levels")) for profile in ("omniglot_device", "grocery_device", "family_device")]
    order = {v["metric"]: "{:+.2f} ({:+.2f} to {:+.2f})".format(*(float(v[k]) for k in ("value", "low", "high"))) for v in rows_of(ROOT / "figures/omniglot_device/again_order.csv") if v["correlation"] == "Spearman"}
    for words in ("{:.3f} lower (center + CE, ± {:.3f})".format(-moved["center"][0], moved["center"][1]), "{:.3f} higher (normalised softmax, ± {:.3f})".format(*moved["normalized_softmax"]),
                  "a move is ± {:.3f}, of groceries ± {:.3f}, of every objective below ± {:.3f}".format(*widths), f"{order['R@1']} by Recall@1 and {order['MAP@R']} by MAP@R", "19 of 22 verdicts"): assert words in said, words


@pytest.mark.parametrize("name, against", committed().items())
def test_committed_comparisons_are_recounted(name, against):
    score = {}
    for which in (name, against):
        for r in R.load_records(ROOT / f"figures/{which}"): score.setdefault((which, r.row), {})[r.seed] = r.metrics["cosine/recall@1"]
    for line in rows_of(ROOT / f"figures/{name}/again_levels.csv"):
        mean = {which: R.mean_interval(score[which, line["row"]].values())[0] for which in (name, against)}
        assert float(line[f"R@1 {name}"]) == pytest.approx(mean[name]) and float(line["R@1 moved by"]) == pytest.approx(mean[name] - mean[against])
    for line in rows_of(ROOT / f"figures/{name}/again_verdicts_recall.csv"):
        words = []
        for which in (against, name):
            mine, base = score[which, line["row"]], score[which, "cross_entropy"]
            mean, half = R.mean_interval([mine[s] - base[s] for s in sorted(mine.keys() & base.keys())])
            words.append("-" if abs(mean) <= half else "above" if mean > 0 else "below")
        assert [line["then"], line["now"]] == words and line["verdict"] == ("same" if words[0] == words[1] else "turned" if "-" not in words else "new" if words[0] == "-" else "gone")
