"""Multilayer perceptrons: digits classified and reconstructed, and random teacher networks imitated."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.meta_training.tasks.data import digits
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.networks import (
    cross_entropy,
    draw_activation,
    draw_rows,
    network_problem,
    perceptron,
    with_label_noise,
)
from teleport_optim.meta_training.tasks.problem import InnerProblem, Task
from teleport_optim.meta_training.tasks.splits import WIDTHS

__all__ = ["DigitsAutoencoder", "DigitsMLP", "TeacherClassification", "TeacherRegression", "draw_perceptron"]

_NUM_EXAMPLES = 512
_NUM_TEACHER_UNITS = 32


def draw_perceptron(draw: Draw, num_inputs: int, num_outputs: int) -> tuple[nn.Sequential, str]:
    """A perceptron with one to four hidden layers of the split's widths, in training also none, and its architecture in words."""
    depth = draw.integer(0 if draw.split == "train" else 1, 4)
    activation, make_activation = draw_activation(draw)
    widths = [draw.choice(WIDTHS[draw.split])] * depth
    if draw.chance(0.3):
        widths = [draw.choice(WIDTHS[draw.split]) for _ in widths]
    sizes = [num_inputs, *widths, num_outputs]
    return perceptron(sizes, make_activation), f"{activation if widths else 'linear'} {'-'.join(map(str, sizes))}"


class DigitsMLP(Task):
    """Perceptrons that classify scikit-learn's digits."""

    name = "digits_mlp"

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        draw = Draw(generator, self.name, split)
        model, architecture = draw_perceptron(draw, 64, 10)
        inputs, labels = digits(split)
        targets = with_label_noise(labels.repeat(num_problems, 1), 10, draw)
        batches = draw_rows(inputs.expand(num_problems, *inputs.shape), targets, draw)
        return network_problem(model, architecture, num_problems, batches, cross_entropy, horizons, draw)


class DigitsAutoencoder(Task):
    """Perceptrons that reconstruct scikit-learn's digits, from noisy ones where there is noise."""

    name = "digits_autoencoder"

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        draw = Draw(generator, self.name, split)
        model, architecture = draw_perceptron(draw, 64, 64)
        inputs, _ = digits(split)
        inputs = inputs.expand(num_problems, *inputs.shape)
        batches = draw_rows(inputs, inputs, draw)
        return network_problem(model, architecture, num_problems, batches, F.mse_loss, horizons, draw)


def _teacher_data(draw: Draw, num_problems: int, num_inputs: int, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Inputs with a decaying spectrum and the outputs of random two-layer networks on them, standardised."""
    spectrum = torch.arange(1, num_inputs + 1) ** -draw.uniform(0.0, 1.0)
    mixing = draw.normal(num_problems, num_inputs, num_inputs) / math.sqrt(num_inputs)
    inputs = (draw.normal(num_problems, _NUM_EXAMPLES, num_inputs) * spectrum) @ mixing
    inputs = inputs / inputs.std(dim=(1, 2), keepdim=True)
    gain = draw.log_uniform(0.3, 2.0) / math.sqrt(num_inputs)
    hidden = torch.tanh(gain * inputs @ draw.normal(num_problems, num_inputs, _NUM_TEACHER_UNITS))
    outputs = hidden @ draw.normal(num_problems, _NUM_TEACHER_UNITS, num_outputs)
    return inputs, (outputs - outputs.mean(dim=1, keepdim=True)) / outputs.std(dim=1, keepdim=True)


class TeacherRegression(Task):
    """Perceptrons that regress on the outputs of random networks."""

    name = "teacher_regression"

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        draw = Draw(generator, self.name, split)
        num_inputs, num_outputs = draw.integer(4, 32), draw.integer(1, 8)
        model, architecture = draw_perceptron(draw, num_inputs, num_outputs)
        inputs, targets = _teacher_data(draw, num_problems, num_inputs, num_outputs)
        targets = targets + draw.uniform(0.0, 0.5) * draw.normal(*targets.shape)
        batches = draw_rows(inputs, targets, draw)
        return network_problem(model, architecture, num_problems, batches, F.mse_loss, horizons, draw)


class TeacherClassification(Task):
    """Perceptrons that learn the most likely class according to random networks."""

    name = "teacher_classification"

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        draw = Draw(generator, self.name, split)
        num_inputs, num_classes = draw.integer(4, 32), draw.integer(2, 10)
        model, architecture = draw_perceptron(draw, num_inputs, num_classes)
        inputs, outputs = _teacher_data(draw, num_problems, num_inputs, num_classes)
        targets = with_label_noise(outputs.argmax(dim=-1), num_classes, draw)
        batches = draw_rows(inputs, targets, draw)
        return network_problem(model, architecture, num_problems, batches, cross_entropy, horizons, draw)
