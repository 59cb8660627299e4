"""The direction of a step: momentum whose rows are made orthogonal, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import StepCoefficients

__all__ = ["Mixing", "Step", "column_scales", "compute_steps", "row_mixers"]


_ITERATIONS = ((7.9424, -22.2873, 15.8239), (3.5875, -2.5845, 0.4893), (2.6604, -1.9134, 0.4194))
"""Coefficients of x, x^3 and x^5 in the polynomials that move singular values in (0, 1] towards 1.

Each is the odd quintic p with the least ``max |1 - p(x)|`` on an interval [l, u], found by a linear program on a fine
grid: first l = 0.01 and u = 1.02, then l and u are the least and the largest value of the polynomial before (u and 2 % more).
Together the three take [0.01, 1] to [0.71, 1.29] and multiply small singular values by 75. Rows are brought to one norm
afterwards, so that only the spread matters. Composing optimal polynomials is from Polar Express (Amsel et al., 2025).
"""


_COLUMN_POWER = 0.375
"""Columns are divided by this power of their norms, before and after rows are made orthogonal."""


_TINY = 1e-18
"""A norm below which a direction counts as zero; its square is still a float32."""


def column_scales(blocks: Tensor) -> Tensor:
    """Factors of the columns of blocks, applied before rows are made orthogonal and once more after.

    That is the -3/8th power of the norm that a column has among rows of norm 1; 0 for columns of zeros.

    Args:
        blocks: ``[*runs, blocks, k, columns]``, float32 or float64.

    Returns:
        ``[*runs, blocks, 1, columns]``.
    """
    rows = blocks / _threshold(torch.linalg.vector_norm(blocks, dim=-1, keepdim=True))
    return _threshold(torch.linalg.vector_norm(rows, dim=-2, keepdim=True)).pow(-_COLUMN_POWER)


def row_mixers(gram: Tensor) -> Tensor:
    """Matrices that make the rows of blocks nearly orthogonal, of any length, by a product from the left.

    Rows are brought to one norm; then the singular values of the block, from 0.01 to 1 relative to the fourth root of the sum
    of the fourth powers of all, go to 0.71 to 1.29. Rows of zeros stay so, with zero derivatives.

    Args:
        gram: Inner products of the rows of every block, ``[*runs, blocks, k, k]``, float32 or float64.

    Returns:
        ``[*runs, blocks, k, k]``. However long rows are, it costs nine products of k x k.
    """
    inverse_norms = _threshold(gram.diagonal(dim1=-2, dim2=-1), _TINY**2).rsqrt()
    cosines = gram * (inverse_norms.unsqueeze(-1) * inverse_norms.unsqueeze(-2))
    cosines = cosines.reshape(-1, *gram.shape[-2:])
    norms = torch.linalg.vector_norm(cosines, dim=(-2, -1), keepdim=True)
    power = cosines / norms.clamp_min(0.5)  # norms are at least 1 but for zeros
    mixers = None
    for index, (a, b, c) in enumerate(_ITERATIONS):
        factor = torch.baddbmm(power, power, power, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        mixers = factor if mixers is None else torch.bmm(factor, mixers)
        if index + 1 < len(_ITERATIONS):
            power = torch.bmm(torch.bmm(factor, power), factor)
    assert mixers is not None
    return mixers.reshape(gram.shape) * inverse_norms.unsqueeze(-2)


def _threshold(norm: Tensor, least: float = _TINY) -> Tensor:
    """Divisors that give zeros, with zero derivatives, where a norm vanishes."""
    return torch.threshold(norm, least, math.inf)


class Mixing(NamedTuple):
    """Factors that make the rows of blocks ``[*runs, blocks, k, columns]`` orthogonal."""

    scales: Tensor
    """``[*runs, blocks, 1, columns]``: what columns are multiplied by before and after."""
    mixers: Tensor
    """``[*runs, blocks, k, k]``: what they are multiplied by from the left."""


class Step(NamedTuple):
    """Step of one tensor. That of a large one is computed only when it is applied."""

    move: Tensor
    """``[*runs, *shape]``, or blocks of rows ``[*runs, blocks, k, columns]``."""
    lengths: Tensor | None = None
    """``[*runs, blocks]``: what rows are brought to in the end; None where ``move`` is the step."""
    mixing: Mixing | None = None
    """Mixing of rows before; None where every row is for itself."""

    def product(self) -> Tensor:
        """The step, of the shape of ``move``."""
        rows = self._rows()
        return rows if self.lengths is None else self._factors(rows, self.lengths) * rows

    def taken_from(self, params: Tensor) -> Tensor:
        """``params``, ``[*runs, *shape]``, less the step."""
        return params - self.product().reshape(params.shape)

    def take_from_(self, params: Tensor) -> None:
        """:meth:`taken_from` in place, without axes of runs."""
        if self.lengths is None or not params.is_contiguous():
            params.sub_(self.product().view(params.shape))
        else:
            rows = self._rows()
            params.view(rows.shape).addcmul_(self._factors(rows, self.lengths), rows, value=-1.0)

    def _rows(self) -> Tensor:
        if self.mixing is None:
            return self.move
        scales, mixers = self.mixing
        return torch.matmul(mixers, self.move * scales) * scales

    @staticmethod
    def _factors(rows: Tensor, lengths: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return lengths[..., None, None].to(norms.dtype) / _threshold(norms)


def compute_steps(
    momenta: Mapping[str, Tensor], coefficients: StepCoefficients, table: ParameterTable
) -> dict[str, Step]:
    """Steps to subtract from the parameters, once ``coefficients.decay_factors`` have shrunk them.

    Args:
        momenta: Gradient averages, this step's gradients included.
        coefficients, table: As for :func:`update`.

    Returns:
        Steps in float32, or in float64 where momenta are.
    """
    run_axes, known = coefficients.beta.dim(), table.tensors(coefficients.step_lengths)
    groups = [
        (group, group.blocks_of(view))
        for bucket in table.buckets
        for group, view in zip(bucket.groups, bucket.views(bucket.gather(momenta, run_axes)))
    ]
    lengths = coefficients.step_lengths.index_select(-1, known.block_tensors)
    all_lengths = torch.split(lengths, [blocks.shape[-3] for _, blocks in groups], dim=-1)
    mixings = _mixings([blocks for group, blocks in groups if group.is_mixed])
    steps: dict[str, Step] = {}
    for (group, blocks), own_lengths in zip(groups, all_lengths):
        step = Step(blocks, own_lengths, next(mixings) if group.is_mixed else None)
        if group.is_large:
            steps[table.names[group.rows[0]]] = step
            continue
        for row, move in zip(group.rows, group.tensors_of(step.product())):
            name = table.names[row]
            shape = table.shapes[name]
            fits = len(shape) == len(group.entries)
            steps[name] = Step(move if fits else move.reshape([*move.shape[:run_axes], *shape]))
    return steps


def _mixings(all_blocks: list[Tensor]) -> Iterator[Mixing]:
    """Mixing of the rows of blocks; the mixers are made together, padded with zeros to the size of the largest."""
    if not all_blocks:
        return
    most = max(blocks.shape[-2] for blocks in all_blocks)
    all_scales = [column_scales(blocks) for blocks in all_blocks]
    mixers = row_mixers(torch.cat([_gram(b * scales, most) for b, scales in zip(all_blocks, all_scales)], dim=-3))
    parts = torch.split(mixers, [blocks.shape[-3] for blocks in all_blocks], dim=-3)
    for blocks, scales, part in zip(all_blocks, all_scales, parts):
        size = blocks.shape[-2]
        yield Mixing(scales, part[..., :size, :size].to(blocks.dtype))


def _gram(blocks: Tensor, size: int) -> Tensor:
    """Inner products of the rows of every block, with zeros around them."""
    missing = size - blocks.shape[-2]
    gram = torch.matmul(blocks, blocks.mT)
    return F.pad(gram, [0, missing, 0, missing]) if missing else gram
