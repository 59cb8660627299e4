"""The inputs of a model, as examples of what it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["ExampleInputs", "Inputs"]


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
