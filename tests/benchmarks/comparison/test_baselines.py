"""Baselines and ablations, and the search of a rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.comparison.ablations import ABLATIONS
from benchmarks.comparison.baselines import baselines, tune_lr
from benchmarks.comparison.training import run_training
from teleport_optim import load_checkpoint
from teleport_optim.cli.training import learned
from teleport_optim.meta_training.tasks.networks import seeded
from teleport_optim.optim.schedule import TELEPORT_INTERVAL
from tests.helpers.evaluation import TASK, wide_perceptron


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
