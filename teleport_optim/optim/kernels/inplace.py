"""The momentum step in torch, in place: a few large calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from teleport_optim.optim.orthogonalise import Step
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.rule import active_rows, average_offset
from teleport_optim.optim.shapes import in_full_precision
from teleport_optim.optim.sharding import local_tensor, local_tensors, shard_like, shards_like
from teleport_optim.symmetry.moves import Moved, unmoved

__all__ = ["all_norms", "copy_all", "gradient_masks", "in_range", "move_all", "take_steps"]


def gradient_masks(grads: Mapping[str, Tensor], table: ParameterTable) -> dict[str, Tensor]:
    """Masks of the rows that have a gradient, for the tensors of which some rows have none."""
    masks = {}
    for name, grad in grads.items():
        # A quick look first: most gradients have no zeros at all.
        if int(torch.count_nonzero(grad)) < grad.numel():
            mask = active_rows(name, grad, table)
            if not bool(mask.all()):
                masks[name] = mask
    return masks


def all_norms(tensors: list[Tensor]) -> list[float]:
    """The Euclidean norm of every tensor, whatever its size; not finite where an entry is not.

    Cost: a few calls, and one wait for an accelerator.
    """
    tensors = [in_full_precision(tensor.detach()) for tensor in tensors]
    norms: list[float] = torch.stack(torch._foreach_norm(tensors)).tolist()
    for number, norm in enumerate(norms):
        # Squares of very large or very small numbers are no floats.
        if not 1e-12 < norm < 1e18 and tensors[number].numel():
            most = tensors[number].abs().max()
            is_usual = bool(most > 0) and bool(most.isfinite())
            norms[number] = float(most) * float((tensors[number] / most).norm()) if is_usual else float(most)
    return norms


def in_range(momenta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Momenta in a range in which squares are floats: their lengths do not count, only their directions do."""
    most = torch.stack(torch._foreach_norm(list(momenta.values()), math.inf)).tolist()
    scales = [1.0 if 1e-12 < norm < 1e12 or norm == 0.0 else norm for norm in most]
    return {name: value if scale == 1.0 else value / scale for (name, value), scale in zip(momenta.items(), scales)}


def copy_all(targets: list[Tensor], values: Sequence[Tensor]) -> None:
    """Write values, which are whole, where the targets lie; both are in one order."""
    torch._foreach_copy_(local_tensors(targets), shards_like(list(values), targets))


def move_all(targets: list[Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values, which are whole and in the same order, where the targets lie: one at a time, in place where they lie there."""
    for target, (name, source) in zip(targets, unmoved(values).items()):
        if source is target and isinstance(values, Moved):
            values.write(name)
        elif source is not target:
            local_tensor(target).copy_(local_tensor(shard_like(values[name], target)))


def take_steps(
    targets: list[Tensor],
    offsets: list[Tensor],
    steps: list[Step],
    masks: dict[int, Tensor],
    decay_factors: Tensor,
    weights: list[float],
) -> None:
    """Shrink the parameters and take the steps, where they lie, but not in rows that are masked; then move their averages."""
    here = local_tensors(targets)
    if any(part is not target for part, target in zip(here, targets)):
        moves = [step.product().view(target.shape) for step, target in zip(steps, targets)]
        steps = list(map(Step, shards_like(moves, targets)))
    numbers = range(len(here))
    small = [number for number in numbers if steps[number].lengths is None]
    large = [[number] for number in numbers if steps[number].lengths is not None]  # a copy of one at a time
    local_offsets, all_shrinks = local_tensors(offsets), decay_factors.tolist()
    for group in [small, *large] if small else large:
        own = [here[number] for number in group]
        old = {number: here[number].clone() for number in group if offsets or number in masks}
        _take_steps(own, [steps[number] for number in group], [all_shrinks[number] for number in group])
        for number in masks.keys() & set(group):
            mask = local_tensor(shard_like(masks[number].expand(targets[number].shape), targets[number]))
            here[number].copy_(torch.where(mask, here[number], old[number]))
        if offsets:
            own_offsets = [local_offsets[number] for number in group]
            own_weights = [weights[number] for number in group]
            torch._foreach_copy_(own_offsets, list(map(average_offset, own_offsets, old.values(), own, own_weights)))


def _take_steps(targets: list[Tensor], steps: list[Step], decay_factors: list[float]) -> None:
    if any(in_full_precision(target) is not target for target in targets):
        for target, shrink, step in zip(targets, decay_factors, steps):
            target.copy_(step.taken_from(in_full_precision(target) * shrink))
        return
    shrunk = [(target, shrink) for target, shrink in zip(targets, decay_factors) if shrink != 1.0]
    if shrunk:
        torch._foreach_mul_(*map(list, zip(*shrunk)))
    if steps[0].lengths is None:
        torch._foreach_sub_(targets, [step.move for step in steps])
    else:
        steps[0].take_from_(targets[0])
