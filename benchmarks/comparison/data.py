"""Data of comparisons that several tasks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_optim.meta_training.tasks.data import ALPHABET, Data, digits, text

__all__ = ["NUM_EXAMPLES", "ill_conditioned", "reconstructed_digits", "split_rows", "windows"]

_NUM_TEST_EXAMPLES = 512
NUM_EXAMPLES = 4096 + _NUM_TEST_EXAMPLES
"""Examples of data that are made here, those for the test included."""


def windows(split: str, length: int) -> Data:
    """Cut the text of a split into overlapping windows, whose targets are the characters that follow.

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


def split_rows(
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    noise: float = 0.0,
) -> Data:
    """Make data of examples; the last 512 are for the test."""
    border = len(inputs) - _NUM_TEST_EXAMPLES
    return Data(inputs[:border], targets[:border], inputs[border:], targets[border:], loss, noise)


def reconstructed_digits(split: str, test_split: str) -> Data:
    """Digits as their own targets."""
    (inputs, _), (test_inputs, _) = digits(split), digits(test_split)
    return Data(inputs, inputs, test_inputs, test_inputs, F.mse_loss)


def ill_conditioned(num_inputs: int, num_classes: int, *, smallest: float, seed: int) -> Data:
    """Random classes, decided by all directions alike, of features of very different sizes.

    Args:
        num_inputs: Number of features.
        num_classes: Number of classes.
        smallest: Base-10 logarithm of the smallest standard deviation of a direction over the largest; the covariance has
            the condition number ``10 ** (-2 * smallest)``.
        seed: Decides the examples.
    """
    generator = torch.Generator().manual_seed(seed)
    whitened = torch.randn(NUM_EXAMPLES, num_inputs, generator=generator)
    scores = whitened @ torch.randn(num_inputs, num_classes, generator=generator) / 3
    labels = torch.multinomial(scores.softmax(dim=1), 1, generator=generator).squeeze(1)
    rotation, _ = torch.linalg.qr(torch.randn(num_inputs, num_inputs, generator=generator))
    return split_rows(whitened * 2 * torch.logspace(0, smallest, num_inputs) @ rotation, labels)
