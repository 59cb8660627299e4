"""The optimizers that are compared, and the search for the rates of those that need one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

from benchmarks.comparison.training import Recipe, Stepper
from teleport_optim.action import SlotKind
from teleport_optim.checkpoints import load_checkpoint
from teleport_optim.meta_optimizer import Controls, MetaOptimizer
from teleport_optim.optimizer import LearnedTeleportOptimizer
from teleport_optim.symmetry.moves import move_scaling
from teleport_optim.update import Horizon, averaging_weight, is_due, prior_rate

__all__ = [
    "ABLATIONS",
    "LIGHT",
    "OURS",
    "REFERENCE",
    "Rival",
    "adamw",
    "cosine",
    "fast_products",
    "learned",
    "rivals",
    "tuned_rate",
]

REFERENCE = "AdamW cosine, tuned"
"""What others are measured against."""
OURS = "learned, untuned"
LIGHT = "light, untuned"
"""The shipped checkpoint of the cheapest steps."""


@dataclass(frozen=True)
class Rival:
    """An optimizer that may need a rate.

    Attributes:
        make: A rate to a recipe.
        first_rate: Where the search for its rate begins; None if it has no rate to tune.
        has_horizon: Whether its horizon speed is measured: it is told the length of the run, and the parameters are the result.
        averaged: A rate to a recipe of the same that has an average of the iterates to look at before the end of the run; None
            if what ``make`` gives is measured at every moment.
    """

    make: Callable[[float], Recipe]
    first_rate: float | None = None
    has_horizon: bool = False
    averaged: Callable[[float], Recipe] | None = None


class Scheduled:
    """Optimizers that step together, each with its schedule.

    Args:
        optimizers: The optimizers.
        factor: Step to the factor on their rates; None for constant ones.
    """

    def __init__(self, optimizers: Sequence[Optimizer], factor: Callable[[int], float] | None) -> None:
        self._optimizers = optimizers
        self._schedules = [LambdaLR(optimizer, factor) for optimizer in optimizers] if factor else []

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Take one step, then move the rates."""
        for optimizer in self._optimizers:
            optimizer.step()
        for schedule in self._schedules:
            schedule.step()


class _ProductsInFloat32(TorchFunctionMode):
    """Multiplies bfloat16 matrices in float32 and rounds the results: the same, but for the order in which is added."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.addmm, Tensor.__matmul__) and args[-1].dtype == torch.bfloat16:
            return func(*map(Tensor.float, args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def fast_products() -> AbstractContextManager[object]:
    """In which Muon runs at the speed of the processor.

    Its products are of bfloat16, which processors without 512-bit vectors multiply at a thirtieth of the speed of float32: there
    they are made in float32.
    """
    is_slow = torch.backends.cpu.get_cpu_capability() != "AVX512"
    return _ProductsInFloat32() if is_slow else nullcontext()


class _MuonAndAdamW(Scheduled):
    """Muon for hidden matrices and kernels (as matrices, one row per output channel), AdamW for everything else.

    Muon's rate is rescaled to the size of AdamW's steps, so that one rate serves both.
    """

    def __init__(self, model: nn.Module, lr: float, factor: Callable[[int], float]) -> None:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in model.parameters() if p.dim() >= 2 and min(p[0].numel(), len(p)) > 1]
        hidden = [p for p in matrices[:-1] if id(p) not in embeddings]  # the last matrix is the head
        self._hidden = hidden
        self._flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in hidden]
        chosen = {id(p) for p in hidden}
        others = [p for p in model.parameters() if id(p) not in chosen]
        optimizers: list[Optimizer] = [AdamW(others, lr=lr)] if others else []
        if self._flat:
            optimizers.append(Muon(self._flat, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        super().__init__(optimizers, factor)

    def zero_grad(self) -> None:
        super().zero_grad()
        for param in self._hidden:
            param.grad = None

    def step(self) -> None:
        for flat, param in zip(self._flat, self._hidden):
            flat.grad = None if param.grad is None else param.grad.reshape(flat.shape)
        with fast_products():
            super().step()


def cosine(steps: int) -> Callable[[int], float]:
    """5 % linear warm-up, then a cosine to zero."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        progress = max(0, step - warmup) / max(1, steps - warmup)
        return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    return factor


def adamw(lr: float, *, is_scheduled: bool = True) -> Recipe:
    """AdamW with torch's other defaults, along :func:`cosine` or at a constant rate."""
    return lambda model, steps: Scheduled(
        [AdamW(model.parameters(), lr=lr, fused=True)], cosine(steps) if is_scheduled else None
    )


def _sgd(lr: float) -> Recipe:
    return lambda model, steps: Scheduled([SGD(model.parameters(), lr=lr, momentum=0.9)], cosine(steps))


def _muon(lr: float) -> Recipe:
    return lambda model, steps: _MuonAndAdamW(model, lr, cosine(steps))


def _schedule_free(lr: float) -> Recipe:
    def recipe(model: nn.Module, steps: int) -> Stepper:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(model.parameters(), lr=lr, warmup_steps=max(1, steps // 20))
        optimizer.train()
        return optimizer  # type: ignore[no-any-return]

    return recipe


class _Averaged(Scheduled):
    """An optimizer after 5 % warm-up, its rate falling with the root of time, and the average of its iterates, as ours has them."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        warmup = max(1, steps // 20)

        def factor(step: int) -> float:
            rate, first_rate = (prior_rate(number, Horizon(), 1)[0] for number in (step, 0))
            return min(1.0, (step + 1) / warmup) * rate / first_rate

        super().__init__([optimizer], factor)
        self._params: list[Tensor] = list(model.parameters())
        self._averages = [param.detach().clone() for param in self._params]
        self._iterates: list[Tensor] = []
        self._count = 0

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        torch._foreach_lerp_(self._averages, self._params, averaging_weight(self._count))
        self._count += 1

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average in the place of the parameters."""
        self._iterates = [param.clone() for param in self._params]
        torch._foreach_copy_(self._params, self._averages)

    @torch.no_grad()
    def train(self) -> None:
        """Put the parameters back."""
        torch._foreach_copy_(self._params, self._iterates)


def _averaged_adamw(lr: float) -> Recipe:
    return lambda model, steps: _Averaged(model, AdamW(model.parameters(), lr=lr, fused=True), steps)


def learned(
    checkpoint: str | Path | MetaOptimizer = "default",
    *,
    teleport: bool = True,
    horizon: bool = True,
    average: bool = True,
) -> Recipe:
    """The learned optimizer as a user would take it, with nothing set."""

    def recipe(model: nn.Module, steps: int) -> Stepper:
        return LearnedTeleportOptimizer(
            model.parameters(),
            model=model,
            total_steps=steps if horizon else None,
            checkpoint=checkpoint,
            teleport=teleport,
            average=average,
        )

    return recipe


def _learned_rival(checkpoint: str | Path | MetaOptimizer, *, teleport: bool = True) -> Rival:
    """The learned optimizer: without an average the parameters are measured, which end where the average is."""
    return Rival(
        lambda lr: learned(checkpoint, teleport=teleport, average=False),
        has_horizon=True,
        averaged=lambda lr: learned(checkpoint, teleport=teleport),
    )


def rivals(checkpoint: str | Path = "default") -> dict[str, Rival]:
    """The optimizers of a comparison by name; the last is :data:`OURS`."""
    return {
        "AdamW default": Rival(lambda lr: adamw(1e-3, is_scheduled=False)),
        "AdamW constant, tuned": Rival(lambda lr: adamw(lr, is_scheduled=False), 2e-3),
        REFERENCE: Rival(adamw, 4e-3, has_horizon=True),
        "SGD momentum cosine, tuned": Rival(_sgd, 0.1),
        "Muon + AdamW cosine, tuned": Rival(_muon, 8e-3),
        "Schedule-Free AdamW, tuned": Rival(_schedule_free, 8e-3),
        "AdamW averaged, tuned": Rival(_averaged_adamw, 8e-3),
        "rule, nothing learned": _learned_rival(MetaOptimizer(), teleport=False),
        LIGHT: _learned_rival("light"),
        OURS: _learned_rival(checkpoint),
    }


def tuned_rate(score: Callable[[float], float], first: float) -> float:
    """The rate with the lowest score on a grid of powers of two times ``first``, extended until the best has worse neighbours.

    Example:
        >>> tuned_rate(lambda rate: abs(rate - 0.5), 0.0625)
        0.5
    """
    scores: dict[float, float] = {}

    def scored(rate: float) -> float:
        if rate not in scores:
            scores[rate] = score(rate)
        return scores[rate]

    best = first
    while True:
        neighbours = [rate for rate in (best / 2.0, 2.0 * best) if 2.0**-16 < rate / first < 2.0**16]
        better = min((best, *neighbours), key=scored)
        if better == best:
            return best
        best = better


def _holding(checkpoint: str | Path, **outputs: float) -> Recipe:
    """The learned optimizer with raw outputs of the network held at one value whatever it says; 0 is the prior."""
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
    """The learned optimizer, its own teleports held at none, with random ones: ``exp(0.3 N(0, 1))`` on every channel."""

    def __init__(self, model: nn.Module, optimizer: LearnedTeleportOptimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0

    def __getattr__(self, name: str) -> Any:  # its evaluation mode
        return getattr(self._optimizer, name)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Take one step, after a teleport every so often."""
        if is_due(self._count):
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
                values, offsets = (move_scaling(symmetry, scales, slot, SlotKind.VECTOR) for slot in (values, offsets))
                slopes, momenta = (
                    move_scaling(symmetry, scales, slot, SlotKind.COVECTOR) for slot in (slopes, momenta)
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
"""The learned optimizer with one part taken away, by name: a checkpoint to a recipe."""
