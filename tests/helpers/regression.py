"""A regression with noise: its network, its data, and the loss on what is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from teleport_optim import LearnedTeleportOptimizer
from tests.helpers.comparing import Weights

Make = Callable[..., Optimizer]


def ours(model: nn.Module, num_steps: int, **options: Any) -> LearnedTeleportOptimizer:
    return LearnedTeleportOptimizer.for_model(model, total_steps=num_steps, **options)


def open_ended(model: nn.Module, num_steps: int, **options: Any) -> LearnedTeleportOptimizer:
    return LearnedTeleportOptimizer.for_model(model, **options)


def adamw(model: nn.Module, num_steps: int, **options: Any) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2)


everyone = pytest.mark.parametrize("make", [ours, open_ended, adamw])
NUM_STEPS = 40
QUARTERS = (10, 20, 30, 40)
GENERATOR = torch.Generator().manual_seed(0)


def target_of(inputs: Tensor) -> Tensor:
    return torch.tanh(3 * inputs[:, :1]) * inputs[:, 1:2] + 0.3 * inputs[:, 2:3].square()


X = torch.randn(80, 6, generator=GENERATOR)
Y = target_of(X) + 0.3 * torch.randn(80, 1, generator=GENERATOR)
HELD_X = torch.randn(64, 6, generator=GENERATOR)
HELD_Y = target_of(HELD_X)
BATCHES = list(zip(X.split(8), Y.split(8)))
"""Ten: an epoch is a quarter of a run."""


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 1)]
        return nn.Sequential(*layers)


def held_out(model: nn.Module) -> float:
    with torch.no_grad():
        return F.mse_loss(model(HELD_X), HELD_Y).item()


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        inputs, targets = BATCHES[step % len(BATCHES)]
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()


def loaded(weights: Weights) -> nn.Module:
    model = network(seed=9)
    model.load_state_dict(weights)
    return model


def looking(optimizer: Optimizer) -> AbstractContextManager[None]:
    return optimizer.averaged() if isinstance(optimizer, LearnedTeleportOptimizer) else nullcontext()


def has_other_average(make: Make, step: int) -> bool:
    """Whether the average differs from the parameters after that many steps of NUM_STEPS."""
    return make is open_ended or (make is ours and step < NUM_STEPS - 2)


teleporting = pytest.mark.usefixtures("often_controlled")
