"""The action of symmetries on parameters, on gradients and on what an optimizer keeps.

All of it is one pure function on dictionaries of tensors, with the degree of every leg multiplied by the kind of the
tensor: parameters move with +1, gradients with -1, squared gradients with -2.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from torch import Tensor

from teleport_optim.symmetry.moves import leg_channels, move
from teleport_optim.symmetry.spec import Element, Leg, Symmetry, SymmetrySpec

__all__ = ["SlotKind", "act", "act_dual", "channel_norms", "transport"]


class SlotKind(IntEnum):
    """Kind of a tensor that moves with a parameter; the value multiplies every degree."""

    VECTOR = 1
    """Moves like the parameter: a velocity, an average of the iterates."""
    COVECTOR = -1
    """Moves like the gradient: an average of gradients."""
    SQUARED_COVECTOR = -2
    """Moves like the squared gradient: Adam's second moment."""
    INVARIANT = 0
    """Does not move: a step count."""


def act(spec: SymmetrySpec, element: Element, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move parameters along their orbit: the same function, other parameters.

    Pure: the result is a new mapping of the type of ``tensors`` (a state dict keeps its ``_metadata``); tensors that
    no leg touches are the same objects as before. Exact up to rounding for every exact symmetry.

    Args:
        spec: The symmetries.
        element: Group elements by site; sites left out stay where they are.
        tensors: Parameters and buffers by name, such as ``model.state_dict()``.

    Raises:
        ValueError: if an element does not fit its site or is not in its group.
        KeyError: if a tensor that a leg names is missing.

    Example:
        >>> import torch
        >>> from teleport_optim import find_symmetries
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> x = torch.randn(5, 2)
        >>> spec = find_symmetries(model, x)
        >>> y = model(x)
        >>> moved = act(spec, spec.random_element(torch.Generator().manual_seed(0)), model.state_dict())
        >>> _ = model.load_state_dict(moved)
        >>> bool(torch.allclose(model(x), y, atol=1e-5))
        True
    """
    spec.check(element)
    return move(spec, element, tensors, SlotKind.VECTOR)


def act_dual(spec: SymmetrySpec, element: Element, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient at the moved parameters, without another backward pass.

    For a loss that the symmetries leave unchanged, ``grad L(act(g, theta)) == act_dual(g, grad L(theta))``. Tensors
    that have no entry in ``grads`` (buffers, frozen parameters) are passed over.

    Raises:
        ValueError: if an element does not fit its site or is not in its group.

    Example:
        >>> import torch
        >>> from teleport_optim import find_symmetries
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).double()
        >>> x = torch.randn(5, 2).double()
        >>> spec = find_symmetries(model, x, groups=["scaling"])
        >>> element = spec.random_element(torch.Generator().manual_seed(0))
        >>> model(x).sum().backward()
        >>> grads = act_dual(spec, element, {name: param.grad.clone() for name, param in model.named_parameters()})
        >>> _ = model.load_state_dict(act(spec, element, model.state_dict()))
        >>> model.zero_grad()
        >>> model(x).sum().backward()
        >>> all(torch.allclose(param.grad, grads[name]) for name, param in model.named_parameters())
        True
    """
    spec.check(element)
    return move(spec, element, grads, SlotKind.COVECTOR, partial=True)


def transport(
    spec: SymmetrySpec,
    element: Element,
    slots: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, SlotKind],
) -> dict[str, dict[str, Tensor]]:
    """Move what an optimizer keeps per parameter along with the parameters.

    Args:
        spec: The symmetries.
        element: Group elements by site.
        slots: ``slots[slot][name]`` is the tensor that the optimizer keeps under ``slot`` for the parameter ``name``.
        kinds: How each slot moves, one :class:`SlotKind` for every key of ``slots``.

    Raises:
        ValueError: if an element does not fit, or a slot has no kind.
    """
    spec.check(element)
    missing = sorted(set(slots) - set(kinds))
    if missing:
        raise ValueError(f"no kind is given for the slots {missing}: say how each moves with a SlotKind")
    return {slot: move(spec, element, tensors, kinds[slot], partial=True) for slot, tensors in slots.items()}


def channel_norms(symmetry: Symmetry, leg: Leg, tensor: Tensor) -> Tensor:
    """The squared norm of what each channel of a site holds in one tensor, shape ``[size]``.

    Example:
        >>> import torch
        >>> from teleport_optim.symmetry.groups import GROUPS
        >>> leg = Leg("0.weight", axis=0, degree=1)
        >>> site = Symmetry("0:scaling", GROUPS["scaling"], 2, (leg,))
        >>> channel_norms(site, leg, torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([25.,  4.])
    """
    return leg_channels(symmetry, leg, tensor).flatten(1).square().sum(dim=1)
