"""Records of a step, grouped by when they change: settings, state, coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_optim.optim.controls import Controls
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.schedule import Horizon, rate_and_decay

__all__ = ["BaseCoefficients", "HyperParameters", "StepCoefficients", "UpdateState", "slot_dtype", "step_coefficients"]


class HyperParameters(NamedTuple):
    """Settings of the user; tensors hold one entry per tensor of the table.

    Attributes:
        lr: Factor on the rate of every step.
        weight_decay: Decoupled decay per unit of rate; NaN stands for the learned decay.
        horizon: Length of the run, in the last 30 % of which the rate falls to zero.
    """

    lr: Tensor
    weight_decay: Tensor
    horizon: Horizon = Horizon()

    @classmethod
    def of(cls, rates: Sequence[float], decays: Sequence[float], horizon: Horizon) -> HyperParameters:
        """From one number per tensor; a decay of NaN stands for the learned one."""
        lr, weight_decay = (torch.tensor(values, dtype=torch.float32) for values in (rates, decays))
        return cls(lr, weight_decay, horizon)

    @classmethod
    def default(cls, num_tensors: int, total_steps: int | None = None) -> HyperParameters:
        """Nothing set: ``lr`` 1 and the learned decay."""
        ones = torch.ones(num_tensors, dtype=torch.float32)
        return cls(ones, math.nan * ones, Horizon(total_steps))


class UpdateState(NamedTuple):
    """Memory of the rule between steps."""

    momenta: Mapping[str, Tensor]
    """Average of the gradients, a covector, of the shape of each parameter."""
    average_offsets: Mapping[str, Tensor]
    """Average of the iterates minus the parameters, of the shape of each; transforms like a vector."""
    hidden: Tensor
    """Hidden state of the meta-optimizer, ``[*runs, num_tensors, 2 * hidden_size]``."""
    outputs: Tensor
    """The meta-optimizer's last raw outputs, ``[*runs, num_tensors, 5]``."""
    log_grad_rms: Tensor
    """Running and first log-RMS of each gradient, ``[*runs, num_tensors, 2]``; NaN before the first gradient."""

    @classmethod
    def initial(cls, params: Mapping[str, Tensor], hidden: Tensor) -> UpdateState:
        """The state before the first step.

        Args:
            params: Parameters by name, each ``[*runs, *shape]``.
            hidden: The meta-optimizer's initial hidden state, ``[*runs, num_tensors, 2 * hidden_size]``.
        """
        *runs, num_tensors, _ = hidden.shape
        return cls(
            momenta={name: torch.zeros_like(param, dtype=slot_dtype(param)) for name, param in params.items()},
            average_offsets={name: torch.zeros_like(param, dtype=slot_dtype(param)) for name, param in params.items()},
            hidden=hidden,
            outputs=hidden.new_zeros(*runs, num_tensors, len(Controls._fields)),
            log_grad_rms=hidden.new_full((*runs, num_tensors, 2), math.nan),
        )


def slot_dtype(param: Tensor) -> torch.dtype:
    """Dtype of the momentum and of the average's offset of a parameter: bfloat16, but float64 for parameters of that."""
    return torch.float64 if param.dtype == torch.float64 else torch.bfloat16


class StepCoefficients(NamedTuple):
    """Numbers that steer one momentum step."""

    beta: Tensor
    """Decay of the gradient average, ``[*runs]``."""
    decay_factors: Tensor
    """Factors by which the parameters shrink, ``[*runs, num_tensors]``."""
    step_lengths: Tensor
    """Length of the step of every row of a matrix, or of a vector, ``[*runs, num_tensors]``."""


class BaseCoefficients(NamedTuple):
    """Step coefficients per unit of the prior rate; they change only with the controls and with what the user sets."""

    beta: Tensor
    """Decay of the gradient average, ``[*runs]``."""
    step_lengths: Tensor
    """Length of the step of every row of a matrix, or of a vector, ``[*runs, num_tensors]``."""
    learned_decays: Tensor
    """Decay per unit of the prior decay, where it is learned."""
    user_decays: Tensor
    """Decay where the user has set it."""

    @classmethod
    def of(cls, controls: Controls, hyper: HyperParameters, table: ParameterTable) -> BaseCoefficients:
        """The coefficients under these controls."""
        known = table.tensors(controls.rate)
        rates = controls.rate * hyper.lr.to(controls.rate)
        user_decay = hyper.weight_decay.to(controls.rate)
        is_learned = torch.isnan(user_decay)
        return cls(
            controls.momentum,
            rates * known.step_length,
            rates * torch.where(is_learned, controls.decay * known.is_matrix, 0.0),
            rates * torch.where(is_learned, 0.0, user_decay),
        )

    def coefficients(self, rate: float, decay: float) -> StepCoefficients:
        """The coefficients of a step at this prior rate and decay."""
        decay_factors = (1.0 - rate * self.user_decays).sub_(self.learned_decays, alpha=rate * decay)
        return StepCoefficients(self.beta, decay_factors, rate * self.step_lengths)


def step_coefficients(
    controls: Controls, *, step: int, hyper: HyperParameters, table: ParameterTable
) -> StepCoefficients:
    """The coefficients of the momentum step of this number."""
    return BaseCoefficients.of(controls, hyper, table).coefficients(*rate_and_decay(step, hyper.horizon, table))
