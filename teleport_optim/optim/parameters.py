"""Facts about a set of parameters that hold before any value is seen: shapes, roles and symmetries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_optim.optim.buckets import MAX_GROUPED, Bucket, RowBlock, ShapeGroup
from teleport_optim.optim.shapes import BLOCK_ROWS, Depth, matrix_shape
from teleport_optim.symmetry.spec import Symmetry, SymmetrySpec

__all__ = ["ParameterTable", "ParameterTensors"]

NUM_STATIC_FEATURES = 9
_WIDTH = 128
"""Columns from which on the step of a row is shorter, with the root of their number."""


class ParameterTensors(NamedTuple):
    """Facts of a table as tensors on one device: one row or column per parameter tensor, in the order of the names."""

    step_scale: Tensor
    """``[num_tensors]``: RMS of a unit step, step_length/sqrt(columns) for matrices and 1/6 for vectors."""
    step_length: Tensor
    """``[num_tensors]``: the Euclidean length of a row of it if it is a matrix, 1 unless that is wide, else of all of it."""
    is_matrix: Tensor
    """``[num_tensors]``: 1 for matrices, 0 for vectors."""
    size: Tensor
    """``[num_tensors]``: number of entries, at least 1."""
    static_features: Tensor
    """``[num_tensors, NUM_STATIC_FEATURES]``: role, size and depth, of order one."""
    site_weights: Tensor
    """``[num_sites, num_tensors]``: averages a per-tensor quantity over the matrices on the legs of a site."""
    inverse_order: Tensor
    """``[num_tensors]``: where in ``ParameterTable.buckets`` every tensor stands."""
    block_tensors: Tensor
    """``[num_blocks]``: the row of the tensor of every block, in the order of ``ParameterTable.buckets``."""


def _balances(symmetry: Symmetry) -> bool:
    """Whether a scaling takes from some tensors what it gives to others."""
    is_split = bool(symmetry.readers and symmetry.writers)
    return is_split and len({leg.name for leg in symmetry.legs}) > 1


@dataclass(frozen=True)
class ParameterTable:
    """Facts about the parameters of an update: one row per tensor, in a fixed order.

    Attributes:
        shapes: Shape of every tensor, by name; the order of the names is the order of all per-tensor rows.
        spec: The positive scalings along which the rule may teleport; every leg lies on a tensor of ``shapes``.
        embeddings: Names of embedding tables, which do not count as layers.
        depth: Depth of the network that they are of; that of these tensors where it is not given.
        block_rows: Number of rows of a matrix that are made orthogonal to each other, at most.
    """

    shapes: Mapping[str, torch.Size]
    spec: SymmetrySpec
    embeddings: frozenset[str] = frozenset()
    depth: Depth | None = None
    block_rows: int = BLOCK_ROWS

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        spec: SymmetrySpec | None = None,
        embeddings: Iterable[str] = (),
        *,
        depth: Depth | None = None,
        block_rows: int = BLOCK_ROWS,
    ) -> ParameterTable:
        """The table of ``tensors``; of ``spec`` it keeps the exact scalings that balance none but these tensors.

        A scaling of one tensor alone, or of tensors that are all written (a weight that is divided by its norm), balances nothing.
        """
        scalings = () if spec is None else spec.of_group("scaling").symmetries
        usable = tuple(s for s in scalings if s.exact and _balances(s) and all(leg.name in tensors for leg in s.legs))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return cls(shapes, SymmetrySpec(usable), frozenset(embeddings) & set(shapes), depth, block_rows)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in row order."""
        return tuple(self.shapes)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """``(rows, columns)`` of every tensor that is read as a matrix."""
        shapes = {name: matrix_shape(shape) for name, shape in self.shapes.items()}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """All tensors, in buckets that are updated as one: the small ones together, every large one alone.

        To copy large tensors together would cost more than it saves.
        """
        small: dict[tuple[int, ...], list[int]] = {}
        large: list[dict[tuple[int, ...], list[int]]] = []
        for row, (name, shape) in enumerate(self.shapes.items()):
            entries: tuple[int, ...] = self.matrices.get(name) or (shape.numel(),)
            if shape.numel() > MAX_GROUPED:
                large.append({entries: [row]})
            else:
                small.setdefault(entries, []).append(row)
        return tuple(self._bucket(groups) for groups in ([small] if small else []) + large)

    @property
    def blocks(self) -> list[RowBlock]:
        """All blocks of all tensors; those whose rows are for themselves are as large as the cache of a processor likes."""
        blocks = []
        for group in (group for bucket in self.buckets for group in bucket.groups):
            rows, columns = group.entries if group.is_matrix else (1, *group.entries)
            most = group.block_size if group.is_mixed else max(1, MAX_GROUPED // max(columns, 1))
            for tensor in group.rows:
                for first in range(0, rows if columns else 0, most):
                    blocks.append(RowBlock(tensor, first * columns, min(most, rows - first), columns, group.is_mixed))
        return blocks

    def _bucket(self, rows: Mapping[tuple[int, ...], Sequence[int]]) -> Bucket:
        groups = tuple(ShapeGroup.of(entries, members, self.block_rows) for entries, members in rows.items())
        names = tuple(self.names[row] for group in groups for row in group.rows)
        return Bucket(names, groups, tuple(len(group.rows) * math.prod(group.entries) for group in groups))

    def with_blocks_of(self, block_rows: int) -> ParameterTable:
        """This table, with blocks of at most so many rows."""
        if block_rows == self.block_rows:
            return self
        return self._variants.setdefault(block_rows, replace(self, block_rows=block_rows))

    @cached_property
    def is_linear(self) -> bool:
        """Whether they are known to be of a model of one matrix, such as logistic regression."""
        return self.depth is not None and self.depth.is_linear

    @cached_property
    def num_layers(self) -> int:
        """Number of matrices and kernels of the network, embeddings not counted; at least 1."""
        return (self.depth or Depth.of(self.shapes, self.embeddings)).num_layers

    def row_shape(self, name: str) -> torch.Size:
        """Shape of one number for each row of a tensor, or one for a vector, that goes with the tensor."""
        shape = self.shapes[name]
        if name not in self.matrices:
            return torch.Size([1] * len(shape))
        axis = 0
        while len(shape) - axis > 2 and shape[axis] == 1:
            axis += 1
        return torch.Size([size if other == axis else 1 for other, size in enumerate(shape)])

    def tensors(self, like: Tensor) -> ParameterTensors:
        """The facts as tensors of the device and dtype of ``like``; kept, since every step needs them."""
        key = (like.device, like.dtype)
        if key not in self._tables:
            groups = [group for bucket in self.buckets for group in bucket.groups]
            block_tensors = [row for group in groups for row in group.rows for _ in range(group.num_blocks)]
            order = torch.tensor([row for group in groups for row in group.rows], dtype=torch.int64)
            table = ParameterTensors(
                step_scale=torch.tensor([self._step_scale(name) for name in self.names], dtype=torch.float64),
                step_length=torch.tensor([self._step_length(name) for name in self.names], dtype=torch.float64),
                is_matrix=torch.tensor([name in self.matrices for name in self.names], dtype=torch.float32),
                size=torch.tensor([max(shape.numel(), 1) for shape in self.shapes.values()], dtype=torch.float32),
                static_features=self._static_features(),
                site_weights=self._site_weights(),
                inverse_order=torch.argsort(order),
                block_tensors=torch.tensor(block_tensors, dtype=torch.int64),
            )
            floats = (tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device) for tensor in table)
            self._tables[key] = ParameterTensors(*floats)
        return self._tables[key]

    def _step_length(self, name: str) -> float:
        """Length of a row (of all of a vector) of the step of a tensor at rate 1."""
        if name not in self.matrices:
            return math.sqrt(self.shapes[name].numel()) / 6
        return 1.0 if name in self.embeddings else math.sqrt(_WIDTH / max(self.matrices[name][1], _WIDTH))

    def _step_scale(self, name: str) -> float:
        """Root mean square of such a step."""
        if name not in self.matrices:
            return 1 / 6
        return self._step_length(name) / math.sqrt(max(self.matrices[name][1], 1))

    @cached_property
    def _tables(self) -> dict[tuple[torch.device, torch.dtype], ParameterTensors]:
        return {}

    @cached_property
    def _variants(self) -> dict[int, ParameterTable]:
        return {}

    def teleport_sizes(self, site_sizes: Tensor) -> dict[str, float]:
        """RMS over sites, for every tensor that is on one, of the sizes ``[num_sites]`` of a teleport."""
        squares: dict[str, list[float]] = {}
        for symmetry, size in zip(self.spec, site_sizes.tolist()):
            for name in {leg.name for leg in symmetry.legs}:
                squares.setdefault(name, []).append(size**2)
        return {name: math.sqrt(sum(own) / len(own)) for name, own in squares.items()}

    def _site_weights(self) -> Tensor:
        weights = torch.zeros(len(self.spec), len(self.names), dtype=torch.float32)
        for site, symmetry in enumerate(self.spec):
            for leg in symmetry.legs:
                if leg.name in self.matrices:
                    weights[site, self.names.index(leg.name)] = 1.0
        return weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)

    def _static_features(self) -> Tensor:
        positions = {name: index for index, name in enumerate(self.matrices)}
        last = max(len(positions) - 1, 1)
        rows = []
        position = 0
        for name, shape in self.shapes.items():
            position = positions.get(name, position)
            out_size, in_size = self.matrices.get(name, (shape.numel(), 1))
            rows.append(
                [
                    float(name in self.matrices),
                    float(name in self.embeddings),
                    float(len(shape) > 2),
                    float(position == 0),
                    float(position == len(positions) - 1),
                    2.0 * position / last - 1.0,
                    (math.log(max(in_size, 1)) - 3.0) / 3.0,
                    (math.log(max(out_size, 1)) - 3.0) / 3.0,
                    math.log(self.num_layers) / 2.0,
                ]
            )
        return torch.tensor(rows, dtype=torch.float32).reshape(len(self.shapes), NUM_STATIC_FEATURES)
