"""Networks of comparisons that several tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.meta_training.tasks.data import ALPHABET
from teleport_optim.meta_training.tasks.networks import perceptron, rescale, seeded

__all__ = ["CharRecurrent", "CharTransformer", "ResidualBlock", "VisionTransformer", "badly_scaled_perceptron"]


def badly_scaled_perceptron(widths: Sequence[int], sigma: float) -> Callable[[int], nn.Sequential]:
    """Make a ReLU perceptron from a seed, and multiply its hidden units at random, which keeps its function.

    Args:
        widths: Widths of the layers, inputs and outputs included.
        sigma: Standard deviation of the log-factors.
    """

    def make(seed: int) -> nn.Sequential:
        model = seeded(partial(perceptron, widths, nn.ReLU))(seed)
        rescale(model, torch.zeros(2, widths[0]), sigma, seed)
        return model

    return make


class ResidualBlock(nn.Module):
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


class VisionTransformer(nn.Module):
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


class CharTransformer(nn.Module):
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


class CharRecurrent(nn.Module):
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
