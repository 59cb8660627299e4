"""Scalings of one tensor alone, which balance nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.symmetry import find_symmetries
from tests.helpers.invariance import change, ids
from tests.helpers.small_models import N, build

pytestmark = pytest.mark.private_torch


class Directions(nn.Module):
    """A classifier by angles: rows of its weight are divided by their norms where they are used."""

    def __init__(self, *, has_bias: bool) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(3, N), nn.Parameter(torch.randn(4, N))
        self.c = nn.Parameter(torch.randn(4)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.w if self.c is None else torch.cat([self.w, self.c[:, None]], 1)
        h = self.a(x).relu()
        h = h if self.c is None else torch.cat([h, torch.ones_like(h[:, :1])], 1)
        return F.linear(h, rows / rows.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_scaling_that_balances_nothing_is_left_to_the_optimizer(has_bias: bool) -> None:
    model = build(lambda: Directions(has_bias=has_bias))
    inputs = torch.randn(8, 3)
    spec = find_symmetries(model, inputs)
    assert change(model, spec, [inputs]) < 1e-9
    layout = ParameterTable.of(dict(model.named_parameters()), spec)
    assert all(symmetry.readers and symmetry.writers for symmetry in layout.spec)
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=20)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_normalised_weight_has_a_scaling_of_its_own() -> None:
    spec = find_symmetries(build(lambda: Directions(has_bias=False)), torch.randn(8, 3))
    assert "w:scaling" in ids(spec)
    assert [str(leg) for leg in spec["w:scaling"].legs] == ["w[0]^+1"]
    assert len(ParameterTable.of(dict(build(lambda: Directions(has_bias=False)).named_parameters()), spec).spec) == 0
