"""Rules that can be meta-trained: the interface, and the rule of the shipped checkpoints with its controller."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from teleport_optim.controller.control import control
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.meta_training.tasks.problem import InnerProblem
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.records import HyperParameters, UpdateState
from teleport_optim.optim.rule import update

__all__ = ["ControllerRule", "Rule", "Tensors"]

Tensors = dict[str, Tensor]


class Rule(ABC):
    """Learned update rule that steps many training runs at once, each with its own weights.

    Attributes:
        network: The network whose parameters are meta-trained; a fresh one defines the untrained rule.
    """

    network: nn.Module

    def check(self, problem: InnerProblem) -> None:  # noqa: B027 -- a rule without limits has nothing to add
        """Raise ``ValueError`` if the rule cannot train this kind of problem; every problem can be trained by default."""

    @abstractmethod
    def initial(self, params: Tensors) -> Any:
        """State before the first step of runs with parameters ``[num_runs, ...]``: a tree of such tensors."""

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
        """Take one step of every run.

        Args:
            weights: Those of the network, by name, each ``[num_runs, ...]``.
            params: ``[num_runs, ...]`` each.
            grads: At ``params``.
            state: As it was after the last step.
            step: Steps taken so far.
            problem: What is trained.
            inputs: The minibatch's inputs, ``[num_runs, batch, ...]``.

        Returns:
            New parameters and state.
        """

    def eval_params(self, params: Tensors, state: Any) -> Tensors:
        """Parameters at which a run is judged: those at which gradients are taken, or an average of them."""
        return params

    def labels(self) -> list[str]:
        """Name of every entry of the flat weights, by which entries can be frozen."""
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

    def flatten(self) -> Tensor:
        """The weights of the network as one vector, ``[num_parameters]``."""
        return parameters_to_vector(self.network.parameters()).detach()

    def unflatten(self, flat: Tensor) -> Tensors:
        """Flat weights ``[..., num_parameters]`` by name."""
        shapes = {name: param.shape for name, param in self.network.named_parameters()}
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()], dim=-1)
        return {name: part.reshape(*flat.shape[:-1], *shape) for (name, shape), part in zip(shapes.items(), parts)}


class ControllerRule(Rule):
    """Rule of :mod:`teleport_optim.optim.rule` with a meta-optimizer as its controller: what the shipped checkpoints hold.

    The rows of the readout are labelled by the control that they set, as in ``"readout_weight.momentum"``.

    Args:
        network: The controller.
    """

    def __init__(self, network: MetaOptimizer) -> None:
        self.network: MetaOptimizer = network

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
        def network(features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return functional_call(self.network, weights, (features, hidden))  # type: ignore[no-any-return]

        table = problem.table.with_blocks_of(self.network.block_rows)
        hyper = HyperParameters.default(len(table.names), problem.horizon if problem.knows_horizon else None)
        return update(partial(control, network), params, grads, state, step=step, hyper=hyper, table=table)

    def eval_params(self, params: Tensors, state: Any) -> Tensors:
        return {name: param + state.average_offsets[name].to(param) for name, param in params.items()}

    def labels(self) -> list[str]:
        labels = []
        for name, param in self.network.named_parameters():
            rows = [f"{name}.{control}" for control in Controls._fields]
            per_row = rows if name.startswith(("readout", "skip")) else [name] * len(param)
            labels += [row for row in per_row for _ in range(param.numel() // len(param))]
        return labels
