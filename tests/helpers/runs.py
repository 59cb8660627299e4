"""Runs with all that must be saved to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.optim.optimizer import TeleportOptimizer
from tests.helpers.classification import network

ROWS = ("hidden", "outputs", "log_grad_rms")
FLOAT32 = (*ROWS, "step", "skipped")
Make = Callable[[nn.Module], Optimizer]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    weights, biases = ([p for name, p in named.items() if name.endswith(end)] for end in ("weight", "bias"))
    return [{"params": weights}, {"params": biases, "lr": 0.5, "weight_decay": 0.01}]


def horizon(model: nn.Module) -> Optimizer:
    return LearnedTeleportOptimizer.for_model(model, total_steps=200)


def all_learned(model: nn.Module) -> Optimizer:
    """Every output of the meta-optimizer has a say, where the default one moves none but the teleports."""
    meta_optimizer, generator = MetaOptimizer(), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(meta_optimizer.readout_weight, std=0.5, generator=generator)
    torch.nn.init.normal_(meta_optimizer.skip_weight, std=0.1, generator=generator)
    return LearnedTeleportOptimizer.for_model(model, total_steps=200, checkpoint=meta_optimizer)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.named_parameters(), lr=1e-2)


MAKERS: dict[str, Make] = {
    "horizon": horizon,
    "all learned": all_learned,
    "open-ended": LearnedTeleportOptimizer.for_model,
    "nothing learned": lambda model: TeleportOptimizer(model.parameters(), model=model, total_steps=200),
    "two groups": lambda model: LearnedTeleportOptimizer(two_groups(model), model=model, total_steps=200),
    "bfloat16": horizon,
    "AdamW": adamw,
}
every_case = pytest.mark.parametrize("case", MAKERS)
everyone = pytest.mark.parametrize("make", [horizon, adamw], ids=["ours", "AdamW"])


@dataclass
class Run:
    """A model in training, with all that must be saved to go on."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler

    @classmethod
    def of(cls, case: str, seed: int = 0) -> Run:
        model = network(seed).to(torch.bfloat16 if case == "bfloat16" else torch.float32)
        optimizer = MAKERS[case](model)
        return cls(model, optimizer, LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.01 * step)))

    def train(self, first: int, last: int) -> list[float]:
        """Take the steps from ``first`` on, each with its own batch; steps 50 and 120 bring huge gradients."""
        sizes = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(16, 6, generator=generator).to(next(self.model.parameters()).dtype)
            targets = torch.randint(3, (16,), generator=generator)
            self.optimizer.zero_grad()
            scale = 1e3 if step in (50, 120) else 1.0
            (scale * F.cross_entropy(self.model(inputs).float(), targets)).backward()
            self.optimizer.step()
            self.scheduler.step()
            sizes.append(getattr(self.optimizer, "teleport_size", 0.0))
        return sizes

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]

    def load(self, state: dict[str, Any]) -> None:
        for name, part in (("model", self.model), ("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            part.load_state_dict(state[name])


def by_position(named: list[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    return [{"params": named[:3]}, {"params": named[3:]}]


def leaves(value: Any) -> Iterator[Any]:
    if type(value) in (dict, list):
        for inner in value.values() if type(value) is dict else value:
            yield from leaves(inner)
    else:
        yield value


def storages(value: Any) -> set[int]:
    return {leaf.data_ptr() for leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.numel()}


def assert_sound(param: Tensor, slots: dict[str, Tensor]) -> None:
    assert set(slots) >= {"exp_avg", *FLOAT32}
    assert slots["exp_avg"].shape == param.shape
    if "average_offset" in slots:
        counts = {"fingerprint", "average_start", "average_end"}
        assert set(slots) >= counts
        assert all(slots[key].dtype == torch.int64 and slots[key].shape == () for key in counts)
        assert 0 <= slots["average_start"] <= slots["average_end"]
        assert slots["average_offset"].shape == param.shape
    assert all(slots[key].dtype == torch.float32 for key in FLOAT32)
    assert all(slots[key].isfinite().all() for key in slots if key != "log_grad_rms")
    assert not slots["log_grad_rms"].isinf().any()
