"""Tasks on torchvision's data sets, for those who have them on disk or a network to fetch them."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.comparison.networks import ResidualBlock
from benchmarks.comparison.task import EvaluationTask
from teleport_optim.meta_training.tasks.data import Data
from teleport_optim.meta_training.tasks.networks import perceptron, seeded

__all__ = ["image_tasks"]


def _images(name: str, folder: Path, download: bool) -> Data:
    """A data set in memory: images ``[n, channels, height, width]`` of zero mean and unit variance, and labels."""
    from torchvision import datasets

    parts: list[Tensor] = []
    for train in (True, False):
        try:
            data_set = getattr(datasets, name)(folder, train=train, download=download)
        except RuntimeError as error:  # what torchvision raises where files are missing or damaged
            raise FileNotFoundError(
                f"the data set {name} is not in {folder}: {error}. Pass --download where there is a network"
            ) from error
        images, labels = torch.as_tensor(data_set.data), torch.as_tensor(data_set.targets)
        is_grey = images.dim() == 3
        parts += [images.unsqueeze(1) if is_grey else images.movedim(-1, 1), labels]
    images, labels, test_images, test_labels = parts
    pixels = images.float()
    mean, std = pixels.mean(), pixels.std()
    return Data((pixels - mean) / std, labels, (test_images[:2048].float() - mean) / std, test_labels[:2048])


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), *perceptron((784, 256, 256, 10), nn.ReLU))


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 49, 10),
    )


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, stride=1),
        ResidualBlock(16, 32, stride=2),
        ResidualBlock(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def image_tasks(folder: Path, *, download: bool = False) -> dict[str, EvaluationTask]:
    """Tasks by name, whose data are read when they are first needed.

    Args:
        folder: Where torchvision keeps its data sets.
        download: Fetch those that are not there.

    Raises:
        FileNotFoundError: from ``make_data``, if a data set is not there.
    """
    tasks = (
        ("mnist", "MNIST", "ReLU perceptron of 2 hidden layers of 256, MNIST", _perceptron, 128),
        ("fashion", "FashionMNIST", "2 convolutions of 32 and 64 channels, Fashion-MNIST", _convolutional, 64),
        ("cifar", "CIFAR10", "residual network of 7 convolutions of 16 to 64 channels, CIFAR-10", _residual, 64),
    )
    return {
        name: EvaluationTask(
            name, description, seeded(build), cache(partial(_images, data_set, folder, download)), batch_size, 1000
        )
        for name, data_set, description, build, batch_size in tasks
    }
