"""The loss along the straight line between two networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from teleport_optim.symmetry.alignment.networks import (
    as_batches,
    check_alike,
    recalibrate_batch_norm,
)
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.named_tensors import cuda_devices, named_tensors

__all__ = ["Barrier", "interpolation_barrier"]


@dataclass(frozen=True)
class Barrier:
    """The loss along the straight line between two networks.

    Attributes:
        alphas: Places on the line, from 0 (the first network) to 1 (the second).
        losses: The loss at each of them.

    Example:
        >>> Barrier(alphas=(0.0, 0.5, 1.0), losses=(1.0, 4.0, 2.0)).barrier
        2.5
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def excesses(self) -> tuple[float, ...]:
        r"""Height of each loss above the chord, :math:`L(\alpha) - (1 - \alpha) L(0) - \alpha L(1)`."""
        first, last = self.losses[0], self.losses[-1]
        inner = zip(self.alphas[1:-1], self.losses[1:-1])
        return (0.0, *((loss - first) - alpha * (last - first) for alpha, loss in inner), 0.0)

    @property
    def barrier(self) -> float:
        """The largest excess, at least 0."""
        return max(self.excesses)


def interpolation_barrier(
    first: nn.Module,
    second: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    num_points: int = 11,
    recalibrate: ExampleInputs | Iterable[ExampleInputs] | None = None,
) -> Barrier:
    r"""The loss along the straight line between two networks, and how far it rises above the chord.

    .. math:: \max_{0 \le \alpha \le 1} L((1 - \alpha) \theta_1 + \alpha \theta_2) - (1 - \alpha) L(\theta_1) - \alpha L(\theta_2)

    All of this happens on a copy: neither network changes, nor does the random state. Every point starts from the same random
    state.

    The hidden activations of an averaged network vary less than those of either network, which running statistics that were
    averaged too do not know. With ``recalibrate`` they are measured anew at every point, also at both ends: this is the
    resetting of BatchNorm in REPAIR. Models without BatchNorm are not changed by it.

    Args:
        first: The network at ``alpha = 0``. Tensors that are not floating point are taken from it.
        second: The network at ``alpha = 1``, with tensors of the same names and shapes.
        evaluate: Gives the loss of the model that it gets, a copy of ``first`` in evaluation mode.
        num_points: Points on the line, evenly spaced, both ends included.
        recalibrate: Batches, as ``data`` in :func:`align`; the running statistics become the average over them.

    Raises:
        ValueError: if the networks differ in their tensors, there are less than three points, or a loss is not a number or
            is infinite at an end.

    Cost: ``num_points`` calls of ``evaluate``, and as many passes over ``recalibrate``.

    Source:
        The barrier as in Frankle et al. 2020, arXiv 1912.05671, and Entezari et al. 2022, arXiv 2110.06296; recalibration
        after Jordan et al. 2022, *REPAIR*, arXiv 2211.08403.

    Example:
        >>> x = torch.ones(4, 3)
        >>> first, second = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
        >>> _ = nn.init.constant_(first.weight, 1.0), nn.init.constant_(second.weight, -1.0)
        >>> line = interpolation_barrier(first, second, lambda model: 1 - model(x).square().mean().item(), num_points=3)
        >>> line.losses, line.barrier
        ((-8.0, 1.0, -8.0), 9.0)
    """
    if num_points < 3:
        raise ValueError(f"num_points is {num_points}, but a barrier needs a point between both ends: take at least 3")
    start, end = dict(named_tensors(first)), dict(named_tensors(second))
    check_alike(start, end)
    batches = None if recalibrate is None else as_batches(recalibrate)
    twin = copy.deepcopy(first).eval()
    devices = cuda_devices(first)
    alphas = [position / (num_points - 1) for position in range(num_points)]
    losses = []
    for alpha in alphas:
        with torch.no_grad():
            for name, tensor in named_tensors(twin):
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.copy_(torch.lerp(start[name], end[name].to(tensor), alpha))
        with torch.random.fork_rng(devices):
            if batches is not None:
                recalibrate_batch_norm(twin, batches)
            losses.append(float(evaluate(twin)))
        if math.isnan(losses[-1]) or (alpha in (0.0, 1.0) and math.isinf(losses[-1])):
            raise ValueError(f"evaluate gives {losses[-1]} at alpha = {alpha:g}: look at the data and at both networks")
    return Barrier(tuple(alphas), tuple(losses))
