"""Random generators whose seed is a hash of their purpose."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator_for"]


def generator_for(*keys: int | str) -> torch.Generator:
    """Random generator of a name such as ``("noise", seed, step, task)``, always started afresh.

    Different names give unrelated numbers, so that what is drawn for one purpose never depends on what was drawn for
    another, on the order of the draws, or on the process that draws.

    Example:
        >>> torch.rand((), generator=generator_for("noise", 0)) == torch.rand((), generator=generator_for("noise", 0))
        tensor(True)
        >>> torch.rand((), generator=generator_for("noise", 0)) == torch.rand((), generator=generator_for("noise", "0"))
        tensor(False)
    """
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
