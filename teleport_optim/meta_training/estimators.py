"""Estimators of the meta-gradient: how the losses of training runs change with the meta-optimizer's weights.

All of them work on *episodes*: one training run of a batch of problems, taken window by window. Evolution strategies take
the whole run as one window; the others keep the runs between windows and go on from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_optim.meta_training.config import Config
from teleport_optim.meta_training.episodes import Episode
from teleport_optim.meta_training.process_group import ProcessGroup
from teleport_optim.meta_training.rules import Rule
from teleport_optim.meta_training.tasks.problem import InnerProblem
from teleport_optim.meta_training.unroll import UnrollResult
from teleport_optim.rng import generator_for

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "EvolutionStrategies",
    "MetaGradient",
    "Mixture",
    "TruncatedBackpropagation",
    "meta_loss",
    "step_weights",
]

_TAIL = 0.1
_HEAD = 0.3


def step_weights(objective: str, horizon: int) -> Tensor:
    """Weight of the meta-loss of each step, shape ``[horizon]``.

    For ``"plain"`` all are 1. For ``"normalised"`` half of the weight is spread over the last tenth of the run, and half over
    all but its first three tenths, so that it counts to be fast.
    """
    if objective == "plain":
        return torch.ones(horizon)
    weights = torch.zeros(horizon)
    for share in (1.0 - _HEAD, _TAIL):
        num_last = max(1, int(share * horizon))
        weights[-num_last:] += 0.5 / num_last
    return weights


def meta_loss(problem: InnerProblem, result: UnrollResult, objective: str = "normalised") -> Tensor:
    """The meta-loss of a window for every run, shape ``[num_runs]``: the weighted sum over its steps.

    The sum over the windows of an episode is the meta-loss of the episode.
    """
    losses, num_steps = result.losses, result.losses.shape[-1]
    if objective == "normalised":
        losses = problem.normalise(losses, result.runs.initial[:, None])
    weights = step_weights(objective, problem.horizon)[result.runs.step - num_steps : result.runs.step]
    return losses @ weights.to(losses)


class MetaGradient(NamedTuple):
    """Estimate of the gradient of the mean meta-loss, with figures for the log."""

    gradient: Tensor
    """``[num_parameters]``."""
    objective: float
    """Mean meta-loss per unit of step weight, over all runs; a run that explodes counts as ``WORST`` from there."""
    exploded: float
    """Share of runs that have exploded."""


class Estimator(ABC):
    """Way to estimate the meta-gradient. Every process calls it with the same arguments and gets the same answer.

    Attributes:
        is_trained: 1 for every entry of the flat weights that is trained, 0 for those that are frozen.
    """

    def __init__(self, rule: Rule, config: Config, group: ProcessGroup) -> None:
        self.rule, self.config, self.group = rule, config, group
        self.is_trained = rule.is_trained(config.frozen)

    @abstractmethod
    def estimate(self, theta: Tensor, episodes: Sequence[Episode], outer_step: int) -> MetaGradient:
        """Take the next window of every episode at ``theta``. The steps of the episodes are counted by the caller."""

    @abstractmethod
    def local_candidates(self, index: int) -> dict[str, range]:
        """For every key in the ``runs`` of the episode with this index, the candidates that are this process's."""

    def window_length(self, episode: Episode) -> int:
        """Length of the next window of an episode."""
        return min(self.config.truncation, episode.horizon - episode.step)

    def _unroll(self, key: str, flat: Tensor, episode: Episode, *, second_order: bool = False) -> tuple[Tensor, Tensor]:
        """The next window for runs with weights ``flat`` (``[num_runs, num_parameters]``).

        Returns:
            The meta-loss of the window and whether the run has exploded, both ``[num_runs]``.
        """
        length = self.window_length(episode)
        result = episode.unroll(key, self.rule, flat, length, second_order=second_order)
        return meta_loss(episode.problem, result, self.config.objective), result.runs.is_exploded

    def _weight(self, episode: Episode) -> float:
        """Sum of the step weights in the next window."""
        weights = step_weights(self.config.objective, episode.horizon)
        return float(weights[episode.step : episode.step + self.window_length(episode)].sum())


class EvolutionStrategies(Estimator):
    """Antithetic evolution strategies, over whole runs or persistently over windows.

    The gradient of the meta-loss blurred with N(0, sigma^2), unbiased::

        sum over pairs i of  xi_i (L(theta + eps_i) - L(theta - eps_i)) / (2 sigma^2 num_pairs)

    ``xi_i`` is the sum of the perturbations that the pair has had since its run began: ``eps_i`` itself where one window is
    the whole run, and the persistent correction for truncation where it is not. With ``equal_tasks`` the differences of every
    problem batch are divided by their root mean square first, which is no longer unbiased. Only the losses travel between
    processes; every process draws all perturbations again from their names.

    Source: Salimans et al., 2017, arXiv 1703.03864; Vicol, Metz, Sohl-Dickstein, 2021, arXiv 2112.13835.
    """

    def __init__(self, rule: Rule, config: Config, group: ProcessGroup, *, is_persistent: bool) -> None:
        super().__init__(rule, config, group)
        self._is_persistent = is_persistent

    def window_length(self, episode: Episode) -> int:
        return super().window_length(episode) if self._is_persistent else episode.horizon

    def local_candidates(self, index: int) -> dict[str, range]:
        pairs = self._local_pairs(index)
        return {"pairs": range(2 * pairs.start, 2 * pairs.stop)}

    def estimate(self, theta: Tensor, episodes: Sequence[Episode], outer_step: int) -> MetaGradient:
        num_pairs, sigma = self.config.num_pairs, self.config.sigma
        values = torch.zeros(len(episodes), num_pairs, 3, dtype=torch.float64)
        displacements = []
        for index, episode in enumerate(episodes):
            noise = self._noise(outer_step, episode.index).to(theta)
            pairs = self._local_pairs(episode.index)
            if pairs:
                values[index, pairs.start : pairs.stop] = self._values(theta, noise[pairs.start : pairs.stop], episode)
            displacements.append(noise if episode.displacement is None else episode.displacement + noise)
            episode.displacement = displacements[-1]
        plus, minus, exploded = self.group.sum(values).unbind(-1)  # Pairs of other processes are zeros here.
        is_usable = torch.isfinite(plus - minus)
        differences = torch.where(is_usable, plus - minus, 0.0)
        if self.config.equal_tasks:
            differences = differences / differences.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        slopes = differences.to(theta) / (2.0 * sigma**2 * num_pairs * len(episodes))
        gradient = torch.zeros_like(theta)
        for slope, displacement in zip(slopes, displacements):
            gradient += slope @ displacement
        weights = torch.tensor([self._weight(episode) for episode in episodes], dtype=torch.float64)
        mean = torch.where(is_usable, (plus + minus) / 2.0, 0.0).sum() / (is_usable * weights[:, None]).sum()
        return MetaGradient(gradient, float(mean), float(exploded.mean()))

    def _local_pairs(self, index: int) -> range:
        """The pairs of an episode that are this process's: its part of all pairs of all episodes, in order."""
        num_pairs = self.config.num_pairs
        local = self.group.local_range(self.config.num_tasks * num_pairs)
        start, stop = (min(max(end - index * num_pairs, 0), num_pairs) for end in (local.start, local.stop))
        return range(start, stop)

    def _noise(self, outer_step: int, index: int) -> Tensor:
        """The perturbations of all pairs of an episode, ``[num_pairs, num_parameters]``, the same in every process."""
        config = self.config
        generator = generator_for("noise", config.seed, outer_step, index)
        noise = torch.randn(config.num_pairs, len(self.is_trained), generator=generator)
        return config.sigma * noise * self.is_trained

    def _values(self, theta: Tensor, noise: Tensor, episode: Episode) -> Tensor:
        """Meta-losses at both perturbations and the share of exploded runs, ``[pairs, 3]``."""
        num_problems = self.config.num_problems
        candidates = torch.stack([theta + noise, theta - noise], dim=1).flatten(0, 1)
        with torch.no_grad():
            losses, is_exploded = self._unroll("pairs", candidates.repeat_interleave(num_problems, dim=0), episode)
        by_pair = losses.double().reshape(len(noise), 2, num_problems).mean(dim=2)
        exploded = is_exploded.double().reshape(len(noise), -1).mean(dim=1, keepdim=True)
        return torch.cat([by_pair, exploded], dim=1)


class TruncatedBackpropagation(Estimator):
    """Backpropagation through windows of the runs, with or without the second-order terms.

    Exact, and unbiased, only where one window is the whole run: what a step does to later windows is not seen. Without
    second-order terms the gradients that the rule reads count as constants. Whole episodes are divided between processes, and
    gradients travel. Runs whose gradient is not finite are left out of it, and counted.

    Source: Andrychowicz et al., 2016, arXiv 1606.04474; Werbos, 1990.
    """

    def __init__(self, rule: Rule, config: Config, group: ProcessGroup, *, is_second_order: bool) -> None:
        super().__init__(rule, config, group)
        self._is_second_order = is_second_order

    def local_candidates(self, index: int) -> dict[str, range]:
        return {"mean": range(1) if index % self.group.size == self.group.rank else range(0)}

    def estimate(self, theta: Tensor, episodes: Sequence[Episode], outer_step: int) -> MetaGradient:
        # Behind the gradient: objective, the weight that it has, and the share of exploded runs. One sum carries them all.
        total = torch.zeros(len(theta) + 3, dtype=torch.float64)
        for episode in episodes:
            if not self.local_candidates(episode.index)["mean"]:
                continue
            weight = self._weight(episode)
            flat = theta.expand(self.config.num_problems, -1).clone().requires_grad_()
            losses, is_exploded = self._unroll("mean", flat, episode, second_order=self._is_second_order)
            is_usable = torch.isfinite(losses.detach())
            grads = torch.zeros_like(flat)
            if losses.requires_grad:  # They do not in a window without a control step: no weight has a part in it.
                loss = torch.where(is_usable, losses, 0.0).sum()
                (grads,) = torch.autograd.grad(loss, flat, materialize_grads=True)
            is_usable = is_usable & torch.isfinite(grads).all(dim=1)
            kept = torch.where(is_usable[:, None], grads, 0.0).sum(dim=0) / (len(grads) * len(episodes))
            loss = torch.where(is_usable, losses.detach(), 0.0).sum()
            total[:-3] += kept.double().cpu()
            total[-3:] += torch.tensor(
                [float(loss), weight * float(is_usable.sum()), float(is_exploded.double().mean()) / len(episodes)]
            )
        total = self.group.sum(total)
        objective, weight, exploded = total[-3:].tolist()
        return MetaGradient(total[:-3].to(theta) * self.is_trained.to(theta), objective / max(weight, 1e-30), exploded)


class Mixture(Estimator):
    """Weighted mean of an unbiased, noisy estimate and a biased, quiet one, on runs of their own."""

    def __init__(self, rule: Rule, config: Config, group: ProcessGroup) -> None:
        super().__init__(rule, config, group)
        self._parts: tuple[tuple[float, Estimator], ...] = (
            (1.0 - config.mix, EvolutionStrategies(rule, config, group, is_persistent=True)),
            (config.mix, TruncatedBackpropagation(rule, config, group, is_second_order=True)),
        )

    def local_candidates(self, index: int) -> dict[str, range]:
        return {key: candidates for _, part in self._parts for key, candidates in part.local_candidates(index).items()}

    def estimate(self, theta: Tensor, episodes: Sequence[Episode], outer_step: int) -> MetaGradient:
        estimates = [(weight, part.estimate(theta, episodes, outer_step)) for weight, part in self._parts]
        mean = sum((weight * estimate.gradient for weight, estimate in estimates), torch.zeros_like(theta))
        objective, exploded = (
            sum(weight * value for (weight, _), value in zip(estimates, values))
            for values in zip(*(estimate[1:] for _, estimate in estimates))
        )
        return MetaGradient(mean, objective, exploded)


ESTIMATORS: dict[str, Callable[[Rule, Config, ProcessGroup], Estimator]] = {
    "es": partial(EvolutionStrategies, is_persistent=False),
    "pes": partial(EvolutionStrategies, is_persistent=True),
    "pes+tbptt": Mixture,
    "tbptt": partial(TruncatedBackpropagation, is_second_order=True),
    "tbptt_first_order": partial(TruncatedBackpropagation, is_second_order=False),
}
"""Every estimator by name."""
