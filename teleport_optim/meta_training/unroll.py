"""Training runs of many networks at once, each under its own meta-optimizer weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from teleport_optim.meta_training.rules import Rule, Tensors
from teleport_optim.meta_training.tasks.problem import InnerProblem

__all__ = ["Batches", "Runs", "Window", "advance", "begin"]

Batches = Callable[[int], torch.Generator]
"""The generator that draws the minibatch of a step."""

EXPLOSION = 1e6
"""A run whose loss exceeds this many times its first one has exploded, as has one whose loss is not finite."""
_CHECK_INTERVAL = 10


class Runs(NamedTuple):
    """Training runs in progress: every candidate set of weights on every problem, candidates outermost."""

    params: Tensors
    """Parameters by name, each ``[num_runs, ...]``."""
    state: Any
    """What the rule remembers."""
    initial: Tensor
    """Loss before the first step, ``[num_runs]``; NaN where no step has been taken."""
    is_exploded: Tensor
    """Whether a run is lost, ``[num_runs]``."""
    step: int
    """Steps taken."""

    def detach(self) -> Runs:
        """The same runs, cut off from how they came about."""
        detached: Runs = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, self)
        return detached


class Window(NamedTuple):
    """What a number of consecutive steps brought."""

    losses: Tensor
    """Minibatch loss after every step, of what the rule has reached, ``[num_runs, steps]``; infinite from where a run explodes."""
    runs: Runs
    """The runs after the last of the steps."""
    distances: Tensor
    """Distance to the optimum after every step, ``[num_runs, steps]``; zeros where the optimum is unknown."""


def begin(rule: Rule, problem: InnerProblem, num_candidates: int) -> Runs:
    """The runs of all candidates before their first step."""
    params = {name: _repeat(value, num_candidates) for name, value in problem.params.items()}
    num_runs = num_candidates * problem.num_problems
    device = next(iter(params.values())).device
    return Runs(
        params,
        rule.initial(params),
        torch.full((num_runs,), torch.nan, device=device),
        torch.zeros(num_runs, dtype=torch.bool, device=device),
        0,
    )


def advance(
    rule: Rule,
    weights: Tensors,
    problem: InnerProblem,
    runs: Runs,
    num_steps: int,
    batches: Batches,
    *,
    second_order: bool = False,
) -> Window:
    """Take ``num_steps`` steps of all runs, in one batched computation.

    All candidates see the same minibatches. The loss after a step is that of the next step's minibatch, which is evaluated
    once more at the end of a window. Differentiable in ``weights`` where gradients are enabled.

    Args:
        rule: The update rule.
        weights: The weights of its network, ``[num_runs, ...]`` each.
        problem: What is trained.
        runs: Where to go on from.
        num_steps: Length of the window.
        batches: Generators of the minibatches.
        second_order: Differentiate the gradients that the rule sees too, where gradients are enabled.

    Memory: parameters and state of every run; it does not grow with the number of steps unless gradients are recorded.
    """
    num_candidates = len(runs.is_exploded) // problem.num_problems
    params, state, initial, is_exploded = runs.params, runs.state, runs.initial, runs.is_exploded
    losses, distances = [], []

    def batch(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = problem.sample_batch(batches(step))
        return _repeat(inputs, num_candidates), _repeat(targets, num_candidates)

    def record(loss: Tensor, params: Tensors) -> None:
        nonlocal is_exploded
        is_exploded = is_exploded | ~(loss.detach() <= EXPLOSION * initial.abs())
        losses.append(torch.where(is_exploded, torch.inf, loss))
        distances.append(_distance(problem, params, num_candidates))

    end = runs.step + num_steps
    for step in range(runs.step, end):
        inputs, targets = batch(step)
        grads, loss = problem.gradients(params, inputs, targets, create_graph=second_order)
        if step == 0:
            initial = loss.detach()
        if step > runs.step:
            reached = rule.outcome(params, state)
            is_free = reached is params  # the loss at the parameters comes with their gradient
            record(_attached(loss, params, grads) if is_free else problem.losses(reached, inputs, targets), reached)
            if step % _CHECK_INTERVAL == 0 and bool(is_exploded.all()):
                break
        params, state = rule.step(weights, params, grads, state, step=step, problem=problem, inputs=inputs)
    else:
        reached = rule.outcome(params, state)
        record(problem.losses(reached, *batch(end)), reached)
    missing = num_steps - len(losses)
    losses += missing * losses[-1:]
    distances += missing * distances[-1:]
    after = Runs(params, state, initial, is_exploded, end)
    return Window(torch.stack(losses, dim=-1), after, torch.stack(distances, dim=-1))


def _attached(loss: Tensor, params: Tensors, grads: Tensors) -> Tensor:
    """``loss`` as a differentiable function of ``params``, to first order, where it is not one already."""
    if loss.requires_grad or not any(param.requires_grad for param in params.values()):
        return loss
    slopes = [((param - param.detach()) * grads[name]).flatten(1).sum(dim=1) for name, param in params.items()]
    return loss + torch.stack(slopes).sum(dim=0)


def _distance(problem: InnerProblem, params: Tensors, num_candidates: int) -> Tensor:
    (first, *_) = params.values()
    if problem.optimum is None:
        return first.new_zeros(len(first))
    return (first - _repeat(problem.optimum, num_candidates)).square().sum(dim=-1).sqrt()


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.dim() - 1))
