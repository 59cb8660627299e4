"""Many runs at once, along leading axes, equal those one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from teleport_optim import MetaOptimizer
from teleport_optim.controller.control import control
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.records import HyperParameters, StepCoefficients, UpdateState, step_coefficients
from teleport_optim.optim.rule import Control, update
from teleport_optim.optim.schedule import TELEPORT_INTERVAL
from teleport_optim.symmetry.moves import move, move_scaling
from teleport_optim.symmetry.spec import SymmetrySpec
from tests.helpers.perceptrons import generator, perceptron_of, stacked_runs
from tests.helpers.reference import momentum_step


def convolutional(seed: int) -> nn.Sequential:
    """Legs of every kind: repeated neighbours after the flatten, and slices of a grouped convolution."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
        ).double()


ARCHITECTURES: dict[str, tuple[Callable[[int], nn.Module], Tensor]] = {
    "perceptron": (partial(perceptron_of, (4, 7, 6, 6, 2)), torch.zeros(2, 4).double()),
    "convolutional": (convolutional, torch.zeros(2, 1, 6, 6).double()),
}


def one_run(x: Any, run: tuple[int, ...]) -> Any:
    if isinstance(x, Tensor):
        return x[run]
    if isinstance(x, UpdateState):
        return UpdateState(*(one_run(value, run) for value in x))
    return {name: value[run] for name, value in x.items()}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([*ARCHITECTURES]), st.sampled_from([(1,), (4,), (2, 3)]), st.integers(0, 10**6))
def test_many_runs_at_once_equal_run_by_run(architecture: str, runs: tuple[int, ...], seed: int) -> None:
    """With weights, controls and teleports of their own; float64, up to features and log-scales, which are float32."""
    make, inputs = ARCHITECTURES[architecture]
    params, grads, table = stacked_runs(make, inputs, math.prod(runs), seed)
    assert len(table.spec) >= 2
    unflatten = lambda tensors: {name: x.unflatten(0, runs) for name, x in tensors.items()}  # noqa: E731
    params, grads = unflatten(params), unflatten(grads)
    meta_optimizer = MetaOptimizer(6)
    weights = {
        name: 0.3 * torch.randn(*runs, *param.shape, generator=generator(seed))
        for name, param in meta_optimizer.named_parameters()
    }

    def controller(own_weights: dict[str, Tensor]) -> Control:
        return partial(
            control, lambda features, hidden: functional_call(meta_optimizer, own_weights, (features, hidden))
        )

    hyper = HyperParameters.default(len(params), 20)
    hidden = meta_optimizer.initial_hidden(len(params)).detach().expand(*runs, -1, -1)
    state = UpdateState.initial(params, hidden)
    for step in (0, 1, TELEPORT_INTERVAL):
        new_params, new_state = update(controller(weights), params, grads, state, step=step, hyper=hyper, table=table)
        for run in itertools.product(*map(range, runs)):
            expected = update(
                controller(one_run(weights, run)),
                *(one_run(x, run) for x in (params, grads, state)),
                step=step,
                hyper=hyper,
                table=table,
            )
            actual = one_run(new_params, run), one_run(new_state, run)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        params, state = new_params, new_state


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([*ARCHITECTURES]), st.integers(0, 10**6))
def test_momentum_steps_of_many_runs_equal_those_of_each(architecture: str, seed: int) -> None:
    make, inputs = ARCHITECTURES[architecture]
    params, grads, table = stacked_runs(make, inputs, 3, seed)
    momenta = {name: torch.randn(x.shape, generator=generator(seed + 1)).double() for name, x in params.items()}
    outputs = torch.randn(3, len(params), len(Controls._fields), generator=generator(seed)).double()

    def coefficients(outputs: Tensor) -> StepCoefficients:
        controls, hyper = Controls.from_outputs(outputs), HyperParameters.default(len(params), 20)
        return step_coefficients(controls, step=3, hyper=hyper, table=table)

    together = momentum_step(grads, momenta, coefficients(outputs), table)
    for run in range(3):
        of_run = (one_run(tensors, (run,)) for tensors in (grads, momenta))
        alone = momentum_step(*of_run, coefficients(outputs[run]), table)
        actual = tuple(one_run(tensors, (run,)) for tensors in together)
        torch.testing.assert_close(actual, alone, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, -1]))
def test_scalings_of_many_runs_are_the_moves_of_each(seed: int, kind: int) -> None:
    params, _, table = stacked_runs(*ARCHITECTURES["convolutional"], 3, seed)
    assert any(leg.within for symmetry in table.spec for leg in symmetry.legs)
    assert any(leg.repeat > 1 for symmetry in table.spec for leg in symmetry.legs)
    for symmetry in table.spec:
        scales = torch.rand(3, symmetry.size, generator=generator(seed), dtype=torch.float64) + 0.5
        moved = move_scaling(symmetry, scales, params, kind)
        for run in range(3):
            alone = move(SymmetrySpec((symmetry,)), {symmetry.id: scales[run]}, one_run(params, (run,)), kind)
            torch.testing.assert_close(one_run(moved, (run,)), alone, rtol=1e-15, atol=0)
