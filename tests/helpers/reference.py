"""The arithmetic of a step, written slowly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teleport_optim.optim.orthogonalise import compute_steps
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import StepCoefficients
from teleport_optim.optim.rule import ema


def momentum_step(
    grads: dict[str, Tensor],
    momenta: dict[str, Tensor],
    coefficients: StepCoefficients,
    table: ParameterTable,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a step takes from parameters at zero, with the opposite sign, and the new momenta."""
    averages = {name: ema(momentum, grads[name], coefficients.beta) for name, momentum in momenta.items()}
    steps = compute_steps(averages, coefficients, table)
    return {name: -steps[name].taken_from(torch.zeros_like(average)) for name, average in averages.items()}, averages


def blocks_of(rows: Tensor, block_rows: int) -> list[Tensor]:
    """As few blocks of at most so many rows as can be, or fewer than twice as many if these have the same size."""
    least = math.ceil(len(rows) / block_rows)
    even = [number for number in range(least, 2 * least) if len(rows) % number == 0]
    return list(rows.split(math.ceil(len(rows) / (even or [least])[0])))


def direction(block: Tensor) -> Tensor:
    """One block before its rows get their lengths: columns are divided by a power of their norms, before and after."""
    rows = block / block.norm(dim=1, keepdim=True).clamp_min(1e-30)
    scales = rows.norm(dim=0).clamp_min(1e-30).pow(-3 / 8)
    return scales * nearly_orthogonal(scales * rows)


def nearly_orthogonal(rows: Tensor) -> Tensor:
    """Singular values are moved towards 1, by polynomials."""
    o = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)  # rows of dead units are zero
    o = o / torch.linalg.svdvals(o).pow(4).sum().pow(0.25).clamp_min(1e-30)
    for b1, b3, b5 in ((7.9424, -22.2873, 15.8239), (3.5875, -2.5845, 0.4893), (2.6604, -1.9134, 0.4194)):
        gram = o @ o.T
        o = b1 * o + b3 * gram @ o + b5 * gram @ gram @ o
    return o
