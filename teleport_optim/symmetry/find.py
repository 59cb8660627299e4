"""Find the symmetries of a model by walking its layers from the input to the output."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from teleport_optim.symmetry.rules import RULES
from teleport_optim.symmetry.sites import Walk
from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["find_symmetries"]


def find_symmetries(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | None = None, *, include_approximate: bool = False
) -> SymmetrySpec:
    r"""Find the hidden channels of a model that can be moved without changing its function.

    Every site found satisfies :math:`f(x; g \cdot \theta) = f(x; \theta)` for all inputs and all elements of its group,
    with ``g`` applied by :func:`~teleport_optim.action.act`. The model's inputs and outputs never move.

    The search walks the layers of an :class:`torch.nn.Sequential` (nested ones too) and fails closed. Nothing passes
    through a layer of unknown type, or one that has hooks, a parametrization, a replaced ``forward``, frozen
    parameters, parameters not yet initialised, or memory shared with another layer. The spec says where and why in its
    ``refusals``. Parameters that a loss uses directly, beside the model, cannot be seen: leave such sites out.

    Args:
        model: The model. It is not changed: with ``example_inputs`` a deep copy is run.
        example_inputs: An input, or the tuple of inputs, that the model takes. Without it, inputs are batched:
            ``(batch, features)`` for Linear and BatchNorm1d, ``(batch, channels, *spatial)`` for convolutions and
            ``(batch, sequence)`` for an Embedding. Needed where this does not settle what a layer does, and where it
            does not hold: sizes that contradict it empty the spec, but not all inputs of another shape show.
        include_approximate: Also list scaling in front of a normalisation, which holds only up to its eps
            (``exact=False``).

    Returns:
        The symmetries in the order of the network. The cost is one forward pass with ``example_inputs``, else none.

    Raises:
        TypeError: if ``model`` is not a module, or ``example_inputs`` neither a tensor nor a tuple.
        ValueError: if the model cannot take ``example_inputs``.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        >>> for symmetry in find_symmetries(model):
        ...     print(symmetry.id, symmetry.size)
        0:permutation 8
        0:sign 8
        1:scaling 8
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_symmetries takes a torch.nn.Module, got {type(model).__name__}")
    walk = Walk(include_approximate=include_approximate)
    shared = _shared_names(model)
    shapes = iter(() if example_inputs is None else _input_shapes(model, example_inputs))
    for name, layer in _layers(model):
        if example_inputs is not None:
            walk.shape = next(shapes)
        problem, is_understood = _obstacle(name, layer, shared)
        if problem:
            walk.refuse(name or "(root)", problem)
        if is_understood:
            RULES[type(layer)](walk, name, layer)
        else:
            walk.lose()
        if problem:
            walk.keep(())
    return walk.spec()


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model in the order in which they run, with their names. What is opaque counts as one layer."""
    if not _is_plain_sequential(module):
        yield prefix, module
        return
    for name, child in module._modules.items():  # named_children would leave out a layer that is used twice
        if child is not None:
            yield from _layers(child, f"{prefix}.{name}" if prefix else name)


def _is_plain_sequential(module: nn.Module) -> bool:
    inherited = ("forward", "__iter__", "__call__")
    return (
        isinstance(module, nn.Sequential)
        and all(getattr(type(module), method) is getattr(nn.Sequential, method) for method in inherited)
        and not _is_altered(module)
    )


def _is_altered(module: nn.Module) -> bool:
    """Whether the instance may compute something else than its class does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _obstacle(name: str, layer: nn.Module, shared: dict[str, str]) -> tuple[str | None, bool]:
    """Why nothing may pass through ``layer``, or None; and whether its rule still tells the shape it returns."""
    kind = type(layer).__name__
    tensors = dict(_tensors(layer))
    twins = sorted(f"{name}.{key} and {shared[f'{name}.{key}']}" for key in tensors if f"{name}.{key}" in shared)
    frozen = sorted(f"{name}.{key}" for key, value in layer.named_parameters() if not value.requires_grad)
    if parametrize.is_parametrized(layer):
        return "it is parametrized, so its weight is computed anew: remove the parametrization", False
    if any(is_lazy(tensor) for tensor in tensors.values()):
        return f"{kind} has no parameters yet: run one batch through the model first", False
    if "forward" in vars(layer):
        return "its forward was replaced", False
    if _is_altered(layer):
        return "it has forward hooks (weight_norm, spectral_norm and pruning use them too): remove them", False
    if isinstance(layer, nn.Sequential):
        return f"{kind} overrides what nn.Sequential does", False
    if type(layer) not in RULES:
        return f"{kind} is not a layer type whose symmetries are known", False
    if twins:
        return f"it shares memory: {', '.join(twins)}", True
    if frozen:
        return f"it is frozen (requires_grad is False): {', '.join(frozen)}", True
    return None, True


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under every name that they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _shared_names(model: nn.Module) -> dict[str, str]:
    """For every tensor that shares memory with another one, the name of the other.

    Views of one flat buffer are not shared as long as they do not overlap.
    """
    shared: dict[str, str] = {}
    spans = sorted(
        ((*_span(tensor), name) for name, tensor in _tensors(model) if not is_lazy(tensor) and tensor.numel() > 0)
    )
    reach: dict[str, tuple[int, str]] = {}  # on each device, the end of the memory seen so far and what reaches there
    for device, start, end, name in spans:
        last_end, last_name = reach.get(device, (start, ""))
        if start < last_end:
            shared[name] = last_name
            shared.setdefault(last_name, name)
        if end >= last_end:
            reach[device] = (end, name)
    return shared


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """The device of a tensor and the range of its memory. Tensors that have none are told apart as objects."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return "none", id(tensor), id(tensor) + 1
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


@torch.no_grad()
def _input_shapes(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> list[tuple[int, ...] | None]:
    """The shape of what enters each layer, found by running a copy of the model layer by layer."""
    values = copy_inputs(example_inputs)
    if _is_plain_sequential(model) and len(values) != 1:
        raise ValueError(f"a Sequential takes one input, but example_inputs holds {len(values)}")
    shapes: list[tuple[int, ...] | None] = []
    with torch.random.fork_rng(cuda_devices(model, values)):
        for name, layer in _layers(copy.deepcopy(model).eval()):
            shapes.append(tuple(values[0].shape) if len(values) == 1 and isinstance(values[0], Tensor) else None)
            try:
                values = (layer(*values),)
            except Exception as error:
                raise ValueError(
                    f"layer {name!r} ({type(layer).__name__}) cannot take the input of shape {shapes[-1]} that "
                    f"example_inputs lead to: {error}. Pass example_inputs as you would pass them to the model, "
                    f"batch axis included."
                ) from error
    return shapes


def copy_inputs(example_inputs: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs as a tuple, copied so that layers may work in place.

    Raises:
        TypeError: if they are neither a tensor nor a tuple.
    """
    if not isinstance(example_inputs, (Tensor, tuple)):
        raise TypeError(f"example_inputs must be a tensor or a tuple of inputs, got {type(example_inputs).__name__}")
    values = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return tuple(v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for v in values)


def cuda_devices(model: nn.Module, values: Iterable[Any]) -> list[int]:
    """The CUDA devices whose random state a run of ``model`` may change."""
    tensors = [*model.parameters(), *model.buffers(), *(value for value in values if isinstance(value, Tensor))]
    return sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})
