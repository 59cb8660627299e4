"""Meta-gradient estimators against the exact meta-gradient of a small problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from benchmarks.paper.functions import task_path
from benchmarks.paper.rules import VARIANTS
from benchmarks.paper.training import PaperConfig, rule_of
from teleport_optim import MetaOptimizer
from teleport_optim.meta_training.config import ESTIMATOR_NAMES
from teleport_optim.meta_training.episodes import Episode
from teleport_optim.meta_training.estimators import ESTIMATORS, Estimator, meta_loss, step_weights
from teleport_optim.meta_training.process_group import ProcessGroup
from teleport_optim.meta_training.rules import ControllerRule, Rule
from teleport_optim.meta_training.tasks import InnerProblem, find_task
from teleport_optim.meta_training.unroll import init_unroll, unroll
from teleport_optim.optim import schedule
from teleport_optim.rng import generator_for
from tests.helpers.problems import in_float64

HORIZON = 6
INTERVAL = 10
"""Steps between two runs of the controller here; over more, the final loss is too rough a function of the weights."""
ELLIPSE = task_path("ellipse")
CONFIG = PaperConfig(
    variant="lr+teleport+momentum",
    tasks=(ELLIPSE,),
    num_tasks=1,
    num_problems=2,
    num_pairs=40,
    sigma=0.01,
    truncation=2,
    hidden_size=2,
    theta_gradient=True,
)


SMOOTH, TELEPORTING = "teacher_regression", "teacher_classification"
"""Tasks of which two kinds of perceptrons are drawn: of tanh, without a kink anywhere, and of ReLU, which can teleport."""
DRAWN = {SMOOTH: (0, INTERVAL + 2, " tanh "), TELEPORTING: (24, HORIZON, " relu ")}


@pytest.fixture(autouse=True)
def often_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TELEPORT_INTERVAL", INTERVAL)


@cache
def draw(task: str) -> InnerProblem:
    seed, horizon, kind = DRAWN.get(task, (3, HORIZON, ""))
    problem = find_task(task).sample(2, (horizon, horizon), "train", generator_for("test", seed))
    assert kind in problem.description
    assert problem.knows_horizon
    assert len(problem.table.spec) == (2 if task == TELEPORTING else 0)
    return in_float64(problem)


def setting(config: PaperConfig) -> tuple[Rule, Tensor]:
    """A rule in double precision and weights at which it does something."""
    rule: Rule
    if config.tasks[0] in DRAWN:  # The inputs of the controller are single precision; its controls need not be.
        network = MetaOptimizer(config.hidden_size, generator_for("weights", 0)).double()
        start = network.initial_hidden
        network.initial_hidden = lambda num_tensors: start(num_tensors).float()  # type: ignore[method-assign]
        network.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
        rule = ControllerRule(network)
    else:
        rule = rule_of(config, draw(config.tasks[0]))
        rule.network.double()
    flat = rule.flatten()
    return rule, flat + 0.2 * torch.randn(flat.shape, generator=generator_for("theta")).to(flat)


def new_episode(config: PaperConfig) -> Episode:
    return Episode(0, 0, draw(config.tasks[0]).horizon, partial(draw, config.tasks[0]), partial(generator_for, "batch"))


def exact_gradient(config: PaperConfig, rule: Rule, theta: Tensor, directions: Tensor) -> Tensor:
    """Slopes of the mean meta-loss along rows of ``directions``, from central differences of whole training runs."""
    problem, size = draw(config.tasks[0]), 1e-5 if theta.dtype == torch.float32 else 1e-8
    candidates = torch.cat([theta + size * directions, theta - size * directions])
    with torch.no_grad():
        runs = init_unroll(rule, problem, len(candidates))
        weights = rule.unflatten(candidates.repeat_interleave(problem.num_problems, dim=0))
        result = unroll(rule, weights, problem, runs, problem.horizon, partial(generator_for, "batch"))
    losses = meta_loss(problem, result, config.objective).reshape(2, len(directions), -1).mean(dim=-1)
    return (losses[0] - losses[1]) / (2 * size)


def whole_run(estimator: Estimator, config: PaperConfig, theta: Tensor, sample: int) -> Tensor:
    """The sum of the estimates of all windows of one episode, at the same weights."""
    episode, total, window = new_episode(config), torch.zeros_like(theta), 0
    while episode.step < episode.horizon:
        total += estimator.estimate(theta, [episode], 1000 * sample + window).gradient
        episode.step += estimator.window_length(episode)
        window += 1
    return total


@pytest.mark.parametrize("objective", ["plain", "normalised"])
@pytest.mark.parametrize(
    ("variant", "task"),
    [(variant, ELLIPSE) for variant in VARIANTS]
    + [("lr+teleport", task_path("scaled_products")), ("controller", SMOOTH), ("controller", TELEPORTING)],
)
def test_full_length_backpropagation_equals_finite_differences(variant: str, task: str, objective: str) -> None:
    config = dataclasses.replace(
        CONFIG,
        variant=CONFIG.variant if task in DRAWN else variant,
        tasks=(task,),
        objective=objective,
        truncation=draw(task).horizon,
        theta_gradient="teleport" in variant,
    )
    rule, theta = setting(config)
    gradient = whole_run(ESTIMATORS["tbptt"](rule, config, ProcessGroup()), config, theta, 0)
    directions = torch.randn(8, len(theta), generator=generator_for("directions"), dtype=theta.dtype)
    exact = exact_gradient(config, rule, theta, directions)
    assert exact.abs().max() > 1e-4
    tolerance = 1e-3 if variant == "controller" else 1e-4
    torch.testing.assert_close(
        (directions @ gradient).to(exact), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max())
    )
    first_order = whole_run(ESTIMATORS["tbptt_first_order"](rule, config, ProcessGroup()), config, theta, 0)
    assert not torch.allclose((directions @ first_order).to(exact), exact, rtol=tolerance)


def z_scores(estimates: Tensor, exact: Tensor) -> Tensor:
    return (estimates.mean(dim=0) - exact) / (estimates.std(dim=0) / len(estimates) ** 0.5)


@pytest.mark.parametrize("name", ["es", "pes"])
def test_evolution_strategies_are_unbiased_and_truncated_backpropagation_is_not(name: str) -> None:
    rule, theta = setting(CONFIG)
    exact = exact_gradient(CONFIG, rule, theta, torch.eye(len(theta), dtype=torch.float64))
    estimator = ESTIMATORS[name](rule, CONFIG, ProcessGroup())
    estimates = torch.stack([whole_run(estimator, CONFIG, theta, sample) for sample in range(60)])
    assert z_scores(estimates, exact).abs().max() < 4.0
    truncated = whole_run(ESTIMATORS["tbptt"](rule, CONFIG, ProcessGroup()), CONFIG, theta, 0)
    assert z_scores(estimates - exact + truncated, exact).abs().max() > 8.0


def test_persistence_is_what_makes_truncation_unbiased() -> None:
    """Without the sum of perturbations, evolution strategies over windows fail the test that PES passes."""
    rule, theta = setting(CONFIG)
    exact = exact_gradient(CONFIG, rule, theta, torch.eye(len(theta), dtype=torch.float64))
    estimator = ESTIMATORS["pes"](rule, CONFIG, ProcessGroup())

    def forgetful(sample: int) -> Tensor:
        episode, total, window = new_episode(CONFIG), torch.zeros_like(theta), 0
        while episode.step < episode.horizon:
            episode.displacement = None
            total += estimator.estimate(theta, [episode], 1000 * sample + window).gradient
            episode.step += estimator.window_length(episode)
            window += 1
        return total

    assert z_scores(torch.stack([forgetful(sample) for sample in range(60)]), exact).abs().max() > 8.0


def test_the_mixture_is_the_weighted_mean_of_its_parts() -> None:
    rule, theta = setting(CONFIG)
    parts = [whole_run(ESTIMATORS[name](rule, CONFIG, ProcessGroup()), CONFIG, theta, 0) for name in ("pes", "tbptt")]
    config = dataclasses.replace(CONFIG, mix=0.25)
    mixed = whole_run(ESTIMATORS["pes+tbptt"](rule, config, ProcessGroup()), config, theta, 0)
    torch.testing.assert_close(mixed, 0.75 * parts[0] + 0.25 * parts[1])


@pytest.mark.parametrize("name", ESTIMATOR_NAMES)
def test_frozen_entries_have_no_gradient(name: str) -> None:
    config = dataclasses.replace(CONFIG, frozen=("first_*", "readout_bias"))
    rule, theta = setting(config)
    is_frozen = torch.tensor([label.startswith("first_") or label == "readout_bias" for label in rule.labels()])
    gradient = whole_run(ESTIMATORS[name](rule, config, ProcessGroup()), config, theta, 0)
    assert (gradient[is_frozen] == 0).all()
    assert (gradient[~is_frozen] != 0).any()


def test_a_control_can_be_frozen_by_name() -> None:
    rule, _ = setting(dataclasses.replace(CONFIG, tasks=(SMOOTH,)))
    is_trained = rule.is_trained(["*.balance"])
    frozen = {label for label, trained in zip(rule.labels(), is_trained) if not trained}
    assert frozen == {"readout_weight.balance", "skip_weight.balance", "readout_bias.balance"}
    with pytest.raises(ValueError, match=r"frozen='\*\.balanse' matches no meta-parameter"):
        rule.is_trained(["*.balanse"])


@pytest.mark.parametrize("horizon", [1, 7, 100])
def test_the_windows_of_a_run_share_its_weights(horizon: int) -> None:
    """Each has its part of one mean loss, the later the more; all but about the first three tenths have one."""
    weights = step_weights("normalised", horizon)
    assert weights.sum() == pytest.approx(1.0, rel=1e-5)
    assert weights.min() >= 0
    assert (weights.diff() >= 0).all()
    assert 0.3 * horizon - 1e-6 <= int((weights == 0).sum()) < 0.3 * horizon + 1 or horizon == 1
    assert weights[-1] > 0
    assert float(weights[int(0.9 * horizon) :].sum()) > 0.5
    assert step_weights("plain", horizon).tolist() == [1.0] * horizon


def test_runs_that_explode_are_counted_and_leave_the_gradient_finite() -> None:
    """At weights that send every run away all estimators say so; for the plain objective nothing is left to follow."""
    config = dataclasses.replace(CONFIG, variant="update", theta_gradient=False, objective="normalised", truncation=6)
    rule, theta = setting(config)
    theta[[label == "readout_bias" for label in rule.labels()]] = 1e30
    for name in ESTIMATOR_NAMES:
        estimate = ESTIMATORS[name](rule, config, ProcessGroup()).estimate(theta, [new_episode(config)], 0)
        assert estimate.exploded == 1.0
        assert torch.isfinite(estimate.gradient).all()
        assert estimate.objective == pytest.approx(3.0)


def test_the_meta_loss_of_windows_adds_up() -> None:
    rule, theta = setting(CONFIG)
    problem = draw(ELLIPSE)

    def total(lengths: Sequence[int]) -> Tensor:
        runs = init_unroll(rule, problem, 1)
        weights = rule.unflatten(theta.expand(2, -1))
        losses = torch.zeros(2, dtype=torch.float64)
        for length in lengths:
            result = unroll(rule, weights, problem, runs, length, partial(generator_for, "batch"))
            runs, losses = result.runs, losses + meta_loss(problem, result, CONFIG.objective)
        return losses

    torch.testing.assert_close(total([HORIZON]), total([1, 2, 3]))
    assert not torch.allclose(total([HORIZON]), total([1, 2]))
