"""Movement of tensors by a group element, along the legs of its symmetry.

This is the one place where legs are applied. The ``kind`` of the tensors multiplies the degree of every leg: it is +1 for
parameters and -1 for gradients (:class:`~teleport_optim.symmetry.action.SlotKind`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from teleport_optim.symmetry.spec import Element, Leg, Symmetry, SymmetrySpec

__all__ = [
    "PART_SIZE",
    "Moved",
    "apply_leg",
    "channel_squares",
    "leg_channels",
    "move",
    "move_scaling",
    "pick",
    "unmoved",
]

PART_SIZE = 2**18
"""Entries of a tensor that are computed with at once, so that a large one needs little memory."""
_SMALL = 2**14
"""Most entries of a tensor that is moved at once."""


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


def leg_channels(
    symmetry: Symmetry, leg: Leg, tensor: Tensor, run_axes: int = 0, first: int = 0, last: int | None = None
) -> Tensor:
    """The part of ``tensor`` on which a leg acts, channels first: shape ``[*runs, size, repeat, ...]``.

    A view, unless the leg lists its entries.

    Args:
        symmetry: The site.
        leg: One of its legs.
        tensor: The tensor of the leg, ``[*runs, ...]``.
        run_axes: Number of axes of runs in front of those of the parameter.
        first, last: The channels to take, all by default; ``last`` itself is left out.
    """
    last = symmetry.size if last is None else last
    outer, axis = _within(leg, tensor, run_axes), run_axes + leg.axis
    if leg.index_tensor is None:
        block = outer.narrow(axis, leg.offset + first * leg.repeat, (last - first) * leg.repeat)
    else:
        block = outer.index_select(axis, leg.index_tensor[first * leg.repeat : last * leg.repeat].to(tensor.device))
    channels = block.movedim(axis, run_axes)
    shape = channels.shape
    return channels.view(*shape[:run_axes], last - first, leg.repeat, *shape[run_axes + 1 :])


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
    moved_channels = symmetry.group.act(element, leg_channels(symmetry, leg, tensor), degree)
    block = moved_channels.flatten(0, 1).movedim(0, leg.axis)
    if _fills_axis(symmetry, leg, tensor.shape[leg.axis]):
        return block.contiguous()
    moved = tensor.clone()
    inner = _within(leg, moved)
    if leg.index_tensor is None:
        inner.narrow(leg.axis, leg.offset, symmetry.size * leg.repeat).copy_(block)
    else:
        inner.index_copy_(leg.axis, leg.index_tensor.to(tensor.device), block)
    return moved


def move_scaling(symmetry: Symmetry, scales: Tensor, tensors: Mapping[str, Tensor], kind: int) -> Moved:
    """:func:`move` for one site of the scaling group, and for many runs at once; a tensor is computed when it is asked for.

    Args:
        symmetry: The site.
        scales: One positive factor per channel, ``[*runs, size]``.
        tensors: Tensors by name, each ``[*runs, *shape]``; none of the legs' may be missing. What was moved before goes further.
        kind: +1 or -1, multiplies the degree of every leg.
    """
    moved = Moved.of(tensors)
    moved.go(symmetry, scales, kind)
    return moved


class Moved(Mapping[str, Tensor]):
    """Tensors at another point of a positive-scaling orbit, each of which is computed when it is asked for.

    What is kept are factors for the entries of single axes, and the tensors themselves: to write into those changes what is
    computed. Small tensors are moved at once, which is faster. Tensors that no leg touches are the same objects as before.

    Attributes:
        tensors: The tensors where they are, each ``[*runs, *shape]``.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._factors: dict[str, dict[tuple[int, int | None], Tensor]] = {}
        self._small: dict[str, Tensor] = {}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Moved:
        """Tensors that can be moved further, without a change of ``tensors``."""
        if not isinstance(tensors, Moved):
            return cls(tensors)
        moved = cls(tensors.tensors)
        moved._factors, moved._small = dict(tensors._factors), dict(tensors._small)
        return moved

    def go(self, symmetry: Symmetry, scales: Tensor, kind: int) -> None:
        """Move further, along one site; see :func:`move_scaling`."""
        powers = {1: scales, -1: scales.reciprocal()}
        for leg in symmetry.legs:
            degree = kind * leg.degree
            power = powers[degree] if degree in powers else scales.pow(degree)
            tensor = self._small.get(leg.name, self.tensors[leg.name])
            factor = _on_axis(symmetry, leg, power, tensor.shape)
            # The range of float16 is smaller than that of factors: those of all moves together may be needed.
            if tensor.numel() <= _SMALL and tensor.dtype != torch.float16:
                self._small[leg.name] = tensor * factor.to(tensor.dtype)
                continue
            key = (leg.axis, None if leg.within is None else leg.within[0])
            known = self._factors.get(leg.name, {})
            self._factors[leg.name] = known | {key: known[key] * factor if key in known else factor}

    def pick(self, name: str, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Take entries of a moved tensor by ``select``, which takes them of any tensor; no others are computed."""
        tensor = self._small.get(name, self.tensors[name])
        picked, is_own = select(tensor), False
        for factor in self._factors_of(name):
            factors = select(factor.expand(tensor.shape))
            in_place = is_own and not torch.is_grad_enabled()
            picked = picked.mul_(factors) if in_place else (picked * factors).to(tensor.dtype)
            is_own = True
        return picked

    def write(self, name: str) -> None:
        """Move a tensor where it lies, after which this one is of no more use; neither runs nor gradients are for this."""
        if name in self._small:
            self.tensors[name].copy_(self._small[name])
        for factor in self._factors_of(name):
            self.tensors[name].mul_(factor)

    def _factors_of(self, name: str) -> list[Tensor]:
        """The factors of a tensor in its dtype; in float32 for float16, in whose range they need not lie."""
        dtype = self.tensors[name].dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype
        return [factor.to(dtype) for factor in self._factors.get(name, {}).values()]

    def __getitem__(self, name: str) -> Tensor:
        return self.pick(name, lambda tensor: tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _on_axis(symmetry: Symmetry, leg: Leg, power: Tensor, shape: torch.Size) -> Tensor:
    """Factors by which a scaling multiplies a tensor ``[*runs, *shape]`` along one leg.

    They have the length of the axis of the leg, and of that on which a slice is taken where there is one.
    """
    run_axes = power.dim() - 1
    axis = run_axes + leg.axis
    along = power if leg.repeat == 1 else power.repeat_interleave(leg.repeat, dim=-1)
    if leg.index_tensor is not None or along.shape[-1] != shape[axis]:
        everywhere = along.new_ones(*power.shape[:-1], shape[axis])
        if leg.index_tensor is None:
            everywhere[..., leg.offset : leg.offset + along.shape[-1]] = along
        else:
            everywhere[..., leg.index_tensor.to(along.device)] = along
        along = everywhere
    along = along.reshape(*power.shape[:-1], *(1,) * leg.axis, -1, *(1,) * (len(shape) - axis - 1))
    if leg.within is None:
        return along
    extents = list(along.shape)
    extents[run_axes + leg.within[0]] = shape[run_axes + leg.within[0]]
    slices = along.new_ones(extents)
    _within(leg, slices, run_axes).mul_(along)
    return slices


def unmoved(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same shapes and dtypes, without any computation."""
    return tensors.tensors if isinstance(tensors, Moved) else tensors


def pick(tensors: Mapping[str, Tensor], name: str, select: Callable[[Tensor], Tensor]) -> Tensor:
    """Take entries of the tensor of this name by ``select``."""
    return tensors.pick(name, select) if isinstance(tensors, Moved) else select(tensors[name])


def channel_squares(symmetry: Symmetry, leg: Leg, tensors: Mapping[str, Tensor], run_axes: int = 0) -> Tensor:
    """Squared norms of what the channels of a site hold in the tensor of a leg, ``[*runs, size]``, in float32 at least."""
    tensor = unmoved(tensors)[leg.name]
    most = max(1, PART_SIZE * tensor.shape[run_axes + leg.axis] // max(tensor.numel() * leg.repeat, 1))
    parts = []
    for first in range(0, symmetry.size, most):
        last = min(first + most, symmetry.size)
        select = functools.partial(_channels, symmetry, leg, run_axes, first, last)
        part = pick(tensors, leg.name, select)
        part = part if part.dtype in (torch.float32, torch.float64) else part.float()
        parts.append(part.square().sum(dim=tuple(range(run_axes + 1, part.dim()))))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _channels(symmetry: Symmetry, leg: Leg, run_axes: int, first: int, last: int, tensor: Tensor) -> Tensor:
    return leg_channels(symmetry, leg, tensor, run_axes, first, last)


def _shallow_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new mapping with the same tensors; that of a ``state_dict`` keeps its ``_metadata``."""
    copy: dict[str, Tensor] = OrderedDict(tensors) if isinstance(tensors, OrderedDict) else dict(tensors)
    if hasattr(tensors, "_metadata"):
        copy._metadata = tensors._metadata  # type: ignore[attr-defined]
    return copy
