"""The unroll against the optimizer class, and what it reports of runs that are lost."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.meta_training.rules import ControllerRule
from teleport_optim.meta_training.tasks import TASKS, InnerProblem, find_task
from teleport_optim.meta_training.tasks.problem import WORST, log_relative
from teleport_optim.meta_training.unroll import UnrollResult, init_unroll, unroll
from teleport_optim.optim import schedule
from teleport_optim.optim.shapes import BLOCK_ROWS
from teleport_optim.rng import generator_for
from tests.helpers.problems import in_float64

pytestmark = pytest.mark.private_torch

BATCHES = partial(generator_for, "batch")


INTERVAL = 20


@pytest.fixture(autouse=True)
def often_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TELEPORT_INTERVAL", INTERVAL)


def new_rule(num_candidates: int, *, block_rows: int = BLOCK_ROWS) -> tuple[ControllerRule, Tensor]:
    rule = ControllerRule(MetaOptimizer(3, generator_for("weights"), block_rows=block_rows))
    return rule, 0.2 * torch.randn(num_candidates, len(rule.flatten()), generator=generator_for("candidates"))


def train(rule: ControllerRule, candidates: Tensor, problem: InnerProblem, *lengths: int) -> UnrollResult:
    runs = init_unroll(rule, problem, len(candidates))
    weights = rule.unflatten(candidates.repeat_interleave(problem.num_problems, dim=0))
    losses = []
    with torch.no_grad():
        for length in lengths:
            result = unroll(rule, weights, problem, runs, length, BATCHES)
            runs = result.runs
            losses.append(result.losses)
    return result._replace(losses=torch.cat(losses, dim=-1))


def assert_unroll_is_the_optimizer(
    problem: InnerProblem, total_steps: int | None, rule: ControllerRule, candidates: Tensor
) -> None:
    """Through two control steps; the features are single precision, and their rounding grows over the steps."""
    num_steps = INTERVAL + 2
    result = train(rule, candidates, problem, num_steps)
    assert result.losses.shape == (4, num_steps)
    for run in range(4):
        vector_to_parameters(candidates[run // 2], rule.network.parameters())
        problem.model.load_state_dict({key: value[run % 2] for key, value in problem.params.items()})
        optimizer = LearnedTeleportOptimizer.for_model(problem.model, total_steps=total_steps, checkpoint=rule.network)
        for step in range(num_steps):
            inputs, targets = (x[run % 2] for x in problem.sample_batch(BATCHES(step)))
            optimizer.zero_grad()
            problem.loss(problem.model(inputs), targets).backward()
            optimizer.step()
        for key, param in problem.model.named_parameters():
            torch.testing.assert_close(param, result.runs.params[key][run], rtol=1e-3, atol=1e-3)


def draw(name: str, *, knows_horizon: bool = True) -> InnerProblem:
    horizon = INTERVAL + 2
    problem = in_float64(find_task(name).sample(2, (horizon, horizon), "train", generator_for("problem", 3)))
    return dataclasses.replace(problem, knows_horizon=knows_horizon)


@pytest.mark.parametrize("name", TASKS)
def test_the_unroll_is_the_optimizer_run_by_run(name: str) -> None:
    problem = draw(name)
    assert_unroll_is_the_optimizer(problem, problem.horizon, *new_rule(2))


@pytest.mark.parametrize("block_rows", [1, 5])
def test_the_unroll_with_other_blocks_is_the_optimizer_run_by_run(block_rows: int) -> None:
    problem = draw("digits_mlp")
    rule, candidates = new_rule(2, block_rows=block_rows)
    assert_unroll_is_the_optimizer(problem, problem.horizon, rule, candidates)
    usual, other = (train(each, candidates, problem, 5).losses for each in (new_rule(2)[0], rule))
    assert not torch.allclose(usual, other, rtol=1e-3)


def test_a_horizon_that_is_not_known_is_not_told() -> None:
    """The run is that of an optimizer without ``total_steps``, whatever the horizon."""
    known, unknown = (draw("digits_mlp", knows_horizon=knows) for knows in (True, False))
    rule, candidates = new_rule(2)
    assert_unroll_is_the_optimizer(unknown, None, rule, candidates)
    usual, blind, longer = (
        train(rule, candidates, problem, 5).losses
        for problem in (known, unknown, dataclasses.replace(unknown, horizon=2 * unknown.horizon))
    )
    assert torch.equal(blind, longer)
    assert not torch.allclose(usual, blind, rtol=1e-3)


@pytest.mark.parametrize("name", ["digits_mlp", "digits_batchnorm_cnn", "char_recurrent"])
def test_windows_go_on_where_the_last_one_ended(name: str) -> None:
    problem = find_task(name).sample(2, (12, 12), "train", generator_for("problem", 1))
    rule, candidates = new_rule(2)
    whole, parts = train(rule, candidates, problem, 12), train(rule, candidates, problem, 2, 9, 1)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-4, atol=1e-5)
    assert parts.runs.step == whole.runs.step == 12


def exploding(problem: InnerProblem, is_lost: Tensor) -> InnerProblem:
    """The same problem, with infinite losses from the fourth minibatch on in the problems that are lost."""
    count = 0

    def sample_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        nonlocal count
        inputs, targets = problem.sample_batch(generator)
        count += 1
        bad = (is_lost & (count > 3)).reshape(-1, *[1] * (inputs.dim() - 1))
        return torch.where(bad, torch.inf, inputs), targets

    return dataclasses.replace(problem, sample_batch=sample_batch, symmetries=problem.table.spec)


def test_a_run_that_explodes_stays_exploded_and_leaves_the_others_alone() -> None:
    problem = find_task("digits_mlp").sample(2, (9, 9), "train", generator_for("problem", 1))
    rule, candidates = new_rule(2)
    sound = train(rule, candidates, problem, 9)
    result = train(rule, candidates, exploding(problem, torch.tensor([True, False])), 9)
    assert result.runs.is_exploded.tolist() == [True, False, True, False]
    assert torch.equal(result.losses[1::2], sound.losses[1::2])
    assert torch.isinf(result.losses[::2, 3:]).all()
    assert torch.isfinite(result.losses[::2, :2]).all()
    assert (log_relative(result.losses, result.runs.initial[:, None])[::2, 3:] == WORST).all()


def test_runs_end_early_once_all_have_exploded() -> None:
    problem = find_task("digits_mlp").sample(1, (200, 200), "train", generator_for("problem", 1))
    steps = []

    def batches(step: int) -> torch.Generator:
        steps.append(step)
        return BATCHES(step)

    rule, candidates = new_rule(1)
    lost = exploding(problem, torch.tensor([True]))
    with torch.no_grad():
        result = unroll(rule, rule.unflatten(candidates), lost, init_unroll(rule, lost, 1), 200, batches)
    assert result.losses.shape == (1, 200)
    assert torch.isinf(result.losses[:, 3:]).all()
    assert len(steps) < 20


def test_memory_does_not_grow_with_the_horizon() -> None:
    """Nothing but the losses is kept of past steps."""
    problem = find_task("digits_mlp").sample(1, (40, 40), "train", generator_for("problem", 1))
    rule, candidates = new_rule(2)

    def num_kept(length: int) -> int:
        result = train(rule, candidates, problem, length)
        state = result.runs.state
        return sum(x.untyped_storage().nbytes() for x in [*result.runs.params.values(), *state.momenta.values()])

    assert num_kept(40) == num_kept(5)


def test_running_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="1 is a BatchNorm1d that keeps running statistics"):
        InnerProblem.of([model], nn.functional.mse_loss, lambda generator: (torch.zeros(1, 4, 2),) * 2, 10)
