"""Splits, and what separates them: the sizes of networks, the rows and texts of data, and the random streams.

Meta-training draws problems from ``"train"``, a checkpoint is chosen on ``"validation"`` and reported on ``"test"``. Every
hidden size lies in one split only, so that no architecture occurs in two of them.
"""

from __future__ import annotations

import hashlib

__all__ = ["CHANNELS", "DIGIT_ROWS", "SEQUENCE_WIDTHS", "SPLITS", "TABLES", "WIDTHS", "check_split", "text_split"]

SPLITS = ("train", "validation", "test")
"""Names of the splits."""

WIDTHS: dict[str, tuple[int, ...]] = {
    "train": (16, 24, 32, 40, 48),
    "validation": (20, 28, 36, 44, 52),
    "test": (64, 72, 80, 96, 112, 128),
}
"""Hidden widths of perceptrons."""

CHANNELS: dict[str, tuple[int, ...]] = {"train": (8, 12, 16), "validation": (10, 14), "test": (20, 24, 32)}
"""Hidden channels of convolutional networks."""

SEQUENCE_WIDTHS: dict[str, tuple[int, ...]] = {
    "train": (16, 24, 32, 48),
    "validation": (20, 28, 36, 44),
    "test": (40, 56, 64),
}
"""Widths of transformers and recurrent networks; four heads divide each of them."""

DIGIT_ROWS: dict[str, tuple[int, int]] = {
    "train": (0, 500),
    "validation": (500, 700),
    "demo": (700, 1437),
    "test": (1437, 1797),
}
"""Rows of the digits data set, shuffled, for each use: all disjoint. No task draws from those of the demo."""

TABLES: dict[str, tuple[str, ...]] = {
    "train": ("wine",),
    "validation": ("iris",),
    "test": ("breast_cancer", "diabetes"),
}
"""Tabular data sets of scikit-learn."""

_TEXT_SHARES = ("train", "train", "train", "validation", "test")


def check_split(split: str) -> None:
    """Refuse a split that does not exist.

    Raises:
        ValueError: if ``split`` is none of ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; tasks have {', '.join(SPLITS)}")


def text_split(title: str) -> str:
    """The split of the text with this title: three fifths of all titles are for training.

    A hash of the title decides, so that texts that other versions of Python add or drop do not move the rest.
    """
    digest = hashlib.sha256(title.encode()).digest()
    return _TEXT_SHARES[int.from_bytes(digest, "big") % len(_TEXT_SHARES)]
