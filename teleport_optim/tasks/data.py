"""Embedded data for inner problems: real 8x8 digits from scikit-learn, and procedural regression and classification."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["SPLITS", "digits"]

SPLITS: dict[str, tuple[int, int]] = {
    "train": (0, 500),
    "validation": (500, 700),
    "demo": (700, 1437),
    "test": (1437, 1797),
}
"""Rows of the digits data set, which lie in the order of its authors' shuffle below, for each use: all disjoint."""


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data set comes from scikit-learn: pip install 'teleport-optim[cli]'") from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(images, dtype=torch.float32)[order] / 8.0 - 0.6
    return inputs, torch.tensor(labels, dtype=torch.int64)[order]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Handwritten digits: inputs ``[n, 64]`` of about zero mean and unit variance, and labels ``[n]`` from 0 to 9.

    Args:
        split: One of ``SPLITS``; meta-training sees "train", choosing a checkpoint "validation", the demo trains on
            "demo" and tests on "test".

    Raises:
        ValueError: for an unknown split.
        ImportError: if scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} of the digits; there are {sorted(SPLITS)}")
    start, stop = SPLITS[split]
    inputs, labels = _all_digits()
    return inputs[start:stop], labels[start:stop]
