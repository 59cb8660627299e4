"""Shapes of tensors as the rule reads them: matrices or vectors, real numbers, and the depth of a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["BLOCK_ROWS", "Depth", "as_real", "embedding_names", "in_full_precision", "matrix_shape"]


BLOCK_ROWS = 64
"""Number of rows of a matrix that are made orthogonal to each other, unless a checkpoint says otherwise."""


def matrix_shape(shape: torch.Size) -> tuple[int, int] | None:
    """Shape of a tensor as a matrix, ``(rows, columns)`` with output units as rows, or None for a vector.

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


class Depth(NamedTuple):
    """Depth of a network as a whole, whichever of its tensors have a gradient; the rate depends on it."""

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


def in_full_precision(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 if it has 16 bits, else as it is."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
