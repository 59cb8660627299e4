"""What is trained in a comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.action import act
from teleport_optim.groups import GROUPS
from teleport_optim.symmetry import find_symmetries

__all__ = ["Data", "EvaluationTask", "rescale", "seeded"]


@dataclass(frozen=True)
class Data:
    """What a network is trained and tested on.

    Attributes:
        inputs, targets: Training examples, ``[n, ...]`` each.
        test_inputs, test_targets: Test examples.
        loss: Output and target to a mean loss.
        noise: Standard deviation of the noise that is added to the inputs of a minibatch, so that no example is seen twice;
            0 for inputs that are integers.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    noise: float = 0.0


@dataclass(frozen=True)
class EvaluationTask:
    """A network and its data, under a name.

    Attributes:
        name: Short and lower-case, with underscores.
        description: One line: what network, what data.
        make_model: A seed to a network with its initial values; torch's global generator is left as it was.
        make_data: The data, the same at every call.
        batch_size: Examples of a minibatch.
        steps: Usual length of a run.
    """

    name: str
    description: str
    make_model: Callable[[int], nn.Module]
    make_data: Callable[[], Data]
    batch_size: int = 64
    steps: int = 400


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """``build`` as a function of a seed."""

    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


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
    noise = {s.id: torch.randn(s.size, generator=generator, dtype=torch.float64) for s in spec}
    element = {site: GROUPS["scaling"].exp(sigma * values) for site, values in noise.items()}
    model.load_state_dict(act(spec, element, model.state_dict()))
