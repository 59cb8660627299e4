"""The tasks of comparisons: networks and data that meta-training never sees.

None of them shares data or a hidden size with meta-training or with the choice of a checkpoint. They train on the digits of
the demo, on the text of the "test" split, or on examples that are made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.evaluation.problem import Data, EvaluationTask, rescale, seeded
from teleport_optim.tasks.data import ALPHABET, digits, text

__all__ = ["SUITE"]

_NUM_EXAMPLES = 4096
_NUM_TEST_EXAMPLES = 512
_RESCALING = 2.0
"""Standard deviation of the log-factors in the badly scaled network."""


# --------------------------------------------------------------------------------------------------------------- data


@cache
def _digits() -> Data:
    """The digits that no meta-training sees, with noise as large as most of their pixels' variation."""
    return Data(*digits("demo"), *digits("test"), noise=0.5)


@cache
def _reconstructed_digits() -> Data:
    """Digits as their own targets."""
    (inputs, _), (test_inputs, _) = digits("demo"), digits("test")
    return Data(inputs, inputs, test_inputs, test_inputs, F.mse_loss)


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
    count = _NUM_EXAMPLES + _NUM_TEST_EXAMPLES
    labels = torch.randint(10, (count,), generator=generator)
    angle = math.pi * (labels % 5 + 0.5 * torch.rand(count, generator=generator)) / 5
    frequency = 0.9 + 0.6 * (labels // 5) + 0.3 * torch.rand(count, generator=generator)
    phase = 2 * math.pi * torch.rand(count, generator=generator)
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    direction = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1) * frequency[:, None]
    waves = torch.sin(torch.einsum("nd,dhw->nhw", direction, torch.stack([row, column])) + phase[:, None, None])
    colours = torch.randn(count, 3, 1, 1, generator=generator)
    return _split(colours * waves[:, None], labels, noise=1.0)


@cache
def _friedman() -> Data:
    """Friedman's first function: of ten columns five matter, and there is noise in the target."""
    generator = torch.Generator().manual_seed(2)
    columns = torch.rand(_NUM_EXAMPLES + _NUM_TEST_EXAMPLES, 10, generator=generator)
    first, second, third, fourth, fifth = columns[:, :5].unbind(dim=1)
    values = 10 * torch.sin(math.pi * first * second) + 20 * (third - 0.5) ** 2 + 10 * fourth + 5 * fifth
    values = values + torch.randn(values.shape, generator=generator)
    return _split(_standardised(columns), _standardised(values[:, None]), loss=F.mse_loss)


@cache
def _mixture() -> Data:
    """Six classes of four normal clusters each, in ten of twenty columns of different sizes; the others are noise."""
    generator = torch.Generator().manual_seed(3)
    count = _NUM_EXAMPLES + _NUM_TEST_EXAMPLES
    clusters = torch.randint(24, (count,), generator=generator)
    centres = 1.4 * torch.randn(24, 10, generator=generator)
    shapes = torch.randn(24, 10, 10, generator=generator) / math.sqrt(10)
    noise = torch.randn(count, 10, generator=generator)
    useful = centres[clusters] + torch.einsum("ni,nij->nj", noise, shapes[clusters])
    columns = torch.cat([useful, torch.randn(count, 10, generator=generator)], dim=1)
    sizes = torch.exp(0.5 * torch.randn(20, generator=generator))
    return _split(sizes * _standardised(columns), clusters % 6)


@cache
def _teacher() -> Data:
    """Outputs of a random two-layer tanh network of width 128 on normal inputs."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(_NUM_EXAMPLES + _NUM_TEST_EXAMPLES, 20, generator=generator)
    first = torch.randn(20, 128, generator=generator) / math.sqrt(20)
    second = 1.5 * torch.randn(128, 128, generator=generator) / math.sqrt(128)
    readout = torch.randn(128, 6, generator=generator)
    outputs = torch.tanh(torch.tanh(inputs @ first) @ second) @ readout
    return _split(inputs, _standardised(outputs), loss=F.mse_loss)


@cache
def _ill_conditioned() -> Data:
    """Random classes, decided by all directions alike, of features whose covariance has a condition number of 1e4."""
    generator = torch.Generator().manual_seed(5)
    whitened = torch.randn(_NUM_EXAMPLES + _NUM_TEST_EXAMPLES, 60, generator=generator)
    scores = whitened @ torch.randn(60, 8, generator=generator) / 3
    labels = torch.multinomial(scores.softmax(dim=1), 1, generator=generator).squeeze(1)
    rotation, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator))
    return _split(whitened * 2 * torch.logspace(0, -2, 60) @ rotation, labels)


@cache
def _short_windows() -> Data:
    return _windows(32)


@cache
def _windows_of_forty() -> Data:
    return _windows(40)


@cache
def _long_windows() -> Data:
    return _windows(48)


def _windows(length: int) -> Data:
    """Overlapping windows of the text and the characters that follow.

    The last fifth of the text is for the test, without those of its windows that the other part has too.
    """
    characters = text("test")
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


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean(dim=0)) / values.std(dim=0)


def _split(
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    noise: float = 0.0,
) -> Data:
    """The last rows are for the test."""
    border = len(inputs) - _NUM_TEST_EXAMPLES
    return Data(inputs[:border], targets[:border], inputs[border:], targets[border:], loss, noise)


# ----------------------------------------------------------------------------------------------------------- networks


def _perceptron(widths: Sequence[int], make_activation: Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in pairwise(widths):
        layers += [nn.Linear(num_inputs, num_outputs), make_activation()]
    return nn.Sequential(*layers[:-1])


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


class _ResidualBlock(nn.Module):
    """Two normalised convolutions, added to the input; where the size changes, to a convolution of it."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.convolutions(x))


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        _ResidualBlock(24, 24, stride=1),
        _ResidualBlock(24, 32, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class _Attention(nn.Module):
    """Attention with four heads."""

    def __init__(self, width: int, *, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.from_input = nn.Linear(width, 3 * width)
        self.to_output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.from_input(x).unflatten(-1, (3, 4, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.is_causal)
        output: Tensor = self.to_output(attended.transpose(1, 2).flatten(2))
        return output


class _Block(nn.Module):
    """Attention and a perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, expansion: int, *, is_causal: bool) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), _Attention(width, is_causal=is_causal))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        output: Tensor = x + self.perceptron(x)
        return output


class _VisionTransformer(nn.Module):
    """Patches of 2x2 pixels, two blocks, and the mean over all patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(_Block(width, 2, is_causal=False) for _ in range(2)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels.reshape(-1, 1, 8, 8)).flatten(2).transpose(1, 2)
        output: Tensor = self.head(self.blocks(patches + self.positions).mean(dim=1))
        return output


class _CharTransformer(nn.Module):
    """A decoder of two blocks with learned positions."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(_Block(width, 3, is_causal=True) for _ in range(2)), nn.LayerNorm(width))
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        output: Tensor = self.head(self.blocks(self.tokens(characters) + self.positions))
        return output


class _CharRecurrent(nn.Module):
    """One recurrent layer of torch between an embedding and a linear layer."""

    def __init__(self, make_layer: type[nn.LSTM] | type[nn.GRU], width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(ALPHABET), width)
        self.recurrent = make_layer(width, width, batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        states, _ = self.recurrent(self.tokens(characters))
        output: Tensor = self.head(states)
        return output


def _badly_scaled(seed: int) -> nn.Module:
    """A perceptron whose hidden units were multiplied at random, and what reads them divided: the same function."""
    model = seeded(partial(_perceptron, (64, 112, 112, 112, 112, 10), nn.ReLU))(seed)
    rescale(model, torch.zeros(2, 64), _RESCALING, seed)
    return model


def _shufflenet() -> nn.Module:
    from torchvision.models import shufflenet_v2_x0_5

    model: nn.Module = shufflenet_v2_x0_5(num_classes=10)
    return model


# -------------------------------------------------------------------------------------------------------------- suite

_TASKS = (
    EvaluationTask(
        "deep_mlp",
        "ReLU perceptron of 8 hidden layers of 72, noisy digits",
        seeded(partial(_perceptron, (64, *[72] * 8, 10), nn.ReLU)),
        _digits,
        steps=500,
    ),
    EvaluationTask(
        "wide_mlp",
        "GELU perceptron of 2 hidden layers of 256, noisy digits",
        seeded(partial(_perceptron, (64, 256, 256, 10), nn.GELU)),
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
        seeded(partial(_perceptron, (64, 112, 72, 30, 72, 112, 64), nn.Tanh)),
        _reconstructed_digits,
        steps=500,
    ),
    EvaluationTask(
        "vit",
        "vision transformer of 2 blocks of width 64, noisy digits in patches of 2x2",
        seeded(partial(_VisionTransformer, 64)),
        _digits,
        batch_size=32,
    ),
    EvaluationTask(
        "char_transformer",
        "causal transformer of 2 blocks of width 64, 48 characters of text",
        seeded(partial(_CharTransformer, 64, 48)),
        _long_windows,
        batch_size=12,
    ),
    EvaluationTask(
        "char_lstm",
        "LSTM of width 64, 40 characters of text",
        seeded(partial(_CharRecurrent, nn.LSTM, 64)),
        _windows_of_forty,
        batch_size=16,
    ),
    EvaluationTask(
        "char_gru",
        "GRU of width 72, 32 characters of text",
        seeded(partial(_CharRecurrent, nn.GRU, 72)),
        _short_windows,
        batch_size=16,
    ),
    EvaluationTask(
        "tabular_regression",
        "tanh perceptron of 3 hidden layers of 96, Friedman's first function",
        seeded(partial(_perceptron, (10, 96, 96, 96, 1), nn.Tanh)),
        _friedman,
    ),
    EvaluationTask(
        "tabular_classification",
        "SiLU perceptron of 3 hidden layers of 80, six classes of normal clusters",
        seeded(partial(_perceptron, (20, 80, 80, 80, 6), nn.SiLU)),
        _mixture,
    ),
    EvaluationTask(
        "badly_scaled",
        "ReLU perceptron of 4 hidden layers of 112 with badly scaled hidden units, noisy digits",
        _badly_scaled,
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
        seeded(partial(_perceptron, (20, 128, 128, 6), nn.GELU)),
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
