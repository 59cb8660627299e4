"""Small convolutional networks, with and without batch normalisation, that classify digits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from teleport_optim.meta_training.tasks.data import digits
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.networks import (
    cross_entropy,
    draw_activation,
    draw_rows,
    network_problem,
    with_label_noise,
)
from teleport_optim.meta_training.tasks.problem import InnerProblem, Task
from teleport_optim.meta_training.tasks.splits import CHANNELS

__all__ = ["DigitsBatchNormCNN", "DigitsCNN"]


def _draw_convolutional(draw: Draw, *, has_norms: bool) -> tuple[nn.Sequential, str]:
    """Two or three convolutions on images of 8x8 pixels, the second with stride 2, then a linear layer."""
    activation, make_activation = draw_activation(draw)
    channels = [draw.choice(CHANNELS[draw.split]) for _ in range(draw.integer(2, 3))]
    layers: list[nn.Module] = []
    for index, (channels_in, channels_out) in enumerate(zip([1, *channels], channels)):
        # A bias before a norm has no effect, and rounding errors for a gradient.
        layers.append(nn.Conv2d(channels_in, channels_out, 3, stride=1 + (index == 1), padding=1, bias=not has_norms))
        if has_norms:
            layers.append(nn.BatchNorm2d(channels_out, track_running_stats=False))
        layers.append(make_activation())
    is_pooled = draw.chance(0.5)
    if is_pooled:
        layers.append(nn.AvgPool2d(2))
    layers += [nn.Flatten(), nn.Linear(channels[-1] * (4 if is_pooled else 16), 10)]
    return nn.Sequential(*layers), f"{activation} {'-'.join(map(str, channels))} {'pooled' if is_pooled else 'flat'}"


class DigitsCNN(Task):
    """Convolutional networks that classify scikit-learn's digits."""

    name = "digits_cnn"
    share = 0.2
    has_norms: ClassVar[bool] = False

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        draw = Draw(generator, self.name, split)
        model, architecture = _draw_convolutional(draw, has_norms=self.has_norms)
        inputs, labels = digits(split)
        targets = with_label_noise(labels.repeat(num_problems, 1), 10, draw)
        images = inputs.reshape(-1, 1, 8, 8).expand(num_problems, -1, 1, 8, 8)
        batches = draw_rows(images, targets, draw, largest_batch=48)
        return network_problem(model, architecture, num_problems, batches, cross_entropy, horizons, draw)


class DigitsBatchNormCNN(DigitsCNN):
    """The same with batch normalisation after every convolution, which always uses the statistics of the minibatch."""

    name = "digits_batchnorm_cnn"
    has_norms = True
