"""Comparisons: what is measured is what is said, every optimizer gets what it should, and nothing is run twice."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.comparison import comparison as comparison_module
from benchmarks.comparison.__main__ import main
from benchmarks.comparison.ablations import ABLATIONS
from benchmarks.comparison.baselines import OURS, REFERENCE, Baseline, baselines, tune_lr
from benchmarks.comparison.comparison import Comparison, Score, TaskResult
from benchmarks.comparison.images import image_tasks
from benchmarks.comparison.report import plot, score_table, task_table
from benchmarks.comparison.task import EvaluationTask
from benchmarks.comparison.training import (
    Run,
    horizon_speed,
    milliseconds_per_step,
    peak_megabytes,
    run_training,
    speed_up,
)
from teleport_optim import LearnedTeleportOptimizer, load_checkpoint
from teleport_optim.cli.training import learned
from teleport_optim.meta_training.tasks.data import Data
from teleport_optim.meta_training.tasks.networks import seeded
from teleport_optim.optim.schedule import TELEPORT_INTERVAL


def blobs() -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs, centres = torch.randn(120, 6, generator=generator), torch.randn(6, 3, generator=generator)
    targets = (inputs @ centres).argmax(dim=1)
    return Data(inputs[:90], targets[:90], inputs[90:], targets[90:], F.cross_entropy, noise=0.1)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def wide_perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 3))


TASK = EvaluationTask("blobs", "a small perceptron", seeded(perceptron), blobs, batch_size=20, steps=40)


def run_of(losses: list[float]) -> Run:
    return Run(tuple(range(0, 10 * len(losses), 10)), tuple(losses), losses[-1], 0.0)


positive = st.floats(1e-3, 1e3)


@given(st.lists(positive, min_size=2, max_size=20), st.lists(positive, min_size=2, max_size=20))
def test_speed_ups_are_1_for_the_reference_and_bounded(losses: list[float], others: list[float]) -> None:
    size = min(len(losses), len(others))
    run, reference = run_of(losses[:size]), run_of(others[:size])
    assert speed_up(reference, reference) == 1.0
    value = speed_up(run, reference)
    assert 1.0 / run.steps[-1] <= value <= run.steps[-1]
    assert (value < 1.0) <= (run.losses[-1] > reference.losses[-1] or value < 1.0)
    if run.losses[-1] > reference.losses[-1]:
        assert value <= 1.0
    better = run_of([0.5 * loss for loss in run.losses])
    assert speed_up(better, reference) >= value


def test_a_lucky_dip_does_not_count() -> None:
    reference = run_of([5.0, 4.0, 3.0, 2.0, 1.0])
    assert speed_up(run_of([5.0, 0.9, 3.0, 0.9, 0.8]), reference) == pytest.approx(4 / 3)
    assert speed_up(run_of([5.0, 0.9, 0.8, 0.9, math.inf]), reference) == pytest.approx(1 / 40)


LENGTHS = (0.5, 1 / 1.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def ends(*losses: float) -> Callable[[float], float]:
    """Final losses of runs of 2 T, 1.5 T, T, T/1.5, ..., T/4 steps."""
    return dict(zip(LENGTHS, losses, strict=True)).__getitem__


@given(st.lists(positive, min_size=5, max_size=5), positive)
def test_the_reference_is_as_fast_as_itself(shorter: list[float], final: float) -> None:
    """Where its shorter runs end higher, as they do but for noise; longer ones are not asked for."""
    losses = (math.nan, math.nan, final, *(final * (1.0 + 1e-6) + loss for loss in shorter))
    assert horizon_speed(ends(*losses), final) == 1.0


@given(st.floats(0.51, 3.99), st.floats(0.1, 3.0), positive)
def test_powers_of_the_length_are_interpolated_exactly(speed: float, power: float, target: float) -> None:
    """A loss that is a power of the length is a line in logarithms."""
    found = horizon_speed(lambda k: target * (k / speed) ** power, target)
    assert found == pytest.approx(speed, rel=1e-6)
    off_by_a_percent = horizon_speed(lambda k: target * (k / speed) ** power, 1.01 * target)
    assert off_by_a_percent > found * (1.0 + 1e-4)


def test_between_two_runs_both_scales_are_logarithmic() -> None:
    found = horizon_speed(ends(9.0, 9.0, 1.0, 1.0, 2.0, 8.0, 9.0, 9.0), 4.0)
    assert found == pytest.approx(math.sqrt(2.0 * 2.5))
    linear_in_the_loss = 2.0 * (2.5 / 2.0) ** (1 / 3)
    assert abs(found - linear_in_the_loss) > 0.05


def test_what_is_beyond_either_end_counts_as_the_end() -> None:
    assert horizon_speed(ends(*8 * [1.0]), 1.0) == 4.0
    assert horizon_speed(ends(*8 * [1.0]), 0.99) == 0.5
    assert 3.0 < horizon_speed(ends(*7 * [1.0], 1.1), 1.05) < 4.0
    assert 0.5 < horizon_speed(ends(0.9, *7 * [1.1]), 1.0) < 1 / 1.5
    assert horizon_speed(ends(*8 * [math.inf]), 1.0) == 0.5
    assert horizon_speed(ends(*3 * [0.5], *5 * [math.inf]), 1.0) == 1.0


def test_a_short_run_that_is_lucky_does_not_count() -> None:
    lucky = ends(9.0, 9.0, 1.0, 1.0, 2.0, 0.5, 0.5, 0.5)
    assert 1.5 <= horizon_speed(lucky, 1.5) < 2.0
    assert horizon_speed(ends(9.0, 9.0, 1.0, 1.0, 1.5, 0.5, 0.5, 0.5), 1.5) == 4.0


def test_no_run_is_made_that_cannot_matter() -> None:
    asked: set[float] = set()

    def final_loss(speed: float) -> float:
        asked.add(speed)
        return speed

    horizon_speed(final_loss, 1.7)
    assert asked == {1.0, 1.5, 2.0}
    asked.clear()
    horizon_speed(final_loss, 0.8)
    assert asked == {1.0, 1 / 1.5}


@given(st.integers(-8, 8), st.floats(0.2, 0.8))
def test_the_rate_that_is_found_has_worse_neighbours(power: int, offset: float) -> None:
    asked: list[float] = []

    def score(rate: float) -> float:
        assert rate not in asked
        asked.append(rate)
        return abs(math.log2(rate) - power - 0.5 * offset)

    best = tune_lr(score, 1.0)
    assert best == 2.0**power
    assert {best / 2, 2 * best} <= set(asked)


def test_where_everything_diverges_the_search_ends() -> None:
    assert tune_lr(lambda rate: math.inf, 1.0) == 1.0


def test_runs_repeat_and_leave_nothing_behind() -> None:
    state = torch.random.get_rng_state()
    first, second = (run_training(TASK, learned(), steps=25, seed=1)[:3] for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first != run_training(TASK, learned(), steps=25, seed=2)[:3]


def test_measuring_does_not_disturb_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss at the end is the same, whether it was measured twice or eighty times on the way, with BatchNorm too."""
    often = run_training(TASK, learned(), steps=40, seed=0)
    seldom = run_training(TASK, learned(), steps=400, seed=0)
    assert len(often.losses) == 41
    assert len(seldom.losses) == 81
    lengths = [run_training(dataclasses.replace(TASK), learned(horizon=False), steps=n, seed=0) for n in (80, 160)]
    assert lengths[0].losses[2::2] == lengths[1].losses[1:41]


@pytest.mark.parametrize("steps", [20, 47, 160])
def test_the_end_alone_is_that_of_a_whole_run(steps: int) -> None:
    whole, end = (run_training(TASK, learned(), steps=steps, seed=0, only_end=only_end) for only_end in (False, True))
    assert end.final_loss == whole.final_loss
    assert end.steps == whole.steps[-len(end.steps) :]
    assert len(end.steps) <= 0.07 * len(whole.steps) + 1
    assert end.final_loss != whole.losses[0]


def test_the_length_is_known_and_the_parameters_are_measured_or_their_average() -> None:
    """What is trained is the same bit for bit, and ends at the same loss; in the middle the average has another."""
    task, x = dataclasses.replace(TASK, make_model=seeded(wide_perceptron)), blobs().inputs
    trained = []
    parameters, average = baselines()[OURS].make(0.0), (baselines()[OURS].averaged or baselines()[OURS].make)(0.0)
    for recipe in (parameters, average):
        model = task.make_model(0)
        optimizer = recipe(model, 30)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), blobs().targets).backward()
            optimizer.step()
        trained.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *trained))
    as_they_are, averaged, endless = (
        run_training(task, recipe, steps=60, seed=0) for recipe in (parameters, average, learned(horizon=False))
    )
    assert all(averaged.losses[k] != as_they_are.losses[k] for k in range(10, 40))
    assert as_they_are.final_loss == pytest.approx(averaged.final_loss, rel=0.1)
    assert endless.losses[:41] == averaged.losses[:41], (
        "before the last 30 % it makes no difference that the end is known"
    )
    assert endless.losses != averaged.losses


def test_an_optimizer_with_an_evaluation_mode_is_measured_in_it() -> None:
    class Shifted(torch.optim.SGD):
        """Evaluates at zero."""

        kept: list[torch.Tensor]

        @torch.no_grad()
        def eval(self) -> None:
            params = self.param_groups[0]["params"]
            self.kept = [param.clone() for param in params]
            for param in params:
                param.zero_()

        @torch.no_grad()
        def train(self) -> None:
            for param, value in zip(self.param_groups[0]["params"], self.kept):
                param.copy_(value)

    shifted, plain = (
        run_training(TASK, lambda model, steps, kind=kind: kind(model.parameters(), lr=0.1), steps=30, seed=0)
        for kind in (Shifted, torch.optim.SGD)
    )
    assert shifted.losses == pytest.approx([math.log(3)] * len(shifted.losses))
    assert plain.losses[-1] < 0.9 * math.log(3)


@pytest.mark.parametrize("name", baselines())
def test_every_baseline_learns(name: str) -> None:
    baseline = baselines()[name]
    run = run_training(TASK, baseline.make(baseline.first_lr or 0.0), steps=60, seed=0)
    assert run.losses[-1] < 0.9 * run.losses[0]
    assert math.isfinite(run.held_out)


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_kernels_are_matrices_to_muon_and_the_head_is_adamws(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its products are made in float32, which changes no more than the order of a sum of numbers of 16 bits."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))

    model = seeded(network)(0)
    optimizer = baselines()["Muon + AdamW cosine, tuned"].make(0.01)(model, 10)
    x, y = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(not torch.equal(param, old) for param, old in zip(model.parameters(), before))
    reference = seeded(network)(0)
    kernel = nn.Parameter(reference[0].weight.detach().reshape(4, 9))  # type: ignore[index, operator]
    muon = torch.optim.Muon([kernel], lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    F.cross_entropy(reference(x), y).backward()
    kernel.grad = reference[0].weight.grad.reshape(4, 9)  # type: ignore[index, operator, union-attr]
    muon.step()
    model = seeded(network)(0)
    optimizer = baselines()["Muon + AdamW cosine, tuned"].make(0.01)(model, 10)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    weights = (before[0], model[0].weight, kernel)  # type: ignore[index]
    start, end, expected = (weight.detach().reshape(4, 9) for weight in weights)  # type: ignore[operator]
    assert float((end - expected).norm()) <= (0.0 if capability == "AVX512" else 0.01) * float((end - start).norm())


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_something(name: str) -> None:
    task = dataclasses.replace(TASK, make_model=seeded(wide_perceptron))
    recipes = (learned(), ABLATIONS[name]("default"))
    full, part = (run_training(task, recipe, steps=TELEPORT_INTERVAL + 10, seed=0) for recipe in recipes)
    assert part.losses != full.losses
    assert part.losses[-1] < part.losses[0]


def test_ablations_leave_the_checkpoint_as_it_is() -> None:
    before = {name: value.clone() for name, value in load_checkpoint("default").state_dict().items()}
    for make in ABLATIONS.values():
        make("default")
    assert all(torch.equal(value, before[name]) for name, value in load_checkpoint("default").state_dict().items())


def test_times_are_of_the_step() -> None:
    class Slow:
        def zero_grad(self) -> None: ...

        def step(self) -> None:
            torch.randn(400, 400) @ torch.randn(400, 400)
            torch.linalg.svd(torch.randn(120, 120))

    class Idle(Slow):
        def step(self) -> None: ...

    recipes = {"slow": lambda model, steps: Slow(), "idle": lambda model, steps: Idle()}
    times = milliseconds_per_step(TASK, recipes, steps=60)
    assert times["slow"] > 2.0 * times["idle"] > 0.0


def test_peak_memory_counts_state_and_what_a_step_needs_for_a_moment() -> None:
    size = sum(p.numel() for p in perceptron().parameters())

    def megabytes(make: Callable[[nn.Module], Any]) -> float:
        return peak_megabytes(TASK, lambda model, steps: make(model), steps=10)

    class Wasteful(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            torch.ones(1_000_000)
            super().step()

    plain, momentum = (
        megabytes(lambda m, b=b: torch.optim.SGD(m.parameters(), lr=0.1, momentum=b)) for b in (0.0, 0.9)
    )
    assert momentum - plain == pytest.approx(4e-6 * size, rel=0.2)
    assert 4.0 <= megabytes(lambda model: Wasteful(model.parameters(), lr=0.1)) < 4.0 + 2 * plain
    wide = seeded(
        lambda: nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3))
    )
    task = dataclasses.replace(TASK, make_model=wide)
    ours, adamw = (peak_megabytes(task, recipe, steps=10) for recipe in (learned(), baselines()[REFERENCE].make(0.01)))
    saved = 4e-6 * sum(p.numel() for p in wide(0).parameters())
    assert adamw - ours == pytest.approx(saved, rel=0.2)


def test_torchvisions_data_sets_are_read(tmp_path: Path) -> None:
    """Files as torchvision keeps them, but of few images."""
    for name, letter in (("MNIST", "train"), ("MNIST", "t10k")):
        folder = tmp_path / name / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        pixels, labels = bytes(range(256)) * 49, bytes(number % 10 for number in range(16))
        for kind, sizes, content in (("images-idx3", (16, 28, 28), pixels), ("labels-idx1", (16,), labels)):
            header = struct.pack(f">{1 + len(sizes)}i", 0x800 + len(sizes), *sizes)
            (folder / f"{letter}-{kind}-ubyte").write_bytes(header + content)
    tasks = image_tasks(tmp_path)
    data = tasks["mnist"].make_data()
    assert data.inputs.shape == data.test_inputs.shape == (16, 1, 28, 28)
    assert data.inputs.mean().abs() < 1e-5
    assert data.inputs[0, 0, 0, 1] - data.inputs[0, 0, 0, 0] == pytest.approx(1 / 73.9, rel=1e-2)
    assert data.targets.tolist() == [number % 10 for number in range(16)]
    run = run_training(tasks["mnist"], learned(), steps=20, seed=0)
    assert run.losses[-1] < run.losses[0]
    for name in ("fashion", "cifar"):
        with pytest.raises(FileNotFoundError, match="Pass --download"):
            tasks[name].make_data()


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("fashion", (1, 28, 28)), ("cifar", (3, 32, 32))])
def test_networks_take_the_images_of_their_data_set(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    assert image_tasks(tmp_path)[name].make_model(0)(torch.zeros(2, *shape)).shape == (2, 10)


def few(*names: str) -> dict[str, Baseline]:
    return {name: baseline for name, baseline in baselines().items() if name in names}


def test_what_was_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted comparison goes on where it was, a second one runs nothing, and other weights are run anew."""
    calls: list[int] = []

    def counted(*args: object, **kwargs: object) -> Run:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return run_training(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison_module, "run_training", counted)
    monkeypatch.setattr(comparison_module, "baselines", lambda *_: few(REFERENCE, "AdamW default", "learned, untuned"))
    make = lambda **options: Comparison(tmp_path, {"blobs": TASK}, num_seeds=3, **options)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        make().results()
    (result,) = make().results()
    assert set(result.runs) == {REFERENCE, "AdamW default", "learned, untuned"}
    assert all(len(runs) == 3 for runs in result.runs.values())
    num_calls = len(calls)
    (again,) = make().results()
    assert len(calls) == num_calls
    assert again == result
    make(checkpoint="light").results()
    own = len(calls) - num_calls
    assert own >= 6, "three of the parameters, three of their average, others for the horizon speed"
    other = make(others={"mine": lambda model, steps: torch.optim.Adagrad(model.parameters(), lr=0.05)})
    assert list(other.results()[0].runs)[-1] == "mine"
    assert len(calls) >= num_calls + own + 3
    num_calls = len(calls)
    other.results()
    assert len(calls) == num_calls


def test_horizon_speeds_are_those_of_runs_that_are_told_their_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of optimizers whose final loss is a constant over the length; who is not told one has no such speed."""
    constants = {"reference": 40.0, "fast": 20.0, "slow": 50.0, "open": 8.0}
    made: list[tuple[str, int, int]] = []

    def made_up(task: EvaluationTask, recipe: Any, *, steps: int, seed: int, only_end: bool = False) -> Run:
        made.append((recipe, steps, seed))
        return Run((0, steps // 2, steps), tuple(constants[recipe] / step for step in (1, steps / 2, steps)), 1.0, 0.0)

    entrants = {
        REFERENCE: Baseline(lambda lr: "reference", has_horizon=True),
        "fast": Baseline(lambda lr: "fast", has_horizon=True, averaged=lambda lr: "open"),
        "slow": Baseline(lambda lr: "slow", has_horizon=True),
        "endless": Baseline(lambda lr: "open"),
    }
    monkeypatch.setattr(comparison_module, "run_training", made_up)
    monkeypatch.setattr(comparison_module, "baselines", lambda *_: entrants)
    for name in ("milliseconds_per_step", "peak_megabytes"):
        monkeypatch.setattr(comparison_module, name, lambda *args, **options: dict.fromkeys(entrants, 1.0))
    task = dataclasses.replace(TASK, steps=60)
    (result,) = Comparison(tmp_path, {"blobs": task}, num_seeds=5, num_horizon_seeds=2).results()
    assert result.horizon_speeds == {REFERENCE: [1.0, 1.0], "fast": [2.0, 2.0], "slow": [pytest.approx(0.8)] * 2}
    assert [result.horizon_speed(name) for name in entrants] == [1.0, 2.0, pytest.approx(0.8), None]
    assert {name: len(runs) for name, runs in result.averaged.items()} == {"fast": 5}
    assert result.open_ended_speed("fast") == 2.0
    assert sorted({steps for recipe, steps, _ in made if recipe == "fast"}) == [24, 30, 40, 60]
    assert sorted({steps for recipe, steps, _ in made if recipe == "slow"}) == [60, 90]
    assert {steps for recipe, steps, _ in made if recipe == "open"} == {60}
    num_runs = len(made)
    (again,) = Comparison(tmp_path, {"blobs": task}, num_seeds=5, num_horizon_seeds=2).results()
    assert (again, len(made)) == (result, num_runs)


def result_of(name: str, losses: dict[str, list[list[float]]]) -> TaskResult:
    runs = {key: [run_of(values) for values in seeds] for key, seeds in losses.items()}
    return TaskResult(name, runs, {REFERENCE: 0.01}, {key: float(len(key)) for key in runs}, dict.fromkeys(runs, 1.0))


def test_scores_are_geometric_means_and_count_what_is_beyond_noise() -> None:
    reference = [[5.0, 4.0, 3.0, 2.0, 1.0]] * 3
    results = [
        result_of("first", {REFERENCE: reference, "ours": [[5.0, 2.0, 1.0, 0.5, 0.4]] * 3}),
        result_of("second", {REFERENCE: reference, "ours": [[5.0, 4.5, 4.0, 3.5, 3.0]] * 3}),
        result_of("third", {REFERENCE: reference, "ours": [[5.0, 4.0, 3.0, 2.0, 0.9], *reference[1:]]}),
        result_of("fourth", {REFERENCE: reference, "ours": [[5.0, 4.0, 3.0, 2.0, math.inf], *reference[1:]]}),
    ]
    score = Score.of("ours", results[:3])
    assert score.open_ended_speed == pytest.approx((2.0 * 0.5 * 1.0) ** (1 / 3))
    assert (score.horizon_speed, score.wall_clock) == (None, None)
    assert (score.wins, score.defeats, score.held_out_defeats, score.diverged) == (1, 1, 1, 0)
    assert Score.of(REFERENCE, results) == Score(None, None, 1.0, 1.0, 1.0, 0, 0, 0, 0)
    assert Score.of("ours", results).diverged == 1
    table = score_table(results[:3])
    assert f"| ours | - | - | {score.open_ended_speed:.2f} |" in table
    assert "horizon speed" not in score_table(results[:3], with_horizon=False)
    assert f"| ours | {score.open_ended_speed:.2f} |" in score_table(results[:3], with_horizon=False)
    assert "| 0.01 |" in task_table(results[0])


@pytest.mark.parametrize(
    ("speeds", "mark"),
    [([2.0, 3.0], ""), ([4.0, 3.0], "≥ "), ([0.5, 2.0], "≤ "), ([4.0, 0.5], "≈ ")],
)
def test_horizon_speeds_come_first_and_what_is_beyond_is_marked(speeds: list[float], mark: str) -> None:
    runs = {REFERENCE: [[5.0, 1.0]] * 3, "ours": [[5.0, 0.5]] * 3, "endless": [[5.0, 0.5]] * 3}
    results = [
        dataclasses.replace(
            result_of(str(speed), runs), horizon_speeds={REFERENCE: [1.0] * 3, "ours": [0.1, speed, 9.0]}
        )
        for speed in speeds
    ]
    score, mean = Score.of("ours", results), math.sqrt(math.prod(speeds))
    assert score.horizon_speed == pytest.approx(mean)
    assert score.wall_clock == pytest.approx(mean * len(REFERENCE) / len("ours"))
    assert (score.beyond, score.below) == (speeds.count(4.0), speeds.count(0.5))
    table = score_table(results)
    assert f"| ours | {mark}{score.horizon_speed:.2f} | {mark}{score.wall_clock:.2f} | " in table
    assert f"| {REFERENCE} | 1.00 | 1.00 | 1.00 |" in table
    assert "| endless | - | - | " in table
    own = {4.0: "≥ 4.00", 0.5: "≤ 0.50"}.get(speeds[0], f"{speeds[0]:.2f}")
    assert f"| {own} | " in task_table(results[0])


def test_reports_are_drawn(tmp_path: Path) -> None:
    losses = {REFERENCE: [[5.0, 1.0]], "learned, untuned": [[5.0, 0.5]], "endless": [[5.0, 0.6]]}
    speeds = {REFERENCE: [1.0], "learned, untuned": [2.0]}
    results = [dataclasses.replace(result_of(name, losses), horizon_speeds=speeds) for name in ("a", "b")]
    plot(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def my_optimizer(model: nn.Module, steps: int) -> LearnedTeleportOptimizer:
    return LearnedTeleportOptimizer.for_model(model, total_steps=steps, teleport=False)


@pytest.mark.slow
def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--task", "ill_conditioned", "--output", str(tmp_path)]
    assert main([*arguments, "--ablations", "--optimizer", "test_evaluation:my_optimizer"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "test_evaluation:my_optimizer" in report
    assert "linear controller" in report
    scores = json.loads((tmp_path / "results.json").read_text())
    assert scores["All tasks"][REFERENCE]["horizon_speed"] == 1.0
    assert scores["All tasks"][REFERENCE]["open_ended_speed"] == 1.0
    assert scores["All tasks"]["AdamW default"]["horizon_speed"] is None
    assert scores["All tasks"]["test_evaluation:my_optimizer"]["horizon_speed"] >= 0.5
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "curves.png",
        "report.md",
        "results.json",
        "runs.jsonl",
    ]
    assert "horizon speed" in capsys.readouterr().out


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--task", "nothing"], "no task 'nothing': there are"),
        (["--optimizer", "math:pi"], "math:pi is not callable, but float"),
        (["--checkpoint", "nothing"], "no checkpoint"),
        (["--suite", "images", "--data", str(tmp_path)], "the data set MNIST is not in"),
    ):
        assert main(["--quick", "--output", str(tmp_path / "report"), *arguments]) == 2
        assert message in capsys.readouterr().err
