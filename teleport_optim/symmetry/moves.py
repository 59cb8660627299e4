"""How one group element moves tensors along the legs of its symmetry.

The one place where legs are applied. :mod:`teleport_optim.symmetry.action` gives it its meanings: the ``kind`` of the tensors is
+1 for parameters and -1 for gradients, and multiplies the degree of every leg.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from teleport_optim.symmetry.spec import Element, Leg, Symmetry, SymmetrySpec

__all__ = ["apply_leg", "channels_of", "move", "move_scaling"]


def move(
    spec: SymmetrySpec, element: Element, tensors: Mapping[str, Tensor], kind: int, *, partial: bool = False
) -> dict[str, Tensor]:
    """``tensors`` moved by ``element``, symmetry by symmetry in the order of the spec, as a new mapping.

    Args:
        spec: The symmetries.
        element: Group elements by site, already checked against the spec.
        tensors: Tensors by name, each of the shape of its parameter.
        kind: Multiplies the degree of every leg.
        partial: Pass over tensors that are missing.

    Raises:
        KeyError: if a tensor that a leg names is missing and ``partial`` is False.
    """
    moved = _shallow_copy(tensors)
    for symmetry in spec if kind != 0 else ():
        if symmetry.id not in element:
            continue
        for leg in symmetry.legs:
            if leg.name in moved:
                moved[leg.name] = apply_leg(symmetry, leg, element[symmetry.id], moved[leg.name], kind * leg.degree)
            elif not partial:
                raise KeyError(f"site {symmetry.id!r} acts on {leg.name!r}, which is not among the tensors given")
    return moved


def channels_of(symmetry: Symmetry, leg: Leg, tensor: Tensor, run_axes: int = 0) -> Tensor:
    """The part of ``tensor`` on which a leg acts, channels first: shape ``[*runs, size, repeat, ...]``.

    A view, unless the leg lists its entries.

    Args:
        symmetry: The site.
        leg: One of its legs.
        tensor: The tensor of the leg, ``[*runs, ...]``.
        run_axes: Number of axes of runs in front of those of the parameter.
    """
    outer, axis = _within(leg, tensor, run_axes), run_axes + leg.axis
    if leg.positions is None:
        block = outer.narrow(axis, leg.offset, symmetry.size * leg.repeat)
    else:
        block = outer.index_select(axis, leg.positions.to(tensor.device))
    channels = block.movedim(axis, run_axes)
    shape = channels.shape
    return channels.view(*shape[:run_axes], symmetry.size, leg.repeat, *shape[run_axes + 1 :])


def _within(leg: Leg, tensor: Tensor, run_axes: int = 0) -> Tensor:
    """The slice of a tensor in which a leg acts."""
    if leg.within is None:
        return tensor
    axis, start, length = leg.within
    return tensor.narrow(run_axes + axis, start, length)


def _fills_axis(symmetry: Symmetry, leg: Leg, extent: int) -> bool:
    return leg.within is None and leg.index is None and symmetry.size * leg.repeat == extent


def apply_leg(symmetry: Symmetry, leg: Leg, element: Tensor, tensor: Tensor, degree: int) -> Tensor:
    """``tensor`` with ``element`` applied along one leg, out of place."""
    moved_channels = symmetry.group.act(element, channels_of(symmetry, leg, tensor), degree)
    block = moved_channels.flatten(0, 1).movedim(0, leg.axis)
    if _fills_axis(symmetry, leg, tensor.shape[leg.axis]):
        return block.contiguous()
    moved = tensor.clone()
    inner = _within(leg, moved)
    if leg.positions is None:
        inner.narrow(leg.axis, leg.offset, symmetry.size * leg.repeat).copy_(block)
    else:
        inner.index_copy_(leg.axis, leg.positions.to(tensor.device), block)
    return moved


def move_scaling(symmetry: Symmetry, scales: Tensor, tensors: Mapping[str, Tensor], kind: int) -> dict[str, Tensor]:
    """:func:`move` for one site of the scaling group, and for many runs at once.

    Args:
        symmetry: The site.
        scales: One positive factor per channel, ``[*runs, size]``.
        tensors: Tensors by name, each ``[*runs, *shape]``; none of the legs' may be missing.
        kind: +1 or -1, multiplies the degree of every leg.
    """
    run_axes = scales.dim() - 1
    powers = {1: scales, -1: scales.reciprocal()}
    moved = dict(tensors)
    for leg in symmetry.legs:
        tensor, degree = moved[leg.name], kind * leg.degree
        factors = (powers[degree] if degree in powers else scales.pow(degree)).to(tensor.dtype)
        axis = run_axes + leg.axis
        along = factors if leg.repeat == 1 else factors.repeat_interleave(leg.repeat, dim=-1)
        if not _fills_axis(symmetry, leg, tensor.shape[axis]):
            everywhere = along.new_ones(*scales.shape[:-1], tensor.shape[axis])
            if leg.positions is None:
                everywhere[..., leg.offset : leg.offset + along.shape[-1]] = along
            else:
                everywhere[..., leg.positions.to(along.device)] = along
            along = everywhere
        along = along.reshape(*scales.shape[:-1], *(1,) * leg.axis, -1, *(1,) * (tensor.dim() - axis - 1))
        if leg.within is None:
            moved[leg.name] = tensor * along
        else:
            moved[leg.name] = tensor.clone()
            _within(leg, moved[leg.name], run_axes).mul_(along)
    return moved


def _shallow_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new mapping with the same tensors; that of a ``state_dict`` keeps its ``_metadata``."""
    copy: dict[str, Tensor] = OrderedDict(tensors) if isinstance(tensors, OrderedDict) else dict(tensors)
    if hasattr(tensors, "_metadata"):
        copy._metadata = tensors._metadata  # type: ignore[attr-defined]
    return copy
