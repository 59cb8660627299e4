"""The verifier works in true float64, whatever types a model casts to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from teleport_optim.symmetry import Leg, Symmetry, SymmetrySpec, verify_symmetries
from teleport_optim.symmetry.groups import GROUPS

pytestmark = pytest.mark.private_torch

VECTORS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


class Casting(nn.Module):
    """Two layers with something in between that works in a narrower type."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(3, 6), between, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)).to(x.dtype))


def filled(x: Tensor) -> Tensor:
    """A tensor of the default type, written step by step."""
    result = torch.zeros(x.shape)
    for row, value in enumerate(x.tanh()):
        result[row] = value
    return result


def automatic(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x @ torch.eye(6, dtype=x.dtype)).tanh()


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x.to(torch.float32).tanh(),
    "float": lambda x: x.float().tanh(),
    "half": lambda x: x.half().tanh(),
    "bfloat16": lambda x: x.bfloat16().tanh(),
    "type": lambda x: x.type(torch.float32).tanh(),
    "type_as": lambda x: x.type_as(torch.ones(1)).tanh(),
    "to another": lambda x: x.to(torch.ones(1)).tanh(),
    "softmax": lambda x: x * torch.softmax(x, -1, dtype=torch.float32),
    "sum": lambda x: x / (1 + x.abs().sum(-1, keepdim=True, dtype=torch.float32)),
    "cumsum": lambda x: x * torch.cumsum(x, 0, dtype=torch.float32).tanh(),
    "root mean square": lambda x: x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6),
    "new tensor": filled,
    "complex": lambda x: torch.view_as_real(torch.polar(x.float().abs(), x.float())).sum(-1),
    "autocast": automatic,
    "constant": lambda x: x.tanh() * torch.tensor(0.1, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_to_narrow_types_are_no_errors(name: str) -> None:
    """Right symmetries hold to the last digits of float64, and wrong ones are caught as ever."""
    model = Casting(CASTS[name])
    legs = (Leg("first.weight", 0, 1), Leg("first.bias", 0, 1), Leg("second.weight", 1, -1))
    right, wrong = (SymmetrySpec((Symmetry("site", GROUPS[group], 6, legs),)) for group in ("permutation", "scaling"))
    assert verify_symmetries(model, right, VECTORS).worst < 1e-14
    assert not verify_symmetries(model, wrong, VECTORS).ok


def test_bits_are_read_as_the_model_reads_them() -> None:
    """Four bytes of a float32 model stay four bytes: the exponent of each channel is a number of its own."""
    model = Casting(lambda x: (x.float().view(torch.int32) >> 23).to(x.dtype) / 100 + x)
    legs = (Leg("first.weight", 0, 1), Leg("first.bias", 0, 1), Leg("second.weight", 1, -1))
    right, wrong = (SymmetrySpec((Symmetry("site", GROUPS[group], 6, legs),)) for group in ("permutation", "scaling"))
    assert verify_symmetries(model, right, VECTORS).ok
    assert not verify_symmetries(model, wrong, VECTORS).ok


def test_tensors_that_are_attributes_are_used_in_float64() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.mix = nn.Linear(3, 6), nn.Linear(6, 2), torch.randn(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x @ self.mix).relu())

    legs = (Leg("first.weight", 0, 1), Leg("first.bias", 0, 1), Leg("second.weight", 1, -1))
    spec = SymmetrySpec((Symmetry("site", GROUPS["scaling"], 6, legs),))
    assert verify_symmetries(Shifted(), spec, VECTORS).worst < 1e-14
