"""Tensors that are updated together: groups of one shape, blocks of rows, and buckets that are one vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_optim.optim.shapes import in_full_precision

__all__ = ["MAX_GROUPED", "Bucket", "RowBlock", "ShapeGroup"]


MAX_GROUPED = 2**15
"""Most entries of what is updated together: tensors of one shape, or rows of one tensor that are for themselves."""


class ShapeGroup(NamedTuple):
    """Tensors of one shape, which lie side by side in the vector of a bucket.

    Attributes:
        entries: Rows and columns of every one if they are matrices, else the number of entries.
        rows: Their rows in the table.
        num_blocks: Number of blocks of rows of every one; a vector is one row.
        block_size: Number of rows of a block; the last block of a matrix may have fewer.
        is_large: Whether it is one large tensor of full blocks.
    """

    entries: tuple[int, ...]
    rows: tuple[int, ...]
    num_blocks: int
    block_size: int
    is_large: bool

    @classmethod
    def of(cls, entries: tuple[int, ...], rows: Sequence[int], most: int) -> ShapeGroup:
        """The group with blocks of at most ``most`` rows: as few as can be, or some more that have the same size."""
        num_rows = max(entries[0], 1) if len(entries) == 2 else 1
        num_blocks = -(-num_rows // most)
        even = (number for number in range(num_blocks, min(2 * num_blocks, num_rows) + 1) if num_rows % number == 0)
        num_blocks = next(even, num_blocks)
        is_large = num_rows % num_blocks == 0 and math.prod(entries) > MAX_GROUPED
        return cls(entries, tuple(rows), num_blocks, -(-num_rows // num_blocks), is_large)

    @property
    def is_matrix(self) -> bool:
        """Whether they are matrices."""
        return len(self.entries) == 2

    @property
    def is_mixed(self) -> bool:
        """Whether blocks have more than one row."""
        return self.block_size > 1

    def blocks_of(self, tensors: Tensor) -> Tensor:
        """Tensors ``[*runs, len(rows), *entries]`` as blocks ``[*runs, blocks, block_size, columns]``; zeros fill the last ones."""
        if not self.is_matrix:
            return tensors.unsqueeze(-2)
        missing = self.num_blocks * self.block_size - self.entries[0]
        if missing:
            tensors = F.pad(tensors, [0, 0, 0, missing])
        return tensors.reshape(
            [*tensors.shape[:-3], len(self.rows) * self.num_blocks, self.block_size, self.entries[1]]
        )

    def tensors_of(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """The tensors of blocks, each ``[*runs, *entries]``."""
        runs = blocks.shape[:-3]
        if not self.is_matrix:
            return blocks.squeeze(-2).unbind(-2)
        padded = blocks.reshape([*runs, len(self.rows), self.num_blocks * self.block_size, self.entries[1]])
        return padded.narrow(-2, 0, self.entries[0]).unbind(-3)


class RowBlock(NamedTuple):
    """Rows of a tensor that are updated as one; a vector is one row."""

    tensor: int
    """Row of the tensor in the table."""
    offset: int
    """First entry of the block in the tensor."""
    rows: int
    columns: int
    is_mixed: bool
    """Whether the rows are made orthogonal to each other, or every row is for itself."""

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.rows * self.columns

    @property
    def work(self) -> int:
        """About how many multiplications its update takes."""
        side = min(self.rows, self.columns)
        return 10 * side**3 + 2 * side * self.size if self.is_mixed else 4 * self.size


class Bucket(NamedTuple):
    """Tensors that are updated as one long vector.

    Attributes:
        names: Their names, in the order in which they lie in the vector.
        groups: What it consists of.
        sizes: Number of entries of every group.
    """

    names: tuple[str, ...]
    groups: tuple[ShapeGroup, ...]
    sizes: tuple[int, ...]

    def gather(self, tensors: Mapping[str, Tensor], run_axes: int) -> Tensor:
        """The tensors, each ``[*runs, *shape]``, as one vector ``[*runs, n]``; 16-bit ones become float32."""
        parts = []
        for name in self.names:
            tensor = tensors[name]
            parts.append(tensor.flatten(run_axes) if tensor.dim() > run_axes else tensor.unsqueeze(-1))
        return in_full_precision(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    def views(self, vector: Tensor) -> list[Tensor]:
        """The groups in a vector ``[*runs, n]``, each ``[*runs, len(rows), *entries]``."""
        runs = vector.shape[:-1]
        parts = torch.split(vector, list(self.sizes), dim=-1)
        return [part.view([*runs, len(group.rows), *group.entries]) for group, part in zip(self.groups, parts)]
