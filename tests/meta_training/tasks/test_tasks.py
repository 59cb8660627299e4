"""The task families: what is drawn is reproducible, varied and disjoint between splits, and orbits keep functions."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from benchmarks.paper.functions import FUNCTIONS, FunctionTask, task_path
from teleport_optim.meta_training.tasks import TASKS as NETWORKS
from teleport_optim.meta_training.tasks import InnerProblem, Task, find_task
from teleport_optim.meta_training.tasks import data as data_module
from teleport_optim.meta_training.tasks.data import ALPHABET, digits, paragraphs, table, text
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.networks import initial_params, rescale_units
from teleport_optim.meta_training.tasks.perceptrons import draw_perceptron
from teleport_optim.meta_training.tasks.problem import WORST
from teleport_optim.meta_training.tasks.sequences import CausalAttention, GRULayer, LSTMLayer
from teleport_optim.meta_training.tasks.splits import (
    CHANNELS,
    DIGIT_ROWS,
    SEQUENCE_WIDTHS,
    SPLITS,
    TABLES,
    WIDTHS,
    text_split,
)
from teleport_optim.rng import generator_for
from teleport_optim.symmetry import find_symmetries
from tests.helpers.problems import in_float64

HORIZONS = (5, 50)
TASKS: dict[str, Task] = {**NETWORKS, **FUNCTIONS}
FUNCTION_TASKS, NETWORK_TASKS = list(FUNCTIONS), list(NETWORKS)
PLANE_TASKS = [name for name in FUNCTION_TASKS if FUNCTIONS[name].dim == 2]
each_task = pytest.mark.parametrize("name", TASKS)
each_split = pytest.mark.parametrize("split", SPLITS)
each_function = pytest.mark.parametrize("name", FUNCTION_TASKS)


def draw_problem(name: str, split: str, seed: int, num_problems: int = 2) -> InnerProblem:
    return TASKS[name].sample(num_problems, HORIZONS, split, generator_for(split, seed))


def as_list(problem: InnerProblem) -> list[Tensor]:
    """Everything that was drawn for a problem, a minibatch included."""
    return [*problem.params.values(), *problem.sample_batch(generator_for("batch"))]


# ------------------------------------------------------------------------------------------------------- every task


@each_split
@each_task
def test_a_problem_is_reproducible_and_varied(name: str, split: str) -> None:
    first, again = draw_problem(name, split, 0), draw_problem(name, split, 0)
    assert first.description == again.description
    assert first.horizon == again.horizon
    assert all(torch.equal(one, other) for one, other in zip(as_list(first), as_list(again), strict=True))
    assert first.num_problems == 2
    assert not all(torch.equal(param[0], param[1]) for param in first.params.values())
    assert len({draw_problem(name, split, seed, 1).description for seed in range(6)}) > 4


@each_split
@each_task
def test_gradients_are_those_of_a_loop_over_the_problems(name: str, split: str) -> None:
    problem = in_float64(draw_problem(name, split, 1, 3))
    inputs, targets = problem.sample_batch(generator_for("batch"))
    assert len(inputs) == len(targets) == 3
    gradients, losses = problem.gradients(problem.params, inputs, targets)
    assert losses.isfinite().all()
    for row in range(3):
        params = {key: value[row].clone().requires_grad_() for key, value in problem.params.items()}
        loss = problem.loss(functional_call(problem.model, params, (inputs[row],)), targets[row])
        loss.backward()
        torch.testing.assert_close(losses[row], loss.detach(), rtol=1e-10, atol=1e-12)
        for key, param in params.items():
            assert gradients[key][row].isfinite().all()
            torch.testing.assert_close(gradients[key][row], param.grad, rtol=1e-8, atol=1e-10 * abs(loss.item()))


@each_task
def test_normalised_losses_do_not_depend_on_the_scale_of_the_loss(name: str) -> None:
    problem = in_float64(draw_problem(name, "train", 2))
    scaled = dataclasses.replace(problem, loss=lambda output, target: 1e3 * problem.loss(output, target))
    batch = problem.sample_batch(generator_for("batch"))
    moved = [{key: value * factor for key, value in problem.params.items()} for factor in (1.0, 0.9, 0.5)]
    losses, scaled_losses = (
        torch.stack([each.losses(params, *batch) for params in moved], dim=-1) for each in (problem, scaled)
    )
    normalised = problem.normalise(losses, losses[:, :1])
    torch.testing.assert_close(normalised, problem.normalise(scaled_losses, scaled_losses[:, :1]))
    assert len(normalised.unique()) >= 3
    assert not torch.allclose(normalised, problem.normalise(scaled_losses, losses[:, :1]))


@each_task
def test_normalised_losses_are_finite_and_bounded(name: str) -> None:
    normalise = draw_problem(name, "train", 0).normalise
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, 0.5, 1.0, 2.0]).repeat(2, 1)
    meta_losses = normalise(values, torch.tensor([[1.0], [1e-3]]))
    assert meta_losses.shape == values.shape
    assert meta_losses.isfinite().all()
    assert (meta_losses <= WORST).all()
    assert (meta_losses[:, [0, 1, 3]] == WORST).all()
    assert (meta_losses[0, 5:8].diff() > 0).all()


@each_task
def test_horizons_lie_between_their_bounds(name: str) -> None:
    horizons = {draw_problem(name, "train", seed, 1).horizon for seed in range(10)}
    assert len(horizons) > 3
    assert min(horizons) >= HORIZONS[0]
    assert max(horizons) <= HORIZONS[1]
    assert {TASKS[name].sample(1, (7, 7), "train", generator_for(seed)).horizon for seed in range(5)} == {7}
    with pytest.raises(ValueError, match=r"horizons must be .* got \(9, 3\)"):
        TASKS[name].sample(1, (9, 3), "train", generator_for(0))
    with pytest.raises(ValueError, match=r"no split 'demo'; tasks have train, validation, test"):
        TASKS[name].sample(1, HORIZONS, "demo", generator_for(0))


def test_horizons_are_log_uniform_and_reach_both_bounds() -> None:
    draw = Draw(generator_for(0), "any", "train")
    assert {draw.horizon(3, 5) for _ in range(100)} == {3, 4, 5}
    share = sum(draw.horizon(10, 1000) < 100 for _ in range(1000)) / 1000
    assert share == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("name", ["teacher_classification", "digits_cnn"])
def test_one_network_in_six_does_not_tell_the_horizon(name: str) -> None:
    problems = [draw_problem(name, "train", seed, 1) for seed in range(80)]
    assert 3 < sum(not problem.knows_horizon for problem in problems) < 26
    assert all(problem.knows_horizon == (not problem.description.endswith(" unknown")) for problem in problems)
    assert all(f" steps={problem.horizon}" in problem.description for problem in problems)


@each_function
def test_functions_tell_the_horizon(name: str) -> None:
    assert all(draw_problem(name, "train", seed, 1).knows_horizon for seed in range(20))


@each_split
def test_only_training_has_perceptrons_without_a_hidden_layer(split: str) -> None:
    drawn = [draw_perceptron(Draw(generator_for(seed), "any", split), 5, 3) for seed in range(100)]
    counts = [sum(isinstance(layer, nn.Linear) for layer in model) for model, _ in drawn]
    assert set(counts) == ({1, 2, 3, 4, 5} if split == "train" else {2, 3, 4, 5})
    for (model, architecture), count in zip(drawn, counts):
        assert (architecture == "linear 5-3") == (count == 1)
        assert model(torch.zeros(2, 5)).shape == (2, 3)
        assert count > 1 or not find_symmetries(model, torch.zeros(2, 5)).of_group("scaling")


# ------------------------------------------------------------------------------------------------------- the splits


@pytest.mark.parametrize("name", NETWORK_TASKS)
def test_splits_have_no_architecture_in_common(name: str) -> None:
    architectures = [{draw_problem(name, split, seed, 1).architecture for seed in range(60)} for split in SPLITS]
    assert all(len(some) > 10 for some in architectures)
    assert not any(first & second for first, second in itertools.combinations(architectures, 2))


@pytest.mark.parametrize("sizes", [WIDTHS, CHANNELS, SEQUENCE_WIDTHS, TABLES])
def test_sizes_and_tables_belong_to_one_split(sizes: dict[str, tuple[object, ...]]) -> None:
    assert tuple(sizes) == SPLITS
    assert sum(map(len, sizes.values())) == len(set(itertools.chain(*sizes.values())))


@pytest.mark.parametrize("name", NETWORK_TASKS)
def test_equal_architectures_have_equal_shapes(name: str) -> None:
    shapes: dict[str, list[torch.Size]] = {}
    for seed in range(40):
        problem = draw_problem(name, "train", seed, 1)
        own = [param.shape for param in problem.params.values()]
        assert shapes.setdefault(problem.architecture, own) == own


@pytest.mark.parametrize("name", ["teacher_regression", "teacher_classification", *FUNCTION_TASKS])
def test_procedural_data_differ_between_splits_even_from_one_seed(name: str) -> None:
    problems = [TASKS[name].sample(8, HORIZONS, split, generator_for(0)) for split in SPLITS]
    for first, second in itertools.combinations(problems, 2):
        if name in FUNCTION_TASKS:
            assert not torch.isin(first.params["x"], second.params["x"]).any()
            first_data, second_data = (problem.sample_batch(generator_for(0))[0] for problem in (first, second))
            is_drawn = (first_data != first_data[0]).any(dim=0) & (first_data != 0).any(dim=0)
            assert is_drawn.any() == (not name.endswith("_fixed"))
            assert not torch.isin(first_data[:, is_drawn], second_data[:, is_drawn]).any()
        else:
            assert first.sample_batch(generator_for(0))[0].shape != second.sample_batch(generator_for(0))[0].shape


def without_noise(name: str, split: str) -> InnerProblem:
    problems = (draw_problem(name, split, seed, 3) for seed in range(50))
    return next(problem for problem in problems if "noise=0.0" in problem.description)


def are_rows_of(rows: Tensor, source: Tensor) -> Tensor:
    """Which of ``rows`` occur in ``source``."""
    return (rows.flatten(0, 1)[:, None] == source[None]).all(dim=-1).any(dim=-1)


@each_split
@pytest.mark.parametrize("name", ["digits_mlp", "digits_autoencoder", "digits_cnn", "digits_batchnorm_cnn"])
def test_tasks_on_digits_use_the_rows_of_their_split(name: str, split: str) -> None:
    inputs = without_noise(name, split).sample_batch(generator_for(0))[0].flatten(2)
    assert are_rows_of(inputs, digits(split)[0]).all()
    for other in set(DIGIT_ROWS) - {split}:
        assert not are_rows_of(inputs, digits(other)[0]).any()


def test_splits_of_the_digits_are_disjoint() -> None:
    bounds = sorted(DIGIT_ROWS.values())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(bounds))
    assert sum(len(digits(split)[0]) for split in DIGIT_ROWS) == 1797
    with pytest.raises(ValueError, match="no split 'holdout'"):
        digits("holdout")


@each_split
def test_tables_are_those_of_the_split(split: str) -> None:
    """Every value of an input occurs in one of the split's tables, and hardly any in those of the others."""
    inputs = without_noise("tabular_mlp", split).sample_batch(generator_for(0))[0]
    for other in SPLITS:
        values = torch.cat([table(name).columns.flatten() for name in TABLES[other]])
        share = torch.isin(inputs, values).double().mean()
        assert share == 1.0 if other == split else share < 0.05


def test_tables_are_standardised_and_some_are_held_out() -> None:
    for name in itertools.chain(*TABLES.values()):
        columns = table(name).columns
        torch.testing.assert_close(columns.mean(dim=0), torch.zeros(columns.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(columns.std(dim=0), torch.ones(columns.shape[1]))
    assert TABLES["test"] == ("breast_cancer", "diabetes")
    assert [table(name).num_classes for name in ("wine", "iris", "breast_cancer", "diabetes")] == [3, 3, 2, 0]


def test_paragraphs_belong_to_one_split() -> None:
    groups = [set(paragraphs(split)) for split in SPLITS]
    assert not any(first & second for first, second in itertools.combinations(groups, 2))
    assert all(len(text(split)) > 20000 for split in SPLITS)
    assert text("train").max() < len(ALPHABET)
    assert {text_split(title) for title in map(str, range(50))} == set(SPLITS)


@each_split
@pytest.mark.parametrize("name", ["char_transformer", "char_recurrent"])
def test_texts_are_those_of_the_split_and_targets_are_what_follows(name: str, split: str) -> None:
    inputs, targets = draw_problem(name, split, 0).sample_batch(generator_for(0))
    assert torch.equal(inputs[..., 1:], targets[..., :-1])
    windows = ["".join(ALPHABET[index] for index in window) for window in inputs.flatten(0, 1).tolist()]
    for other in SPLITS:
        source = "".join(ALPHABET[index] for index in text(other).tolist())
        share = sum(window in source for window in windows) / len(windows)
        assert share == 1.0 if other == split else share < 0.2


def test_missing_data_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pydoc_data.topics", "sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="leave out the tasks whose names start with 'char_'"):
        paragraphs.__wrapped__("train")
    with pytest.raises(ImportError, match="pip install"):
        table.__wrapped__("iris")
    with pytest.raises(ImportError, match="pip install"):
        data_module._all_digits.__wrapped__()


# --------------------------------------------------------------------------------------------------------- networks


def make_batchnorm_network() -> nn.Sequential:
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(6, 4, 3), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(144, 3))


def test_initial_values_are_of_the_kind_of_torch() -> None:
    params = initial_params(make_batchnorm_network(), 5, Draw(generator_for(0), "any", "train"), gain=2.0)
    assert {name: value.shape[0] for name, value in params.items()} == dict.fromkeys(params, 5)
    assert list(params) == [name for name, _ in make_batchnorm_network().named_parameters()]
    assert (params["1.weight"] == 1.0).all()
    assert (params["1.bias"] == 0.0).all()
    for name, bound in {"3.weight": 2.0 / 54**0.5, "3.bias": 54**-0.5, "6.weight": 2.0 / 12.0}.items():
        assert 0.8 * bound < params[name].abs().max() <= bound
    with pytest.raises(TypeError, match="no initial values are known for 'weight', a parameter of PReLU"):
        initial_params(nn.PReLU(), 1, Draw(generator_for(0), "any", "train"))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), (6, 4)),
        (make_batchnorm_network(), (6, 1, 8, 8)),
    ],
)
def test_rescaled_units_leave_the_function_unchanged(model: nn.Sequential, shape: tuple[int, ...]) -> None:
    spec = find_symmetries(model, torch.zeros(shape))
    assert len(spec.of_group("scaling")) == 2
    params = {
        name: value.double() for name, value in initial_params(model, 3, Draw(generator_for(0), "any", "train")).items()
    }
    rescaled = rescale_units(spec, params, 2.0, Draw(generator_for(1), "any", "train"))
    inputs = torch.randn(shape, generator=generator_for(2), dtype=torch.float64)
    assert list(rescaled) == list(params)
    for row in range(3):
        before, after = (
            functional_call(model, {name: value[row] for name, value in some.items()}, (inputs,))
            for some in (params, rescaled)
        )
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    head = list(params)[-2]
    factors = rescaled[head] / params[head]
    assert factors.min() < 0.3
    assert factors.max() > 3.0
    partly = {**{name: value[0] for name, value in rescaled.items()}, head: params[head][0]}
    before = functional_call(model, {name: value[0] for name, value in params.items()}, (inputs,))
    assert not torch.allclose(functional_call(model, partly, (inputs,)), before)


def test_some_networks_start_rescaled_and_only_where_that_can_be() -> None:
    descriptions = [draw_problem("digits_mlp", "train", seed, 1).description for seed in range(80)]
    assert 5 < sum("sigma=0.0" not in description for description in descriptions) < 50
    assert all("sigma=0.0" in description for description in descriptions if " tanh " in description)


def test_batchnorm_networks_normalise_by_the_minibatch() -> None:
    problem = draw_problem("digits_batchnorm_cnn", "train", 0)
    layers = [layer for layer in problem.model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert layers
    assert not list(problem.model.buffers())
    assert not any(
        isinstance(layer, nn.BatchNorm2d) for layer in draw_problem("digits_cnn", "train", 0).model.modules()
    )


@each_split
@pytest.mark.parametrize("name", ["char_transformer", "char_recurrent"])
def test_predictions_do_not_depend_on_what_follows(name: str, split: str) -> None:
    problem = in_float64(draw_problem(name, split, 0, 1))
    params = {key: value[0] for key, value in problem.params.items()}
    tokens = problem.sample_batch(generator_for(0))[0][0]
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % len(ALPHABET)
    before, after = (functional_call(problem.model, params, (each,)) for each in (tokens, changed))
    torch.testing.assert_close(after[:, :10], before[:, :10], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, 10], before[:, 10])
    assert not torch.allclose(after[:, 11], before[:, 11], rtol=1e-9, atol=1e-12)


def test_the_layers_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    attention = CausalAttention(6, 2).double()
    queries, keys, values = (
        part.unflatten(-1, (2, 3)).transpose(1, 2) for part in attention.from_input(x).chunk(3, -1)
    )
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.to_output(attended))

    for layer, reference, order in [
        (LSTMLayer(6, 5), nn.LSTM(6, 5, batch_first=True), [1, 0, 3, 2]),
        (GRULayer(6, 5), nn.GRU(6, 5, batch_first=True), [0, 1, 2]),
    ]:
        layer.double()
        reference.double()
        with torch.no_grad():
            for own, theirs in [
                (layer.from_input.weight, reference.weight_ih_l0),
                (layer.from_input.bias, reference.bias_ih_l0),
                (layer.from_state.weight, reference.weight_hh_l0),
            ]:
                gates = own.chunk(len(order))
                theirs.copy_(torch.cat([gates[index] for index in order]))
            reference.bias_hh_l0.zero_()
        torch.testing.assert_close(layer(x), reference(x)[0])


# -------------------------------------------------------------------------------------------------------- functions


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


# --------------------------------------------------------------------------------------------------------- registry


def test_the_registry_is_complete() -> None:
    assert not {*NETWORK_TASKS} & {*FUNCTION_TASKS}
    assert all(find_task(name) is task and task.name == name for name, task in NETWORKS.items())
    assert all(type(find_task(task_path(name))) is type(task) for name, task in FUNCTIONS.items())
    assert all(task.name == name for name, task in FUNCTIONS.items())
    assert all(TASKS[name].share > 0 for name in TASKS)


MODULE = """
from teleport_optim.meta_training import Task

class Mine(Task):
    name = "mine"
    def sample(self, num_problems, horizons, split, generator):
        raise NotImplementedError

class Nameless(Task):
    def sample(self, num_problems, horizons, split, generator):
        raise NotImplementedError

class Unfinished(Task):
    name = "unfinished"

class Other:
    pass
"""


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "digit_mlp",
            ValueError,
            r"no task 'digit_mlp'; did you mean 'digits_mlp'\? There are digits_mlp, digits_auto",
        ),
        ("", ValueError, "no task ''; did you mean"),
        (
            "no_such_module:Mine",
            ValueError,
            "'no_such_module:Mine' cannot be imported: No module named 'no_such_module'",
        ),
        (":Mine", ValueError, "':Mine' cannot be imported"),
        ("my_own_tasks:Yours", ValueError, r"has no 'Yours'; the tasks in it are \[.*'Mine'"),
        (
            "my_own_tasks:Other",
            TypeError,
            "is not a task family: it must be a subclass of teleport_optim.meta_training.Task",
        ),
        ("my_own_tasks:Nameless", TypeError, "has no name: set the class attribute 'name'"),
        ("my_own_tasks:Unfinished", TypeError, "cannot be made without arguments: .*abstract"),
    ],
)
def test_tasks_that_cannot_be_found_are_explained(
    path: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_tasks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_tasks", raising=False)
    with pytest.raises(error, match=message):
        find_task(path)


def test_a_task_of_ones_own_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_tasks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_tasks", raising=False)
    assert find_task("my_own_tasks:Mine").name == "mine"
