"""Optimizers that are compared, and the search for the learning rates of those that need one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode

from teleport_optim.cli.training import Recipe, Scheduled, Stepper, adamw, cosine, learned
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.optim.schedule import Horizon, averaging_weight, prior_rate

__all__ = [
    "LIGHT",
    "OURS",
    "REFERENCE",
    "Baseline",
    "baselines",
    "fast_products",
    "tune_lr",
]

REFERENCE = "AdamW cosine, tuned"
"""Optimizer that others are measured against."""
OURS = "learned, untuned"
LIGHT = "light, untuned"
"""The shipped checkpoint of the cheapest steps."""


@dataclass(frozen=True)
class Baseline:
    """Optimizer of a comparison, whose learning rate may have to be tuned.

    Attributes:
        make: A learning rate to a recipe.
        first_lr: Learning rate from which the search starts; None if there is none to tune.
        has_horizon: Whether its horizon speed is measured: it is told the length of the run, and the parameters are the result.
        averaged: A learning rate to a recipe of the same that has an average of the iterates to look at before the end of the
            run; None if what ``make`` gives is measured at every moment.
    """

    make: Callable[[float], Recipe]
    first_lr: float | None = None
    has_horizon: bool = False
    averaged: Callable[[float], Recipe] | None = None


class _ProductsInFloat32(TorchFunctionMode):
    """Multiplies bfloat16 matrices in float32 and rounds the results: the same, but for the order in which is added."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.addmm, Tensor.__matmul__) and args[-1].dtype == torch.bfloat16:
            return func(*map(Tensor.float, args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def fast_products() -> AbstractContextManager[object]:
    """Context in which Muon runs at the speed of the processor.

    Its products are of bfloat16, which processors without 512-bit vectors multiply at a thirtieth of the speed of float32: there
    they are made in float32.
    """
    is_slow = torch.backends.cpu.get_cpu_capability() != "AVX512"
    return _ProductsInFloat32() if is_slow else nullcontext()


class _MuonAndAdamW(Scheduled):
    """Muon for hidden matrices and kernels (as matrices, one row per output channel), AdamW for everything else.

    Muon's learning rate is rescaled to the size of AdamW's steps, so that one serves both.
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
    """Optimizer after 5 % warm-up, its rate falling with the root of time, and the average of its iterates, as ours has them."""

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


def _learned(checkpoint: str | Path | MetaOptimizer, *, teleport: bool = True) -> Baseline:
    """Learned optimizer: without an average the parameters are measured, which end where the average is."""
    return Baseline(
        lambda lr: learned(checkpoint, teleport=teleport, average=False),
        has_horizon=True,
        averaged=lambda lr: learned(checkpoint, teleport=teleport),
    )


def baselines(checkpoint: str | Path = "default") -> dict[str, Baseline]:
    """Optimizers of a comparison by name; the last is :data:`OURS`.

    Args:
        checkpoint: Weights of the learned optimizer.
    """
    return {
        "AdamW default": Baseline(lambda lr: adamw(1e-3, is_scheduled=False)),
        "AdamW constant, tuned": Baseline(lambda lr: adamw(lr, is_scheduled=False), 2e-3),
        REFERENCE: Baseline(adamw, 4e-3, has_horizon=True),
        "SGD momentum cosine, tuned": Baseline(_sgd, 0.1),
        "Muon + AdamW cosine, tuned": Baseline(_muon, 8e-3),
        "Schedule-Free AdamW, tuned": Baseline(_schedule_free, 8e-3),
        "AdamW averaged, tuned": Baseline(_averaged_adamw, 8e-3),
        "rule, nothing learned": _learned(MetaOptimizer(), teleport=False),
        LIGHT: _learned("light"),
        OURS: _learned(checkpoint),
    }


def tune_lr(score: Callable[[float], float], first: float) -> float:
    """Find the learning rate with the lowest score among powers of two times ``first``: the best so far has worse neighbours.

    Example:
        >>> tune_lr(lambda lr: abs(lr - 0.5), 0.0625)
        0.5
    """
    scores: dict[float, float] = {}

    def scored(lr: float) -> float:
        if lr not in scores:
            scores[lr] = score(lr)
        return scores[lr]

    best = first
    while True:
        neighbours = [lr for lr in (best / 2.0, 2.0 * best) if 2.0**-16 < lr / first < 2.0**16]
        better = min((best, *neighbours), key=scored)
        if better == best:
            return best
        best = better
