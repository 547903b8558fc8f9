"The committed tables of the bench: their verdicts follow from what was measured, and each has a reason where it needs one."
import json
import re
import shutil
from pathlib import Path

import pytest

pd = pytest.importorskip("pandas")
ROOT = Path(__file__).parents[1]
BENCH = ROOT / "figures/bench"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch): monkeypatch.syspath_prepend(ROOT)


def test_every_measured_size_has_a_verdict_against_the_peer():
    table, found = pd.read_csv(BENCH / "losses.csv"), pd.read_csv(BENCH / "losses_targets.csv")
    from benchmarks.bench_losses import PEER_TARGETS, PEERS_AT
    rows = found[found.kind == "peer / ours"].set_index(["objective", "batch"])
    measured = table[table.peer_state == "measured"].set_index(["objective", "batch"])
    assert {*rows.index} == {*measured.index} and {128, 512, 1024, 4096} == {*rows.index.get_level_values("batch")}
    text = (BENCH / "losses.md").read_text()
    (told,) = re.findall(r"\*\*Slower than the peer\*\*.*?:\n\n((?:- .*\n)+)", text)
    for (label, b), row in rows.iterrows():
        ratio, target = measured.peer_times_ours[label, b], PEER_TARGETS.get(label, 1) if b == PEERS_AT else 1
        assert row.target == target and row.verdict == ("met" if ratio >= target else "not met")
        line = next((line for line in told.splitlines() if line.startswith(f"- {label}: ")), "")
        assert (re.search(rf"\b{ratio:.2f} at B = {b:,.0f}\b", line) is not None) == (ratio < 1), (label, b)
    assert "N-pair, no norm: 0.80 at B = 128" in told and "ArcFace, 3 sub-centres: 0.93 at B = 1,024" in told


def test_medians_and_quickest_runs_that_disagree_decide_nothing():
    from benchmarks.contenders import EXEMPT
    table, found = pd.read_csv(BENCH / "losses.csv"), pd.read_csv(BENCH / "losses_targets.csv")
    rows = found[(found.kind == "ours / floor") & found.batch.notna()].set_index(["objective", "batch"])
    for r in table[table.batch >= 512].itertuples():
        median, best = r.times_floor <= 2, r.best_times_floor <= 2
        expected = "exempt" if r.objective in EXEMPT else "undecided" if median != best else "met" if median else "not met"
        row = rows.loc[(r.objective, r.batch)]
        assert row.verdict == expected and (expected == "met") == (row.why != row.why), (r.objective, r.batch)
    assert {*rows[rows.verdict == "undecided"].index} == {
        ("margin, all pairs", 512), ("SNR, contrastive", 512), *((name, 4096) for name in ("triplet, squared", "lifted", "angular", "circle"))}


def test_the_tables_are_what_the_csv_gives(tmp_path):
    "Written anew without measuring: the same bytes, machine and rounds included."
    pytest.importorskip("matplotlib")
    from benchmarks.__main__ import main
    for name in ("losses.csv", "losses.md", "compile.csv", "compile.md"): shutil.copy(BENCH / name, tmp_path)
    main(["--render", "--out", str(tmp_path)])
    for name in ("losses.csv", "losses.md", "losses_targets.csv", "compile.csv", "compile.md"):
        assert (tmp_path / name).read_bytes() == (BENCH / name).read_bytes(), name
    assert {"losses.png", "losses.svg", "losses_peers.png", "losses_peers.svg"} <= {f.name for f in tmp_path.iterdir()}
    (tmp_path / "compile.md").write_text("# torch.compile\n")
    with pytest.raises(ValueError, match="lines about a machine"): main(["compile", "--render", "--out", str(tmp_path)])
    with pytest.raises(SystemExit): main(["memory", "--render"])


def test_what_differs_when_compiled_has_a_reason_that_is_tried():
    from benchmarks.bench_compile import DRAWS, why_unequal
    table = pd.read_csv(BENCH / "compile.csv", keep_default_na=False)
    different = table[table.equal != "yes"]
    assert {*different.objective} == {"margin, distance-weighted"} and {*different.why} == {DRAWS}
    assert why_unequal("margin, distance-weighted", 16) == DRAWS and why_unequal("contrastive", 16) == ""
    text = (BENCH / "compile.md").read_text()
    assert DRAWS in text and "inductor, which generates code, is not" in text


def test_the_breaks_of_the_table_are_the_check_of_labels(monkeypatch):
    "Why each forward that the table breaks does so, and that it breaks nowhere else; one objective of each kind."
    import torch
    from importlib import import_module
    from benchmarks.bench_compile import CHECKED
    from benchmarks.contenders import CONTENDERS, make_batch
    from dml_companion.objective import loss_modules
    def explained(label):
        torch._dynamo.reset()
        return torch._dynamo.explain(CONTENDERS[label].make().eval())(*make_batch(8))
    table = pd.read_csv(BENCH / "compile.csv", keep_default_na=False).set_index("objective")
    some = ["cross-entropy", "ArcFace", "ProxyNCA++", "regularised softmax", "intra-batch"]
    assert (table.breaks[some] > 0).all() and {*table.why[table.breaks > 0]} == {"Data-dependent branching"} and CHECKED in (BENCH / "compile.md").read_text()
    for label in some: assert all("check_labels" in reason.user_stack[-1].name for reason in explained(label).break_reasons), label
    for module in map(import_module, loss_modules()):
        if hasattr(module, "check_labels"): monkeypatch.setattr(module, "check_labels", lambda labels, num_classes: None)
    assert [explained(label).graph_break_count for label in some] == [0] * len(some)
    torch._dynamo.reset()


def test_the_search_tables_are_what_the_csv_gives():
    "Everything but the exact part, whose csv is rounded, word by word; SOP's size and a million vectors, synthetic and real, are there."
    from benchmarks import bench_search as S
    table, exact = pd.read_csv(BENCH / "search.csv", keep_default_na=False), pd.read_csv(BENCH / "search_exact.csv")
    wanted, text = (t.split("**What recall")[1].split("\n\n- AMD")[0].rstrip() for t in (S.markdown(table, exact), (BENCH / "search.md").read_text()))
    assert wanted.split("\n\n")[:4] == text.split("\n\n")[:4]
    (said,) = (p for p in S.markdown(table, exact).split("\n\n") if p.startswith("Float32, normal vectors."))
    assert f"\n\n{said}\n\n" in (BENCH / "search.md").read_text() and "medians of 2 rounds" in said and "A ratio below one" in said
    assert "Views of omniglot: the run's name was not recorded then." in wanted
    assert "Views of omniglot: the run spce, seed 1, 0123456789ab." in S.markdown(table.assign(run="spce, seed 1, 0123456789ab"), exact)
    assert {tuple(v) for v in exact[["n", "d"]].values.tolist()} == {(60_502, 2_048)} and (exact.peak_gb < .1 * exact.matrix_gb).all()
    assert {("synthetic", 1_000_000), ("views of omniglot", 1_000_000)} <= {*map(tuple, table[["data", "n"]].values.tolist())}
    assert table.recall.between(0, 1).all() and (table[table["index"] != "exact"].visited < 1.1).all()


def test_03b_says_what_the_search_benchmark_found():
    from benchmarks import bench_search as S
    prose = json.loads((ROOT / "nbs/01_foundations/03b_search_at_scale.ipynb").read_text())["cells"][-1]["source"]
    line = next(s for s in "".join(prose).splitlines() if "At a million" in s)
    table, exact = pd.read_csv(BENCH / "search.csv", keep_default_na=False), pd.read_csv(BENCH / "search_exact.csv").set_index("way")
    found = {(v["data"], v["n"], v["index"]): v for v in S.verdicts(table)}
    made, real = (lambda name, d=d: found[d, 1_000_000, name] for d in ("synthetic", "views of omniglot"))
    ms = lambda v: f"{1e3 * v['best'].seconds:.2g} ms"
    own = table[(table["index"] == "exact") & (table.n == 1_000_000)].set_index("data").seconds
    said = [f"{1e3 * own['synthetic']:.1f} ms a query", f"`ivf_flat` {ms(made('ivf_flat'))} after {made('ivf_flat')['build']:.0f} s", f"`hnsw` {ms(made('hnsw'))} after {made('hnsw')['build']:.0f} s",
            f"after {round(made('ivf_flat')['pays'], -3):,.0f} and {round(made('hnsw')['pays'], -3):,.0f} queries", f"{real('ivf_flat')['best'].setting} of 4,000 cells",
            f"took {made('ivf_flat')['best'].setting} on", f"needed {ms(real('ivf_flat'))}, `hnsw` {ms(real('hnsw'))}", f"{made('ivf_pq')['top']:.2f} and {real('ivf_pq')['top']:.2f}"]
    assert not [s for s in said if s not in line], [s for s in said if s not in line]
    sop = next(s for s in "".join(prose).splitlines() if "At SOP's size" in s)
    for words in (f"{exact.seconds['euclidean']:.0f} s (Euclidean) and {exact.seconds['cosine']:.0f} s", f"{exact.times_floor['euclidean']:.2f} and {exact.times_floor['cosine']:.2f} times",
                  f"{exact.peak_gb.max():.2f} GB beside", f"{exact.matrix_gb.max():.1f} GB"): assert words in sop, words


def test_the_ladder_in_figures_is_the_program_s():
    import torch
    from benchmarks import bench_training as T
    names = [r.name for r in T.rungs(torch.device("cpu"), True)]
    table = pd.read_csv(BENCH / "training_cpu.csv")
    assert table.rung.tolist() == [*names[:-1], T.ITSELF, names[-1]]
    lines = {line.split(" | ")[0][2:]: line for line in (BENCH / "training_cpu.md").read_text().splitlines() if line.startswith("| ")}
    for r in table.itertuples(): assert lines[r.rung].endswith(f" | {r.against_first:.2f} | {r.step_against_floor:.2f} | {r.share_of_peak:.1%} |"), r.rung


def test_the_page_of_both_paths_and_05c_are_what_the_seeds_give():
    import json
    from benchmarks import bench_paths as P
    table, page = pd.read_csv(BENCH / "training_paths.csv"), (BENCH / "training_paths.md").read_text()
    assert table.groupby(["path", "epoch"]).seed.nunique().eq(10).all() and [*dict.fromkeys(table.path)] == list(P.PATHS)
    both, first = P.compared(table), P.compared(table[table.seed < 5])
    for _, rows in both.groupby("path", sort=False): assert P.page_of(rows) in page
    for _, rows in first.groupby("path", sort=False): assert P.verdict_of(rows) in page.split("first five")[1]
    said = next(line for c in json.loads((BENCH.parents[1] / "nbs/01_foundations/05c_device_training.ipynb").read_text())["cells"] for line in c["source"] if "learns what the usual path learns" in line)
    fp32, bf16 = both[both.epoch == 12].itertuples()
    early = next(first[first.epoch == 12].itertuples())
    assert both.overlap.all() and "overlap after each of twelve epochs" in said
    for words in (f"{fp32.reference:.3f} ± {fp32.reference_half:.3f} there, {fp32.device:.3f} ± {fp32.device_half:.3f} and {bf16.device:.3f} ± {bf16.device_half:.3f} here",
                  f"{fp32.difference:.3f} ± {fp32.half:.3f} and {bf16.difference:.3f} ± {bf16.half:.3f}", f"off by {early.difference:.3f} ± {early.half:.3f}"): assert words in said, words
