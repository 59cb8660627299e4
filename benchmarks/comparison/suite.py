"""Tasks that are reported: networks and data that meta-training never sees.

None of them shares data or a hidden size with meta-training or with the choice of a checkpoint. They train on the digits of
the demo, on the text of the "test" split, or on examples that are made here.
"""

from __future__ import annotations

import math
from dataclasses import replace
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

__all__ = ["FAR", "SUITE"]

_RESCALING = 2.0
"""Standard deviation of the log-factors in the badly scaled network."""


# --------------------------------------------------------------------------------------------------------------- data


_reconstructed_digits = cache(partial(reconstructed_digits, "demo", "test"))
_ill_conditioned = cache(partial(ill_conditioned, 60, 8, smallest=-2.0, seed=5))
_short_windows = cache(partial(windows, "test", 32))
_windows_of_forty = cache(partial(windows, "test", 40))
_long_windows = cache(partial(windows, "test", 48))


@cache
def _digits() -> Data:
    """Digits that no meta-training sees, with noise as large as most of their pixels' variation."""
    return Data(*digits("demo"), *digits("test"), noise=0.5)


@cache
def _enlarged_digits() -> Data:
    """Digits in 16x16 pixels and three equal channels."""

    def enlarge(inputs: Tensor) -> Tensor:
        images = F.interpolate(inputs.reshape(-1, 1, 8, 8), size=(16, 16), mode="bilinear", align_corners=False)
        return images.repeat(1, 3, 1, 1)

    (inputs, labels), (test_inputs, test_labels) = digits("demo"), digits("test")
    return Data(enlarge(inputs), labels, enlarge(test_inputs), test_labels, noise=0.5)


@cache
def _gratings() -> Data:
    """Coloured gratings in noise, 12x12 pixels: ten classes, of five directions and two frequencies."""
    generator = torch.Generator().manual_seed(1)
    count = NUM_EXAMPLES
    labels = torch.randint(10, (count,), generator=generator)
    angle = math.pi * (labels % 5 + 0.5 * torch.rand(count, generator=generator)) / 5
    frequency = 0.9 + 0.6 * (labels // 5) + 0.3 * torch.rand(count, generator=generator)
    phase = 2 * math.pi * torch.rand(count, generator=generator)
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    direction = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1) * frequency[:, None]
    waves = torch.sin(torch.einsum("nd,dhw->nhw", direction, torch.stack([row, column])) + phase[:, None, None])
    colours = torch.randn(count, 3, 1, 1, generator=generator)
    return split_rows(colours * waves[:, None], labels, noise=1.0)


@cache
def _friedman() -> Data:
    """Friedman's first function: of ten columns five matter, and there is noise in the target."""
    generator = torch.Generator().manual_seed(2)
    columns = torch.rand(NUM_EXAMPLES, 10, generator=generator)
    first, second, third, fourth, fifth = columns[:, :5].unbind(dim=1)
    values = 10 * torch.sin(math.pi * first * second) + 20 * (third - 0.5) ** 2 + 10 * fourth + 5 * fifth
    values = values + torch.randn(values.shape, generator=generator)
    return split_rows(standardise(columns), standardise(values[:, None]), loss=F.mse_loss)


@cache
def _mixture() -> Data:
    """Six classes of four normal clusters each, in ten of twenty columns of different sizes; the others are noise."""
    generator = torch.Generator().manual_seed(3)
    count = NUM_EXAMPLES
    clusters = torch.randint(24, (count,), generator=generator)
    centres = 1.4 * torch.randn(24, 10, generator=generator)
    shapes = torch.randn(24, 10, 10, generator=generator) / math.sqrt(10)
    noise = torch.randn(count, 10, generator=generator)
    useful = centres[clusters] + torch.einsum("ni,nij->nj", noise, shapes[clusters])
    columns = torch.cat([useful, torch.randn(count, 10, generator=generator)], dim=1)
    sizes = torch.exp(0.5 * torch.randn(20, generator=generator))
    return split_rows(sizes * standardise(columns), clusters % 6)


@cache
def _teacher() -> Data:
    """Outputs of a random two-layer tanh network of width 128 on normal inputs."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(NUM_EXAMPLES, 20, generator=generator)
    first = torch.randn(20, 128, generator=generator) / math.sqrt(20)
    second = 1.5 * torch.randn(128, 128, generator=generator) / math.sqrt(128)
    readout = torch.randn(128, 6, generator=generator)
    outputs = torch.tanh(torch.tanh(inputs @ first) @ second) @ readout
    return split_rows(inputs, standardise(outputs), loss=F.mse_loss)


# ----------------------------------------------------------------------------------------------------------- networks


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        ResidualBlock(24, 24, stride=1),
        ResidualBlock(24, 32, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _shufflenet() -> nn.Module:
    from torchvision.models import shufflenet_v2_x0_5

    model: nn.Module = shufflenet_v2_x0_5(num_classes=10)
    return model


# -------------------------------------------------------------------------------------------------------------- suite

_TASKS = (
    EvaluationTask(
        "deep_mlp",
        "ReLU perceptron of 8 hidden layers of 72, noisy digits",
        seeded(partial(perceptron, (64, *[72] * 8, 10), nn.ReLU)),
        _digits,
        steps=500,
    ),
    EvaluationTask(
        "wide_mlp",
        "GELU perceptron of 2 hidden layers of 256, noisy digits",
        seeded(partial(perceptron, (64, 256, 256, 10), nn.GELU)),
        _digits,
        steps=300,
    ),
    EvaluationTask(
        "cnn",
        "3 convolutions of 24, 32 and 64 channels with ReLU and no norm, noisy digits",
        seeded(_convolutional),
        _digits,
        batch_size=48,
        steps=300,
    ),
    EvaluationTask(
        "resnet",
        "residual network of 5 convolutions of 24 and 32 channels with BatchNorm, coloured gratings in noise",
        seeded(_residual),
        _gratings,
        batch_size=24,
        steps=300,
    ),
    EvaluationTask(
        "autoencoder",
        "deep tanh autoencoder 112-72-30-72-112, digits",
        seeded(partial(perceptron, (64, 112, 72, 30, 72, 112, 64), nn.Tanh)),
        _reconstructed_digits,
        steps=500,
    ),
    EvaluationTask(
        "vit",
        "vision transformer of 2 blocks of width 64, noisy digits in patches of 2x2",
        seeded(partial(VisionTransformer, 64)),
        _digits,
        batch_size=32,
    ),
    EvaluationTask(
        "char_transformer",
        "causal transformer of 2 blocks of width 64, 48 characters of text",
        seeded(partial(CharTransformer, 64, 48)),
        _long_windows,
        batch_size=12,
    ),
    EvaluationTask(
        "char_lstm",
        "LSTM of width 64, 40 characters of text",
        seeded(partial(CharRecurrent, nn.LSTM, 64)),
        _windows_of_forty,
        batch_size=16,
    ),
    EvaluationTask(
        "char_gru",
        "GRU of width 72, 32 characters of text",
        seeded(partial(CharRecurrent, nn.GRU, 72)),
        _short_windows,
        batch_size=16,
    ),
    EvaluationTask(
        "tabular_regression",
        "tanh perceptron of 3 hidden layers of 96, Friedman's first function",
        seeded(partial(perceptron, (10, 96, 96, 96, 1), nn.Tanh)),
        _friedman,
    ),
    EvaluationTask(
        "tabular_classification",
        "SiLU perceptron of 3 hidden layers of 80, six classes of normal clusters",
        seeded(partial(perceptron, (20, 80, 80, 80, 6), nn.SiLU)),
        _mixture,
    ),
    EvaluationTask(
        "badly_scaled",
        "ReLU perceptron of 4 hidden layers of 112 with badly scaled hidden units, noisy digits",
        badly_scaled_perceptron((64, 112, 112, 112, 112, 10), _RESCALING),
        _digits,
        steps=500,
    ),
    EvaluationTask(
        "ill_conditioned",
        "multinomial logistic regression on features of condition number 1e4",
        seeded(partial(nn.Linear, 60, 8)),
        _ill_conditioned,
    ),
    EvaluationTask(
        "teacher_regression",
        "GELU perceptron of 2 hidden layers of 128, outputs of a random tanh network",
        seeded(partial(perceptron, (20, 128, 128, 6), nn.GELU)),
        _teacher,
    ),
    EvaluationTask(
        "torchvision_net",
        "torchvision's shufflenet_v2_x0_5, noisy digits in 16x16 pixels",
        seeded(_shufflenet),
        _enlarged_digits,
        batch_size=32,
        steps=300,
    ),
)

SUITE: dict[str, EvaluationTask] = {task.name: task for task in _TASKS}
"""Every task by name."""

_LONG, _WIDE = 8 * 320, 8 * 56
"""Eight times the longest run and the widest layer that the default checkpoint was meta-trained on."""

FAR: dict[str, EvaluationTask] = {
    task.name: task
    for task in (
        *(
            replace(SUITE[name], name=f"long_{name}", steps=_LONG)
            for name in ("deep_mlp", "autoencoder", "tabular_regression")
        ),
        EvaluationTask(
            "wide_relu",
            f"ReLU perceptron of 3 hidden layers of {_WIDE}, noisy digits",
            seeded(partial(perceptron, (64, *[_WIDE] * 3, 10), nn.ReLU)),
            _digits,
            steps=300,
        ),
        EvaluationTask(
            "wide_teacher",
            f"GELU perceptron of 2 hidden layers of {_WIDE}, outputs of a random tanh network",
            seeded(partial(perceptron, (20, _WIDE, _WIDE, 6), nn.GELU)),
            _teacher,
            steps=300,
        ),
        EvaluationTask(
            "wide_classes",
            f"SiLU perceptron of 2 hidden layers of {_WIDE}, six classes of normal clusters",
            seeded(partial(perceptron, (20, _WIDE, _WIDE, 6), nn.SiLU)),
            _mixture,
            steps=300,
        ),
    )
}
"""Runs eight times as long, and networks eight times as wide, as anything in meta-training."""
