"""Estimators of the meta-gradient: how the outcome of whole training runs changes with the meta-optimizer's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MetaGradient", "evolution_strategies", "meta_loss"]

_FLOOR = 1e-4
_WORST = 3.0
_TAIL = 0.1
_PATH_WEIGHT = 0.2


def meta_loss(losses: Tensor) -> Tensor:
    """One number per training run, lower is better: log of the final loss, with a little of the whole curve.

    ``log(mean of the last tenth) + 0.2 * mean of the log``, both relative to the first loss, so that the scale of the loss
    does not matter; a small floor keeps a perfectly fitted problem from dominating, and a run that diverges counts as
    one that ends at e^3 times its first loss.

    Args:
        losses: ``[..., horizon]``, positive.

    Returns:
        Shape ``[...]``, finite.
    """
    relative = torch.nan_to_num(losses / losses[..., :1], nan=torch.inf).clamp(0.0, 1e6)
    tail = relative[..., -max(1, int(_TAIL * losses.shape[-1])) :].mean(dim=-1)
    path = torch.log(relative + _FLOOR).mean(dim=-1)
    return torch.log(tail + _FLOOR).clamp(max=_WORST) + _PATH_WEIGHT * path.clamp(max=_WORST)


class MetaGradient(NamedTuple):
    """An estimate of the gradient of the mean objective, and the mean objective itself."""

    gradient: Tensor
    objective: float


def evolution_strategies(
    objective: Callable[[Tensor], Tensor],
    theta: Tensor,
    *,
    num_pairs: int,
    sigma: float,
    generator: torch.Generator,
) -> MetaGradient:
    """Antithetic evolution strategies: the gradient of the objective blurred with N(0, sigma^2), unbiased.

    Args:
        objective: Candidates ``[2 * num_pairs, num_parameters]`` to objectives ``[2 * num_pairs]``.
        theta: The point, ``[num_parameters]``.
        num_pairs: Number of antithetic pairs.
        sigma: Standard deviation of the perturbations.
        generator: Draws the perturbations.

    Source: Salimans et al., 2017, arXiv 1703.03864.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> square = lambda candidates: candidates.square().sum(dim=-1)
        >>> estimate = evolution_strategies(square, torch.ones(2), num_pairs=10_000, sigma=0.1, generator=generator)
        >>> bool((estimate.gradient - 2.0).abs().max() < 0.1)
        True
    """
    noise = torch.randn(num_pairs, theta.numel(), generator=generator).to(theta)
    values = objective(torch.cat([theta + sigma * noise, theta - sigma * noise]))
    plus, minus = values.chunk(2)
    return MetaGradient((plus - minus) @ noise / (2.0 * sigma * num_pairs), float(values.mean()))
