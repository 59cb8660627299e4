"""What holds for every task, and how tasks are found."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.paper.functions import FUNCTIONS, task_path
from teleport_optim.meta_training.tasks import TASKS as NETWORKS
from teleport_optim.meta_training.tasks import InnerProblem, find_task
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.perceptrons import draw_perceptron
from teleport_optim.meta_training.tasks.problem import WORST
from teleport_optim.rng import generator_for
from teleport_optim.symmetry import find_symmetries
from tests.helpers.problems import (
    FUNCTION_TASKS,
    HORIZONS,
    NETWORK_TASKS,
    TASKS,
    draw_problem,
    each_function,
    each_split,
    in_float64,
)

each_task = pytest.mark.parametrize("name", TASKS)


def as_list(problem: InnerProblem) -> list[Tensor]:
    """Everything that was drawn for a problem, a minibatch included."""
    return [*problem.params.values(), *problem.sample_batch(generator_for("batch"))]


# Every task.


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


# The registry.


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
