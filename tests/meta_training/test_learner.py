"""Meta-training runs: reproducible, resumable at any moment, shared by processes, and refused where they make no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.paper.functions import task_path
from benchmarks.paper.training import PaperConfig, learner_of
from teleport_optim import load_checkpoint
from teleport_optim.meta_training.config import ESTIMATOR_NAMES, PRESETS, Config, read_config
from teleport_optim.meta_training.learner import Learner
from teleport_optim.meta_training.run_folder import config_of_run
from teleport_optim.meta_training.tasks import InnerProblem
from teleport_optim.meta_training.tasks.perceptrons import DigitsMLP
from teleport_optim.rng import generator_for
from tests.helpers.paths import ROOT

SMALL: dict[str, Any] = {
    "num_outer_steps": 5,
    "num_tasks": 2,
    "num_problems": 2,
    "num_pairs": 2,
    "min_horizon": 6,
    "max_horizon": 14,
    "truncation": 4,
    "validate_every": 2,
    "num_validation": 1,
    "hidden_size": 3,
}
TINY = Config(tasks=("digits_mlp", "teacher_regression"), **SMALL)
TINY_PAPER = PaperConfig(variant="lr", tasks=(task_path("ellipse"),), **SMALL)


def log_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_two_runs_agree_and_an_interrupted_one_too(estimator: str, tmp_path: Path) -> None:
    config = replace(TINY, estimator=estimator, run_dir=str(tmp_path / "full_tensor"))
    whole = Learner(config)
    reports = [report._replace(seconds=0.0) for report in whole.run()]
    other = replace(config, run_dir=str(tmp_path / "other"))
    steps = Learner(other).run()
    first_half = [next(steps)._replace(seconds=0.0) for _ in range(2)]
    resumed = Learner(other, resume=True)
    assert first_half + [report._replace(seconds=0.0) for report in resumed.run()] == reports
    for name in ("theta", "average", "best"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    assert reports[1].validation is not None
    assert reports[4].validation is not None
    assert log_of(tmp_path / "other") == log_of(tmp_path / "full_tensor")
    assert not torch.equal(whole.theta.detach(), whole.untrained)


def test_a_run_in_memory_is_the_same_run(tmp_path: Path) -> None:
    written, kept = Learner(replace(TINY, run_dir=str(tmp_path))), Learner(TINY)
    assert [r._replace(seconds=0.0) for r in written.run()] == [r._replace(seconds=0.0) for r in kept.run()]


@pytest.mark.parametrize("block_rows", [32, 8, 1])
def test_the_best_average_is_exported(tmp_path: Path, block_rows: int) -> None:
    learner = Learner(replace(TINY, block_rows=block_rows))
    for _ in learner.run():
        pass
    learner.export(tmp_path / "out.safetensors", note="a test")
    loaded = load_checkpoint(tmp_path / "out.safetensors")
    assert torch.equal(torch.cat([param.reshape(-1) for param in loaded.parameters()]), learner.best)
    assert loaded.block_rows == block_rows
    card = json.loads((tmp_path / "out.json").read_text())
    assert card["note"] == "a test"
    assert card["meta_training"]["max_horizon"] == TINY.max_horizon
    assert card["meta_training"]["block_rows"] == block_rows
    with pytest.raises(ValueError, match="PaperRule is not the rule of the optimizer class"):
        learner_of(TINY_PAPER).export(tmp_path / "paper.safetensors")


def test_meta_training_learns() -> None:
    """In a few seconds, a network that sets one learning rate for one family of functions beats an untrained one."""
    config = replace(
        TINY_PAPER,
        estimator="pes",
        tasks=(task_path("convex_quadratic"),),
        num_outer_steps=60,
        num_pairs=8,
        max_horizon=30,
        min_horizon=30,
        validate_every=20,
        num_validation=8,
        averaging=0.9,
        learning_rate=0.03,
        sigma=0.05,
    )
    learner = learner_of(config)
    for _ in learner.run():
        pass
    assert learner.best_validation < 0.8


def test_the_longest_horizon_grows_as_the_curriculum_says() -> None:
    config = Config(min_horizon=50, max_horizon=2000, num_outer_steps=100, curriculum=0.5)
    longest = [config.longest_horizon(step) for step in range(100)]
    assert longest[0] == 50
    assert longest == sorted(longest)
    assert longest[25] == pytest.approx((50 * 2000) ** 0.5, rel=0.01)
    assert set(longest[50:]) == {2000}
    assert replace(config, curriculum=0.0).longest_horizon(1) == 2000


def test_frozen_entries_stay() -> None:
    learner = Learner(replace(TINY, frozen=("hidden_weight", "*.balance"), weight_decay=0.5))
    for _ in learner.run():
        pass
    is_trained = learner.rule.is_trained(learner.config.frozen).bool()
    assert torch.equal(learner.theta.detach()[~is_trained], learner.untrained[~is_trained])
    assert not torch.equal(learner.theta.detach()[is_trained], learner.untrained[is_trained])


def test_runs_are_not_overwritten_or_mixed(tmp_path: Path) -> None:
    config = replace(TINY, run_dir=str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        Learner(config, resume=True)
    with pytest.raises(ValueError, match="no meta-training run in"):
        config_of_run(tmp_path / "run")
    next(Learner(config).run())
    with pytest.raises(FileExistsError, match="holds a run"):
        Learner(config)
    with pytest.raises(ValueError, match=r"settings differ: \['sigma'\]"):
        Learner(replace(config, sigma=0.5), resume=True)
    assert config_of_run(tmp_path / "run") == config


class BadStart(DigitsMLP):
    """A task whose loss is not a number."""

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            return output.mean() * torch.nan

        return replace(super().sample(num_problems, horizons, split, generator), loss=loss)


class OneProblem(DigitsMLP):
    """A task that does not draw as many problems as it is asked for."""

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        return super().sample(1, horizons, split, generator)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(TINY, tasks=(f"{__name__}:BadStart",)),
            "the loss of the task .*BadStart is .*nan.* at the initial parameters",
        ),
        (replace(TINY, tasks=(f"{__name__}:OneProblem",)), "asked for 2 problems and drew 1"),
        (replace(TINY_PAPER, tasks=TINY.tasks), "networks are trained with the controller"),
        (replace(TINY_PAPER, tasks=(task_path("ellipse"), task_path("power_sums"))), "train on tasks of one kind"),
        (replace(TINY, frozen=("*.balanse",)), "matches no meta-parameter"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(config: Config, message: str, tmp_path: Path) -> None:
    config = replace(config, run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        learner_of(config) if isinstance(config, PaperConfig) else Learner(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sigma=0", "sigma must be positive, got 0.0"),
        ("num_pairs=0", "num_pairs must be at least 1, got 0"),
        ("averaging=1", "averaging must lie in"),
        ("max_horizon=10", "max_horizon must be at least min_horizon"),
        ("mix=2", "mix must lie in"),
        ("clip=-1", "clip must not be negative"),
        ("tasks=digits_mpl", "did you mean 'digits_mlp'"),
        ("tasks=", "at least one task"),
        ("estimator=pse", "unknown estimator 'pse': did you mean 'pes'"),
        ("objective=planned", "did you mean 'plain'"),
        ("num_outer_step=3", "unknown key 'num_outer_step': did you mean 'num_outer_steps'"),
        ("sigma", "write key=value"),
        ("num_pairs=many", "cannot read 'many' as the int that num_pairs is"),
        ("equal_tasks=maybe", "cannot read 'maybe' as the bool"),
    ],
)
def test_bad_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config().with_settings([setting])


def test_configurations_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('sigma = 0.1\ntasks = ["digits_mlp"]\nfrozen = ["bias", "*.rate"]\nequal_tasks = true\n')
    config = read_config(str(file))
    assert (config.sigma, config.tasks, config.frozen, config.equal_tasks) == (
        0.1,
        ("digits_mlp",),
        ("bias", "*.rate"),
        True,
    )
    assert read_config("quick") == PRESETS["quick"]
    file.write_text("sigmas = 0.1")
    with pytest.raises(ValueError, match=r"mine\.toml: unknown key 'sigmas': did you mean 'sigma'"):
        read_config(str(file))
    with pytest.raises(ValueError, match="no configuration 'quik': did you mean 'quick'"):
        read_config("quik")
    with pytest.raises(ValueError, match=r"cannot read nothing\.toml"):
        read_config("nothing.toml")


def test_validation_is_on_problems_of_its_own() -> None:
    """The validation problems depend on neither the seed nor the state of training."""
    first, second = Learner(TINY), Learner(replace(TINY, seed=7))
    flat = first.untrained + 0.1
    assert first.validate(flat) == second.validate(flat) != 1.0
    assert first.validate(first.untrained) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("script", ["kill_at_random", "many_processes"])
def test_in_processes_of_their_own(script: str, tmp_path: Path) -> None:
    """Runs that are killed at random moments, and runs of two and three processes: see the scripts."""
    path = ROOT / "tests" / "scripts" / f"{script}.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(path), str(tmp_path)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_streams_have_their_own_seeds() -> None:
    names: list[tuple[int | str, ...]] = [("a", 1), ("a", 2), ("a", "1"), ("b", 1), ("a", 1, 0), ("a",)]
    draws = {float(torch.rand((), generator=generator_for(*name), dtype=torch.float64)) for name in names}
    assert len(draws) == len(names)
