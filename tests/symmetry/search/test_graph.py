"""The graph between recording and analysis: it prints, it can be written by hand, and only recording touches torch's dispatcher."""

import ast
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_optim.symmetry
from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.inputs import Inputs
from teleport_optim.symmetry.search import analyse, permutations, scalings
from teleport_optim.symmetry.search.analyse import Analyser
from teleport_optim.symmetry.search.graph import Call, Graph, Pin, Value, Write
from teleport_optim.symmetry.search.record import record
from teleport_optim.symmetry.search.sites import symmetries_of
from teleport_optim.symmetry.spec import Symmetry
from tests.helpers.small_models import Model

pytestmark = pytest.mark.private_torch

PACKAGE = Path(teleport_optim.symmetry.__file__).parent
RECORDING = {"search/recording/recorder.py": "TorchDispatchMode", "search/recording/fakes.py": "FakeTensorMode"}


def symmetries(graph: Graph, *groups: str) -> list[Symmetry]:
    """The symmetries of a graph."""
    analyser = Analyser(groups)
    analyser.follow(graph)
    analyser.finish(graph.parameters)
    names = {name: [name] for name in graph.parameters}
    return [one for each in analyser.analyses for one in symmetries_of(each, names, include_approximate=False)]


def two_layers(activation: str) -> Graph:
    """A linear layer, a function of each entry, and another linear layer."""
    graph = Graph()
    x, first, second = graph.input(2, 3), graph.parameter("a.weight", 8, 3), graph.parameter("b.weight", 1, 8)
    (hidden,) = graph.call("linear", {"input": x, "weight": first, "bias": None}, (2, 8), module="a")
    (hidden,) = graph.call(activation, {"self": hidden}, (2, 8))
    graph.outputs += graph.call("linear", {"input": hidden, "weight": second, "bias": None}, (2, 1), module="b")
    return graph


# ----------------------------------------------------------------------------------------------------------- recording


def test_a_recorded_graph_prints_one_line_for_each_call() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x).view(2, 2, 3)
        h.mul_(m.scale)
        out: Tensor = torch.cat([h, h.relu()], 1).flatten(1) @ m.last.t()
        return out

    model = Model(forward, first=nn.Linear(4, 6), scale=torch.ones(3), last=nn.Parameter(torch.ones(5, 12)))
    assert str(record(model, Inputs.of(torch.ones(2, 4)))).splitlines() == [
        "%0 = input [2, 4]",
        "%1 = linear(%0, first.weight, first.bias) [2, 6]  # first",
        "%2 = view(%1, size=[2, 2, 3]) [2, 2, 3]",
        "%3 = mul(%2, scale) [2, 2, 3] in place of %2",
        "%4 = relu(%3) [2, 2, 3]",
        "%5 = cat([%3, %4], dim=1) [2, 4, 3]",
        "%6 = flatten(%5, start_dim=1, end_dim=-1) [2, 12]",
        "%7 = t(last) [12, 5]",
        "%8 = matmul(%6, %7) [2, 5]",
        "return %8",
    ]


def test_a_graph_tells_of_pins_and_refusals() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h.data = x.exp()
        out: Tensor = h
        return out

    model = Model(forward, a=nn.Linear(4, 4))
    lines = str(record(model, Inputs.of(torch.ones(2, 4)))).splitlines()
    reason = "another tensor is put in the place of a tensor by an assignment to its .data"
    assert f"pin %1, %2: {reason}" in lines


def test_a_graph_holds_no_tensors_and_can_be_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    graph = record(model, Inputs.of(torch.ones(2, 3, 4, 4)))
    gc.collect()
    reached, queue = {id(graph)}, [graph]
    while queue:
        one = queue.pop()
        assert not isinstance(one, Tensor)
        if not isinstance(one, type):
            new = [other for other in gc.get_referents(one) if id(other) not in reached]
            reached |= set(map(id, new))
            queue += new
    before = str(graph)
    found = [symmetries(graph, "permutation", "sign") for _ in range(2)]
    assert found[0] == found[1] != []
    assert str(graph) == before


def test_a_search_leaves_no_garbage_that_holds_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3)
    collections = []
    monkeypatch.setattr(gc, "collect", lambda *args: collections.append(args))
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        assert len(find_symmetries(model, x)) > 0
    finally:
        if is_enabled:
            gc.enable()
    assert collections == []


# ----------------------------------------------------------------------------------------------------------- analysis


@pytest.mark.parametrize(
    ("activation", "groups"),
    [("relu", {"permutation", "scaling"}), ("tanh", {"permutation", "sign"}), ("neg", {"linear", "permutation"})],
)
def test_a_graph_that_is_written_by_hand_is_analysed(activation: str, groups: set[str]) -> None:
    found = symmetries(two_layers(activation), "permutation", "scaling", "sign", "linear")
    assert groups <= {one.group.name for one in found}
    for one in found:
        assert [str(leg) for leg in one.legs if leg.name == "b.weight"] == ["b.weight[1]^-1"]
        assert one.size == 8


def test_the_analysis_of_a_written_graph_is_that_of_a_recorded_one() -> None:
    layers = {"a": nn.Linear(3, 8, bias=False), "b": nn.Linear(8, 1, bias=False)}
    model = Model(lambda m, x: m.b(m.a(x).relu()), **layers)
    recorded = record(model, Inputs.of(torch.ones(2, 3)))
    groups = ("permutation", "scaling", "sign", "linear")
    assert symmetries(recorded, *groups) == symmetries(two_layers("relu"), *groups) != []


def test_an_operation_without_a_rule_lets_nothing_through() -> None:
    analyser = Analyser(["permutation", "scaling"])
    analyser.follow(two_layers("unheard_of"))
    assert [refusal.reason for refusal in analyser.refusals] == [
        "unheard_of is not an operation whose symmetries are known"
    ]
    assert symmetries(two_layers("unheard_of"), "permutation", "scaling") == []


@pytest.mark.parametrize(("reason", "refusals"), [("a hook", [("b", "a hook")]), ("", [])])
def test_a_pin_holds_what_it_names(reason: str, refusals: list[tuple[str, str]]) -> None:
    graph = two_layers("relu")
    hidden = list(graph.calls)[1].results[0]
    graph.steps.append(Pin((hidden,), reason, "b"))
    analyser = Analyser(["scaling"])
    analyser.follow(graph)
    assert [(one.name, one.reason) for one in analyser.refusals] == refusals
    assert symmetries(graph, "scaling") == []
    assert len(symmetries(two_layers("relu"), "scaling")) == 1


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_write_into_shared_memory_pins_what_both_hold(is_shared: bool) -> None:
    graph = Graph()
    x, first, second = graph.input(2, 3), graph.parameter("a.weight", 8, 3), graph.parameter("b.weight", 1, 8)
    scale = graph.parameter("scale", 8)
    (hidden,) = graph.call("linear", {"input": x, "weight": first, "bias": None}, (2, 8))
    (view,) = graph.call("view", {"self": hidden, "size": [2, 8]}, (2, 8))
    after = Value((2, 8), reads_inputs=True)
    shared = ((hidden, hidden),) if is_shared else ()
    write = Write(view, after, shared, 0)
    graph.steps.append(Call("mul", {"self": view, "other": scale}, (after,), writes=(write,)))
    graph.outputs += graph.call("linear", {"input": after, "weight": second, "bias": None}, (2, 1))
    found = symmetries(graph, "scaling")
    assert (len(found) > 0) is not is_shared


def test_a_rule_that_forgets_an_output_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(analyse.RULES, "relu", lambda call, analysis: [])
    with pytest.raises(ValueError, match="shorter"):
        symmetries(two_layers("relu"), "scaling")


# -------------------------------------------------------------------------------------------------------------- layers


def names_in(source: str) -> set[str]:
    """All names and attributes that a module mentions."""
    tree = ast.parse(source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return imported | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_only_recording_touches_the_dispatcher_of_torch() -> None:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in names_in(path.read_text()) & {"TorchDispatchMode", "FakeTensorMode"}:
            found.setdefault(path.relative_to(PACKAGE).as_posix(), set()).add(name)
    assert found.pop("double_precision.py") == {"TorchDispatchMode"}
    assert found == {path: {name} for path, name in RECORDING.items()}


def test_the_dispatcher_would_be_found() -> None:
    assert "TorchDispatchMode" in names_in("from torch.utils._python_dispatch import TorchDispatchMode as Mode")
    assert "FakeTensorMode" in names_in("import torch\nmode = torch._subclasses.FakeTensorMode()")


def test_rules_ask_for_no_class_of_an_analysis() -> None:
    classes = {permutations.PermutationAnalysis.__name__, scalings.ScalingAnalysis.__name__}
    for path in (PACKAGE / "search" / "operations").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | names_in(path.read_text())
        assert not names & classes
        asked = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in ("name", "group") and isinstance(node.value, ast.Name)
        ]
        assert [node for node in asked if node.value.id == "analysis"] == []  # type: ignore[attr-defined]
