"""Shared parts of all families of networks: initial values, minibatches, noise, the scale of the loss and the horizon."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from teleport_optim.meta_training.tasks.data import add_noise
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.problem import InnerProblem, Loss, SampleBatch
from teleport_optim.symmetry import SymmetrySpec, find_symmetries
from teleport_optim.symmetry.action import act
from teleport_optim.symmetry.groups import GROUPS

__all__ = [
    "ACTIVATIONS",
    "cross_entropy",
    "draw_activation",
    "draw_rows",
    "initial_params",
    "network_problem",
    "perceptron",
    "rescale",
    "rescale_units",
    "seeded",
    "with_label_noise",
]

_Module = TypeVar("_Module", bound=nn.Module)

ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "relu": (nn.ReLU, 0.5),
    "leaky_relu": (lambda: nn.LeakyReLU(0.1), 0.15),
    "tanh": (nn.Tanh, 0.2),
    "gelu": (nn.GELU, 0.15),
}
"""Activations and how often they are drawn."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """``torch.nn.functional.cross_entropy`` with classes last; for few classes and many networks it takes half the time.

    Args:
        output: ``[..., num_classes]``.
        target: ``[...]``.
    """
    chosen = output.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return (torch.logsumexp(output, dim=-1) - chosen).mean()


def draw_activation(draw: Draw) -> tuple[str, Callable[[], nn.Module]]:
    """The name of an activation and what makes it."""
    name = draw.choice(tuple(ACTIVATIONS), [weight for _, weight in ACTIVATIONS.values()])
    return name, ACTIVATIONS[name][0]


def perceptron(widths: Sequence[int], make_activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Make linear layers of these widths, inputs and outputs included, with activations in between."""
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in pairwise(widths):
        layers += [nn.Linear(num_inputs, num_outputs), make_activation()]
    return nn.Sequential(*layers[:-1])


def seeded(build: Callable[[], _Module]) -> Callable[[int], _Module]:
    """Make ``build`` a function of a seed, which leaves torch's global generator as it was."""

    def make(seed: int) -> _Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


def initial_params(
    model: nn.Module, num_problems: int, draw: Draw, *, gain: float = 1.0, embedding_scale: float = 1.0
) -> dict[str, Tensor]:
    """Random initial values of torch's kind for ``num_problems`` networks.

    Args:
        model: The architecture: a module whose parameters all belong to Linear, convolution, Embedding and norm layers.
        num_problems: Number of networks.
        draw: Draws the values.
        gain: Multiplies matrices and kernels.
        embedding_scale: Standard deviation of embeddings.

    Raises:
        TypeError: if a parameter belongs to a layer of another kind.

    Example:
        >>> draw = Draw(torch.Generator().manual_seed(0), "mine", "train")
        >>> initial_params(nn.Linear(2, 3), num_problems=4, draw=draw)["weight"].shape
        torch.Size([4, 3, 2])
    """
    params = {}
    for prefix, layer in model.named_modules():
        for name, param in layer.named_parameters(prefix, recurse=False):
            shape = (num_problems, *param.shape)
            if isinstance(layer, _NORMS):
                params[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            elif isinstance(layer, nn.Embedding):
                params[name] = embedding_scale * draw.normal(*shape)
            elif isinstance(layer, (nn.Linear, nn.Conv2d)):
                scale = 1.0 if param.dim() == 1 else gain
                params[name] = scale / math.sqrt(layer.weight[0].numel()) * draw.uniforms(*shape)
            else:
                raise TypeError(
                    f"no initial values are known for {name!r}, a parameter of {type(layer).__name__}: build the model "
                    f"from Linear, Conv2d, Embedding and norm layers"
                )
    return params


def rescale(model: nn.Module, inputs: Tensor, sigma: float, seed: int) -> None:
    """Multiply the hidden units of ``model`` that can be scaled by ``exp(sigma N(0, 1))``, and divide what reads them.

    Args:
        model: Is changed; its function stays.
        inputs: An example of what it takes.
        sigma: Standard deviation of the log-factors.
        seed: Decides the factors.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = find_symmetries(model, inputs, groups=["scaling"])
    noise = {site.id: torch.randn(site.size, generator=generator, dtype=torch.float64) for site in spec}
    element = {name: GROUPS["scaling"].exp(sigma * values) for name, values in noise.items()}
    model.load_state_dict(act(spec, element, model.state_dict()))


def rescale_units(spec: SymmetrySpec, params: dict[str, Tensor], sigma: float, draw: Draw) -> dict[str, Tensor]:
    """The same functions with every hidden unit that ``spec`` can scale multiplied by ``exp(sigma N(0, 1))``."""
    scaling = GROUPS["scaling"]
    moved = []
    for problem in range(next(iter(params.values())).shape[0]):
        element = {site.id: scaling.exp(sigma * draw.normal(site.size).double()) for site in spec.of_group("scaling")}
        moved.append(act(spec, element, {name: param[problem] for name, param in params.items()}))
    return {name: torch.stack([one[name] for one in moved]) for name in params}


def with_label_noise(labels: Tensor, num_classes: int, draw: Draw) -> Tensor:
    """The labels, sometimes with a share of them replaced at random."""
    share = draw.uniform(0.0, 0.3) if draw.chance(0.4) else 0.0
    is_wrong = torch.rand(labels.shape, generator=draw.generator) < share
    return torch.where(is_wrong, draw.integers(num_classes, *labels.shape), labels)


def draw_rows(inputs: Tensor, targets: Tensor, draw: Draw, *, largest_batch: int = 90) -> tuple[SampleBatch, str]:
    """Minibatches of random rows, of a random size and sometimes with noise on the inputs; and a description.

    Args:
        inputs: ``[num_problems, num_examples, ...]``.
        targets: ``[num_problems, num_examples, ...]``.
        draw: Draws the size and the noise.
        largest_batch: Bound on the size; the smallest is 16.
    """
    num_problems, num_examples = inputs.shape[:2]
    batch_size = min(int(draw.log_uniform(16, largest_batch + 1)), num_examples)
    noise = draw.uniform(0.0, 1.0) if draw.chance(0.5) else 0.0
    problems = torch.arange(num_problems)[:, None]

    def sample_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(num_examples, (num_problems, batch_size), generator=generator)
        return add_noise(inputs[problems, rows], noise, generator), targets[problems, rows]

    return sample_batch, f"batch={batch_size} noise={noise:.1f}"


def network_problem(
    model: nn.Module,
    architecture: str,
    num_problems: int,
    batches: tuple[SampleBatch, str],
    loss: Loss,
    horizons: tuple[int, int],
    draw: Draw,
) -> InnerProblem:
    """Draw what is left of a problem: initial values, the scale of the loss and the horizon.

    In one of three the initial matrices have another size; in one of three the hidden units are rescaled along their
    orbit, where there is one; in one of six the optimizer is not told the horizon.

    Args:
        model: The architecture.
        architecture: What was drawn of it; with the name of the task, equal for equal architectures.
        num_problems: Networks in the batch.
        batches: Minibatches and their description.
        loss: Output and target of a minibatch to a positive loss.
        horizons: Shortest and longest horizon.
        draw: Draws everything.
    """
    gain = draw.log_uniform(0.5, 2.0) if draw.chance(0.3) else 1.0
    sample_batch, batch_text = batches
    spec = None
    if draw.chance(0.35):
        inputs, _ = sample_batch(torch.Generator().manual_seed(0))
        spec = find_symmetries(model, inputs[0], groups=["scaling"])
    sigma = draw.uniform(0.5, 2.5) if spec else 0.0
    embedding_scale = draw.log_uniform(0.02, 1.0)
    params = initial_params(model, num_problems, draw, gain=gain, embedding_scale=embedding_scale)
    if spec:
        params = rescale_units(spec, params, sigma, draw)
    loss_scale = 10.0 ** draw.uniform(-3, 3)
    horizon = draw.horizon(*horizons)
    knows_horizon = not draw.chance(1 / 6)
    architecture = f"{draw.task} {architecture}"

    def scaled_loss(output: Tensor, target: Tensor) -> Tensor:
        scaled: Tensor = loss_scale * loss(output, target)
        return scaled

    description = f"{architecture} gain={gain:.1f} sigma={sigma:.1f} {batch_text} steps={horizon}"
    if not knows_horizon:
        description += " unknown"
    return InnerProblem(
        model,
        params,
        scaled_loss,
        sample_batch,
        horizon,
        description,
        architecture,
        symmetries=spec,
        knows_horizon=knows_horizon,
    )
