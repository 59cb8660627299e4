"""How one group element moves tensors along the legs of its symmetry.

The one place where legs are applied. :mod:`teleport_optim.action` gives it its meanings: the ``kind`` of the tensors is
+1 for parameters and -1 for gradients, and multiplies the degree of every leg.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from teleport_optim.symmetry.spec import Element, Leg, Symmetry, SymmetrySpec

__all__ = ["apply_leg", "move", "view_channels"]


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


def view_channels(symmetry: Symmetry, leg: Leg, tensor: Tensor) -> Tensor:
    """The part of ``tensor`` on which a leg acts, channels first: shape ``[size, repeat, ...]``."""
    outer = tensor.narrow(*leg.within) if leg.within else tensor
    block = outer.narrow(leg.axis, leg.offset, symmetry.size * leg.repeat).movedim(leg.axis, 0)
    return block.reshape(symmetry.size, leg.repeat, *block.shape[1:])


def apply_leg(symmetry: Symmetry, leg: Leg, element: Tensor, tensor: Tensor, degree: int) -> Tensor:
    """``tensor`` with ``element`` applied along one leg, out of place."""
    moved_channels = symmetry.group.act(element, view_channels(symmetry, leg, tensor), degree)
    result = moved_channels.flatten(0, 1).movedim(0, leg.axis)
    if result.shape == tensor.shape:
        return result.contiguous()
    moved = tensor.clone()
    view_channels(symmetry, leg, moved).copy_(moved_channels)
    return moved


def _shallow_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new mapping with the same tensors; that of a ``state_dict`` keeps its ``_metadata``."""
    copy: dict[str, Tensor] = OrderedDict(tensors) if isinstance(tensors, OrderedDict) else dict(tensors)
    if hasattr(tensors, "_metadata"):
        copy._metadata = tensors._metadata  # type: ignore[attr-defined]
    return copy
