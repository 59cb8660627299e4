"""The inputs of a model, as examples of what it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["ExampleInputs", "InputWatch", "Inputs", "SilentHook"]


class Inputs(NamedTuple):
    """What a model is called with: ``model(*args, **kwargs)``.

    Example:
        >>> import torch
        >>> Inputs.of({"x": torch.zeros(2, 3)}).kwargs["x"].shape
        torch.Size([2, 3])
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: ExampleInputs) -> Inputs:
        """An input, a tuple of them or a dictionary of named ones, as arguments.

        Raises:
            TypeError: if it is none of these.
        """
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Tensor):
            return cls((example,), {})
        if isinstance(example, Mapping):
            return cls((), dict(example))
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
"""What functions take as an example of a model's inputs."""


class _Shape(NamedTuple):
    """A tensor without its data."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


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
        self._last = tree_map_only(Tensor, _shape_of, (args, kwargs))

    @property
    def inputs(self) -> Inputs | None:
        """What the module was last called with, on the meta device; None if it was not called."""
        if self._last is None:
            return None
        args, kwargs = tree_map_only(
            _Shape,
            lambda shape: torch.empty(shape.sizes, dtype=shape.dtype, device="meta"),
            self._last,
            is_leaf=lambda node: isinstance(node, _Shape),
        )
        return Inputs(args, kwargs)


def _shape_of(tensor: Tensor) -> _Shape:
    return _Shape(tuple(tensor.shape), tensor.dtype)
