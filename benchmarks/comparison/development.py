"""Tasks on which the rule is developed, so that what is tried is not chosen on the tasks that are reported.

Of the kinds of the suite, with other widths, on data of the "train" split or made with other seeds.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.comparison.data import NUM_EXAMPLES, ill_conditioned, reconstructed_digits, split_rows, windows
from benchmarks.comparison.networks import (
    CharRecurrent,
    CharTransformer,
    ResidualBlock,
    VisionTransformer,
    badly_scaled_perceptron,
)
from benchmarks.comparison.task import EvaluationTask
from teleport_optim.meta_training.tasks.data import Data, digits, standardise
from teleport_optim.meta_training.tasks.networks import perceptron, seeded

__all__ = ["DEVELOPMENT", "DEVELOPMENT_WIDE"]


_reconstructed_digits = cache(partial(reconstructed_digits, "train", "validation"))
_ill_conditioned = cache(partial(ill_conditioned, 40, 6, smallest=-1.5, seed=79))
_windows = cache(partial(windows, "train", 32))


@cache
def _digits() -> Data:
    return Data(*digits("train"), *digits("validation"), noise=0.4)


@cache
def _sines() -> Data:
    """A sum of sines of projections and a product of two of them."""
    generator = torch.Generator().manual_seed(77)
    inputs = torch.randn(NUM_EXAMPLES, 14, generator=generator)
    projections = inputs @ torch.randn(14, 5, generator=generator) / 14**0.5
    values = torch.sin(2 * projections).sum(dim=1) + projections[:, 0] * projections[:, 1]
    values = values + 0.2 * torch.randn(len(values), generator=generator)
    return split_rows(inputs, standardise(values[:, None]), loss=F.mse_loss)


@cache
def _teacher_classes() -> Data:
    """The largest output of a random network, of columns of different sizes."""
    generator = torch.Generator().manual_seed(78)
    inputs = torch.randn(NUM_EXAMPLES, 24, generator=generator)
    hidden = torch.tanh(2 * inputs @ torch.randn(24, 40, generator=generator) / 24**0.5)
    labels = (hidden @ torch.randn(40, 8, generator=generator)).argmax(dim=1)
    return split_rows(inputs * torch.exp(0.5 * torch.randn(24, generator=generator)), labels)


def _convolutional(first: int, second: int, side: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(side),
        nn.Flatten(),
        nn.Linear(side * side * second, 10),
    )


class _Residual(nn.Module):
    """Two residual blocks between a convolution and the mean over pixels."""

    def __init__(self, first: int, second: int, stride: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.blocks = nn.Sequential(ResidualBlock(first, first, stride), ResidualBlock(first, second, 2))
        self.head = nn.Linear(second, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.head(self.blocks(self.stem(pixels.view(-1, 1, 8, 8))).mean(dim=(2, 3)))
        return output


_TASKS = (
    EvaluationTask(
        "mlp",
        "ReLU perceptron of 5 hidden layers of 64, noisy digits",
        seeded(partial(perceptron, (64, *[64] * 5, 10), nn.ReLU)),
        _digits,
        steps=300,
    ),
    EvaluationTask(
        "wide",
        "SiLU perceptron of 2 hidden layers of 200, noisy digits",
        seeded(partial(perceptron, (64, 200, 200, 10), nn.SiLU)),
        _digits,
        steps=200,
    ),
    EvaluationTask(
        "convolutional",
        "2 convolutions of 16 and 32 channels, noisy digits",
        seeded(partial(_convolutional, 16, 32, 4)),
        _digits,
        batch_size=32,
        steps=250,
    ),
    EvaluationTask(
        "residual",
        "residual network of 16 and 24 channels with BatchNorm, noisy digits",
        seeded(partial(_Residual, 16, 24, 1)),
        _digits,
        batch_size=24,
        steps=200,
    ),
    EvaluationTask(
        "reconstruction",
        "deep tanh autoencoder 96-48-20-48-96, digits",
        seeded(partial(perceptron, (64, 96, 48, 20, 48, 96, 64), nn.Tanh)),
        _reconstructed_digits,
    ),
    EvaluationTask(
        "patches",
        "vision transformer of 2 blocks of width 48, noisy digits",
        seeded(partial(VisionTransformer, 48)),
        _digits,
        batch_size=24,
        steps=300,
    ),
    EvaluationTask(
        "decoder",
        "causal transformer of 2 blocks of width 48, 32 characters of text",
        seeded(partial(CharTransformer, 48, 32)),
        _windows,
        batch_size=12,
        steps=300,
    ),
    EvaluationTask(
        "recurrent",
        "GRU of width 56, 32 characters of text",
        seeded(partial(CharRecurrent, nn.GRU, 56)),
        _windows,
        batch_size=12,
        steps=300,
    ),
    EvaluationTask(
        "regression",
        "tanh perceptron of 3 hidden layers of 72, sines of projections",
        seeded(partial(perceptron, (14, 72, 72, 72, 1), nn.Tanh)),
        _sines,
        steps=300,
    ),
    EvaluationTask(
        "classes",
        "GELU perceptron of 2 hidden layers of 100, classes of a random network",
        seeded(partial(perceptron, (24, 100, 100, 8), nn.GELU)),
        _teacher_classes,
        steps=300,
    ),
    EvaluationTask(
        "linear",
        "multinomial logistic regression on features of condition number 1e3",
        seeded(partial(nn.Linear, 40, 6)),
        _ill_conditioned,
        steps=300,
    ),
    EvaluationTask(
        "rescaled",
        "ReLU perceptron of 3 hidden layers of 80 with badly scaled hidden units, noisy digits",
        badly_scaled_perceptron((64, 80, 80, 80, 10), 1.5),
        _digits,
        steps=300,
    ),
)

_WIDE_TASKS = (
    EvaluationTask(
        "very_wide",
        "SiLU perceptron of 2 hidden layers of 384, noisy digits",
        seeded(partial(perceptron, (64, 384, 384, 10), nn.SiLU)),
        _digits,
        steps=250,
    ),
    EvaluationTask(
        "very_wide_relu",
        "ReLU perceptron of 3 hidden layers of 320, noisy digits",
        seeded(partial(perceptron, (64, 320, 320, 320, 10), nn.ReLU)),
        _digits,
        steps=250,
    ),
    EvaluationTask(
        "very_wide_classes",
        "GELU perceptron of 2 hidden layers of 384, classes of a random network",
        seeded(partial(perceptron, (24, 384, 384, 8), nn.GELU)),
        _teacher_classes,
        steps=250,
    ),
    EvaluationTask(
        "very_wide_regression",
        "tanh perceptron of 2 hidden layers of 320, sines of projections",
        seeded(partial(perceptron, (14, 320, 320, 1), nn.Tanh)),
        _sines,
        steps=250,
    ),
    EvaluationTask(
        "very_wide_convolutional",
        "2 convolutions of 96 and 128 channels, noisy digits",
        seeded(partial(_convolutional, 96, 128, 2)),
        _digits,
        batch_size=24,
        steps=150,
    ),
    EvaluationTask(
        "very_wide_residual",
        "residual network of 64 and 128 channels with BatchNorm, noisy digits",
        seeded(partial(_Residual, 64, 128, 2)),
        _digits,
        batch_size=24,
        steps=150,
    ),
)

DEVELOPMENT: dict[str, EvaluationTask] = {task.name: task for task in _TASKS}
"""Every task by name."""
DEVELOPMENT_WIDE: dict[str, EvaluationTask] = {task.name: task for task in _WIDE_TASKS}
"""Those of wide networks."""
