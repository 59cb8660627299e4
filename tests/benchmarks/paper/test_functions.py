"""The functions of the paper: their orbits, optima and starts."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import hessian

from benchmarks.paper.functions import FUNCTIONS, FunctionTask
from teleport_optim.rng import generator_for
from tests.helpers.problems import FUNCTION_TASKS, HORIZONS, TASKS, draw_problem, each_function, in_float64

PLANE_TASKS = [name for name in FUNCTION_TASKS if FUNCTIONS[name].dim == 2]


def function_case(name: str, seed: int, count: int = 5) -> tuple[FunctionTask, Tensor, Tensor]:
    """A task, coefficients and points, in double precision."""
    task = FUNCTIONS[name]
    problem = in_float64(task.sample(count, HORIZONS, "train", generator_for(seed)))
    return task, problem.sample_batch(generator_for(0))[0], problem.params["x"]


def coordinates_of(task: FunctionTask, seed: int, size: float, count: int = 5) -> Tensor:
    return size * torch.randn(
        count, task.orbit.num_coordinates, generator=generator_for("g", seed), dtype=torch.float64
    )


@each_function
@given(seed=st.integers(0, 10**6), size=st.floats(0.01, 10.0))
@settings(max_examples=25, deadline=None)
def test_orbits_keep_the_function(name: str, seed: int, size: float) -> None:
    task, coefficients, x = function_case(name, seed)
    coordinates = coordinates_of(task, seed, size)
    moved = task.orbit.move(coordinates, x, coefficients)
    assert moved.shape == x.shape
    assume(moved.abs().max() < 1e2)
    scale = task.value(x, coefficients).abs() + x.square().sum(dim=-1) + 1.0
    change = (task.value(moved, coefficients) - task.value(x, coefficients)).abs()
    assert (change < 1e-9 * scale).all()
    torch.testing.assert_close(task.orbit.move(torch.zeros_like(coordinates), x, coefficients), x, rtol=1e-9, atol=1e-9)
    ahead = torch.stack([coordinates, -coordinates])
    both = task.orbit.move(ahead, x, coefficients)
    torch.testing.assert_close(both[0], moved)
    torch.testing.assert_close(both[1], task.orbit.move(-coordinates, x, coefficients))


@each_function
def test_orbits_move_and_random_moves_do_not_keep_the_function(name: str) -> None:
    task, coefficients, x = function_case(name, 0)
    moved = task.orbit.move(coordinates_of(task, 0, 1.0), x, coefficients)
    assert ((moved - x).norm(dim=-1) > 1e-3).any()
    shifted = moved + 0.1
    assert ((task.value(shifted, coefficients) - task.value(x, coefficients)).abs() > 1e-3).any()


@pytest.mark.parametrize("name", PLANE_TASKS)
def test_moves_along_the_orbit_of_another_function_change_the_value(name: str) -> None:
    task, coefficients, x = function_case(name, 0)
    _, others, _ = function_case(name.removesuffix("_fixed"), 1)
    before, after = (
        task.value(point, coefficients) for point in (x, task.orbit.move(coordinates_of(task, 0, 1.0), x, others))
    )
    assert not torch.isclose(after, before, rtol=1e-3).any()


@pytest.mark.parametrize("name", [name for name in PLANE_TASKS if FUNCTIONS[name].orbit.group == "SO(2)"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_rotations_compose_by_adding_angles(name: str, seed: int) -> None:
    task, coefficients, x = function_case(name, seed)
    first, second = coordinates_of(task, seed, 2.0), coordinates_of(task, seed + 1, 2.0)
    halfway = task.orbit.move(first, x, coefficients)
    moved = task.orbit.move(first + second, x, coefficients)
    assume(max(halfway.abs().max(), moved.abs().max()) < 1e2)
    torch.testing.assert_close(task.orbit.move(second, halfway, coefficients), moved, rtol=1e-7, atol=1e-7)


@each_function
def test_differentiable_orbits_have_gradients_and_permutations_say_that_they_have_none(name: str) -> None:
    task, coefficients, x = function_case(name, 0)
    coordinates = (0.0 * coordinates_of(task, 0, 1.0)).requires_grad_()
    moved = task.orbit.move(coordinates, x, coefficients)
    assert moved.requires_grad == task.orbit.is_differentiable
    if task.orbit.is_differentiable:
        moved.sum().backward()
        assert (coordinates.grad != 0).all()


@pytest.mark.parametrize("name", [name for name in FUNCTION_TASKS if name != "indefinite_quadratic"])
def test_the_optimum_is_one(name: str) -> None:
    task, coefficients, _ = function_case(name, 3)
    optimum = task.optimum(coefficients)
    assert optimum is not None
    value, zeros = task.value(optimum, coefficients), torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(value, zeros, atol=1e-12, rtol=0)
    torch.testing.assert_close(FUNCTIONS[name].sample(5, HORIZONS, "train", generator_for(3)).optimum.double(), optimum)


def test_the_fixed_functions_are_those_of_the_paper() -> None:
    task, coefficients, x = function_case("ellipse_fixed", 0)
    torch.testing.assert_close(task.value(x, coefficients), (0.5 * x[:, 0]) ** 2 + (3.0 * x[:, 1]) ** 2)
    task, coefficients, x = function_case("rosenbrock_fixed", 0)
    first, second = -2.0 * x[:, 1] + 0.4 * x[:, 0] ** 2, x[:, 0] - 1.0
    torch.testing.assert_close(task.value(x, coefficients), first**2 + second**2)


@pytest.mark.parametrize("name", ["ellipse", "rosenbrock"])
def test_varied_coefficients_and_starts_are_standard_normal(name: str) -> None:
    problem = TASKS[name].sample(20000, HORIZONS, "train", generator_for(0))
    for drawn in (problem.sample_batch(generator_for(0))[0], problem.params["x"]):
        torch.testing.assert_close(drawn.mean(dim=0), torch.zeros(drawn.shape[1]), atol=0.04, rtol=0)
        torch.testing.assert_close(drawn.std(dim=0), torch.ones(drawn.shape[1]), atol=0.04, rtol=0)


@pytest.mark.parametrize(("name", "sign"), [("convex_quadratic", 1.0), ("indefinite_quadratic", -1.0)])
def test_quadratics_have_the_eigenvalues_that_they_should(name: str, sign: float) -> None:
    task, coefficients, x = function_case(name, 0, 100)
    matrices = torch.stack([hessian(partial(task.value, coefficients=row), x[0]) for row in coefficients])
    torch.testing.assert_close(task.value(x, coefficients), (x[:, None] @ matrices @ x[..., None]).flatten() / 2.0)
    low, high = torch.linalg.eigvalsh(matrices).unbind(-1)
    assert (high > 0).all()
    assert (sign * low > 0).all()
    ratio = torch.maximum(high / low.abs(), low.abs() / high)
    assert ratio.min() < 3.0
    assert 300.0 < ratio.max() <= 1001.0


def test_the_further_down_a_saddle_the_better() -> None:
    losses = torch.tensor([-math.inf, -1e38, -1e3, -10.0, -1.0, 0.0, 1.0, 5.0])
    meta_losses = FUNCTIONS["indefinite_quadratic"].normalise(losses, torch.tensor([-2.0]))
    assert meta_losses[0] == meta_losses[1]
    assert (meta_losses[1:].diff() > 0).all()


def test_a_function_has_one_parameter_and_constant_coefficients() -> None:
    problem = draw_problem("ellipse", "train", 0)
    assert {key: tuple(value.shape) for key, value in problem.params.items()} == {"x": (2, 2)}
    first, second = problem.sample_batch(generator_for(0)), problem.sample_batch(generator_for(1))
    assert torch.equal(first[0], second[0])
    assert first[0].shape == (2, 6)
    assert first[1].shape == (2,)
