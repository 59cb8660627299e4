"""Ablations: the learned optimizer with one part taken away at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from teleport_optim.cli.training import Recipe, Stepper, learned
from teleport_optim.controller.checkpoints import load_checkpoint
from teleport_optim.learned import LearnedTeleportOptimizer
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.schedule import is_control_step
from teleport_optim.symmetry.action import SlotKind
from teleport_optim.symmetry.moves import move_scaling

__all__ = ["ABLATIONS"]


def _holding(checkpoint: str | Path, **outputs: float) -> Recipe:
    """Learned optimizer with raw outputs of the network held at one value whatever it says; 0 is the prior."""
    meta_optimizer = load_checkpoint(checkpoint)
    for name, value in outputs.items():
        row = Controls._fields.index(name)
        for weights in (meta_optimizer.readout_weight, meta_optimizer.skip_weight):
            weights[row] = 0.0
        meta_optimizer.readout_bias[row] = value
    return learned(meta_optimizer)


def _without_memory(checkpoint: str | Path) -> Recipe:
    meta_optimizer = load_checkpoint(checkpoint)
    meta_optimizer.readout_weight.zero_()
    return learned(meta_optimizer)


def _with_blocks_of(checkpoint: str | Path, rows: int) -> Recipe:
    meta_optimizer = load_checkpoint(checkpoint)
    meta_optimizer.rows_per_block.fill_(float(rows))
    return learned(meta_optimizer)


class _RandomTeleports:
    """Learned optimizer, its own teleports held at none, with random ones: ``exp(0.3 N(0, 1))`` on every channel."""

    def __init__(self, model: nn.Module, optimizer: LearnedTeleportOptimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0

    def __getattr__(self, name: str) -> Any:  # ``eval`` and ``train``, by which the average is measured
        return getattr(self._optimizer, name)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Take one step, after a teleport every so often."""
        if is_control_step(self._count):
            params = dict(self._model.named_parameters())
            state = self._optimizer.state
            values = {name: param.detach() for name, param in params.items()}
            slopes = {name: param.grad for name, param in params.items() if param.grad is not None}
            known = {name: state[param] for name, param in params.items() if state.get(param)}
            momenta, offsets = (
                {name: own[key] for name, own in known.items()} for key in ("exp_avg", "average_offset")
            )
            for symmetry in self._optimizer.spec:  # none before the first step
                scales = torch.exp(0.3 * torch.randn(symmetry.size, generator=self._generator, dtype=torch.float64))
                values, offsets = (
                    dict(move_scaling(symmetry, scales, slot, SlotKind.VECTOR)) for slot in (values, offsets)
                )
                slopes, momenta = (
                    dict(move_scaling(symmetry, scales, slot, SlotKind.COVECTOR)) for slot in (slopes, momenta)
                )
            for name, param in params.items():
                param.copy_(values[name])
                if param.grad is not None:
                    param.grad.copy_(slopes[name])
                if name in momenta:
                    state[param]["exp_avg"].copy_(momenta[name])
                    state[param]["average_offset"].copy_(offsets[name])
                    state[param]["fingerprint"].zero_()  # else this write would begin the average again
        self._count += 1
        self._optimizer.step()


def _random_teleports(checkpoint: str | Path) -> Recipe:
    recipe = _holding(checkpoint, balance=0.0, gradient_balance=0.0)

    def make(model: nn.Module, steps: int) -> Stepper:
        optimizer = recipe(model, steps)
        assert isinstance(optimizer, LearnedTeleportOptimizer)
        return _RandomTeleports(model, optimizer)

    return make


ABLATIONS: dict[str, Callable[[str | Path], Recipe]] = {
    "no teleports": partial(learned, teleport=False),
    "random teleports": _random_teleports,
    "weights balanced in closed form": partial(_holding, balance=20.0, gradient_balance=0.0),
    "horizon unknown": partial(learned, horizon=False),
    "parameters instead of their average": partial(learned, average=False),
    "rows normalised, not orthogonalised": partial(_with_blocks_of, rows=1),
    "whole matrices orthogonalised": partial(_with_blocks_of, rows=2**20),
    "linear controller (LSTM cut off)": _without_memory,
}
"""Learned optimizer with one part taken away, by name: a checkpoint to a recipe."""
