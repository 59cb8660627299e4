"""The rooms of the learner by themselves: episodes that are saved and divided anew, and the folder of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from teleport_optim import MetaOptimizer
from teleport_optim.meta_training.config import Config
from teleport_optim.meta_training.episodes import Episodes, LocalCandidates
from teleport_optim.meta_training.process_group import ProcessGroup
from teleport_optim.meta_training.rules import ControllerRule
from teleport_optim.meta_training.run_folder import OuterStep, RunFolder, read_log
from teleport_optim.rng import generator_for

pytestmark = pytest.mark.private_torch

CONFIG = Config(
    tasks=("teacher_regression",),
    num_tasks=1,
    num_problems=2,
    num_pairs=3,
    min_horizon=9,
    max_horizon=90,
    hidden_size=2,
)
RULE = ControllerRule(MetaOptimizer(2, generator_for("weights")))
CANDIDATES = RULE.flatten() + 0.2 * torch.randn(6, len(RULE.flatten()), generator=generator_for("candidates"))


def local_candidates(rank: int, size: int) -> LocalCandidates:
    return lambda index: {"pairs": ProcessGroup(rank, size).local_range(len(CANDIDATES))}


def advanced(rank: int, size: int, num_steps: int) -> Episodes:
    """Episodes after some steps of the candidates that are those of one process."""
    episodes = Episodes(CONFIG)
    local = local_candidates(rank, size)(0)["pairs"]
    flat = CANDIDATES[local.start : local.stop].repeat_interleave(CONFIG.num_problems, dim=0)
    with torch.no_grad():
        episodes.running[0].unroll("pairs", RULE, flat, num_steps)
    episodes.count_steps(lambda episode: num_steps)
    return episodes


@pytest.mark.parametrize("size", [1, 2, 3])
def test_runs_are_divided_anew_between_processes(size: int) -> None:
    """Three processes save, another number goes on: each gets the runs of its own candidates, whoever had them."""
    saved = [advanced(rank, 3, 4) for rank in range(3)]
    parts = [episodes.local_state(local_candidates(rank, 3)) for rank, episodes in enumerate(saved)]
    runs = [episodes.running[0].runs["pairs"] for episodes in saved]
    whole = torch.cat([each.params["0.weight"] for each in runs])
    assert len(whole.unique(dim=0)) == len(whole) == len(CANDIDATES) * CONFIG.num_problems
    for rank in range(size):
        loaded = Episodes(CONFIG)
        loaded.load(saved[0].state(), parts[::-1], RULE, local_candidates(rank, size))
        episode = loaded.running[0]
        assert (episode.step, episode.number, episode.horizon) == (4, 0, saved[0].running[0].horizon)
        local = local_candidates(rank, size)(0)["pairs"]
        rows = slice(local.start * CONFIG.num_problems, local.stop * CONFIG.num_problems)
        assert torch.equal(episode.runs["pairs"].params["0.weight"], whole[rows])
        assert torch.equal(episode.runs["pairs"].initial, torch.cat([each.initial for each in runs])[rows])
        assert episode.runs["pairs"].step == 4


def test_an_episode_that_is_over_is_renewed_and_keeps_nothing() -> None:
    episodes = advanced(0, 1, 4)
    first = episodes.running[0]
    episodes.renew(0)
    assert episodes.running[0] is first
    episodes.count_steps(lambda episode: episode.horizon - episode.step)
    first.displacement = torch.ones(1)
    assert episodes.state()[0]["displacement"] is None
    assert episodes.local_state(local_candidates(0, 1)) == {}
    episodes.renew(CONFIG.num_outer_steps)
    second = episodes.running[0]
    assert (second.index, second.number, second.step, second.runs, second.displacement) == (0, 1, 0, {}, None)
    assert second.problem.description != first.problem.description


def test_the_curriculum_bounds_the_horizons() -> None:
    config = replace(CONFIG, num_tasks=30)
    early = [episode.horizon for episode in Episodes(config).running]
    assert set(early) == {config.min_horizon}
    late = Episodes(config)
    late.count_steps(lambda episode: episode.horizon)
    late.renew(config.num_outer_steps)
    horizons = [episode.horizon for episode in late.running]
    assert config.min_horizon <= min(horizons) < 2 * config.min_horizon
    assert config.max_horizon / 2 < max(horizons) <= config.max_horizon


def report(step: int) -> OuterStep:
    return OuterStep(step, 0.5, 1.0, 0.0, 9, None, 0.1)


def test_a_folder_holds_one_whole_step(tmp_path: Path) -> None:
    """What was written of a step whose state was not is dropped; what belongs to steps before is deleted."""
    folder, config = RunFolder(tmp_path / "run", ProcessGroup()), Config()
    folder.create(config)
    assert folder.resume(config) is None
    for step in (1, 2):
        folder.save(report(step), {"value": step}, {0: {"pairs": {"start": 0, "leaves": [torch.tensor(step)]}}})
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write("cut off in the mid")
    found = folder.resume(config)
    assert found is not None
    state, parts = found
    assert (state["value"], state["step"], state["num_processes"]) == (2, 2, 1)
    assert [int(part[0]["pairs"]["leaves"][0]) for part in parts] == [2]
    assert [line.step for line in read_log(tmp_path / "run")] == [1, 2]
    assert [file.name for file in (tmp_path / "run").glob("runs-*")] == ["runs-2-0.pt"]
    folder.save(report(3), {"value": 3}, {})
    assert not list((tmp_path / "run").glob("runs-*"))
    with pytest.raises(FileExistsError, match="holds a run"):
        folder.create(config)
