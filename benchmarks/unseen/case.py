"""One model to check: how it is built, and inputs of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Case", "Sizes"]


class Sizes(NamedTuple):
    """Batch and length (of a sequence, a side of an image, ...): of the example that is searched, and others."""

    example: tuple[int, int]
    other: tuple[int, int]


class Case(NamedTuple):
    """A model with random weights, and what it takes.

    Attributes:
        kind: The library that it comes from, or ``"hand-built"``.
        build: Builds it; the caller seeds the global random state.
        inputs: Inputs by batch and length: a tensor, a tuple or a dictionary of named ones.
        sizes: Batch and length of the example, and other ones that the model takes too.
    """

    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    sizes: Sizes

    @property
    def package(self) -> str:
        """The package that must be installed, if any."""
        return "" if self.kind == "hand-built" else self.kind
