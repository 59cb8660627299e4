"""The task families of meta-training: multilayer perceptrons and small convolutional networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.action import act
from teleport_optim.groups import GROUPS
from teleport_optim.symmetry import find_symmetries
from teleport_optim.tasks.data import digits
from teleport_optim.tasks.problem import InnerProblem, Task

__all__ = ["TASKS", "DigitsAutoencoder", "DigitsCNN", "DigitsMLP", "TeacherClassification", "TeacherRegression"]

_ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "relu": (nn.ReLU, 0.5),
    "leaky_relu": (lambda: nn.LeakyReLU(0.1), 0.15),
    "tanh": (nn.Tanh, 0.2),
    "gelu": (nn.GELU, 0.15),
}


class Draw:
    """Scalar draws from one generator, so that samplers read as a list of choices."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        return self.uniform(0.0, 1.0) < probability

    def activation(self) -> str:
        weights = torch.tensor([weight for _, weight in _ACTIVATIONS.values()])
        return list(_ACTIVATIONS)[int(torch.multinomial(weights, 1, generator=self.generator))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def _mlp(draw: Draw, num_inputs: int, num_outputs: int) -> tuple[nn.Sequential, str]:
    depth, activation = draw.integer(1, 4), draw.activation()
    widths = [int(draw.log_uniform(16, 56)) // 8 * 8] * depth
    if draw.chance(0.3):
        widths = [int(draw.log_uniform(16, 56)) // 8 * 8 for _ in widths]
    layers: list[nn.Module] = []
    for width_in, width in zip([num_inputs, *widths], widths):
        layers += [nn.Linear(width_in, width), _ACTIVATIONS[activation][0]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs)), f"{activation} {'-'.join(map(str, widths))}"


def _cnn(draw: Draw) -> tuple[nn.Sequential, str]:
    activation = draw.activation()
    make = _ACTIVATIONS[activation][0]
    first, second = draw.integer(2, 4) * 4, draw.integer(2, 4) * 4
    layers: list[nn.Module] = [
        nn.Conv2d(1, first, 3, padding=1),
        make(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        make(),
    ]
    if draw.chance(0.5):
        layers += [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(second * 4, 10)]
    else:
        layers += [nn.Flatten(), nn.Linear(second * 16, 10)]
    return nn.Sequential(*layers), f"{activation} {first}-{second}"


def _initial_params(model: nn.Sequential, num_problems: int, draw: Draw) -> tuple[dict[str, Tensor], float]:
    """Random initial values of torch's kind; sometimes all scaled, sometimes with hidden units rescaled along the orbit.

    Returns:
        The parameters, and the standard deviation of the log-factors of the hidden units.
    """
    gain = draw.log_uniform(0.5, 2.0) if draw.chance(0.3) else 1.0
    params = {}
    for name, param in model.named_parameters():
        weight = model.get_parameter(name.replace("bias", "weight"))
        bound = 1.0 / math.sqrt(weight[0].numel())
        values = bound * (2.0 * torch.rand(num_problems, *param.shape, generator=draw.generator) - 1.0)
        params[name] = gain * values if param.dim() > 1 else values
    sigma = draw.uniform(0.5, 2.5) if draw.chance(0.35) else 0.0
    spec = find_symmetries(model).of_group("scaling")
    scaling = GROUPS["scaling"]
    for problem in range(num_problems if sigma else 0):
        element = {s.id: scaling.exp(sigma * draw.normal(s.size).double()) for s in spec}
        moved = act(spec, element, {name: param[problem] for name, param in params.items()})
        for name, value in moved.items():
            params[name][problem] = value
    return params, sigma


def _draw_problem(
    model: nn.Sequential,
    architecture: str,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    max_horizon: int,
    draw: Draw,
) -> InnerProblem:
    """The part that all families share: initial values, minibatches, noise, the scale of the loss and the horizon.

    ``inputs`` and ``targets`` are ``[num_problems, num_examples, ...]``.
    """
    num_problems, num_examples = inputs.shape[:2]
    params, sigma = _initial_params(model, num_problems, draw)
    horizon = int(draw.log_uniform(min(40, max_horizon), max_horizon))
    batch_size = min(int(2 ** draw.uniform(4, 6.5)), num_examples)
    noise = draw.uniform(0.0, 1.0) if draw.chance(0.5) else 0.0
    loss_scale = 10.0 ** draw.uniform(-3, 3)
    problems = torch.arange(num_problems)[:, None]

    def sample_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(num_examples, (num_problems, batch_size), generator=generator)
        batch = inputs[problems, rows]
        if noise:
            batch = batch + noise * torch.randn(batch.shape, generator=generator)
        return batch, targets[problems, rows]

    def scaled_loss(output: Tensor, target: Tensor) -> Tensor:
        scaled: Tensor = loss_scale * loss(output, target)
        return scaled

    description = f"{architecture} sigma={sigma:.1f} batch={batch_size} noise={noise:.1f} steps={horizon}"
    return InnerProblem(model, params, scaled_loss, sample_batch, horizon, description)


def _with_label_noise(labels: Tensor, num_classes: int, draw: Draw) -> Tensor:
    share = draw.uniform(0.0, 0.3) if draw.chance(0.4) else 0.0
    is_wrong = torch.rand(labels.shape, generator=draw.generator) < share
    return torch.where(is_wrong, torch.randint(num_classes, labels.shape, generator=draw.generator), labels)


class DigitsMLP(Task):
    """Multilayer perceptrons that classify scikit-learn's digits."""

    name = "digits_mlp"

    def sample(self, num_problems: int, max_horizon: int, split: str, generator: torch.Generator) -> InnerProblem:
        draw = Draw(generator)
        model, architecture = _mlp(draw, 64, 10)
        inputs, labels = digits(split)
        targets = _with_label_noise(labels.repeat(num_problems, 1), 10, draw)
        inputs = inputs.expand(num_problems, *inputs.shape)
        return _draw_problem(model, f"{self.name} {architecture}", inputs, targets, F.cross_entropy, max_horizon, draw)


class DigitsCNN(Task):
    """Small convolutional networks that classify scikit-learn's digits."""

    name = "digits_cnn"
    share = 0.2  # One step costs ten times that of the perceptrons.

    def sample(self, num_problems: int, max_horizon: int, split: str, generator: torch.Generator) -> InnerProblem:
        draw = Draw(generator)
        model, architecture = _cnn(draw)
        inputs, labels = digits(split)
        targets = _with_label_noise(labels.repeat(num_problems, 1), 10, draw)
        inputs = inputs.reshape(-1, 1, 8, 8).expand(num_problems, -1, 1, 8, 8)
        return _draw_problem(model, f"{self.name} {architecture}", inputs, targets, F.cross_entropy, max_horizon, draw)


class DigitsAutoencoder(Task):
    """Multilayer perceptrons that reconstruct scikit-learn's digits."""

    name = "digits_autoencoder"

    def sample(self, num_problems: int, max_horizon: int, split: str, generator: torch.Generator) -> InnerProblem:
        draw = Draw(generator)
        model, architecture = _mlp(draw, 64, 64)
        inputs, _ = digits(split)
        inputs = inputs.expand(num_problems, *inputs.shape)
        return _draw_problem(model, f"{self.name} {architecture}", inputs, inputs, F.mse_loss, max_horizon, draw)


def _teacher_data(draw: Draw, num_problems: int, num_inputs: int, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Inputs with a decaying spectrum and the outputs of random two-layer networks on them, standardised."""
    spectrum = torch.arange(1, num_inputs + 1) ** -draw.uniform(0.0, 1.0)
    mixing = draw.normal(num_problems, num_inputs, num_inputs) / math.sqrt(num_inputs)
    inputs = (draw.normal(num_problems, 512, num_inputs) * spectrum) @ mixing
    inputs = inputs / inputs.std(dim=(1, 2), keepdim=True)
    hidden = torch.tanh(
        inputs @ draw.normal(num_problems, num_inputs, 32) * draw.log_uniform(0.3, 2.0) / math.sqrt(num_inputs)
    )
    outputs = hidden @ draw.normal(num_problems, 32, num_outputs)
    return inputs, (outputs - outputs.mean(dim=1, keepdim=True)) / outputs.std(dim=1, keepdim=True)


class TeacherRegression(Task):
    """Multilayer perceptrons that regress on the outputs of random networks."""

    name = "teacher_regression"

    def sample(self, num_problems: int, max_horizon: int, split: str, generator: torch.Generator) -> InnerProblem:
        draw = Draw(generator)
        num_inputs, num_outputs = draw.integer(4, 32), draw.integer(1, 8)
        model, architecture = _mlp(draw, num_inputs, num_outputs)
        inputs, targets = _teacher_data(draw, num_problems, num_inputs, num_outputs)
        targets = targets + draw.uniform(0.0, 0.5) * draw.normal(*targets.shape)
        return _draw_problem(model, f"{self.name} {architecture}", inputs, targets, F.mse_loss, max_horizon, draw)


class TeacherClassification(Task):
    """Multilayer perceptrons that learn the most likely class according to random networks."""

    name = "teacher_classification"

    def sample(self, num_problems: int, max_horizon: int, split: str, generator: torch.Generator) -> InnerProblem:
        draw = Draw(generator)
        num_inputs, num_classes = draw.integer(4, 32), draw.integer(2, 10)
        model, architecture = _mlp(draw, num_inputs, num_classes)
        inputs, outputs = _teacher_data(draw, num_problems, num_inputs, num_classes)
        targets = _with_label_noise(outputs.argmax(dim=-1), num_classes, draw)
        return _draw_problem(model, f"{self.name} {architecture}", inputs, targets, F.cross_entropy, max_horizon, draw)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (DigitsMLP(), DigitsCNN(), DigitsAutoencoder(), TeacherRegression(), TeacherClassification())
}
"""Every task family by name."""
