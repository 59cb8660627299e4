"""Tasks of a comparison: networks with their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from teleport_optim.meta_training.tasks.data import Data

__all__ = ["EvaluationTask"]


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
