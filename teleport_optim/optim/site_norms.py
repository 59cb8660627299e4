"""Norms of what writes into the channels of a site and of what reads from them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from teleport_optim.symmetry.moves import channel_squares
from teleport_optim.symmetry.spec import Leg, Symmetry

__all__ = ["log_ratio", "site_log_norms"]


def site_log_norms(symmetry: Symmetry, tensors: Mapping[str, Tensor], run_axes: int = 0) -> Tensor:
    """Per channel, the logs of the squared norms of what reads it and of what writes it, shape ``[*runs, 2, size]``.

    A channel with nothing (or nothing finite) on one side gives zeros: there is nothing to balance.

    Args:
        symmetry: The site.
        tensors: Tensors by name, with ``run_axes`` axes of runs in front of those of the parameter.
        run_axes: Number of axes of runs.
    """

    def total(legs: tuple[Leg, ...]) -> Tensor:
        return functools.reduce(torch.add, [channel_squares(symmetry, leg, tensors, run_axes) for leg in legs])

    norms = torch.stack([total(symmetry.readers), total(symmetry.writers)], dim=-2)
    is_usable = ((norms > 0) & torch.isfinite(norms)).all(dim=-2, keepdim=True)
    return torch.log(torch.where(is_usable, norms, 1.0)).float()


def log_ratio(log_norms: Tensor) -> Tensor:
    """Reading over writing: ``[*runs, 2, size]`` of :func:`site_log_norms` to ``[*runs, size]``."""
    return log_norms[..., 0, :] - log_norms[..., 1, :]
