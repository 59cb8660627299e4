"""The meta-optimizer: one small LSTM shared by all tensors of a network, and the controls that it emits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from teleport_optim.controller.control import control
from teleport_optim.controller.features import NUM_FEATURES
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import UpdateState
from teleport_optim.optim.shapes import BLOCK_ROWS

__all__ = ["MetaOptimizer"]


class MetaOptimizer(nn.Module):
    """An LSTM over control steps, run with the same weights on every tensor.

    It is size-agnostic: its inputs are a fixed number of features per tensor, so one set of weights serves any network.
    (The LSTM of arXiv 2504.15399 reads the flattened gradient itself, which ties its weights to one architecture; this is
    a deliberate departure.) The readout starts at zero, so an untrained meta-optimizer emits the prior exactly.

    The cell is written out rather than taken from ``nn.LSTMCell``, which has no batching rule under ``torch.func.vmap``.

    Args:
        hidden_size: Width of the LSTM, at least 1.
        generator: Draws the initial weights; a generator seeded with 0 by default.
        block_rows: Number of rows of a matrix whose steps are made orthogonal to each other. More cost more, and are worth
            more; 1 leaves rows of unit norm.

    Raises:
        ValueError: if ``hidden_size`` or ``block_rows`` is not positive.

    Example:
        >>> meta_optimizer = MetaOptimizer(hidden_size=8)
        >>> outputs, hidden = meta_optimizer(torch.randn(3, NUM_FEATURES), meta_optimizer.initial_hidden(3))
        >>> outputs.shape, hidden.shape, outputs.any().item()
        (torch.Size([3, 5]), torch.Size([3, 16]), False)
    """

    rows_per_block: Tensor

    def __init__(
        self, hidden_size: int = 12, generator: torch.Generator | None = None, *, block_rows: int = BLOCK_ROWS
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("block_rows", block_rows)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.hidden_size = hidden_size
        generator = generator or torch.Generator().manual_seed(0)
        num_outputs = len(Controls._fields)

        def normal(rows: int, columns: int) -> nn.Parameter:
            values = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
            return nn.Parameter(values / math.sqrt(columns))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32))

        self.input_weight = normal(4 * hidden_size, NUM_FEATURES)
        self.hidden_weight = normal(4 * hidden_size, hidden_size)
        self.bias = zeros(4 * hidden_size)
        self.bias.data[:hidden_size] = 1.0  # remember at first
        self.readout_weight = zeros(num_outputs, hidden_size)
        self.skip_weight = zeros(num_outputs, NUM_FEATURES)
        self.readout_bias = zeros(num_outputs)
        self.register_buffer("rows_per_block", torch.tensor(float(block_rows)))

    @property
    def block_rows(self) -> int:
        """Number of rows of a matrix whose steps are made orthogonal to each other."""
        return max(1, round(self.rows_per_block.item()))

    def initial_hidden(self, num_tensors: int) -> Tensor:
        """Hidden and cell state side by side, zeros of shape ``[num_tensors, 2 * hidden_size]``."""
        return self.bias.new_zeros(num_tensors, 2 * self.hidden_size).detach()

    def forward(self, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One control step.

        Args:
            features: ``[*runs, num_tensors, NUM_FEATURES]``.
            hidden: ``[*runs, num_tensors, 2 * hidden_size]``.

        Returns:
            Raw outputs ``[*runs, num_tensors, 5]`` for :meth:`Controls.from_outputs`, and the new hidden state.

        Under ``torch.func.functional_call`` every weight may have the same leading axes: each run then has its own.
        """
        output, cell = hidden.chunk(2, dim=-1)
        gates = features @ self.input_weight.mT + output @ self.hidden_weight.mT + self.bias.unsqueeze(-2)
        forget, enter, emit, candidate = gates.chunk(4, dim=-1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
        output = torch.sigmoid(emit) * torch.tanh(cell)
        outputs = output @ self.readout_weight.mT + features @ self.skip_weight.mT
        outputs = outputs + self.readout_bias.unsqueeze(-2)
        return outputs, torch.cat([output, cell], dim=-1)

    def control(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: UpdateState,
        *,
        step: int,
        total_steps: int | None,
        table: ParameterTable,
    ) -> UpdateState:
        """Set the controls at a control step; see :class:`teleport_optim.optim.rule.Control`."""
        network = self.to(state.hidden.device)
        return control(network, params, grads, state, step=step, total_steps=total_steps, table=table)
