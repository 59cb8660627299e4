"""Inputs like given ones, of other sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from teleport_optim.symmetry.inputs import Inputs

__all__ = ["Growth", "grown", "growths"]


_SEED = 0
_SHORT = 64
"""Axes up to this length are made longer by half, others by one entry: large images are expensive."""


class Growth(NamedTuple):
    """Axes that are made longer: the first one (of examples) or all others of one length."""

    is_batch: bool
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.after} examples" if self.is_batch else f"{self.after} instead of {self.before}"


def _first_shape(inputs: Inputs) -> tuple[int, ...]:
    """The shape of the first input, which says what is an axis of examples; empty where nothing can grow."""
    tensors = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    first = next((tensor for tensor in tensors if tensor.dim() > 0), None)
    return () if first is None or first.numel() == 0 or first.layout != torch.strided else tuple(first.shape)


def growths(inputs: Inputs) -> Iterator[list[Growth]]:
    """Axes that may be made longer, each with the lengths that are tried, in this order."""
    batch, *lengths = _first_shape(inputs) or (None,)
    if batch is not None:
        yield [Growth(True, batch, batch + 1)]
    for length in dict.fromkeys(lengths):
        longer = (length + length // 2, length + 1)
        if length > 1:
            yield [
                Growth(False, length, after) for after in dict.fromkeys(longer if length <= _SHORT else longer[::-1])
            ]


def grown(inputs: Inputs, growths: list[Growth]) -> Inputs:
    """Inputs of another size: entries are repeated, floating point ones with other numbers, zeros and infinities kept."""
    generator = torch.Generator().manual_seed(_SEED)
    lengths = {growth.before: growth.after for growth in growths if not growth.is_batch}
    num_examples = _first_shape(inputs)[0]
    first_axis = lengths | {num_examples: num_examples} | {g.before: g.after for g in growths if g.is_batch}

    def grow(tensor: Tensor) -> Tensor:
        shape = tensor.shape
        for axis, size in enumerate(shape):
            after = (first_axis if axis == 0 else lengths).get(size, size)
            if after != size:
                tensor = tensor.index_select(axis, torch.arange(after, device=tensor.device) % size)
        if tensor.shape == shape or not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor * (0.1 * noise).exp().to(tensor.device)

    grown: Inputs = tree_map_only(Tensor, grow, inputs)
    return grown
