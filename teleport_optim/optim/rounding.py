"""Gradients that are nothing but rounding errors, such as that of a bias in front of a normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.shapes import in_full_precision
from teleport_optim.optim.sharding import full_tensor

__all__ = ["bias_pairs", "rounding_errors"]

_ROUNDING, _ROUNDING_64 = (32.0 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
"""A bias whose gradient is a smaller share of that of its matrix may have none but rounding errors."""
_AGREEMENT = 0.9
"""Least cosine with the momentum of a gradient that is so small and still no rounding error."""


def bias_pairs(table: ParameterTable) -> list[tuple[int, int]]:
    """Numbers of the biases, each with that of the matrix of its layer.

    The matrix is found by name, or else it is the last one before the bias, if it has as many rows.
    """
    numbers = {name: number for number, name in enumerate(table.names)}
    pairs = []
    last: str | None = None
    for name, shape in table.shapes.items():
        if name in table.matrices:
            last = name
        elif len(shape) == 1:
            own = next((n for n in (name.replace("bias", "weight"), last) if n in table.matrices and n != name), None)
            if own is not None and table.matrices[own][0] == shape[0]:
                pairs.append((numbers[name], numbers[own]))
    return pairs


def rounding_errors(
    pairs: Sequence[tuple[int, int]], norms: Sequence[float], grads: Sequence[Tensor], momenta: Sequence[Tensor]
) -> list[int]:
    """Numbers of the biases whose gradients are nothing but rounding errors.

    They are less than a few roundings of the gradient of the matrix of their layer, and do not agree from step to step. Neither
    changes when the loss or the layer is scaled. Such a bias would otherwise walk at full length in any direction.

    Args:
        pairs: :func:`bias_pairs` of the tensors.
        norms, grads: Of all tensors.
        momenta: Averages of the gradients before this step.
    """
    found = []
    for bias, matrix in pairs:
        grad = grads[bias]
        rounding = _ROUNDING_64 if grad.dtype == torch.float64 else _ROUNDING
        if 0.0 < norms[bias] < rounding * norms[matrix]:
            own, other = (in_full_precision(one).flatten() for one in (grad, full_tensor(momenta[bias])))
            # Divided by their largest entries, since squares of very small numbers are no floats.
            own, other = (one / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny) for one in (own, other))
            if not float(own @ other) > _AGREEMENT * float(own.norm() * other.norm()):
                found.append(bias)
    return found
