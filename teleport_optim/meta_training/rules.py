"""What is meta-trained: the default controller, and the five variants of arXiv 2504.15399."""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from teleport_optim.layout import BLOCK_ROWS
from teleport_optim.meta_optimizer import Controls, MetaOptimizer
from teleport_optim.meta_training.tasks.problem import InnerProblem, Orbit
from teleport_optim.update import Hyper, UpdateState, update

__all__ = ["VARIANTS", "ControllerRule", "PaperRule", "Rule", "RuleOptions", "make_rule"]

Tensors = dict[str, Tensor]


class RuleOptions(NamedTuple):
    """What a rule may be told.

    Attributes:
        hidden_size: Width of the network.
        block_rows: Number of rows that the steps which the controller steers make orthogonal to each other.
        theta_gradient: Give the paper's variants the derivative of the squared gradient norm along the orbit as an input.
        teleport_steps: The set Z of steps after which the paper's variants teleport; empty for every step.
    """

    hidden_size: int = 12
    block_rows: int = BLOCK_ROWS
    theta_gradient: bool = False
    teleport_steps: tuple[int, ...] = ()


class Rule(ABC):
    """A learned update rule, advanced for many runs at once, each with its own weights.

    Attributes:
        network: The network whose parameters are meta-trained; a fresh one defines the untrained rule.
    """

    network: nn.Module

    @abstractmethod
    def check(self, problem: InnerProblem) -> None:
        """Raise ``ValueError`` if the rule cannot train this kind of problem."""

    @abstractmethod
    def initial(self, params: Tensors) -> Any:
        """The state before the first step of runs with parameters ``[num_runs, ...]``: a tree of such tensors."""

    @abstractmethod
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
        """One step of every run.

        Args:
            weights: Those of the network, by name, each ``[num_runs, ...]``.
            params: ``[num_runs, ...]`` each.
            grads: At ``params``.
            state: As it was after the last step.
            step: Steps taken so far.
            problem: What is trained.
            inputs: The minibatch's inputs, ``[num_runs, batch, ...]``; the coefficients of a test function.

        Returns:
            New parameters and state.
        """

    def outcome(self, params: Tensors, state: Any) -> Tensors:
        """What a run has reached, if that is not the parameters at which gradients are taken, but an average of them."""
        return params

    def labels(self) -> list[str]:
        """A name for every entry of the flat weights, by which entries can be frozen."""
        return [name for name, param in self.network.named_parameters() for _ in range(param.numel())]

    def is_trained(self, frozen: Sequence[str]) -> Tensor:
        """1 for every entry of the flat weights whose label matches none of the patterns, 0 for the others.

        Raises:
            ValueError: for a pattern that matches nothing.
        """
        labels = self.labels()
        for pattern in frozen:
            if not fnmatch.filter(labels, pattern):
                raise ValueError(f"frozen={pattern!r} matches no meta-parameter; there are {sorted(set(labels))}")
        return torch.tensor([float(not any(fnmatch.fnmatch(label, f) for f in frozen)) for label in labels])

    def flat(self) -> Tensor:
        """The weights of the network, ``[num_parameters]``."""
        return torch.cat([param.detach().reshape(-1) for param in self.network.parameters()])

    def named(self, flat: Tensor) -> Tensors:
        """Flat weights ``[..., num_parameters]`` by name."""
        shapes = {name: param.shape for name, param in self.network.named_parameters()}
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()], dim=-1)
        return {name: part.reshape(*flat.shape[:-1], *shape) for (name, shape), part in zip(shapes.items(), parts)}


class ControllerRule(Rule):
    """The rule of :mod:`teleport_optim.update`: what the shipped checkpoints hold.

    The rows of the readout are labelled by the control that they set, as in ``"readout_weight.momentum"``.
    """

    def __init__(self, options: RuleOptions, generator: torch.Generator) -> None:
        self.network: MetaOptimizer = MetaOptimizer(options.hidden_size, generator, block_rows=options.block_rows)

    def check(self, problem: InnerProblem) -> None:
        """Every problem can be trained."""

    def initial(self, params: Tensors) -> UpdateState:
        hidden = self.network.initial_hidden(len(params)).detach()
        num_runs = len(next(iter(params.values())))
        return UpdateState.initial(params, hidden.expand(num_runs, *hidden.shape))

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
        def controller(features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return functional_call(self.network, weights, (features, hidden))  # type: ignore[no-any-return]

        layout = problem.layout.with_blocks_of(self.network.block_rows)
        hyper = Hyper.default(len(layout.names), problem.horizon if problem.knows_horizon else None)
        return update(
            controller,
            params,
            grads,
            state,
            step=step,
            hyper=hyper,
            layout=layout,
        )

    def outcome(self, params: Tensors, state: Any) -> Tensors:
        return {name: param + state.average_offsets[name].to(param) for name, param in params.items()}

    def labels(self) -> list[str]:
        labels = []
        for name, param in self.network.named_parameters():
            rows = [f"{name}.{control}" for control in Controls._fields]
            per_row = rows if name.startswith(("readout", "skip")) else [name] * len(param)
            labels += [row for row in per_row for _ in range(param.numel() // len(param))]
        return labels


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
    """What a run of the paper's rules remembers: ``[num_runs, 4 * hidden_size]`` and ``[num_runs, dim]``."""

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
    """

    def __init__(
        self, emits: frozenset[str], options: RuleOptions, generator: torch.Generator, problem: InnerProblem
    ) -> None:
        self._emits, self._options, self._dim = emits, options, _num_variables(problem)
        self._num_coordinates = 0
        if "teleport" in emits or options.theta_gradient:
            if problem.orbit is None:
                raise ValueError(f"{problem.description}: this task has no group action, so nothing can teleport on it")
            self._num_coordinates = problem.orbit.num_coordinates
        sizes = {"update": self._dim, "lr": 1, "momentum": 1, "teleport": self._num_coordinates}
        self._heads = {name: size for name, size in sizes.items() if name in emits}
        num_inputs = self._dim + (self._num_coordinates if options.theta_gradient else 0)
        self.network: _PaperNetwork = _PaperNetwork(
            num_inputs, sum(self._heads.values()), options.hidden_size, generator
        )

    def check(self, problem: InnerProblem) -> None:
        num_coordinates = problem.orbit.num_coordinates if problem.orbit else 0
        if _num_variables(problem) != self._dim or (self._num_coordinates and num_coordinates != self._num_coordinates):
            raise ValueError(
                f"{problem.description} has {_num_variables(problem)} variables and {num_coordinates} group coordinates, "
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
        grad, orbit = grads[name], problem.orbit
        seen = [grad]
        if self._options.theta_gradient and orbit is not None:
            seen.append(_orbit_gradient(orbit, problem, name, x, inputs, create_graph=grad.requires_grad))
        outputs, hidden = functional_call(self.network, weights, (torch.cat(seen, dim=-1), state.hidden))
        emitted = dict(zip(self._heads, outputs.split(list(self._heads.values()), dim=-1)))
        velocity = self._velocity(emitted, grad, state.velocity)
        x = x + velocity
        steps = self._options.teleport_steps
        if "teleport" in emitted and orbit is not None and (not steps or step in steps):
            before, x = x, orbit.move(emitted["teleport"], x, inputs)
            if "momentum" in emitted:
                velocity = _push_forward(orbit, emitted["teleport"], before, inputs, velocity)
        return {name: x}, PaperState(hidden, velocity)

    def _velocity(self, emitted: Tensors, grad: Tensor, velocity: Tensor) -> Tensor:
        if "update" in emitted:
            return emitted["update"]
        descent = -0.03 * torch.exp(3.0 * torch.tanh(emitted["lr"] / 3.0)) * grad
        return descent + torch.sigmoid(emitted["momentum"]) * velocity if "momentum" in emitted else descent


def _num_variables(problem: InnerProblem) -> int:
    if len(problem.params) != 1 or next(iter(problem.params.values())).dim() != 2:
        raise ValueError(
            f"{problem.description}: the paper's variants read one vector of variables and its whole gradient; "
            f"networks are trained with the variant 'controller'"
        )
    return next(iter(problem.params.values())).shape[1]


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


VARIANTS: dict[str, frozenset[str]] = {
    "controller": frozenset(),
    "update": frozenset({"update"}),
    "update+teleport": frozenset({"update", "teleport"}),
    "lr": frozenset({"lr"}),
    "lr+teleport": frozenset({"lr", "teleport"}),
    "lr+teleport+momentum": frozenset({"lr", "teleport", "momentum"}),
}
"""Every variant by name, with what the paper's networks emit; ``"controller"`` is the default, for networks."""


def make_rule(variant: str, options: RuleOptions, generator: torch.Generator, problem: InnerProblem) -> Rule:
    """The rule of a variant of ``VARIANTS``, for problems of the kind of ``problem``, with untrained weights.

    Raises:
        ValueError: if the variant cannot train such problems.
    """
    if variant == "controller":
        return ControllerRule(options, generator)
    return PaperRule(VARIANTS[variant], options, generator, problem)
