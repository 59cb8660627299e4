"""Find the symmetries of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.symmetry.inputs import ExampleInputs, Inputs
from teleport_optim.symmetry.named_tensors import named_tensors
from teleport_optim.symmetry.search.limits import Limits, SearchStopped, Untraceable
from teleport_optim.symmetry.search.runs import follow
from teleport_optim.symmetry.search.sites import symmetries_of
from teleport_optim.symmetry.spec import Refusal, Symmetry, SymmetrySpec

__all__ = ["find_symmetries"]


def find_symmetries(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    groups: Iterable[str] = tuple(GROUPS),
    include_approximate: bool = False,
    max_operations: int = 200_000,
    max_seconds: float = 60.0,
) -> SymmetrySpec:
    r"""Find the hidden channels of a model that can be moved without changing its function.

    Every site found satisfies :math:`f(x; g \cdot \theta) = f(x; \theta)` for all inputs and all elements of its group,
    with ``g`` applied by :func:`~teleport_optim.symmetry.action.act`. The model's inputs and outputs never move.

    A copy of the model is followed operation by operation, in evaluation and in training mode, on tensors without data. The
    model is neither run nor changed, and what its code keeps elsewhere (caches, lists, counters, random states) is put back.
    Beside other threads, only tensors are taken out again. The search fails closed. What goes into an operation that is not
    known does not move; neither does anything in a module with hooks, a parameter with hooks or one that shares memory with
    another one, entries of a parameter that nothing reads, and what a custom ``autograd.Function`` takes, whose gradients may
    not move along. Buffers are data: they are permuted along with what they meet, and never multiplied but for the
    statistics that a normalisation updates. A model whose control flow depends on data, or on random numbers of Python or
    numpy, is refused as a whole. One that asks for the size of its inputs or whether gradients are taken is followed with
    other answers, too. The spec says where and why in its ``refusals``. Parameters that a loss uses directly, beside the
    model, cannot be seen: leave such sites out.

    Args:
        model: The model.
        example_inputs: An input that the model takes, the tuple of its inputs, the dictionary of those that have names, or
            an :class:`Inputs` with both. Only shapes and dtypes matter. One example is enough: where a layer needs two in
            training mode, there are two.
        groups: Names of the groups to look for, all by default: ``"permutation"``, ``"scaling"``, ``"sign"``, ``"linear"``.
        include_approximate: Also list scaling in front of a normalisation, which holds only up to its eps
            (``exact=False``).
        max_operations: Most operations of the model that are followed, in all its runs together.
        max_seconds: Most seconds that this may take. At a limit there are no symmetries, but a warning.

    Returns:
        The symmetries, group by group: permutations (of channels, and of whole attention heads), positive scalings, sign
        flips and general linear maps.

    Raises:
        TypeError: if ``model`` is not a module, or ``example_inputs`` none of these.
        ValueError: if the model cannot take ``example_inputs``, its own code fails on them, or there is no group of such
            a name. Any other error is a mistake in this library: please report it.

    Cost: Python's part of two forward passes, and as much again: 0.1 to 2 s for the networks of torchvision. A model that
    compares sizes, or asks whether gradients are taken, is followed a few times more.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        >>> for symmetry in find_symmetries(model, torch.randn(2, 3, 4, 4)):
        ...     print(symmetry.id, symmetry.size)
        0:permutation 8
        1:scaling 8
        0:sign 8
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_symmetries takes a torch.nn.Module, got {type(model).__name__}")
    wanted = set(groups)
    if not wanted <= set(GROUPS):
        raise ValueError(f"there are no groups {sorted(wanted - set(GROUPS))}, but {sorted(GROUPS)}")
    limits = Limits.of(max_operations, max_seconds)
    inputs = Inputs.of(example_inputs, model)
    lazy = [name for name, tensor in named_tensors(model) if is_lazy(tensor)]
    if lazy:
        reason = "it has no shape yet: run one batch through the model first"
        return SymmetrySpec(refusals=tuple(Refusal(name, reason) for name in lazy))
    try:
        analyser = follow(model, inputs, wanted, pinned=_hooked(model) | _shared_memory(model), limits=limits)
    except SearchStopped as error:
        warnings.warn(
            f"no symmetries: {error}. Raise max_operations and max_seconds of find_symmetries; give an optimizer what that "
            "finds as symmetries=, or pass teleport=False",
            stacklevel=2,
        )
        return SymmetrySpec(refusals=(Refusal("(root)", str(error)),))
    except Untraceable as error:
        return SymmetrySpec(refusals=(Refusal("(root)", str(error)),))
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    all_names = {own[0]: own for own in names.values()}
    found: list[Symmetry] = []
    while analyser.analyses:  # one after the other, since they take much memory
        found += symmetries_of(analyser.analyses.pop(0), all_names, include_approximate=include_approximate)
    return SymmetrySpec(tuple(found), tuple(analyser.refusals))


def _hooked(model: nn.Module) -> dict[str, str]:
    """The parameters whose gradients hooks may change, with the reason why they do not move."""
    reason = "it has hooks, which may change its gradient: remove them"
    return {
        name: reason
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    }


def _shared_memory(model: nn.Module) -> dict[str, str]:
    """The tensors that share memory with another one, with the reason why they do not move.

    Views of one flat buffer are not shared as long as they do not overlap; one tensor under two names is a single tensor.
    """
    shared: dict[str, str] = {}
    unique = {id(tensor): (name, tensor) for name, tensor in reversed([*named_tensors(model)])}
    spans = sorted((*_span(tensor), name) for name, tensor in unique.values() if tensor.numel() > 0)
    reach: dict[str, tuple[int, str]] = {}  # on each device, the end of the memory seen so far and what reaches there
    for device, start, end, name in spans:
        last_end, last_name = reach.get(device, (start, ""))
        if start < last_end:
            shared[name] = f"it shares memory with {last_name}"
            shared.setdefault(last_name, f"it shares memory with {name}")
        if end >= last_end:
            reach[device] = (end, name)
    return shared


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """The device of a tensor and the range of its memory. Tensors that have none are told apart as objects."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return "none", id(tensor), id(tensor) + 1
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()
