"""A small task to compare optimizers on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.comparison.task import EvaluationTask
from benchmarks.comparison.training import Run
from teleport_optim.meta_training.tasks.data import Data
from teleport_optim.meta_training.tasks.networks import seeded


def blobs() -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs, centres = torch.randn(120, 6, generator=generator), torch.randn(6, 3, generator=generator)
    targets = (inputs @ centres).argmax(dim=1)
    return Data(inputs[:90], targets[:90], inputs[90:], targets[90:], F.cross_entropy, noise=0.1)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def wide_perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 3))


TASK = EvaluationTask("blobs", "a small perceptron", seeded(perceptron), blobs, batch_size=20, steps=40)


def run_of(losses: list[float]) -> Run:
    return Run(tuple(range(0, 10 * len(losses), 10)), tuple(losses), losses[-1], 0.0)
