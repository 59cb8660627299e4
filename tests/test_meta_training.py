"""Meta-training: the estimator against exact gradients, the unroll against the optimizer class, runs that resume."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer, load_checkpoint
from teleport_optim.meta_training.estimators import evolution_strategies, meta_loss
from teleport_optim.meta_training.learner import Config, Learner
from teleport_optim.meta_training.unroll import unroll
from teleport_optim.tasks import TASKS, InnerProblem
from teleport_optim.tasks.data import SPLITS, digits

TINY = Config(
    num_outer_steps=4, num_tasks=2, num_problems=1, num_pairs=2, max_horizon=12, validate_every=2, hidden_size=3
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(seed: int, num_candidates: int) -> tuple[MetaOptimizer, dict[str, Tensor]]:
    meta_optimizer, source = MetaOptimizer(3), generator(seed)
    return meta_optimizer, {
        name: 0.2 * torch.randn(num_candidates, *param.shape, generator=source)
        for name, param in meta_optimizer.named_parameters()
    }


def in_float64(problem: InnerProblem) -> InnerProblem:
    """The same problem with double parameters and data, so that rounding does not grow over the steps."""

    def sample_batch(source: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = problem.sample_batch(source)
        return inputs.double(), targets.double() if targets.is_floating_point() else targets

    params = {name: value.double() for name, value in problem.params.items()}
    return dataclasses.replace(problem, model=problem.model.double(), params=params, sample_batch=sample_batch)


@pytest.mark.parametrize("name", TASKS)
def test_the_unroll_is_the_optimizer_run_by_run(name: str) -> None:
    problem = in_float64(TASKS[name].sample(2, 15, "train", generator(3)))
    meta_optimizer, candidates = weights(0, 2)
    with torch.no_grad():
        trajectory = unroll(meta_optimizer, candidates, problem, generator(5))
    assert trajectory.losses.shape == (2, 2, problem.horizon)
    for candidate in range(2):
        meta_optimizer.load_state_dict({key: value[candidate] for key, value in candidates.items()})
        for row in range(2):
            problem.model.load_state_dict({key: value[row] for key, value in problem.params.items()})
            optimizer = LearnedTeleportOptimizer.for_model(
                problem.model, total_steps=problem.horizon, checkpoint=meta_optimizer
            )
            source = generator(5)
            for _ in range(problem.horizon):
                inputs, targets = (x[row] for x in problem.sample_batch(source))
                optimizer.zero_grad()
                problem.loss(problem.model(inputs), targets).backward()
                optimizer.step()
            for key, param in problem.model.named_parameters():
                torch.testing.assert_close(param, trajectory.params[key][candidate, row], rtol=1e-3, atol=1e-2)


def final_loss(problem: InnerProblem, candidates: dict[str, Tensor], meta_optimizer: MetaOptimizer) -> Tensor:
    return meta_loss(unroll(meta_optimizer, candidates, problem, generator(5)).losses).mean(dim=1)


def test_backpropagation_through_the_unroll_agrees_with_finite_differences() -> None:
    problem = in_float64(TASKS["teacher_regression"].sample(2, 5, "train", generator(12)))
    meta_optimizer, candidates = weights(1, 1)
    leaves = {name: value.clone().requires_grad_() for name, value in candidates.items()}
    final_loss(problem, leaves, meta_optimizer).sum().backward()
    source = generator(2)
    direction = {name: torch.randn(value.shape, generator=source) for name, value in candidates.items()}
    slope = sum(float((leaves[name].grad * direction[name]).sum()) for name in direction)
    size = 1e-4
    with torch.no_grad():
        plus, minus = (
            final_loss(problem, {n: v + sign * size * direction[n] for n, v in candidates.items()}, meta_optimizer)
            for sign in (1.0, -1.0)
        )
    assert abs(slope) > 1e-3
    assert float(plus - minus) / (2 * size) == pytest.approx(slope, rel=5e-3)


def test_evolution_strategies_are_unbiased_for_a_quadratic() -> None:
    """For a quadratic the blurred gradient is the gradient; the mean lies within four standard errors of it."""
    matrix = torch.diag(torch.tensor([1.0, 3.0, 0.5]))
    theta = torch.tensor([1.0, -2.0, 0.5])

    def objective(candidates: Tensor) -> Tensor:
        return 0.5 * ((candidates @ matrix) * candidates).sum(dim=-1) + candidates.sum(dim=-1)

    source = generator()
    estimates = torch.stack(
        [evolution_strategies(objective, theta, num_pairs=4, sigma=0.3, generator=source).gradient for _ in range(500)]
    )
    error = (estimates.mean(dim=0) - (matrix @ theta + 1.0)) / (estimates.std(dim=0) / 500**0.5)
    assert error.abs().max() < 4.0
    biased = (1.5 * estimates).mean(dim=0) - (matrix @ theta + 1.0)
    assert (biased / (estimates.std(dim=0) / 500**0.5)).abs().max() > 4.0


def test_meta_loss_orders_runs_and_bounds_divergence() -> None:
    good, bad = torch.linspace(1.0, 0.1, 50), torch.linspace(1.0, 0.5, 50)
    diverged = torch.cat([torch.ones(10), torch.full((40,), torch.nan)])
    losses = torch.stack([good, bad, diverged, 100.0 * good])
    values = meta_loss(losses)
    assert torch.isfinite(values).all()
    assert values[0] < values[1] < values[2]
    assert values[3] == pytest.approx(values[0].item(), rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_reproducible_and_varied(name: str) -> None:
    first, again = (TASKS[name].sample(2, 50, "train", generator(7)) for _ in range(2))
    assert first.description == again.description
    assert all(torch.equal(first.params[key], again.params[key]) for key in first.params)
    assert torch.equal(first.sample_batch(generator())[0], again.sample_batch(generator())[0])
    assert len({TASKS[name].sample(1, 50, "train", generator(seed)).description for seed in range(6)}) > 3
    assert 1 <= first.horizon <= 50


def test_splits_of_the_digits_are_disjoint() -> None:
    bounds = sorted(SPLITS.values())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(bounds))
    assert sum(len(digits(split)[0]) for split in SPLITS) == 1797
    with pytest.raises(ValueError, match="no split 'holdout'"):
        digits("holdout")


def test_two_runs_agree_and_an_interrupted_one_too(tmp_path: Path) -> None:
    whole = Learner(TINY, tmp_path / "whole")
    reports = [report[:4] for report in whole.run()]
    other = Learner(TINY, tmp_path / "other")
    steps = other.run()
    first_half = [next(steps)[:4] for _ in range(2)]
    resumed = Learner(TINY, tmp_path / "other", resume=True)
    assert first_half + [report[:4] for report in resumed.run()] == reports
    assert torch.equal(resumed.theta, whole.theta)
    assert torch.equal(resumed.best, whole.best)
    assert reports[1][3] is not None
    assert [json.loads(line)["step"] for line in (tmp_path / "other" / "log.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    whole.export(tmp_path / "out.safetensors", note="a test")
    loaded = load_checkpoint(tmp_path / "out.safetensors")
    flat = torch.cat([param.reshape(-1) for param in loaded.parameters()])
    assert torch.equal(flat, whole.best)


def test_runs_are_not_overwritten_or_mixed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        Learner(TINY, tmp_path / "run", resume=True)
    next(Learner(TINY, tmp_path / "run").run())
    with pytest.raises(FileExistsError, match="holds a run"):
        Learner(TINY, tmp_path / "run")
    with pytest.raises(ValueError, match=r"settings differ: \['sigma'\]"):
        Learner(TINY.with_settings(["sigma=0.5"]), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "setting", ["sigma=0", "num_pairs=0", "averaging=1", "tasks=chess", "speed=3", "sigma", "num_pairs=many"]
)
def test_bad_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=setting.split("=")[0]):
        Config().with_settings([setting])


def test_functional_call_of_the_meta_optimizer_is_its_call() -> None:
    meta_optimizer, candidates = weights(4, 1)
    own = {name: value[0] for name, value in candidates.items()}
    features, hidden = torch.randn(5, meta_optimizer.input_weight.shape[1], generator=generator()), torch.zeros(5, 6)
    outside = functional_call(meta_optimizer, own, (features, hidden))
    meta_optimizer.load_state_dict(own)
    with torch.no_grad():
        for inside, other in zip(meta_optimizer(features, hidden), outside):
            assert torch.equal(inside, other)
