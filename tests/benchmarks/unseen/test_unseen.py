"""The check of unseen models has power of its own: it passes what holds, and catches outputs, gradients, buffers and sizes."""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import detection
from benchmarks.unseen import CASES, Case, Sizes
from benchmarks.unseen import check as check_module
from benchmarks.unseen.check import check
from teleport_optim.symmetry import Leg, Refusal, Symmetry, SymmetrySpec, find_symmetries
from teleport_optim.symmetry.groups import GROUPS


def images(batch: int, length: int) -> Tensor:
    return torch.randn(batch, 2, length, length)


def vectors(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length)


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)


IMAGES = Case("hand-built", convnet, images, Sizes((3, 4), (4, 6)))
SEQUENCES = Case("hand-built", attention, lambda batch, length: torch.randn(batch, length, 8), Sizes((3, 4), (4, 6)))


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[SymmetrySpec], SymmetrySpec]) -> None:
    """Let the search of the check find something else."""
    monkeypatch.setattr(check_module, "find_symmetries", lambda *arguments: change(find_symmetries(*arguments)))


def with_leg(site: str, name: str, **changes: Any) -> Callable[[SymmetrySpec], SymmetrySpec]:
    """The same spec with one leg of another kind, or without it."""

    def change(spec: SymmetrySpec) -> SymmetrySpec:
        assert name in {leg.name for leg in spec[site].legs}
        legs = [replace(leg, **changes) if leg.name == name and changes else leg for leg in spec[site].legs]
        wrong = replace(spec[site], legs=tuple(leg for leg in legs if changes or leg.name != name))
        return SymmetrySpec(tuple(wrong if symmetry.id == site else symmetry for symmetry in spec))

    return change


def test_the_list_is_what_was_promised() -> None:
    kinds = Counter(case.kind for case in CASES.values())
    assert kinds["transformers"] == 60
    assert kinds["timm"] == 25
    assert kinds["diffusers"] + kinds["segmentation_models_pytorch"] == 15
    assert kinds["torch_geometric"] == 10
    assert kinds["hand-built"] == 40
    own = Counter(name.split(":")[0] for name, case in CASES.items() if case.kind == "hand-built")
    assert sorted(own.values()) == [1, *[3] * 13]


@pytest.mark.parametrize("case", [IMAGES, SEQUENCES])
def test_what_holds_is_exact(case: Case) -> None:
    result = check(case)
    assert result["outcome"] == "exact"
    assert result["error"] < 1e-12
    assert result["sizes"] == 2
    assert 0.9 < result["share"] <= 1
    assert result["share"] == pytest.approx(
        find_symmetries(case.build(), case.inputs(3, 4)).share_of(case.build()), abs=1e-4
    )


@pytest.mark.parametrize(
    ("site", "name", "changes"),
    [
        ("0:permutation", "0.weight", {}),
        ("0:permutation", "4.weight", {}),
        ("0:permutation", "1.bias", {}),
        ("0:permutation", "1.running_var", {}),
        ("0:sign", "0.bias", {}),
        ("1:scaling", "4.weight", {"degree": 1}),
        ("1:scaling", "4.weight", {"axis": 0}),
        ("1:scaling", "4.weight", {"index": (3, 2, 1, 0)}),
        ("4:linear", "7.weight", {"degree": 1}),
        ("4:linear", "4.bias", {}),
    ],
)
def test_a_wrong_leg_is_caught(monkeypatch: pytest.MonkeyPatch, site: str, name: str, changes: dict[str, Any]) -> None:
    plant(monkeypatch, with_leg(site, name, **changes))
    result = check(IMAGES)
    assert result["outcome"] == "wrong"
    assert result["wrong_sites"] == 1
    assert result["cause"].startswith(f"{site} (")
    assert " in outputs at " in result["cause"] or "running" in name


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clamp(-1e-3, 1e-3)


class Layers(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(4, 6), between, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.between(self.first(x)).to(x.dtype))


def planted_scaling(spec: SymmetrySpec) -> SymmetrySpec:
    legs = (Leg("first.weight", 0, 1), Leg("first.bias", 0, 1), Leg("second.weight", 1, -1))
    return SymmetrySpec((Symmetry("site", GROUPS["scaling"], 6, legs),))


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (torch.relu, ""),
        (lambda x: torch.relu(x.float()), ""),
        (lambda x: torch.relu(x.to(dtype=torch.float16)), ""),
        (torch.sigmoid, "outputs at"),
        (lambda x: Clipped.apply(x.relu()), "gradients at"),
        (lambda x: x.relu() if len(x) < 4 else x.sigmoid(), "outputs at batch 5"),
        (lambda x: x.relu() if torch.is_grad_enabled() else x.sigmoid(), "without grad"),
    ],
)
def test_outputs_gradients_and_sizes_are_compared(
    monkeypatch: pytest.MonkeyPatch, between: Callable[[Tensor], Tensor], expected: str
) -> None:
    plant(monkeypatch, planted_scaling)
    result = check(Case("hand-built", lambda: Layers(between), vectors, Sizes((3, 4), (5, 4))))
    assert result["outcome"] == ("wrong" if expected else "exact")
    assert expected in result.get("cause", "")


def test_other_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = Refusal("(root)", "it is odd")
    for outcome, spec in {"none": SymmetrySpec(), "refused": SymmetrySpec(refusals=(reason,))}.items():
        with monkeypatch.context() as patch:
            plant(patch, lambda found, spec=spec: spec)
            result = check(IMAGES)
        assert result["outcome"] == outcome
        assert (result["cause"] == "it is odd") == (outcome == "refused")

    def fail(spec: SymmetrySpec) -> SymmetrySpec:
        raise LookupError("a rule is missing")

    plant(monkeypatch, fail)
    result = check(IMAGES)
    assert result["outcome"] == "raised"
    assert result["cause"].startswith("search: LookupError: a rule is missing (")


def test_a_search_that_leaves_traces_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cache: list[float] = []

    def spoil(spec: SymmetrySpec) -> SymmetrySpec:
        cache.append(1.0)
        return spec

    plant(monkeypatch, spoil)
    case = Case("hand-built", lambda: Layers(lambda x: x.relu() + sum(cache)), vectors, Sizes((3, 4), (5, 4)))
    result = check(case)
    assert (result["outcome"], result["cause"]) == ("raised", "a model built after the search computes something else")


def test_results_are_kept_and_missing_packages_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {"a": IMAGES, "b": IMAGES._replace(kind="no_such_package"), "c": SEQUENCES}
    calls: list[Case] = []

    def count(case: Case) -> dict[str, Any]:
        calls.append(case)
        return check(case)

    monkeypatch.setattr(detection, "CASES", cases)
    monkeypatch.setattr(detection, "check", count)
    output = tmp_path / "results.jsonl"
    detection.check_unseen(["a"], output)
    detection.check_unseen([], output)
    assert calls == [IMAGES, SEQUENCES]
    assert [json.loads(line)["model"] for line in output.read_text().splitlines()] == ["a", "c"]
    printed = capsys.readouterr().out
    assert "skipped 1 models: no_such_package is not installed" in printed
    assert "2 models: 2 exact, 0 wrong, 0 raised, 0 refused, 0 none" in printed
    with pytest.raises(SystemExit, match="there are no models"):
        detection.check_unseen(["d"], output)


@pytest.mark.parametrize(
    "name", ["causal: prefix", "buffer: mask of floats", "transformers Bert", "timm test_mambaout"]
)
def test_models_of_the_list_can_be_checked(name: str) -> None:
    package = CASES[name].package
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert check(CASES[name])["outcome"] == "exact"
