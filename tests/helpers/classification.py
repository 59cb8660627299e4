"""A network of six inputs and three classes, its data, and steps on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from teleport_optim import MetaOptimizer

NO_STEP = 1e-35
"""A rate at which nothing moves but by teleports; at a rate of 0 these rest, too."""


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What is made with that seed; the generator of torch is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def network(seed: int = 0) -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3)), seed
    )


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> float:
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
    return loss.item()


def balancing() -> MetaOptimizer:
    """A meta-optimizer that always balances at full strength."""
    meta_optimizer = MetaOptimizer(4)
    with torch.no_grad():
        meta_optimizer.readout_bias[-2] = 20.0
    return meta_optimizer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
