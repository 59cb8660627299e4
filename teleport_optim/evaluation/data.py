"""What the data of comparisons have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from teleport_optim.evaluation.problem import Data
from teleport_optim.meta_training.tasks.data import ALPHABET, text

__all__ = ["NUM_EXAMPLES", "split_rows", "standardised", "windows"]

_NUM_TEST_EXAMPLES = 512
NUM_EXAMPLES = 4096 + _NUM_TEST_EXAMPLES
"""Examples of data that are made here, those for the test included."""


def windows(split: str, length: int) -> Data:
    """Overlapping windows of the text of a split and the characters that follow.

    The last fifth of the text is for the test, without those of its windows that the other part has too.
    """
    characters = text(split)
    border = len(characters) * 4 // 5
    train = characters[:border].unfold(0, length + 1, 11)
    test = characters[border:].unfold(0, length + 1, length)
    known = _as_string(characters[:border])
    test = test[[_as_string(window[:-1]) not in known for window in test]][:128]
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], _next_character_loss)


def _as_string(positions: Tensor) -> str:
    return "".join(ALPHABET[position] for position in positions.tolist())


def _next_character_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of ``[batch, time, vocabulary]`` and ``[batch, time]``."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def standardised(values: Tensor) -> Tensor:
    """Every column at zero mean and unit variance."""
    return (values - values.mean(dim=0)) / values.std(dim=0)


def split_rows(
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    noise: float = 0.0,
) -> Data:
    """Examples as data; the last 512 are for the test."""
    border = len(inputs) - _NUM_TEST_EXAMPLES
    return Data(inputs[:border], targets[:border], inputs[border:], targets[border:], loss, noise)
