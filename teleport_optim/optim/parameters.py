"""What the update rule knows about a set of parameters before it sees a value: shapes, roles and symmetries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.symmetry.spec import Symmetry, SymmetrySpec

__all__ = [
    "Block",
    "Bucket",
    "Depth",
    "Group",
    "Layout",
    "Table",
    "as_real",
    "embedding_names",
    "in_full_precision",
    "matrix_shape",
]

NUM_STATIC_FEATURES = 9
BLOCK_ROWS = 64
"""Number of rows of a matrix that are made orthogonal to each other, unless a checkpoint says otherwise."""
_WIDTH = 128
"""Columns from which on the step of a row is shorter, with the root of their number."""
_MAX_GROUPED = 2**15
"""Most entries of what is updated together: tensors of one shape, or rows of one tensor that are for themselves."""


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


def as_real(tensor: Tensor) -> Tensor:
    """A view of complex numbers as pairs of real ones, ``[*shape, 2]``, or ``[2 * n]`` of a vector; a real tensor itself.

    Example:
        >>> as_real(torch.zeros(3, 2, dtype=torch.complex64)).shape, as_real(torch.zeros(3, dtype=torch.complex64)).shape
        (torch.Size([3, 2, 2]), torch.Size([6]))
    """
    if not tensor.is_complex():
        return tensor
    pairs = torch.view_as_real(tensor.detach().resolve_conj())
    return pairs.view(-1) if tensor.dim() == 1 else pairs


def embedding_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of ``model`` that are embedding tables.

    Example:
        >>> sorted(embedding_names(nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 1))))
        ['0.weight']
    """
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding))


class Table(NamedTuple):
    """What a layout knows, as tensors on one device: one row or column per parameter tensor, in the order of the names."""

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
    """``[num_tensors]``: where in ``Layout.buckets`` every tensor stands."""
    block_tensors: Tensor
    """``[num_blocks]``: the row of the tensor of every block, in the order of ``Layout.buckets``."""


class Depth(NamedTuple):
    """What the rate needs to know of a network as a whole, whichever of its tensors have a gradient."""

    num_layers: int
    """Number of matrices and kernels, embeddings not counted; at least 1."""
    is_linear: bool = False
    """Whether it has one matrix only."""

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], embeddings: Iterable[str] = (), *, is_whole: bool = False) -> Depth:
        """The depth of a network with tensors of these shapes; ``is_whole`` says that it is known to have no others."""
        matrices = [name for name, shape in shapes.items() if matrix_shape(shape) is not None]
        num_layers = len(set(matrices) - set(embeddings))
        return cls(max(1, num_layers), is_whole and len(matrices) == 1)


class Group(NamedTuple):
    """Tensors of one shape, which lie side by side in the vector of a bucket.

    Attributes:
        entries: Rows and columns of every one if they are matrices, else the number of entries.
        rows: Their rows in the layout.
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
    def of(cls, entries: tuple[int, ...], rows: Sequence[int], most: int) -> Group:
        """The group with blocks of at most ``most`` rows: as few as can be, or some more that have the same size."""
        num_rows = max(entries[0], 1) if len(entries) == 2 else 1
        num_blocks = -(-num_rows // most)
        even = (number for number in range(num_blocks, min(2 * num_blocks, num_rows) + 1) if num_rows % number == 0)
        num_blocks = next(even, num_blocks)
        is_large = num_rows % num_blocks == 0 and math.prod(entries) > _MAX_GROUPED
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


class Block(NamedTuple):
    """Rows of a tensor that are updated as one; a vector is one row."""

    tensor: int
    """Row of the tensor in the layout."""
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
    groups: tuple[Group, ...]
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


def in_full_precision(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 if it has 16 bits, else as it is."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _balances(symmetry: Symmetry) -> bool:
    """Whether a scaling takes from some tensors what it gives to others."""
    is_split = bool(symmetry.readers and symmetry.writers)
    return is_split and len({leg.name for leg in symmetry.legs}) > 1


@dataclass(frozen=True)
class Layout:
    """The static side of an update: one row per parameter tensor, in a fixed order.

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
    ) -> Layout:
        """The layout of ``tensors``; of ``spec`` it keeps the exact scalings that balance none but these tensors.

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
            if shape.numel() > _MAX_GROUPED:
                large.append({entries: [row]})
            else:
                small.setdefault(entries, []).append(row)
        return tuple(self._bucket(groups) for groups in ([small] if small else []) + large)

    @property
    def blocks(self) -> list[Block]:
        """All blocks of all tensors; those whose rows are for themselves are as large as the cache of a processor likes."""
        blocks = []
        for group in (group for bucket in self.buckets for group in bucket.groups):
            rows, columns = group.entries if group.is_matrix else (1, *group.entries)
            most = group.block_size if group.is_mixed else max(1, _MAX_GROUPED // max(columns, 1))
            for tensor in group.rows:
                for first in range(0, rows if columns else 0, most):
                    blocks.append(Block(tensor, first * columns, min(most, rows - first), columns, group.is_mixed))
        return blocks

    def _bucket(self, rows: Mapping[tuple[int, ...], Sequence[int]]) -> Bucket:
        groups = tuple(Group.of(entries, members, self.block_rows) for entries, members in rows.items())
        names = tuple(self.names[row] for group in groups for row in group.rows)
        return Bucket(names, groups, tuple(len(group.rows) * math.prod(group.entries) for group in groups))

    def with_blocks_of(self, block_rows: int) -> Layout:
        """This layout, with blocks of at most so many rows."""
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

    def table(self, like: Tensor) -> Table:
        """What the layout knows, of the device and dtype of ``like``; kept, since every step needs it."""
        key = (like.device, like.dtype)
        if key not in self._tables:
            groups = [group for bucket in self.buckets for group in bucket.groups]
            block_tensors = [row for group in groups for row in group.rows for _ in range(group.num_blocks)]
            order = torch.tensor([row for group in groups for row in group.rows], dtype=torch.int64)
            table = Table(
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
            self._tables[key] = Table(*floats)
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
    def _tables(self) -> dict[tuple[torch.device, torch.dtype], Table]:
        return {}

    @cached_property
    def _variants(self) -> dict[int, Layout]:
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
