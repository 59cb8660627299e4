"""What the update rule knows about a set of parameters before it sees a value: shapes, roles and symmetries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["Layout", "matrix_shape"]

NUM_STATIC_FEATURES = 9


def matrix_shape(shape: torch.Size) -> tuple[int, int] | None:
    """How the rule reads a tensor: ``(rows, columns)``, rows being output units, or None for a vector.

    Kernels ``[out, in, k, k]`` are read as ``out x (in * k * k)``. Leading axes of length one are dropped (position
    embeddings ``[1, n, d]``); a tensor with more than two axes that leaves a single column (a gain per channel) is a
    vector.

    Example:
        >>> matrix_shape(torch.Size([16, 3, 5, 5])), matrix_shape(torch.Size([16])), matrix_shape(torch.Size([16, 1, 1]))
        ((16, 75), None, None)
    """
    sizes = list(shape)
    while len(sizes) > 2 and sizes[0] == 1:
        sizes.pop(0)
    if len(sizes) < 2:
        return None
    columns = math.prod(sizes[1:])
    if len(shape) > 2 and columns == 1:
        return None
    return sizes[0], columns


@dataclass(frozen=True)
class Layout:
    """The static side of an update: one row per parameter tensor, in a fixed order.

    Attributes:
        shapes: Shape of every tensor, by name; the order of the names is the order of all per-tensor rows.
        spec: The positive scalings along which the rule may teleport; every leg lies on a tensor of ``shapes``.
        embeddings: Names of embedding tables, which do not count as layers.
    """

    shapes: Mapping[str, torch.Size]
    spec: SymmetrySpec
    embeddings: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], spec: SymmetrySpec | None = None, embeddings: Iterable[str] = ()
    ) -> Layout:
        """The layout of ``tensors``; of ``spec`` it keeps the exact scalings that move none but these tensors."""
        scalings = () if spec is None else spec.of_group("scaling").symmetries
        usable = tuple(s for s in scalings if s.exact and all(leg.name in tensors for leg in s.legs))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return cls(shapes, SymmetrySpec(usable), frozenset(embeddings) & set(shapes))

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
    def groups(self) -> tuple[tuple[tuple[int, int] | None, tuple[int, ...]], ...]:
        """Rows of tensors that are updated as one batch: those of one matrix shape, and the vectors of one shape."""
        rows: dict[tuple[tuple[int, int] | None, torch.Size | None], list[int]] = {}
        for row, (name, shape) in enumerate(self.shapes.items()):
            matrix = self.matrices.get(name)
            rows.setdefault((matrix, None if matrix else shape), []).append(row)
        return tuple((matrix, tuple(members)) for (matrix, _), members in rows.items())

    @cached_property
    def num_layers(self) -> int:
        """Number of matrices and kernels, embeddings not counted; at least 1."""
        return max(1, sum(name not in self.embeddings for name in self.matrices))

    @cached_property
    def step_scale(self) -> Tensor:
        """Shape ``[num_tensors]``: RMS of a unit step, 1/sqrt(columns) for matrices and 1/4 for vectors."""
        scales = [self.matrices[name][1] ** -0.5 if name in self.matrices else 0.25 for name in self.names]
        return torch.tensor(scales, dtype=torch.float64)

    @cached_property
    def is_matrix(self) -> Tensor:
        """Shape ``[num_tensors]``: 1 for matrices, 0 for vectors."""
        return torch.tensor([float(name in self.matrices) for name in self.names])

    @cached_property
    def site_weights(self) -> Tensor:
        """Shape ``[num_sites, num_tensors]``: averages a per-tensor quantity over the matrices on the legs of a site."""
        weights = torch.zeros(len(self.spec), len(self.names))
        for site, symmetry in enumerate(self.spec):
            for leg in symmetry.legs:
                if leg.name in self.matrices:
                    weights[site, self.names.index(leg.name)] = 1.0
        return weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)

    @cached_property
    def static_features(self) -> Tensor:
        """Shape ``[num_tensors, NUM_STATIC_FEATURES]``: role, size and depth of every tensor, of order one."""
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
