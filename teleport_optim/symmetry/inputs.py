"""The inputs of a model, as examples of what it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

__all__ = ["ExampleInputs", "InputWatch", "Inputs", "SilentHook"]


class Inputs(NamedTuple):
    """Arguments of a call of a model: ``model(*args, **kwargs)``.

    Example:
        >>> import torch
        >>> Inputs.of({"x": torch.zeros(2, 3)}).kwargs["x"].shape
        torch.Size([2, 3])
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: ExampleInputs, model: nn.Module | None = None) -> Inputs:
        """An input, a tuple of them or a dictionary of named ones, as arguments.

        A dictionary is the one argument of a ``model`` that does not take its entries by name.

        Raises:
            TypeError: if it is none of these.
        """
        if isinstance(example, Inputs):
            return example
        if isinstance(example, (Tensor, PackedSequence)):
            return cls((example,), {})
        if isinstance(example, Mapping):
            return cls((example,), {}) if model is not None and _takes_one(model, example) else cls((), dict(example))
        if not isinstance(example, tuple):
            raise TypeError(
                f"example_inputs must be a tensor, a tuple of inputs or a dictionary of named ones, got {type(example).__name__}"
            )
        return cls(example, {})

    def copy(self) -> Inputs:
        """The same inputs in new memory, so that a model may work on them in place."""
        copied: Inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), self)
        return copied


ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | Inputs
"""Forms in which functions take an example of a model's inputs."""


def _takes_one(model: nn.Module, example: Mapping[str, Any]) -> bool:
    """Whether a model takes a dictionary as its one argument, and not the entries by their names."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # it is written in C
        return False
    return not _binds(signature, **example) and _binds(signature, example)


def _binds(signature: inspect.Signature, /, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


class _Shape(NamedTuple):
    """A tensor without its data."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


class _Unseen(NamedTuple):
    """An input that has no shape of the usual kind."""

    kind: str


class SilentHook:
    """A hook that does not change what its module computes, so that the search takes no notice of it."""


class InputWatch(SilentHook):
    """A forward pre-hook that keeps the shapes of the last call's inputs.

    It may be compiled with the model: it holds no data, asks nothing and does the same at every call.

    Attributes:
        is_compiled: Whether it was compiled with the model, which would be compiled again if the hook were taken away.
    """

    def __init__(self) -> None:
        self.is_compiled = False
        self._last: tuple[Any, Any] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.is_compiled = torch.compiler.is_compiling()
        self._last = (_outline(args), _outline(kwargs))

    @property
    def inputs(self) -> Inputs | None:
        """Arguments of the last call, on the meta device; None if there was no call.

        Raises:
            TypeError: if it was called with a tensor that has no shape of the usual kind.
        """
        if self._last is None:
            return None
        args, kwargs = map(_on_meta, self._last)
        return Inputs(args, kwargs)


def _outline(value: Any) -> Any:
    """An input with the shapes of its tensors in their place. It must not fail: the call of the model goes on after it."""
    if isinstance(value, PackedSequence):
        return _Unseen("a PackedSequence")
    if isinstance(value, Tensor):
        is_usual = value.layout == torch.strided and not value.is_nested
        return _Shape(tuple(value.shape), value.dtype) if is_usual else _Unseen("a nested or sparse tensor")
    kind = type(value)
    if kind is tuple:
        return tuple([_outline(entry) for entry in value])
    if kind is list:
        return [_outline(entry) for entry in value]
    if kind is dict:
        return {key: _outline(entry) for key, entry in value.items()}
    return value


def _on_meta(outline: Any) -> Any:
    kind = type(outline)
    if kind is _Shape:
        return torch.empty(outline.sizes, dtype=outline.dtype, device="meta")
    if kind is _Unseen:
        raise TypeError(
            f"the model was called with {outline.kind}, whose shape does not tell what operations make of it: pass "
            "example_inputs of plain tensors if the model takes them, or teleport=False"
        )
    if kind in (tuple, list):
        return kind(map(_on_meta, outline))
    if kind is dict:
        return {key: _on_meta(entry) for key, entry in outline.items()}
    return outline
