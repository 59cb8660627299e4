"""Plain numbers about what an optimizer has done so far, and warnings that are given once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from teleport_optim.optim.controls import Controls
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import HyperParameters, step_coefficients

__all__ = ["Notices", "OptimizerStats", "ScalarWriter", "TensorStats", "brief_list", "tensor_stats"]

_OWN_FILES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
"""Where the code lies between a user's line and a warning."""


class TensorStats(NamedTuple):
    """Numbers about the last step of one tensor."""

    rate: float
    """RMS of the step, decay not counted, over rows that have a gradient."""
    decay: float
    """Share by which the values were shrunk."""
    momentum: float
    """Decay of the gradient average."""
    balance: float
    """Strength of the teleport that balances the norms of weights."""
    gradient_balance: float
    """Strength of the teleport that balances the norms of gradients."""
    teleport_size: float
    """RMS of the log-scales of the sites on the tensor, at the last teleport."""
    num_skipped_steps: int
    """Steps skipped since the gradient of this tensor was not finite."""


class OptimizerStats(NamedTuple):
    """Plain numbers about what an optimizer has done so far.

    Attributes:
        num_steps: Steps taken.
        num_skipped_steps: Steps not taken because a gradient was not finite.
        teleport_size: RMS over channels of the log-scale of the last step's teleport; 0 if it took none.
        tensors: By name, for every tensor that has had a step.
    """

    num_steps: int
    num_skipped_steps: int
    teleport_size: float
    tensors: dict[str, TensorStats]

    def log(self, writer: ScalarWriter, step: int | None = None, prefix: str = "optimizer") -> None:
        """Write one scalar for every tensor and number; see :meth:`LearnedTeleportOptimizer.log`."""
        step = self.num_steps if step is None else step
        for key, value in self._asdict().items():
            if key != "tensors":
                writer.add_scalar(f"{prefix}/{key}", value, step)
        for name, tensor in self.tensors.items():
            for key, value in tensor._asdict().items():
                writer.add_scalar(f"{prefix}_{key}/{name}", value, step)


class ScalarWriter(Protocol):
    """A writer of scalars, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Write one number."""
        ...


def tensor_stats(
    slots: Sequence[Mapping[str, Tensor]],
    controls: Controls,
    *,
    step: int,
    hyper: HyperParameters,
    table: ParameterTable,
    teleport_sizes: Mapping[str, float],
) -> dict[str, TensorStats]:
    """Numbers about the last step, number ``step``, of every tensor of ``table``; the slots are in the same order."""
    coefficients, known = step_coefficients(controls, step=step, hyper=hyper, table=table), table.tensors(controls.rate)
    columns = [
        coefficients.step_lengths * known.step_scale / known.step_length,
        1.0 - coefficients.decay_factors,
        coefficients.beta.expand_as(coefficients.decay_factors),
        controls.balance,
        controls.gradient_balance,
    ]
    return {
        name: TensorStats._make([*row, teleport_sizes.get(name, 0.0), int(own["skipped"])])
        for name, own, row in zip(table.names, slots, torch.stack(columns, dim=-1).tolist())
    }


class Notices:
    """Warnings at the line of the user that made or stepped an optimizer."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        """Keys of the warnings that are given once."""

    def warn(self, message: str, once: str | None = None) -> None:
        """Warn; with a key, only once."""
        if once is not None:
            if once in self.given:
                return
            self.given.add(once)
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN_FILES):
            frame, level = frame.f_back, level + 1
        warnings.warn(message, stacklevel=level)


def brief_list(names: Sequence[str]) -> str:
    """The first few of many names.

    Example:
        >>> brief_list(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
