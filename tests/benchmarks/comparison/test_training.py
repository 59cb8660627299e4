"""Runs that are measured: what is measured, when, and what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.comparison.baselines import OURS, REFERENCE, baselines
from benchmarks.comparison.training import milliseconds_per_step, peak_megabytes, run_training
from teleport_optim.cli.training import learned
from teleport_optim.meta_training.tasks.networks import seeded
from tests.helpers.evaluation import TASK, blobs, perceptron, wide_perceptron


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
