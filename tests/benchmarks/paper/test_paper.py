"""The paper's experiments: the harness counts everything and changes nothing, and the closed forms hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.paper import __main__ as command
from benchmarks.paper import newton
from benchmarks.paper.ellipse_directions import short_axis
from benchmarks.paper.functions import FUNCTIONS
from benchmarks.paper.groups import balance, permutation_spread
from benchmarks.paper.harness import (
    NEVER,
    Study,
    Trajectory,
    comparison,
    follow,
    gradient_descent,
    gradients,
    largest_gradient,
    summary,
    teleport_facts,
)
from benchmarks.paper.tables import insert
from benchmarks.paper.training import PAPER, family_of, learner_of, rule_of, train, window
from teleport_optim.meta_training.unroll import init_unroll
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.quick(tmp_path / "cache", tmp_path / "out")


@pytest.mark.slow
def test_everything_runs_end_to_end(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--quick", "--cache", str(study.cache), "--out", str(study.out)])
    results = json.loads((study.out / "results.json").read_text())
    assert set(results) == {*command.EXPERIMENTS, "settings"}
    assert len(list(study.out.glob("*.png"))) >= 8
    printed = capsys.readouterr().out
    for name, experiment in command.EXPERIMENTS.items():
        for title, table in experiment.tables(results[name]).items():
            assert table in printed, title


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["5"])
    assert "there is no experiment '5'" in capsys.readouterr().err


def test_the_settings_are_those_of_the_paper() -> None:
    assert PAPER.num_outer_steps == 500 * -(-21 // PAPER.truncation)
    assert (PAPER.max_horizon, PAPER.hidden_size, PAPER.learning_rate, PAPER.clip) == (21, 100, 4e-4, 0.0)


def test_meta_seeds_do_not_meet_and_are_kept(study: Study) -> None:
    config = study.config("ellipse", "lr+teleport+momentum")
    alone = train(config, [1], study.cache / "alone")
    together = train(config, [0, 1, 2], study.cache)
    torch.testing.assert_close(alone[0], together[1])
    untrained = rule_of(replace(config, seed=1), study.problem("ellipse")).flatten()
    assert not torch.equal(untrained, together[1])
    written = sorted(study.cache.glob("*.pt"))
    times = [file.stat().st_mtime_ns for file in written]
    assert torch.equal(train(config, [2, 1], study.cache), together[[2, 1]])
    assert [file.stat().st_mtime_ns for file in written] == times


@pytest.mark.parametrize("second_order", [False, True])
def test_the_distance_to_the_optimum_is_added_to_the_meta_loss_of_every_step(study: Study, second_order: bool) -> None:
    """With a weight steps are taken one by one, which changes neither the loss nor its gradient."""
    estimator = "tbptt" if second_order else "tbptt_first_order"
    near, far = (study.config("ellipse", "lr", distance_weight=weight, estimator=estimator) for weight in (1e-9, 1.0))
    without, problem = replace(near, distance_weight=0.0), study.problem("ellipse")
    problem = replace(problem, horizon=study.num_steps)
    rule = rule_of(without, problem)
    losses, gradients, points = {}, {}, []
    for config in (without, near, far):
        flat = rule.flatten().requires_grad_()
        runs = init_unroll(rule, problem, 1)
        result, after = window(config, rule, rule.unflatten(flat), problem, runs)
        (gradients[config.distance_weight],) = torch.autograd.grad(result.sum(), flat)
        losses[config.distance_weight] = result.detach()
        assert after.step == config.truncation
    torch.testing.assert_close(losses[1e-9], losses[0.0])
    torch.testing.assert_close(gradients[1e-9], gradients[0.0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(gradients[1.0], gradients[0.0], rtol=1e-2)
    runs, flat = init_unroll(rule, problem, 1), rule.flatten()
    for _ in range(without.truncation):
        _, runs = window(replace(without, truncation=1), rule, rule.unflatten(flat), problem, runs)
        points.append(runs.params["x"].detach())
    expected = sum((point - problem.optimum).norm(dim=-1) for point in points)
    torch.testing.assert_close(losses[1.0] - losses[0.0], expected, rtol=1e-3, atol=1e-3)


def test_what_the_learner_of_the_library_cannot_do_is_refused(study: Study) -> None:
    with pytest.raises(ValueError, match="distance_weight is for truncated backpropagation"):
        learner_of(study.config("ellipse", "lr", distance_weight=1.0))
    with pytest.raises(ValueError, match=r"unknown variant 'lr\+telport': there are update, "):
        study.config("ellipse", "lr+telport")
    with pytest.raises(TypeError, match="'digits_mlp' is no family of functions"):
        family_of(replace(PAPER, tasks=("digits_mlp",)))


def test_teleports_are_applied_where_they_should_be_and_nowhere_when_off(study: Study) -> None:
    config = study.config("rosenbrock_fixed", "update+teleport", theta_gradient=True)
    problem, weights = study.problem("rosenbrock_fixed"), study.weights(config)
    kept = weights.clone()
    on, off = study.test(config), study.test(config, "off")
    assert torch.equal(weights, kept)
    assert torch.equal(study.weights(config), kept)
    assert on.points.shape == (len(study.seeds), study.num_functions, study.num_steps + 1, 2)
    moved = ((on.before - on.points[:, :, 1:]).norm(dim=-1) > 0).flatten(0, 1)
    for step in range(study.num_steps):
        assert bool(moved[:, step].all()) == (step in config.teleport_steps), step
        if step not in config.teleport_steps:
            assert not moved[:, step].any()
    inputs, targets = (part.repeat_interleave(13, dim=0) for part in problem.sample_batch(torch.Generator()))
    again = problem.losses({"x": on.points[0].flatten(0, 1)}, inputs, targets).reshape(on.losses[0].shape)
    torch.testing.assert_close(again, on.losses[0])
    assert torch.equal(off.before, off.points[:, :, 1:])
    first = config.teleport_steps[0]
    torch.testing.assert_close(on.points[:, :, : first + 1], off.points[:, :, : first + 1])
    random = study.test(config, "random")
    assert not torch.equal(random.points, on.points)
    start = problem.losses({"x": random.before[0, :, first]}, *problem.sample_batch(torch.Generator()))
    torch.testing.assert_close(start, random.losses[0, :, first + 1], rtol=1e-3, atol=1e-5)
    by_hand = follow(replace(config, teleport_steps=NEVER), weights[0], problem, study.num_steps)
    assert torch.equal(by_hand.points, off.points[0])


def test_every_run_is_counted() -> None:
    final = torch.tensor([[1.0, 2.0, 3.0, torch.inf], [5.0, 6.0, torch.inf, torch.inf], [1.0, 1.0, 2.0, 2.0]])
    result = summary(final)
    assert (result["runs"], result["exploded"]) == (12, 3)
    assert result["medians"] == [2.0, 6.0, 1.0]
    assert (result["median"], result["lowest"], result["highest"]) == (2.0, 1.0, 6.0)
    paired = comparison(final, 2.0 * final, is_paired=True)
    assert (paired["ratio"], paired["wins"], paired["pairs"], paired["functions"]) == (2.0, 3, 3, 0.75)
    unpaired = comparison(final, final, is_paired=False)
    assert (unpaired["ratio"], unpaired["wins"], unpaired["pairs"]) == (1.0, 3, 9)


def test_the_exact_teleport_solves_an_ellipse(study: Study) -> None:
    """A positive control: at the tip of the short axis a gradient step with the right rate is Newton's step."""
    problem = study.problem("ellipse_fixed")
    start = problem.params["x"]
    moved = largest_gradient(problem, start)
    inputs, targets = problem.sample_batch(torch.Generator())
    torch.testing.assert_close(
        problem.losses({"x": moved}, inputs, targets), problem.losses(problem.params, inputs, targets)
    )
    assert (gradients(problem, moved).norm(dim=-1) >= gradients(problem, start).norm(dim=-1) - 1e-4).all()
    axis = short_axis(problem)
    torch.testing.assert_close(axis.abs(), torch.tensor([0.0, 1.0]).expand(len(axis), 2))
    towards = (moved * axis).sum(dim=-1).abs() / moved.norm(dim=-1)
    assert (towards > 0.99).all()
    path = gradient_descent(problem, 1.0 / 18.0, 3, (0,))
    assert (path.final < 1e-3 * gradient_descent(problem, 1.0 / 18.0, 3).final).all()
    facts = teleport_facts(problem, Trajectory(*(part[None] for part in path)), [0])
    assert (facts["raised"], facts["away"], facts["teleports"]) == (1.0, 0.0, study.num_functions)


def test_the_lemma_holds_for_definite_matrices_and_fails_for_the_counterexample() -> None:
    results = newton.lemma()
    assert results["definite_negative"] == 0.0
    assert results["definite_lowest"] > -1e-9
    assert results["indefinite_negative"] > 0.1
    assert results["counterexample"] == -1.0
    plane = torch.randn(200, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plane = plane + plane.mT
    slopes = newton.symmetry_slope(plane, torch.ones(200, 2, dtype=torch.float64))
    assert torch.equal(slopes > 0.0, torch.linalg.det(plane) > 0.0)


def test_on_the_saddle_a_larger_gradient_is_a_larger_distance() -> None:
    orbit = newton.counterexample()
    assert orbit["gradient_norm"] == pytest.approx(orbit["distance"], rel=1e-5)
    assert orbit["value"] == pytest.approx([orbit["value"][0]] * len(orbit["value"]), rel=1e-4)
    assert max(orbit["distance"]) > 2.0 * min(orbit["distance"])


def test_permutations_keep_the_gradient_norm_and_balance_keeps_the_loss(study: Study) -> None:
    permuted = study.problem("power_sums")
    assert permutation_spread(permuted, permuted.params["x"]).max() < 1e-4
    scaled = study.problem("scaled_products")
    u, v = balance(scaled, scaled.params["x"]).chunk(2, dim=-1)
    torch.testing.assert_close(u.abs(), v.abs())
    inputs, _ = scaled.sample_batch(torch.Generator())
    value = FUNCTIONS["scaled_products"].value
    torch.testing.assert_close(value(torch.cat([u, v], dim=-1), inputs), value(scaled.params["x"], inputs))


def test_the_report_has_its_figures_and_a_place_for_every_table() -> None:
    page = (DOCS / "paper.md").read_text()
    results = json.loads((DOCS / "paper" / "results.json").read_text())
    for name, experiment in command.EXPERIMENTS.items():
        for title, table in experiment.tables(results[name]).items():
            assert insert(page, title, table) == page, f"the table {title} of the report is not that of results.json"
    figures = sorted((DOCS / "paper").glob("*.png"))
    assert figures
    for figure in figures:
        assert f"paper/{figure.name}" in page
        assert figure.stat().st_size < 150_000
    with pytest.raises(ValueError, match="no place for the table 'nothing'"):
        insert(page, "nothing", "")
