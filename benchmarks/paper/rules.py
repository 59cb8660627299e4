"""The update rules of arXiv 2504.15399: an LSTM that reads the gradient of a test function, and what it may emit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.paper.functions import FunctionProblem
from benchmarks.paper.orbits import Orbit
from teleport_optim.meta_training.rules import Rule, Tensors
from teleport_optim.meta_training.tasks import InnerProblem

__all__ = ["VARIANTS", "PaperRule", "PaperState"]

VARIANTS: dict[str, frozenset[str]] = {
    "update": frozenset({"update"}),
    "update+teleport": frozenset({"update", "teleport"}),
    "lr": frozenset({"lr"}),
    "lr+teleport": frozenset({"lr", "teleport"}),
    "lr+teleport+momentum": frozenset({"lr", "teleport", "momentum"}),
}
"""Every variant by name, with what its network emits."""


class _PaperNetwork(nn.Module):
    """Two stacked LSTM cells and linear heads, batched over runs by hand. Heads start near zero."""

    def __init__(self, num_inputs: int, num_outputs: int, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        bound = 1.0 / math.sqrt(hidden_size)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(bound * (2.0 * torch.rand(shape, generator=generator) - 1.0))

        self.first_input_weight = uniform(4 * hidden_size, num_inputs)
        self.first_hidden_weight = uniform(4 * hidden_size, hidden_size)
        self.first_bias = uniform(4 * hidden_size)
        self.second_input_weight = uniform(4 * hidden_size, hidden_size)
        self.second_hidden_weight = uniform(4 * hidden_size, hidden_size)
        self.second_bias = uniform(4 * hidden_size)
        self.readout_weight = uniform(num_outputs, hidden_size)
        self.readout_bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[num_runs, num_inputs]`` and ``[num_runs, 4 * hidden_size]`` to outputs and the new hidden state."""
        output_1, cell_1, output_2, cell_2 = hidden.chunk(4, dim=-1)
        gates = _linear(self.first_input_weight, inputs) + _linear(self.first_hidden_weight, output_1) + self.first_bias
        output_1, cell_1 = _lstm_cell(gates, cell_1)
        gates = (
            _linear(self.second_input_weight, output_1)
            + _linear(self.second_hidden_weight, output_2)
            + self.second_bias
        )
        output_2, cell_2 = _lstm_cell(gates, cell_2)
        outputs = _linear(self.readout_weight, output_2) + self.readout_bias
        return outputs, torch.cat([output_1, cell_1, output_2, cell_2], dim=-1)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    """``weight [..., out, in]`` times ``x [..., in]``."""
    return (weight @ x.unsqueeze(-1)).squeeze(-1)


def _lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    enter, forget, candidate, emit = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.sigmoid(emit) * torch.tanh(cell), cell


class PaperState(NamedTuple):
    """State of a run: ``[num_runs, 4 * hidden_size]`` and ``[num_runs, dim]``."""

    hidden: Tensor
    velocity: Tensor


class PaperRule(Rule):
    """LSTM(update), LSTM(lr) and their kin: the network reads the raw gradient of a test function of ``dim`` variables.

    One step with what the LSTM emits, absent parts left out (Algorithms 2 and 3 of the paper)::

        v <- beta v - alpha grad f(x)        or        v <- update
        x <- x + v
        if the step is in Z:    x <- g . x,    v <- (dg/dx) v

    ``alpha = 0.03 exp(3 tanh(o / 3))``, ``beta = sigmoid(o)``; the updates and the coordinates of ``g`` are unbounded linear
    outputs. The paper does not say how it bounds the rate, nor whether the velocity is moved by ``g``; it has to be, to
    stay a tangent vector.

    The LSTM reads all of the gradient, so one network serves functions of one number of variables.

    Source: Zamir et al., 2025, arXiv 2504.15399; sizes of the network from the public code of its first author.

    Args:
        variant: One of ``VARIANTS``.
        hidden_size: Width of the LSTM cells.
        generator: Draws the initial weights.
        problem: A problem of the kind that is to be trained.
        theta_gradient: Give the network the derivative of the squared gradient norm along the orbit as an input.
        teleport_steps: The set Z of steps after which a teleport follows; empty for every step.

    Raises:
        ValueError: if the variant cannot train such problems.
    """

    def __init__(
        self,
        variant: str,
        hidden_size: int,
        generator: torch.Generator,
        problem: InnerProblem,
        *,
        theta_gradient: bool = False,
        teleport_steps: tuple[int, ...] = (),
    ) -> None:
        emits = VARIANTS[variant]
        self._theta_gradient, self._teleport_steps = theta_gradient, teleport_steps
        self._dim, num_coordinates = _sizes(problem)
        self._num_coordinates = num_coordinates if "teleport" in emits or theta_gradient else 0
        sizes = {"update": self._dim, "lr": 1, "momentum": 1, "teleport": self._num_coordinates}
        self._heads = {name: size for name, size in sizes.items() if name in emits}
        num_inputs = self._dim + (self._num_coordinates if theta_gradient else 0)
        self.network: _PaperNetwork = _PaperNetwork(num_inputs, sum(self._heads.values()), hidden_size, generator)

    def check(self, problem: InnerProblem) -> None:
        dim, num_coordinates = _sizes(problem)
        if dim != self._dim or (self._num_coordinates and num_coordinates != self._num_coordinates):
            raise ValueError(
                f"{problem.description} has {dim} variables and {num_coordinates} group coordinates, "
                f"the network was made for {self._dim} and {self._num_coordinates}: train on tasks of one kind"
            )

    def initial(self, params: Tensors) -> PaperState:
        (x,) = params.values()
        return PaperState(x.new_zeros(len(x), 4 * self.network.hidden_size), torch.zeros_like(x))

    def step(
        self,
        weights: Tensors,
        params: Tensors,
        grads: Tensors,
        state: Any,
        *,
        step: int,
        problem: InnerProblem,
        inputs: Tensor,
    ) -> tuple[Tensors, Any]:
        ((name, x),) = params.items()
        assert isinstance(problem, FunctionProblem)
        grad, orbit = grads[name], problem.orbit
        seen = [grad]
        if self._theta_gradient:
            seen.append(_orbit_gradient(orbit, problem, name, x, inputs, create_graph=grad.requires_grad))
        outputs, hidden = functional_call(self.network, weights, (torch.cat(seen, dim=-1), state.hidden))
        emitted = dict(zip(self._heads, outputs.split(list(self._heads.values()), dim=-1)))
        velocity = self._velocity(emitted, grad, state.velocity)
        x = x + velocity
        if "teleport" in emitted and (not self._teleport_steps or step in self._teleport_steps):
            before, x = x, orbit.move(emitted["teleport"], x, inputs)
            if "momentum" in emitted:
                velocity = _push_forward(orbit, emitted["teleport"], before, inputs, velocity)
        return {name: x}, PaperState(hidden, velocity)

    def _velocity(self, emitted: Tensors, grad: Tensor, velocity: Tensor) -> Tensor:
        if "update" in emitted:
            return emitted["update"]
        descent = -0.03 * torch.exp(3.0 * torch.tanh(emitted["lr"] / 3.0)) * grad
        return descent + torch.sigmoid(emitted["momentum"]) * velocity if "momentum" in emitted else descent


def _sizes(problem: InnerProblem) -> tuple[int, int]:
    """Numbers of variables and of group coordinates."""
    if not isinstance(problem, FunctionProblem):
        raise ValueError(
            f"{problem.description}: the paper's variants read one vector of variables and its whole gradient; "
            f"networks are trained with the controller"
        )
    return problem.params["x"].shape[1], problem.orbit.num_coordinates


def _push_forward(orbit: Orbit, coordinates: Tensor, x: Tensor, coefficients: Tensor, velocity: Tensor) -> Tensor:
    """The velocity at the moved point, ``(dg/dx) v``: the derivative, in ``u``, of the product of ``u`` and the Jacobian."""
    has_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        moved = orbit.move(coordinates, x, coefficients)
        probe = torch.zeros_like(moved, requires_grad=True)
        (pulled,) = torch.autograd.grad(moved, x, probe, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, probe, velocity, create_graph=has_graph)
    return pushed


def _orbit_gradient(
    orbit: Orbit, problem: InnerProblem, name: str, x: Tensor, coefficients: Tensor, *, create_graph: bool
) -> Tensor:
    """Derivative of the squared gradient norm along the orbit, at the identity: ``[num_runs, num_coordinates]``."""
    with torch.enable_grad():
        coordinates = x.new_zeros(len(x), orbit.num_coordinates, requires_grad=True)
        moved = orbit.move(coordinates, x if create_graph else x.detach(), coefficients)
        grads, _ = problem.gradients({name: moved}, coefficients, x.new_zeros(len(x)), create_graph=True)
        squares = grads[name].square().sum()
        (slope,) = torch.autograd.grad(squares, coordinates, create_graph=create_graph)
    return slope
