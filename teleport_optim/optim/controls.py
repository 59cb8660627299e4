"""The controls: five numbers per tensor that steer a step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PRIOR_MOMENTUM", "Controls"]


PRIOR_MOMENTUM = 0.65
"""Decay of the gradient average where nothing is learned."""


class Controls(NamedTuple):
    """Factors and strengths that steer a step, ``[*runs, num_tensors]``, and one momentum for all tensors."""

    rate: Tensor
    """Factor on the prior rate, in (e^-2, e^2); 1 at the prior."""
    momentum: Tensor
    """Decay beta of the gradient average, in (0.2, 0.93), the same for all tensors, ``[*runs]``; 0.65 at the prior."""
    decay: Tensor
    """Factor on the prior weight decay, in (e^-2, e^2); 1 at the prior."""
    balance: Tensor
    """Strength of the teleport that balances the norms of weights around a channel, in (-1, 1); 0 at the prior."""
    gradient_balance: Tensor
    """Strength of the teleport that balances the norms of gradients around a channel, in (-1, 1); 0 at the prior."""

    @classmethod
    def prior(cls, num_tensors: int) -> Controls:
        """The constant controls under which the rule is its unlearned prior."""
        return cls.from_outputs(torch.zeros(num_tensors, len(cls._fields), dtype=torch.float32))

    @classmethod
    def from_outputs(cls, outputs: Tensor) -> Controls:
        """Bound the raw outputs of a network, shape ``[*runs, num_tensors, 5]``; zeros give the prior."""
        bounded = torch.tanh(outputs)
        rate, momentum, decay, balance, gradient_balance = bounded.unbind(-1)
        logit = math.log(PRIOR_MOMENTUM / (1.0 - PRIOR_MOMENTUM))
        return cls(
            rate=torch.exp(2.0 * rate),
            momentum=torch.sigmoid(logit + 2.0 * momentum.mean(dim=-1)),
            decay=torch.exp(2.0 * decay),
            balance=balance,
            gradient_balance=gradient_balance,
        )
