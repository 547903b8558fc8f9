"""`torch.compile`: every objective is one graph, or the table of notebook 29 says why not; compiled or not, the numbers are equal.

The backend is "eager": it finds breaks without generating code, so no compiler is needed.
"""
from importlib import import_module

import pytest, torch
from torch.testing import assert_close

from dml_companion.objective import loss_modules, locate
from dml_companion.objectives import BREAKS, LABELS, make

NAMES, y = sorted(locate()), torch.arange(12) // 3
STILL = {"mined": dict(miner="hard")}                                # compiled, a miner that draws fills a wider rectangle: other draws


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def value_and_slope(name, how=lambda loss: loss):
    "Of a new objective, seeded: some draw, and a training step moves the state of others."
    torch.manual_seed(0)
    loss, leaf = how(make(name, 4, 8, **STILL.get(name, {}))), torch.randn(12, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    value = loss(leaf, y)
    value.backward()
    return value.detach(), leaf.grad


def whole(loss): return torch.compile(loss, backend="eager", fullgraph=True)


def test_the_reasons_are_of_known_objectives():
    assert set(BREAKS) <= set(NAMES) and set(BREAKS.values()) == {LABELS}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BREAKS])
def test_one_graph(name):
    assert_close(value_and_slope(name, whole), value_and_slope(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(BREAKS))
def test_a_reason_is_needed(name):
    with pytest.raises(Exception) as told: value_and_slope(name, whole)
    assert "check_labels" in str(told.value)


@pytest.mark.parametrize("name", sorted(BREAKS))
def test_the_check_of_labels_is_the_only_reason(name, monkeypatch):
    "A GPU is not asked whether labels are in range: without that question these are one graph, too."
    for module in map(import_module, loss_modules()):
        if hasattr(module, "check_labels"): monkeypatch.setattr(module, "check_labels", lambda labels, num_classes: None)
    assert_close(value_and_slope(name, whole), value_and_slope(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "proxy_anchor"])
def test_a_break_is_no_error(name):
    "Without fullgraph=True the compiler steps aside at the break, and the numbers are the same."
    assert_close(value_and_slope(name, lambda loss: torch.compile(loss, backend="eager")), value_and_slope(name), rtol=1e-5, atol=1e-6)
