"""Models moved by all that is found in them, in float64, and called on inputs of other sizes than those of the search.

The ids that must be found show that the rest of a model is not given up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from teleport_optim import act
from teleport_optim.symmetry import SymmetrySpec, find_symmetries
from tests.helpers.small_models import Model, N, build


def moved(model: nn.Module, spec: SymmetrySpec, seed: int) -> nn.Module:
    """A copy of a model, moved by a random element."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(act(spec, spec.random_element(torch.Generator().manual_seed(seed)), model.state_dict()))
    return twin


def outputs_of(model: nn.Module, x: Any) -> list[Tensor]:
    torch.manual_seed(0)
    output = copy.deepcopy(model)(*(x if isinstance(x, tuple) else (x,)))
    return [output] if isinstance(output, Tensor) else list(output)


def in_double(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(in_double, x))
    return x.double() if x.is_floating_point() else x


def generic(model: nn.Module) -> nn.Module:
    """A copy in float64 without zero biases, which would hide a wrong symmetry."""
    twin = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in filter(Tensor.is_floating_point, twin.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return twin


def change(model: nn.Module, spec: SymmetrySpec, inputs: Iterable[Any]) -> float:
    """The largest relative change of an output in float64 by random elements, in both modes, with and without gradients."""
    largest = 0.0
    for is_training in (False, True):
        twin = generic(model).train(is_training)
        for seed in range(3):
            other = moved(twin, spec, seed)
            for x in map(in_double, inputs):
                for has_gradients in (False, True):
                    with torch.set_grad_enabled(has_gradients):
                        for before, after in zip(outputs_of(twin, x), outputs_of(other, x), strict=True):
                            difference = (before - after).abs().max() / before.abs().max().clamp_min(1e-3)
                            largest = max(largest, difference.item())
    return largest


def ids(spec: SymmetrySpec) -> str:
    return " ".join(symmetry.id for symmetry in spec if symmetry.group.name != "linear")


Case = tuple[Callable[[], nn.Module], Callable[[], list[Any]], str]


def images() -> list[Any]:
    return [torch.randn(3, 2, 6, 6), torch.randn(2, 2, 7, 5)]


def vectors() -> list[Any]:
    return [torch.randn(4, 3), torch.randn(3, 3), torch.randn(9, 3)]


def sequences() -> list[Any]:
    return [torch.randn(3, 5, 3), torch.randn(2, 3, 3), torch.randn(4, 12, 3)]


def between(forward: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A model with ``a`` from 3 to N features, ``b`` from N to 2 and more parts."""
    return lambda: Model(
        forward, a=nn.Linear(3, N), b=nn.Linear(N, 2), **{name: part() for name, part in parts.items()}
    )


def lines() -> list[Any]:
    return [torch.randn(3, 3, 8), torch.randn(2, 3, 11)]


def by_kind(**kinds: dict[str, Case]) -> dict[str, Case]:
    """All cases of several tables, each under ``"kind: name"``."""
    return {f"{kind}: {name}": case for kind, cases in kinds.items() for name, case in cases.items()}


def assert_holds(case: Case) -> None:
    """Assert that all that must be found in a model is found, no more, and that it changes nothing."""
    factory, make_inputs, expected = case
    model, inputs = build(factory), build(make_inputs)
    spec = find_symmetries(model, inputs[0])
    assert change(model, spec, inputs) < 1e-9, spec
    assert ids(spec) == expected
