"""Data to train on: scikit-learn's digits and tables, the texts of Python's own documentation, and minibatches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_optim.meta_training.tasks.splits import DIGIT_ROWS, text_split

__all__ = [
    "ALPHABET",
    "Data",
    "Table",
    "add_noise",
    "digits",
    "minibatches",
    "paragraphs",
    "standardise",
    "table",
    "text",
]

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;()[]'\"-_=*/\N{REPLACEMENT CHARACTER}"
"""The characters of :func:`text`; the last stands for all that are not listed."""


def _load(name: str) -> tuple[Any, Any]:
    """Inputs and targets of a data set of scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"the data set {name!r} is missing; it comes with scikit-learn: pip install 'teleport-optim[cli]'"
        ) from error
    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    return inputs, targets


@dataclass(frozen=True)
class Data:
    """Examples that one network is trained and tested on.

    Attributes:
        inputs, targets: Training examples, ``[n, ...]`` each.
        test_inputs, test_targets: Test examples.
        loss: Output and target to a mean loss.
        noise: Standard deviation of the noise that is added to the inputs of a minibatch, so that no example is seen twice;
            0 for inputs that are integers.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    noise: float = 0.0


def minibatches(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw minibatches without end: inputs, with noise, and targets of examples drawn with replacement.

    Example:
        >>> data = Data(torch.zeros(9, 4), torch.zeros(9), torch.zeros(2, 4), torch.zeros(2), noise=1.0)
        >>> inputs, targets = next(minibatches(data, 3, torch.Generator().manual_seed(0)))
        >>> inputs.shape, targets.shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    while True:
        yield _minibatch(data, size, generator)


def _minibatch(data: Data, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(data.inputs), (size,), generator=generator)
    return add_noise(data.inputs[rows], data.noise, generator), data.targets[rows]


def add_noise(inputs: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of this standard deviation; without any, nothing is drawn."""
    return inputs + std * torch.randn(inputs.shape, generator=generator) if std else inputs


def standardise(values: Tensor) -> Tensor:
    """Bring every column to zero mean and unit variance."""
    return (values - values.mean(dim=0)) / values.std(dim=0)


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    images, labels = _load("digits")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(images, dtype=torch.float32)[order] / 8.0 - 0.6
    return inputs, torch.tensor(labels, dtype=torch.int64)[order]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Handwritten digits: inputs ``[n, 64]`` of about zero mean and unit variance, and labels ``[n]`` from 0 to 9.

    Args:
        split: One of ``DIGIT_ROWS``: those of the tasks, and "demo", on which the demo trains.

    Raises:
        ValueError: for an unknown split.
        ImportError: if scikit-learn is not installed.
    """
    if split not in DIGIT_ROWS:
        raise ValueError(f"no split {split!r} of the digits; there are {sorted(DIGIT_ROWS)}")
    start, stop = DIGIT_ROWS[split]
    inputs, labels = _all_digits()
    return inputs[start:stop], labels[start:stop]


@dataclass(frozen=True)
class Table:
    """A tabular data set.

    Attributes:
        columns: Standardised numbers, ``[n, num_columns]``.
        labels: Classes ``[n]``, or None where the table has none.
    """

    columns: Tensor
    labels: Tensor | None

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1


@cache
def table(name: str) -> Table:
    """A table of scikit-learn; the target of a regression counts as one more column.

    Args:
        name: ``"wine"``, ``"iris"``, ``"breast_cancer"`` or ``"diabetes"``.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    values, targets = _load(name)
    columns, targets = torch.tensor(values, dtype=torch.float64), torch.tensor(targets)
    has_classes = not targets.is_floating_point()
    if not has_classes:
        columns = torch.cat([columns, targets[:, None]], dim=1)
    return Table(standardise(columns).float(), targets if has_classes else None)


@cache
def paragraphs(split: str) -> tuple[str, ...]:
    """The paragraphs of Python's reference (``pydoc_data.topics``) whose topics belong to a split, in lower case.

    Some topics contain others. Every paragraph is kept once, with the alphabetically first topic that has it, and so
    belongs to one split only. The texts are those of the running Python and differ between its versions.

    Raises:
        ImportError: if this Python comes without its reference.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "the text of the character-level tasks is Python's reference, pydoc_data.topics, which this Python lacks: "
            "install the complete standard library, or leave out the tasks whose names start with 'char_'"
        ) from error
    owners: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            owners.setdefault(" ".join(paragraph.lower().split()), text_split(topic))
    return tuple(paragraph for paragraph, owner in owners.items() if owner == split and paragraph)


@cache
def text(split: str) -> Tensor:
    """The paragraphs of a split in one row, as positions in ``ALPHABET``: int64 ``[n]``."""
    positions = {character: index for index, character in enumerate(ALPHABET)}
    return torch.tensor([positions.get(character, len(ALPHABET) - 1) for character in " ".join(paragraphs(split))])
