"""Moves along the positive-scaling orbits: the balanced start, and the teleports that the controller asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_optim.optim.controls import Controls
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.site_norms import log_ratio, site_log_norms
from teleport_optim.symmetry.action import SlotKind
from teleport_optim.symmetry.moves import Moved, unmoved
from teleport_optim.symmetry.spec import Symmetry

__all__ = ["MAX_LOG_SCALE", "Point", "balance", "teleport"]


MAX_LOG_SCALE = 0.75
"""Largest |log s| by which a teleport moves a channel; the balanced start, from where a run begins, has no bound."""


_MAX_SWEEPS, _BALANCED = 30, 0.01
_KINDS = (SlotKind.VECTOR, SlotKind.COVECTOR, SlotKind.COVECTOR, SlotKind.VECTOR)
"""Kinds of parameters, gradients, momenta and offsets of averages."""


class Point(NamedTuple):
    """Where a step is taken from: tensors by name, each ``[*runs, *shape]``, some of which are computed when they are asked for."""

    params: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    momenta: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    """Of the averages; empty where none are kept."""


def teleport(point: Point, controls: Controls, table: ParameterTable) -> tuple[Point, Tensor]:
    """Move along the positive-scaling orbits towards balance, one site after the other, by ``MAX_LOG_SCALE`` at most.

    At strength 1 the weights (or the averaged gradients) that write into a channel and those that read from it get equal
    norms; the two strengths of a site are the means of those of the matrices on its legs. ``|log s|`` is at most
    ``MAX_LOG_SCALE``, since along a scaling orbit the gradient norm has no maximum. Channels whose weights could leave the
    range of their dtype stay where they are. Next to weights of 16 bits the scales are powers of two, so that nothing is
    rounded.

    Returns:
        The new point of the orbit, whose tensors are computed when they are asked for, and for every site the RMS of ``log s``.
    """
    weights = table.tensors(controls.balance).site_weights
    strengths = weights @ torch.stack([controls.balance, controls.gradient_balance], dim=-1)
    run_axes = controls.balance.dim() - 1
    moved = [Moved.of(tensors) for tensors in point]
    params, _, momenta, _ = moved
    sizes = []
    for symmetry, strength in zip(table.spec, strengths.unbind(-2)):
        of_weights, of_gradients = strength.unsqueeze(-2).unbind(-1)
        norms = site_log_norms(symmetry, params, run_axes)
        # A channel's log-scale that equalises squared norms is a quarter of their log-ratio: s^2 w^2 = r^2 / s^2.
        log_scale = 0.25 * (
            of_weights * log_ratio(norms) - of_gradients * log_ratio(site_log_norms(symmetry, momenta, run_axes))
        )
        log_scale = log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)
        # Gradients whose squares are no floats say nothing about balance.
        log_scale = _in_range(torch.nan_to_num(log_scale), norms, symmetry, params)
        sizes.append(log_scale.square().mean(dim=-1).sqrt())
        scales = symmetry.group.exp(log_scale.double())
        for tensors, kind in zip(moved, _KINDS):
            if tensors:  # An optimizer need not keep an average.
                tensors.go(symmetry, scales, kind)
    return Point(*moved), torch.stack(sizes, dim=-1)


def balance(point: Point, table: ParameterTable) -> tuple[Point, Tensor]:
    """The point of the positive-scaling orbit where every run begins, what goes with it there, and the way to it.

    It is where the norms of what writes into a channel and of what reads from it are equal, for all channels at once: the
    least sum of squared weights on the orbit, so that where on the orbit a network was initialised makes no difference. Found
    by balancing one site after the other until none moves by more than 1 %, at most 30 times; ``|log s|`` has no bound. In 16
    bits nothing moves by less than a power of two.

    Returns:
        The point, whose tensors are computed when they are asked for, and for every site the RMS of ``log s`` in all,
        ``[*runs, num_sites]``.
    """
    name = table.names[0]
    shape = unmoved(point.params)[name].shape
    run_axes = len(shape) - len(table.shapes[name])
    runs = shape[:run_axes]
    params, *others = moved = [Moved.of(tensors) for tensors in point]
    ways: dict[str, Tensor] = {}
    is_moving = torch.ones(runs, dtype=torch.bool)
    for _ in range(_MAX_SWEEPS if len(table.spec) else 0):
        largest = torch.zeros(runs)
        for symmetry in table.spec:
            norms = site_log_norms(symmetry, params, run_axes)
            log_scale = _in_range(0.25 * log_ratio(norms), norms, symmetry, params)
            log_scale = torch.where(is_moving.to(log_scale.device).unsqueeze(-1), log_scale, 0.0)
            largest = torch.maximum(largest, log_scale.detach().abs().amax(dim=-1).cpu())
            log_scale = log_scale.double()
            ways[symmetry.id] = ways.get(symmetry.id, 0.0) + log_scale
            scales = symmetry.group.exp(log_scale)
            params.go(symmetry, scales, SlotKind.VECTOR)
        is_moving = is_moving & (largest >= _BALANCED)
        if not bool(is_moving.any()):
            break
    for symmetry in table.spec:
        scales = symmetry.group.exp(ways[symmetry.id])
        for tensors, kind in zip(others, _KINDS[1:]):
            if tensors:
                tensors.go(symmetry, scales, kind)
    sizes = [way.square().mean(dim=-1).sqrt().float() for way in ways.values()]
    return Point(*moved), torch.stack(sizes, dim=-1) if sizes else torch.zeros(*runs, 0)


def _in_range(log_scale: Tensor, log_norms: Tensor, symmetry: Symmetry, params: Mapping[str, Tensor]) -> Tensor:
    """``log_scale``, but 0 for channels whose norms could leave the range of the dtypes of their weights."""
    dtypes = {unmoved(params)[leg.name].dtype for leg in symmetry.legs}
    if not dtypes <= {torch.float32, torch.float64}:
        log_scale = math.log(2.0) * torch.round(log_scale / math.log(2.0))
    reach = max(abs(leg.degree) for leg in symmetry.legs) * log_scale.abs()
    highest = min(math.log(torch.finfo(dtype).max) for dtype in dtypes)
    lowest = max(math.log(torch.finfo(dtype).tiny) for dtype in dtypes)
    norms = 0.5 * log_norms
    is_inside = (norms.amax(dim=-2) + reach < highest) & (norms.amin(dim=-2) - reach > lowest)
    return torch.where(is_inside, log_scale, 0.0)
