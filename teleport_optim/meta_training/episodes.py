"""Episodes: the inner training runs in progress, how they begin and end, and what is kept of them between outer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from teleport_optim.meta_training.config import Config, log_uniform_horizon
from teleport_optim.meta_training.rules import Rule
from teleport_optim.meta_training.sampling import draw_problem
from teleport_optim.meta_training.tasks import InnerProblem, find_task
from teleport_optim.meta_training.unroll import Runs, UnrollResult, init_unroll, unroll
from teleport_optim.rng import generator_for

__all__ = ["Episode", "Episodes", "LocalCandidates"]

LocalCandidates = Callable[[int], dict[str, range]]
"""For the index of an episode, and every key of its ``runs``: the candidates that are this process's."""


@dataclass
class Episode:
    """One training run of a problem batch, taken window by window.

    Attributes:
        index: Which of the ``num_tasks`` problem batches of an outer step it is.
        number: How many episodes there were before at this index.
        horizon: Length of the run.
        draw: Draws the problem; called only where the process has a part in the episode.
        batches: Generators of the minibatches by step.
        step: Steps taken.
        runs: Runs in progress of this process, by estimator; empty before the first window.
        displacement: Sum of the perturbations of each pair so far, ``[num_pairs, num_parameters]``.
    """

    index: int
    number: int
    horizon: int
    draw: Callable[[], InnerProblem]
    batches: Callable[[int], torch.Generator]
    step: int = 0
    runs: dict[str, Runs] = field(default_factory=dict)
    displacement: Tensor | None = None

    @cached_property
    def problem(self) -> InnerProblem:
        """The problem batch."""
        return self.draw()

    @property
    def is_over(self) -> bool:
        """True once all steps have been taken."""
        return self.step >= self.horizon

    def unroll(self, key: str, rule: Rule, flat: Tensor, num_steps: int, *, second_order: bool = False) -> UnrollResult:
        """Take the next steps of the runs of one estimator, from their start if there are none yet, and keep the runs.

        Args:
            key: Of the estimator, in ``runs``.
            rule: What steps the runs.
            flat: Its weights for every run, ``[num_runs, num_parameters]``.
            num_steps: Length of the window.
            second_order: As for :func:`unroll`.
        """
        runs = self.runs.get(key)
        if runs is None:
            runs = init_unroll(rule, self.problem, len(flat) // self.problem.num_problems)
        weights = rule.unflatten(flat)
        result = unroll(rule, weights, self.problem, runs, num_steps, self.batches, second_order=second_order)
        self.runs[key] = result.runs.detach()
        return result


class Episodes:
    """The episodes in progress, one for each problem batch of an outer step.

    Problems and minibatches follow from their names. So only numbers, horizons and steps are saved, and parameters and rule
    state of runs that go on.

    Args:
        config: The run.

    Attributes:
        running: The episodes, by index.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.running = [self._begin(index, 0) for index in range(config.num_tasks)]

    def renew(self, outer_step: int) -> None:
        """Begin new episodes in the place of those that are over; the curriculum bounds their horizons."""
        for episode in self.running:
            if episode.is_over:
                self.running[episode.index] = self._begin(episode.index, episode.number + 1, outer_step)

    def count_steps(self, window_length: Callable[[Episode], int]) -> None:
        """Count the steps of the windows that have been taken."""
        for episode in self.running:
            episode.step += window_length(episode)

    def state(self) -> list[dict[str, Any]]:
        """State that is the same in every process, as plain data and tensors."""
        return [
            {
                "number": episode.number,
                "horizon": episode.horizon,
                "step": episode.step,
                "displacement": None if episode.is_over else episode.displacement,
            }
            for episode in self.running
        ]

    def local_state(self, local_candidates: LocalCandidates) -> dict[int, Any]:
        """The runs of this process that go on: the first of their candidates and their tensors, by index and estimator."""
        return {
            episode.index: {
                key: {"start": local_candidates(episode.index)[key].start, "leaves": pytree.tree_leaves(runs)}
                for key, runs in episode.runs.items()
            }
            for episode in self.running
            if not episode.is_over
        }

    def load(
        self,
        state: Sequence[dict[str, Any]],
        local_states: Sequence[dict[int, Any]],
        rule: Rule,
        local_candidates: LocalCandidates,
    ) -> None:
        """Go on from what :meth:`state` and, in every process of the run that was saved, :meth:`local_state` gave.

        The number of processes may have changed since.
        """
        for index, saved in enumerate(state):
            episode = self._begin(index, saved["number"], horizon=saved["horizon"])
            episode.step = saved["step"]
            if saved["displacement"] is not None:
                episode.displacement = saved["displacement"].to(self._config.device)
            if not episode.is_over:
                for key, candidates in local_candidates(index).items():
                    if candidates:
                        pieces = [part[index][key] for part in local_states if key in part[index]]
                        like = init_unroll(rule, episode.problem, len(candidates))
                        episode.runs[key] = self._join(pieces, candidates, like)
            self.running[index] = episode

    def _join(self, pieces: list[dict[str, Any]], candidates: range, like: Runs) -> Runs:
        """The runs of these candidates, out of the pieces that processes saved; of the structure of ``like``."""
        pieces = sorted(pieces, key=lambda piece: int(piece["start"]))
        rows = slice(candidates.start * self._config.num_problems, candidates.stop * self._config.num_problems)
        leaves = [
            torch.cat(parts)[rows].to(self._config.device) if isinstance(parts[0], Tensor) else parts[0]
            for parts in zip(*(piece["leaves"] for piece in pieces))
        ]
        runs: Runs = pytree.tree_unflatten(leaves, pytree.tree_structure(like))
        return runs

    def _begin(self, index: int, number: int, outer_step: int = 0, *, horizon: int | None = None) -> Episode:
        """The episode ``number`` of an index; without a horizon, one is drawn up to the longest at the outer step."""
        config = self._config
        generator = generator_for("episode", config.seed, index, number)
        shares = torch.tensor([find_task(task).share for task in config.tasks])
        task = config.tasks[int(torch.multinomial(shares, 1, generator=generator))]
        quantile = float(torch.rand((), generator=generator))
        drawn = log_uniform_horizon(config.min_horizon, config.longest_horizon(outer_step), quantile)
        horizon = horizon or drawn
        draw = partial(draw_problem, config, task, "train", index, number, horizon=horizon)
        return Episode(index, number, horizon, draw, partial(generator_for, "batch", config.seed, index, number))
