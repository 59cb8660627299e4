"""What is trained in a comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Data", "EvaluationTask", "seeded"]


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
