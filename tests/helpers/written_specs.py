"""Small networks, specs of them that are written by hand, and mistakes in these."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from teleport_optim.symmetry import Leg, Symmetry, SymmetrySpec
from teleport_optim.symmetry.groups import GROUPS

INPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def mlp(activation: nn.Module, width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), activation, nn.Linear(width, 2))


def spec_of(*groups: str, size: int = 6) -> SymmetrySpec:
    """Sites of an :func:`mlp`, written by hand."""
    legs = (Leg("0.weight", 0, 1), Leg("0.bias", 0, 1), Leg("2.weight", 1, -1))
    return SymmetrySpec(tuple(Symmetry(f"0:{name}", GROUPS[name], size, legs) for name in groups))


def replaced(spec: SymmetrySpec, wrong: Symmetry) -> SymmetrySpec:
    return SymmetrySpec(tuple(wrong if symmetry.id == wrong.id else symmetry for symmetry in spec))


def without(spec: SymmetrySpec, site: str, name: str) -> SymmetrySpec:
    legs = tuple(leg for leg in spec[site].legs if leg.name != name)
    assert len(legs) < len(spec[site].legs)
    return replaced(spec, replace(spec[site], legs=legs))


def convnet(seed: int) -> tuple[nn.Sequential, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, channels, hidden, side = (int(n) for n in torch.randint(2, 6, (4,), generator=generator))
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(inputs, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(channels * side**2, hidden), nn.GELU(), nn.Linear(hidden, 2)),
    )
    return model.double(), torch.randn(3, inputs, side, side, dtype=torch.float64)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)
