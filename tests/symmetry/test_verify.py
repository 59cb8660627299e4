"""The verifier has power: it passes what holds, and catches every kind of wrong symmetry."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from teleport_optim.symmetry import (
    APPROXIMATE_TOLERANCE,
    Inputs,
    Leg,
    Refusal,
    Symmetry,
    SymmetrySpec,
    VerificationReport,
    find_symmetries,
    verify_symmetries,
)
from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.symmetry.inputs import ExampleInputs

pytestmark = pytest.mark.private_torch

Build = Callable[[nn.Module, Tensor], Symmetry]
SOURCE = torch.Generator().manual_seed(0)
IMAGES, VECTORS, SIXES = (torch.randn(shape, generator=SOURCE) for shape in ((3, 3, 6, 6), (6, 3), (5, 6)))


def mlp(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), activation, nn.Linear(6, 2))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )


def planted(group: str) -> Build:
    legs = (Leg("0.weight", 0, 1), Leg("0.bias", 0, 1), Leg("2.weight", 1, -1))
    return lambda model, inputs: Symmetry("0:planted", GROUPS[group], 6, legs)


def without(site: str, name: str) -> Build:
    def build(model: nn.Module, inputs: Tensor) -> Symmetry:
        right = find_symmetries(model, inputs)[site]
        assert name in {leg.name for leg in right.legs}
        return replace(right, legs=tuple(leg for leg in right.legs if leg.name != name))

    return build


def with_leg(site: str, name: str, **changes: Any) -> Build:
    def build(model: nn.Module, inputs: Tensor) -> Symmetry:
        right = find_symmetries(model, inputs)[site]
        assert name in {leg.name for leg in right.legs}
        return replace(right, legs=tuple(replace(x, **changes) if x.name == name else x for x in right.legs))

    return build


def shifted(model: nn.Module, inputs: Tensor) -> Symmetry:
    """Writers of the first five channels, readers of the last five."""
    right = find_symmetries(model, inputs)["0:scaling"]
    return replace(right, size=5, legs=tuple(replace(leg, offset=int(leg.degree < 0)) for leg in right.legs))


WRONG: dict[str, tuple[nn.Module, Build, Tensor]] = {
    "scaling through GELU": (mlp(nn.GELU()), planted("scaling"), VECTORS),
    "scaling through tanh": (mlp(nn.Tanh()), planted("scaling"), VECTORS),
    "scaling through softmax": (mlp(nn.Softmax(-1)), planted("scaling"), VECTORS),
    "sign through ReLU": (mlp(nn.ReLU()), planted("sign"), VECTORS),
    "sign through GELU": (mlp(nn.GELU()), planted("sign"), VECTORS),
    "permutation through a slope per channel": (mlp(nn.PReLU(6)), planted("permutation"), VECTORS),
    "forgotten bias": (mlp(nn.ReLU()), without("0:scaling", "0.bias"), VECTORS),
    "forgotten writer": (mlp(nn.ReLU()), without("0:permutation", "0.weight"), VECTORS),
    "forgotten reader": (mlp(nn.ReLU()), without("0:scaling", "2.weight"), VECTORS),
    "forgotten bias behind batch norm": (convnet(), without("0:sign", "0.bias"), IMAGES),
    "forgotten weight of batch norm": (convnet(), without("0:permutation", "1.weight"), IMAGES),
    "forgotten bias of batch norm": (convnet(), without("1:scaling", "1.bias"), IMAGES),
    "forgotten running mean": (convnet(), without("0:sign", "1.running_mean"), IMAGES),
    "forgotten running variance": (convnet(), without("0:permutation", "1.running_var"), IMAGES),
    "wrong degree": (mlp(nn.ReLU()), with_leg("0:scaling", "2.weight", degree=-2), VECTORS),
    "wrong axis": (
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)),
        with_leg("0:sign", "0.weight", axis=1),
        SIXES,
    ),
    "wrong repeat": (convnet(), with_leg("1:scaling", "6.weight", repeat=2), IMAGES),
    "wrong repeat of a permutation": (convnet(), with_leg("0:permutation", "6.weight", repeat=1), IMAGES),
    "wrong offset": (mlp(nn.ReLU()), shifted, VECTORS),
    "linear map through ReLU": (mlp(nn.ReLU()), planted("linear"), VECTORS),
    "linear map through tanh": (mlp(nn.Tanh()), planted("linear"), VECTORS),
    "linear map that forgets a bias": (mlp(nn.Identity()), without("0:linear", "0.bias"), VECTORS),
    "wrong order of entries": (mlp(nn.ReLU()), with_leg("0:scaling", "2.weight", index=(5, 4, 3, 2, 1, 0)), VECTORS),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_symmetry_is_caught(name: str) -> None:
    model, build, inputs = WRONG[name]
    symmetry = build(model, inputs)
    report = verify_symmetries(model, SymmetrySpec((symmetry,)), inputs)
    assert not report.ok
    assert report.failed == (symmetry.id,)
    assert report.errors[symmetry.id] > 1e-3
    assert report.worst == max(report.errors[symmetry.id], report.together)
    assert "FAILED" in str(report)


def test_one_wrong_symmetry_among_right_ones_is_named() -> None:
    model = mlp(nn.ReLU())
    spec = find_symmetries(model, VECTORS)
    wrong = replace(spec["0:scaling"], id="wrong", legs=spec["0:scaling"].legs[:2])
    report = verify_symmetries(model, SymmetrySpec((*spec, wrong)), VECTORS)
    assert report.failed == ("wrong",)


def test_a_symmetry_of_evaluation_mode_only_is_caught() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head, self.side = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> dict[str, object]:
            hidden = self.trunk(x).relu()
            return {"out": self.head(hidden), "side": [self.side(hidden)] if self.training else ()}

    legs = (Leg("trunk.weight", 0, 1), Leg("trunk.bias", 0, 1), Leg("head.weight", 1, -1), Leg("side.weight", 1, -1))
    right = Symmetry("right", GROUPS["scaling"], 6, legs)
    report = verify_symmetries(Auxiliary(), SymmetrySpec((right, replace(right, id="wrong", legs=legs[:3]))), VECTORS)
    assert report.failed == ("wrong",)
    assert report.errors["right"] < 1e-13


def test_a_tied_weight_that_moves_under_one_name_only_is_caught() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    assert not verify_symmetries(model, SymmetrySpec((planted("scaling")(model, SIXES),)), SIXES).ok


def test_special_values_hide_nothing() -> None:
    """Zero biases and unit statistics would pass a symmetry that forgets them."""
    model = convnet()
    for parameter in (model[0].bias, model[1].bias):
        nn.init.zeros_(parameter)
    for site, name in (("0:permutation", "0.bias"), ("0:permutation", "1.weight"), ("0:permutation", "1.running_mean")):
        assert not verify_symmetries(model, SymmetrySpec((without(site, name)(model, IMAGES),)), IMAGES).ok
    dead = mlp(nn.ReLU())
    nn.init.zeros_(dead[2].weight)
    assert not verify_symmetries(dead, SymmetrySpec((without("0:scaling", "2.weight")(dead, VECTORS),)), VECTORS).ok


def test_everything_is_left_as_it_was() -> None:
    model = convnet()
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    inputs, random_state = IMAGES.clone(), torch.get_rng_state()
    report = verify_symmetries(model, find_symmetries(model, inputs), inputs)
    assert report.ok
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(inputs, IMAGES)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert verify_symmetries(model, find_symmetries(model, inputs), inputs) == report


def test_a_generator_draws_other_elements() -> None:
    model = mlp(nn.ReLU())
    reports = [
        verify_symmetries(
            model, find_symmetries(model, VECTORS), VECTORS, generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(3)
    ]
    assert all(report.ok for report in reports)
    assert len({tuple(report.errors.values()) for report in reports}) > 1


def test_approximate_symmetries_have_a_tolerance_of_their_own() -> None:
    torch.manual_seed(0)  # Of 400 networks with GELU, two change by less than an approximate symmetry may.
    model = convnet()
    spec = find_symmetries(model, IMAGES, include_approximate=True)
    report = verify_symmetries(model, spec, IMAGES)
    assert report.ok
    assert report.approximate == {"0:scaling"}
    assert report.worst <= 1e-10 < report.errors["0:scaling"] < APPROXIMATE_TOLERANCE
    assert "approximate" in str(report)
    exact = SymmetrySpec((replace(spec["0:scaling"], exact=True),))
    assert verify_symmetries(model, exact, IMAGES).failed == ("0:scaling",)
    pretended = SymmetrySpec((replace(planted("scaling")(model, VECTORS), exact=False),))
    assert not verify_symmetries(mlp(nn.GELU()), pretended, VECTORS).ok


def test_the_report_prints_as_a_table() -> None:
    refusal = Refusal("3", "it is frozen")
    report = VerificationReport({"0:sign": 1e-15, "1:scaling": 0.5}, 0.25, frozenset(), (refusal,), 1e-10)
    assert str(report).splitlines() == [
        "site          error    verdict",
        "0:sign        1.0e-15  holds",
        "1:scaling     5.0e-01  FAILED",
        "all together  2.5e-01  FAILED",
        "refused  3: it is frozen",
    ]
    assert report.worst == 0.5
    tried = replace(report, tried={"as given": True, "7 instead of 5": False}, where={"1:scaling": "4 examples"})
    assert str(tried).splitlines()[2:] == [
        "1:scaling     5.0e-01  FAILED with 4 examples",
        "all together  2.5e-01  FAILED",
        "inputs   as given: taken",
        "inputs   7 instead of 5: not taken",
        "refused  3: it is frozen",
    ]


def test_an_empty_spec_holds() -> None:
    report = verify_symmetries(mlp(nn.ReLU()), SymmetrySpec(), VECTORS)
    assert report.ok
    assert report.worst == 0.0


def test_outputs_that_are_not_numbers_fail() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (-(self.scale * x).square()).log()

    spec = SymmetrySpec((Symmetry("site", GROUPS["sign"], 3, (Leg("scale", 0, 1),)),))
    assert verify_symmetries(Logarithm(), spec, VECTORS).worst == float("inf")


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (mlp(nn.ReLU()), torch.randn(6, 4), "cannot take example_inputs in evaluation mode"),
        (mlp(nn.BatchNorm1d(6)), torch.randn(1, 3), "in training mode.*at least two"),
        (nn.Sequential(nn.Linear(3, 6), nn.ReLU()), VECTORS, "the model does not have"),
        (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), VECTORS, "has 6 channels and acts by"),
    ],
)
def test_what_does_not_fit_is_refused(model: nn.Module, inputs: Tensor, message: str) -> None:
    spec = SymmetrySpec((planted("permutation")(model, inputs),))
    with pytest.raises(ValueError, match=message):
        verify_symmetries(model, spec, inputs)


@pytest.mark.parametrize(
    "leg", [Leg("0.weight", 2, 1), Leg("0.weight", 0, 1, within=(1, 2, 2)), Leg("0.weight", 0, 1, 2)]
)
def test_legs_outside_of_their_tensor_are_refused(leg: Leg) -> None:
    spec = SymmetrySpec((Symmetry("site", GROUPS["sign"], 6, (leg,)),))
    with pytest.raises(ValueError, match="does not fit the shape"):
        verify_symmetries(mlp(nn.ReLU()), spec, VECTORS)


@pytest.mark.parametrize("index", [(0, 1, 2, 3, 4, 9), (-1, 0, 1, 2, 3, 4), (0, 1, 2)])
def test_lists_of_entries_that_do_not_fit_are_refused(index: tuple[int, ...]) -> None:
    spec = SymmetrySpec((Symmetry("site", GROUPS["sign"], 6, (Leg("0.weight", 0, 1, index=index),)),))
    with pytest.raises(ValueError, match="does not fit the shape"):
        verify_symmetries(mlp(nn.ReLU()), spec, VECTORS)


def test_inputs_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="a tensor, a tuple of inputs or a dictionary of named ones, got list"):
        verify_symmetries(mlp(nn.ReLU()), SymmetrySpec(), [VECTORS])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "inputs", [VECTORS, (VECTORS,), {"input": VECTORS}, Inputs((VECTORS,), {}), Inputs((), {"input": VECTORS})]
)
def test_every_form_of_inputs_gives_the_same_report(inputs: ExampleInputs) -> None:
    model = mlp(nn.ReLU())
    spec = find_symmetries(model, inputs)
    assert spec == find_symmetries(model, VECTORS)
    assert verify_symmetries(model, spec, inputs) == verify_symmetries(model, spec, VECTORS)
    wrong = SymmetrySpec((planted("sign")(model, VECTORS),))
    assert verify_symmetries(model, wrong, inputs).failed == ("0:planted",)


def test_a_model_without_tensor_outputs_is_refused() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(ValueError, match="returns no tensor"):
        verify_symmetries(Silent(), SymmetrySpec(), VECTORS)


def test_every_path_of_random_choices_is_run() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden.relu() if random.random() < 0.7 else hidden.sigmoid())

    legs = (Leg("first.weight", 0, 1), Leg("first.bias", 0, 1), Leg("second.weight", 1, -1))
    right, wrong = (SymmetrySpec((Symmetry("site", GROUPS[group], 6, legs),)) for group in ("permutation", "scaling"))
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert verify_symmetries(Choosing(), right, VECTORS).ok
    assert not verify_symmetries(Choosing(), wrong, VECTORS).ok
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_equal_infinities_are_no_difference() -> None:
    class Masked(nn.Module):
        def __init__(self, place: int) -> None:
            super().__init__()
            self.first, self.second, self.place = nn.Linear(3, 6), nn.Linear(6, 2), place

        def forward(self, x: Tensor) -> Tensor:
            scores = self.second(self.first(x).relu())
            return scores.masked_fill(torch.arange(len(x))[:, None] == self.place, float("-inf"))

    model = Masked(1)
    spec = find_symmetries(model, VECTORS)
    assert len(spec) > 0
    assert verify_symmetries(model, spec, VECTORS).ok
    assert not verify_symmetries(
        model, SymmetrySpec((without("first:scaling", "first.bias")(model, VECTORS),)), VECTORS
    ).ok
