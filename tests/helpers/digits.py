"""Handwritten digits: a network, the plain loop, and the teleports of a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.meta_training.tasks.data import digits
from teleport_optim.optim.schedule import is_control_step

Make = Callable[[nn.Module, int], Optimizer]


def ours(model: nn.Module, num_steps: int) -> LearnedTeleportOptimizer:
    return LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=num_steps)


def adamw(model: nn.Module, num_steps: int) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2)


everyone = pytest.mark.parametrize("make", [ours, adamw])
X, Y = (values[:112] for values in digits("demo"))
BATCHES = list(zip(X.split(16), Y.split(16)))
"""Seven, so that the end of an epoch is none of the steps at which the learned optimizer does more than usual."""


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(X, Y), batch_size=16)


def teleport_size(optimizer: Optimizer) -> float:
    return optimizer.teleport_size if isinstance(optimizer, LearnedTeleportOptimizer) else 0.0


def assert_teleports(make: Make, sizes: list[float]) -> None:
    """The learned optimizer teleports in its first step and in every fortieth from there, AdamW never."""
    assert [step for step, size in enumerate(sizes) if size > 0] == (
        [step for step in range(len(sizes)) if is_control_step(step)] if make is ours else []
    )


def warned_of_a_schedule(make: Make) -> AbstractContextManager[Any]:
    """The learned optimizer, which has a schedule of its own, warns of another one on top."""
    return pytest.warns(UserWarning, match="^lr has changed from") if make is ours else nullcontext()


def assert_same(first: nn.Module, second: nn.Module) -> None:
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def reference(make: Make, epochs: int, *, accumulation: int = 1, clip: float | None = None) -> nn.Module:
    """The network after the loop that a library is to have run: the last step of an epoch may have fewer batches."""
    model = network()
    optimizer = make(model, epochs * -(-len(BATCHES) // accumulation))
    for _ in range(epochs):
        for index, (inputs, labels) in enumerate(BATCHES, start=1):
            (F.cross_entropy(model(inputs), labels) / accumulation).backward()
            if index % accumulation == 0 or index == len(BATCHES):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model
