"Cards: one for each objective, recipes that validate and train, and the two commands that show them."
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from dml_companion import cli
from dml_companion.cli import app
from dml_companion.objective import catalogue, find, locate, options
from dml_companion.losses.regularisers import REGULARISERS
from dml_companion.mining import MINERS
from dml_companion.objectives import make
from dml_companion.encoders import PRETRAINED
from dml_companion.papers import (CARDS, ELSEWHERE, GAPS, PHOTOGRAPHS, REVISIT, SETTINGS, as_yaml, card, default_fields, drawer,
                                  elsewhere, fields, page, squeezed)
from dml_companion.training import Recipe, build_optimizer, parameter_groups, rate_factor

NAMES = sorted(CARDS)
CLASSES = {name: find(name) for name in NAMES}


def command(*words, width=100):
    done = CliRunner().invoke(app, ["objectives", *words], env={"COLUMNS": str(width)})
    return done.exit_code, done.output


def test_every_objective_has_a_card_and_every_card_an_objective():
    assert NAMES == sorted(locate())


@pytest.mark.parametrize("name", NAMES)
def test_a_card_agrees_with_its_class(name):
    c, entry = CARDS[name], catalogue()[name]
    assert str(c.year) in entry.paper and str(c.year) in c.paper
    assert all(text.strip() == text and text for text in (c.paper, c.formula, c.plain, c.cost, c.split, c.source))
    assert "$" not in c.formula and c.formula.count("{") == c.formula.count("}")
    assert c.tune and (c.beyond or c.stands), "a card without a knob, or a recipe that leaves nothing out, is hard to believe"
    for knob in c.tune:
        assert knob.name in options(CLASSES[name]) or knob.name in Recipe.model_fields, knob.name
        assert knob.scale in ("log", "linear", "choice") and len(knob.values) >= 2 and knob.why
        if knob.scale != "choice":
            low, high = knob.values
            assert low < high and (low > 0 or knob.scale == "linear"), knob
            default = options(CLASSES[name]).get(knob.name)
            assert default is None or low <= default <= high, f"{knob.name}: the default {default} is outside the "
            "advice"


@pytest.mark.parametrize("name", NAMES)
def test_knobs_turn_to_both_ends(name):
    points, labels = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) // 4
    for knob in CARDS[name].tune:
        if knob.name in options(CLASSES[name]):
            for value in knob.values: assert CLASSES[name](2, 8, **{knob.name: value})(points, labels).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_drawers_do_not_overlap(name):
    c = CARDS[name]
    drawers = [set(d) - {"objective_options"} for d in (c.said, c.recalled, c.ours)]
    assert sum(map(len, drawers)) == len(set.union(*drawers)), "one number, two sources"
    assert set(default_fields(name)) == set(SETTINGS) - set.union(*drawers)
    assert all(bool(drawer(name, field)) == (field in c.stands) for field in {*c.said} - {*c.recalled, *c.ours})
    assert all(drawer(name, field) for field in {*c.recalled, *c.ours} - {*c.said})
    assert set(c.stands) <= set(fields(name)) and all(c.stands.values()), "a line that is not there stands for nothing"


def body(text): # of `as_yaml`
    "Field -> comment of its line."
    return {line.split(":")[0]: line.partition("  # ")[2] for line in text.splitlines() if not line.startswith("#")}


# Lines in place of something else in the source, apart from the cards on purpose.
INSTEAD = dict(
    optimizer="mined_triplet", epsilon="", decay="", weight_decay="group_loss intra_batch", proxy_lr="margin mined",
    schedule="arcface center cosface mined_triplet proxy_nca_pp subcenter_arcface",
    milestones="modified_softmax multi_similarity softmax sphereface")


def test_a_line_that_differs_from_its_source_is_marked():
    "AdaGrad is none of the optimizers, stairs of unknown height are no schedule, iterations are no epochs."
    marked = {field: [name for name in NAMES if "stands for" in body(as_yaml(name)).get(field, "")] for field in INSTEAD}
    assert marked == {field: names.split() for field, names in INSTEAD.items()}
    assert "AdaGrad" in body(as_yaml("mined_triplet"))["optimizer"] and "24,000 of 28,000" in body(as_yaml("sphereface"))["milestones"]


# Optimizer, its epsilon, the rate of the encoder and of the objective's own weights, and what an epoch (from 0) makes of them:
# written from the sources' code as it counts, apart from the cards on purpose.
ROTHS = (torch.optim.Adam, 1e-8, 1e-5, None, 4e-4, lambda e: 1)
WUS = (torch.optim.Adam, 1e-7, 1e-4, .1, 1e-4, lambda e: .5 ** ((e >= 12) + (e >= 14) + (e >= 16) + (e >= 18)))
PUBLISHED = dict(
    **dict.fromkeys("angular contrastive generalized_lifted histogram n_pair quadruplet snr triplet".split(), ROTHS),
    margin=WUS, mined=WUS,
    contextual_similarity=(torch.optim.Adam, 1e-8, 8e-5, None, 1e-4, lambda e: .3 ** min(e // 15, 3)),
    group_loss=(torch.optim.RAdam, 1e-8, .00015637, .00015637, 6.06e-6, lambda e: 1 if e + 1 < 31 else .1),
    intra_batch=(torch.optim.RAdam, 1e-8, .00015637, .00015637, 6.06e-6, lambda e: 1 if e + 1 < 31 else .1),
    normalized_softmax=(torch.optim.SGD, None, .001, .001, 1e-4, lambda e: .1 ** (e // 15)),
    proxy_anchor=(torch.optim.AdamW, 1e-8, 1e-4, .01, 1e-4, lambda e: .5 ** (e // 5)),
    proxy_nca=(torch.optim.Adam, 1., .045, 1., 0., lambda e: .94 ** e),
    proxy_nca_pp=(torch.optim.Adam, 1., .004, 400., 0., lambda e: 1),
    snca=(torch.optim.SGD, None, .1, None, 1e-4, lambda e: .1 ** (e // 40)),
    soft_triple=(torch.optim.Adam, .01, 1e-4, .01, 1e-4, lambda e: .1 ** ((e + 1) // 20)))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_optimizer_is_the_published_one(name):
    "Class, epsilon, both rates and the decay of what is built, and the rate of every epoch, first and last batch."
    kind, epsilon, encoder, own, decay, factor = PUBLISHED[name]
    recipe = Recipe.from_paper(name)
    loss = make(recipe.objective, 8, 16, **recipe.objective_options)
    optimizer = build_optimizer(parameter_groups(torch.nn.Linear(20, 16), loss, recipe), recipe)
    assert type(optimizer) is kind and {group.get("eps") for group in optimizer.param_groups} == {epsilon}
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates.pop("encoder") == encoder and (not rates if own is None else [*rates.values()] == pytest.approx([own], rel=.002))
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"][0].ndim > 1} == {decay}
    for epoch in range(recipe.epochs):
        for step in (7 * epoch, 7 * epoch + 6):
            assert rate_factor(recipe, step, 7 * recipe.epochs) == pytest.approx(factor(epoch), rel=1e-9), epoch


@pytest.mark.parametrize("name, batches", [("multi_similarity", 3000), ("sphereface", 28000), ("softmax", 28000),
                                           ("modified_softmax", 28000)])
def test_steps_of_iterations_are_met_to_the_nearest_epoch(name, batches):
    recipe = Recipe.from_paper(name)
    steps = [step for step in range(1, batches) if rate_factor(recipe, step, batches) < rate_factor(recipe, step - 1, batches)]
    said = [int(n.replace(",", "")) for n in re.findall(r"\d+,000|\d,\d00", CARDS[name].stands["milestones"])][:-1]
    assert len(steps) == 2 and said == ([1200, 2400] if name == "multi_similarity" else [16000, 24000])
    assert all(abs(step - at) <= batches / recipe.epochs / 2 for step, at in zip(steps, said))
    assert rate_factor(recipe, batches - 1, batches) == pytest.approx(.01)


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_idle_and_none_is_missing(name):
    "Momentum is SGD's and epsilon Adam's; steps say when and by how much; advice on the rate holds for the optimizer of the recipe."
    found, recipe = fields(name), Recipe.from_paper(name)
    assert not {"momentum", "nesterov"} & {*found} or recipe.optimizer == "sgd"
    assert "epsilon" not in found or recipe.optimizer != "sgd"
    assert ({"milestones", "decay"} & {*found}) == ({"milestones", "decay"} if recipe.schedule == "step" else set())
    for knob in CARDS[name].tune:
        if knob.name == "lr":
            assert knob.values[0] <= recipe.lr <= knob.values[1] and re.search(r"for (\w+)", knob.why)[1] == recipe.optimizer
            assert (f"epsilon = {recipe.epsilon:g}" in knob.why) == ("epsilon" in found)


@pytest.mark.parametrize("name", NAMES)
def test_no_card_speaks_of_an_optimizer_or_of_stairs_without_marking_the_line(name):
    words = dict(optimizer=r"\b(R?Adam|AdamW|RMSprop|AdaGrad|SGD)\b",
                 schedule=r"\brates? (is |was )?(times|halved|divided|lowered)|divided by \d|schedule|steps of")
    about_others = ("Hermans et al. use", "the authors' solver for CUHK03", "the paper: batch 512", "the paper itself: RMSprop")
    lines = body(as_yaml(name))                                                # about_others: not the card's source
    for sentence in CARDS[name].beyond:
        for field, word in words.items():
            if re.search(word, sentence) and not sentence.startswith(about_others):
                assert field not in lines or "stands for" in lines[field], f"{field}: {lines[field]!r}, but: {sentence}"


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_recipe_carries_its_caveats(name):
    "What no line can say stands in the file that --recipe writes, as comments below the lines."
    code, out = command(name, "--recipe")
    told = " ".join(line.removeprefix("#").strip() for line in out.splitlines() if line.startswith("#"))
    assert code == 0 and all(f"- {' '.join(text.split())}" in told for text in CARDS[name].beyond)
    assert all(f"{field}={Recipe.model_fields[field].default}" in told for field in default_fields(name))


# Commands that the cards use and that LaTeX, amsmath and MathJax know.
LATEX = {*"! # , { } Big Phi alpha bar beta big cdot cos delta dots eta exp frac gamma in lVert lambda le leftarrow log mathcal mathrm max ne "
         "nu operatorname overline pm psi qquad quad rVert sigma sum tan tau text tfrac theta tilde top".split()}


@pytest.mark.parametrize("name", NAMES)
def test_formulas_are_made_of_known_commands(name):
    unknown = set(re.findall(r"\\([a-zA-Z]+|.)", CARDS[name].formula)) - LATEX
    assert not unknown, f"no command of LaTeX, or one to be added above: {unknown}"


@pytest.mark.parametrize("name", NAMES)
def test_the_published_recipe_trains(name):
    "Its options are accepted and its optimiser moves encoder and weights for two steps, with a finite loss."
    recipe = Recipe.from_paper(name)
    behind = recipe.objective == "mined" != name                               # a loss that its authors showed mined triplets only
    assert (recipe.objective_options["base"] if behind else recipe.objective) == name and recipe.epochs > 0
    torch.manual_seed(0)
    labels = torch.arange(48) % 8
    points = torch.eye(8, 20)[labels] + .3 * torch.randn(48, 20)
    encoder, loss = torch.nn.Linear(20, 16), make(recipe.objective, 8, 16, **recipe.objective_options)
    optimizer = build_optimizer(parameter_groups(encoder, loss, recipe), recipe)
    before = [p.detach().clone() for p in encoder.parameters()]
    for _ in range(2):
        value = loss(encoder(points), labels)
        assert value.isfinite()
        optimizer.zero_grad(); value.backward(); optimizer.step()
    assert any((p != b).any() for p, b in zip(encoder.parameters(), before)), "nothing was learned"
    assert all(p.isfinite().all() for p in [*encoder.parameters(), *loss.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_no_photographs_for_an_untrained_convnet(name):
    """A recipe says its data set, its backbone and a rate with its optimizer. On photographs the backbone is a large one, and
    it starts from random weights only where the source did, with the source's rate."""
    c, recipe = CARDS[name], Recipe.from_paper(name)
    drawers = {"read": c.said, "recalled": c.recalled, "ours": c.ours}
    of = {field: [word for word, found in drawers.items() if field in found] for field in Recipe.model_fields}
    assert len(of["dataset"]) == len(of["encoder"]) == len(of["lr"]) == 1 and of["optimizer"] == of["lr"]
    if recipe.dataset not in PHOTOGRAPHS:
        assert name == "spce" and recipe.dataset == "glyphs"                   # MNIST in the paper
        return
    assert all(of[field] for field in GAPS) and (recipe.size, recipe.encoder in PRETRAINED) == (224, True)
    if not recipe.pretrained:
        assert of["pretrained"] == of["lr"] != [] and recipe.optimizer == "sgd"
        assert any(word in " ".join([*c.beyond, *c.stands.values()]) for word in ("random weights", "ImageNet", "faces"))
    if of["lr"] == ["ours"] and recipe.pretrained: assert recipe.lr == REVISIT["lr"] and recipe.optimizer == "adam"


@pytest.mark.parametrize("name", NAMES)
def test_each_number_says_whose_it_is(name):
    "The first lines name the source; a line without a comment was read there, and no other."
    c, lines = CARDS[name], as_yaml(name).splitlines()
    legend = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    assert legend.startswith(name) and c.source in legend and max(map(len, lines)) < 200
    found = body(as_yaml(name))
    assert set(found) == set(fields(name))
    for field, comment in found.items():
        comment, _, other = comment.partition("stands for ")
        assert other == c.stands.get(field, "")
        assert ("ours" in comment) == (field in c.ours) and ("unconfirmed" in comment) == (field in c.recalled), field
    options_ = [d.get("objective_options", {}) for d in (c.said, c.recalled, c.ours)]
    assert sum(map(bool, options_)) <= 1, "options of two drawers on one line: which is whose?"


@pytest.mark.parametrize("name", NAMES)
def test_yaml_reads_back_as_the_recipe(name, tmp_path):
    code, out = command(name, "--recipe")
    assert code == 0
    (tmp_path / "recipe.yaml").write_text(out, encoding="utf-8")
    assert Recipe.load(tmp_path / "recipe.yaml") == Recipe.from_paper(name)
    unconfirmed = {field for field, comment in body(out).items() if "unconfirmed" in comment.split("stands for")[0]}
    assert unconfirmed == {*CARDS[name].recalled} and list(fields(name))[0] == "objective"


def test_changes_are_validated_with_the_rest():
    assert Recipe.from_paper("arcface", dataset="glyphs", size=None, dim=64).dim == 64
    assert Recipe.from_paper("arcface", objective_options=dict(scale=16.)).objective_options == dict(scale=16.)
    with pytest.raises(ValueError, match="did you mean 'arcface'"): Recipe.from_paper("arkface")
    with pytest.raises(ValueError, match="did you mean 'lr'"): Recipe.from_paper("arcface", learning_rate=.1)
    with pytest.raises(ValueError, match="multiple of per_class"): Recipe.from_paper("multi_similarity", batch_size=81)
    with pytest.raises(ValueError, match="nothing like it|unknown objective"): card("")
    with pytest.raises(ValueError, match="option of arcface 'foo'"): Recipe.from_paper("arcface", objective_options={"foo": 1})
    with pytest.raises(ValueError, match="28.6.*radians"): Recipe.from_paper("arcface", objective_options={"margin": 28.6})
    with pytest.raises(ValueError, match="a word, got None"): Recipe.from_paper(None)
    with pytest.raises(ValueError, match="'pads'.*notebook 21c"): Recipe.from_paper("pads")


def test_a_user_needs_one_import():
    "In a process that has imported nothing else, and without this project's development tools."
    code = ("import sys; sys.modules['fastcore'] = None\nfrom dml_companion.training import Recipe\n"
            "assert 'dml_companion.papers' not in sys.modules\nprint(Recipe.from_paper('proxy_anchor').proxy_lr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "100.0", done.stderr


@pytest.mark.parametrize("width", [80, 100, 112, 130, 200])
def test_the_list_fits_into_the_terminal(width, monkeypatch):
    "No line is too long, no name, paper or parameter is broken or left out; a pipe (200) has one line an objective."
    monkeypatch.setattr(cli.out, "width", width)
    code, out = command()
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= width
    starts = [i for i, line in enumerate(lines[:lines.index("")]) if not line.startswith(" ")]
    rows = {lines[i].split()[0]: lines[i:j] for i, j in zip(starts, [*starts[1:], lines.index("")])}
    assert set(rows) == {*NAMES, "name"} and " ".join(" ".join(rows.pop("name")).split()) == "name family paper parts weights cost tune"
    for name, entry in catalogue().items():
        row, knobs = " ".join(" ".join(rows[name]).split()), ", ".join(knob.name for knob in CARDS[name].tune)
        owns = entry.own[0] if len(entry.own) == 1 else "both" if entry.own else "-"
        assert row == " ".join([name, entry.family, entry.paper.replace(", a reconstruction", " *"),
                                "natural" if CARDS[name].natural else "stated", owns, CARDS[name].cost.replace(" ", ""), knobs])
        assert len(rows[name]) == 1 or width < 200
    assert "dml-companion objectives xbm" in out and lines[-1].endswith("dml-companion objectives NAME")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_class_as_it_is(name):
    code, out = command(name)
    assert code == 0
    flat = " ".join(out.split())
    for option, default in options(CLASSES[name]).items(): assert f"{option}={default!r}" in flat
    assert CARDS[name].formula in out and f"objectives {name} --recipe" in out
    assert all(line.strip() in out for line in as_yaml(name, 94).splitlines())
    assert ("none" in out.split("weights")[1][:12]) == (not list(CLASSES[name](4, 8).parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_the_page_fits_into_the_terminal(name):
    "From 72 columns to 96 its lines are as long as the terminal has room for; fields, which must stay on a line, and LaTeX aside."
    words = {}
    for width in (72, 80, 96, 200):
        out = command(name, width=width)[1]
        prose = [line for line in out.splitlines() if not re.match(r"LaTeX|  \w+: |As a file: ", line)]
        assert max(map(len, prose)) <= min(width, 96) and (width > 80 or max(map(len, prose)) > width - 12)
        words[width] = [word for word in out.split() if word != "#"]
    assert words[72] == words[80] == words[96] == words[200]
    assert command(name, "--recipe", width=72) == command(name, "--recipe", width=200), "a file does not depend on the terminal"


@pytest.mark.parametrize("words, told", [
    (("arkface",), "did you mean 'arcface'"), (("ArcFace",), "did you mean 'arcface'"), (("", ),
    "unknown objective ''"),
    (("tripplet", "--recipe"), "did you mean 'triplet'"), (("[bold]",), "[bold]"), (("--recipe",), "needs the NAME"),
    (("MARGIN",), "'MARGIN': did you mean 'margin'?"), (("Proxy-Anchor", "--recipe"), "did you mean 'proxy_anchor'?"),
    (("TripletLoss",), "did you mean 'triplet'?"), (("semihard",), "'semihard' is a miner: `mined_triplet` takes it"),
    (("semi-hard",), "miner: semihard"), (("DistanceWeightedMiner",), "miner: distance_weighted"),
    (("regularface",), "regulariser: regular_face"), (("XBM",), "import CrossBatchMemory"), (("InfoNCE",), "`snca`"),
    (("nt-xent",), "`snca`"), (("SupConLoss",), "`snca`"), (("npairs",), "`n_pair`"), (("MS",), "`multi_similarity`"),
    (("proxynca++",), "`proxy_nca_pp`")])
def test_nonsense_gets_a_sentence(words, told):
    code, out = command(*words)
    assert code == 2 and told in out and "Traceback" not in out


def test_what_stands_for_another_word_exists():
    "Names in the answers are objectives, miners are those of the class, and no answer hides an objective of that very name."
    for word, told in ELSEWHERE.items():
        assert word == squeezed(word) and word not in map(squeezed, NAMES)
        named = re.findall(r"`(\w+)`", told)
        assert set(named) <= set(NAMES) and (named or "CrossBatchMemory" in told)
    for miner in MINERS:
        told = elsewhere(miner)
        assert ("is a miner" in told) == (miner not in NAMES)
        if f"{{miner: {miner}}}" in told: CLASSES["mined_triplet"](miner=miner)
    for regulariser in REGULARISERS: CLASSES["regularised"](4, 8, regulariser=regulariser)
    with pytest.raises(ValueError, match="did you mean 'margin'"): Recipe.from_paper("Margin")


def test_pair_losses_that_no_miner_takes_are_named_with_the_reason():
    from pathlib import Path
    from dml_companion.losses.mined import BASES
    without = {e.name for e in catalogue().values() if e.family in ("pairwise", "ranking")} - {*BASES, "mined", "mined_triplet"}
    assert without == {"almn", "center", "danml", "spce"}, "say of a new one why no miner takes it, in 21b"
    folder = Path(__file__).parents[1] / "nbs/03_objectives"
    for book, names in (("21b_mined_triplet", without), ("28_contextual", without - {"center"}), ("29_objectives", without - {"center"})):
        text = (folder / f"{book}.ipynb").read_text(encoding="utf-8")
        assert any("miner" in said and all(f"`{name}`" in said for name in names) for said in re.split(r'"cell_type"', text)), book


@pytest.mark.parametrize("loss, ours", [("NTXentLoss", "snca"), ("SupConLoss", "snca")])
def test_an_alias_is_no_lie(loss, ours):
    "With two images a class the peers' loss is ours, value and gradient."
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    found, y = [], torch.arange(12) // 2
    for f in (getattr(losses, loss)(temperature=.2), CLASSES[ours](temperature=.2)):
        leaf = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        value = f(leaf, y)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)

