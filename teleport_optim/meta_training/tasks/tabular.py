"""Perceptrons on tabular data: classification, and regression of one column on the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_optim.meta_training.tasks.data import table
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.networks import (
    cross_entropy,
    draw_rows,
    network_problem,
    with_label_noise,
)
from teleport_optim.meta_training.tasks.perceptrons import draw_perceptron
from teleport_optim.meta_training.tasks.problem import InnerProblem, Loss, Task
from teleport_optim.meta_training.tasks.splits import TABLES

__all__ = ["Tabular"]


def _column_on_others(columns: Tensor, num_problems: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """One random column for each problem as the target, and the other ones as inputs."""
    num_columns = columns.shape[1]
    orders = torch.stack([torch.randperm(num_columns, generator=draw.generator) for _ in range(num_problems)])
    shuffled = columns.T[orders].transpose(1, 2)
    return shuffled[..., 1:], shuffled[..., :1]


class Tabular(Task):
    """Perceptrons on the split's tables of scikit-learn."""

    name = "tabular_mlp"

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        draw = Draw(generator, self.name, split)
        name = draw.choice(TABLES[split])
        data = table(name)
        if data.labels is not None and draw.chance(0.5):
            kind, num_outputs = "classification", data.num_classes
            inputs = data.columns.expand(num_problems, *data.columns.shape)
            targets = with_label_noise(data.labels.repeat(num_problems, 1), num_outputs, draw)
        else:
            kind, num_outputs = "regression", 1
            inputs, targets = _column_on_others(data.columns, num_problems, draw)
        model, architecture = draw_perceptron(draw, inputs.shape[-1], num_outputs)
        architecture = f"{name} {kind} {architecture}"
        batches = draw_rows(inputs, targets, draw)
        loss: Loss = cross_entropy if kind == "classification" else F.mse_loss
        return network_problem(model, architecture, num_problems, batches, loss, horizons, draw)
