"""An optimizer that knows the length of its run and keeps an average of the iterates: what a user sees of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from teleport_optim.optim.averaging import SwapLock, average_of, begin_again, catch_up, swap_in, swap_out, written
from teleport_optim.optim.binding import Binding
from teleport_optim.optim.checks import check_group
from teleport_optim.optim.diagnostics import Notices
from teleport_optim.optim.schedule import Horizon
from teleport_optim.optim.shapes import as_real
from teleport_optim.optim.state import Progress
from teleport_optim.optim.step import StepCache

__all__ = ["AveragedOptimizer"]


class AveragedOptimizer(Optimizer):
    """The part of :class:`~teleport_optim.optim.optimizer.TeleportOptimizer` that takes no steps."""

    _binding: Binding
    _cache: StepCache | None
    _first_lrs: list[float] | None
    _has_average: bool
    _notices: Notices
    _progress: Progress
    _swap_lock: SwapLock

    def _entries(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Every parameter under its name, or its number, with its group."""
        params = [(param, group) for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return [(name, *entry) for name, entry in zip(names or map(str, range(len(params))), params)]

    # ------------------------------------------------------------------------------------------------ length of the run

    def _horizon(self, step: int) -> Horizon:
        """The length of the run, which may have been changed in the groups since the last step."""
        horizon, total_steps = self._progress.horizon, self.param_groups[0]["total_steps"]
        return horizon if horizon.total_steps == total_steps else horizon.changed(total_steps, step)

    def _check_schedule(self, step: int, total_steps: int | None) -> None:
        """Warn of a step past the end of the run, and of a scheduler on top of the schedule that is built in."""
        lrs = [float(group["lr"]) for group in self.param_groups]
        if self._first_lrs is None or len(self._first_lrs) != len(lrs):
            self._first_lrs = lrs
        if total_steps is None:
            return
        if step >= total_steps:
            self._notices.warn(
                f"step {step + 1} lies past total_steps={total_steps}: going on at the last rate. Give the length of the "
                "whole run (set_total_steps), or leave total_steps out.",
                once="past total_steps",
            )
        if self._first_lrs != lrs:
            self._notices.warn(
                f"lr has changed from {self._first_lrs} to {lrs} in a run with total_steps={total_steps}, whose rate falls to "
                "zero by itself in the last 30 %: a scheduler multiplies with that. Leave the scheduler out (where a library "
                "makes one, ask for a constant one), or leave total_steps out.",
                once="scheduler",
            )

    def set_total_steps(self, total_steps: int | None) -> None:
        """Change the length of a run that is going on.

        Rate and average go on without a jump: a rate that falls already rises again no faster than it fell, or falls faster.
        Writing ``total_steps`` into every parameter group does the same.

        Args:
            total_steps: The new number of steps, those taken included; None for an open-ended run.

        Raises:
            ValueError: if it is no positive integer, or if so many steps have been taken already.

        Example:
            >>> from teleport_optim import LearnedTeleportOptimizer
            >>> from torch import nn
            >>> optimizer = LearnedTeleportOptimizer.for_model(nn.Linear(2, 1), total_steps=100)
            >>> optimizer.set_total_steps(200)
        """
        check_group({**self.defaults, "total_steps": total_steps})
        taken = self._progress.num_steps
        if total_steps is not None and total_steps <= taken:
            raise ValueError(
                f"total_steps={total_steps} is not more than the {taken} steps that have been taken: finish_in(n) ends the run "
                "after n more"
            )
        for group in self.param_groups:
            group["total_steps"] = total_steps
        self._notices.given.discard("past total_steps")

    def finish_in(self, num_steps: int) -> None:
        """End the run after so many more steps, in which the rate falls to zero, so that the parameters become the result.

        Args:
            num_steps: At least 1.

        Raises:
            ValueError: if it is no positive integer.

        Example:
            >>> from teleport_optim import LearnedTeleportOptimizer
            >>> from torch import nn
            >>> optimizer = LearnedTeleportOptimizer.for_model(nn.Linear(2, 1))  # open-ended
            >>> optimizer.finish_in(50)
        """
        check_group({**self.defaults, "total_steps": num_steps})
        self.set_total_steps(self._progress.num_steps + num_steps)

    # ------------------------------------------------------------------------------------------------ average

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average of the iterates in the place of the parameters, until :meth:`train`.

        Libraries that know Schedule-Free (Hugging Face's Trainer, accelerate) call both. Nothing happens if the average is there
        already, or where none is kept (``average=False``). A state that is saved now can be resumed from: the parameters are in it.

        Cost: a copy of the parameters, until :meth:`train`.

        Example:
            >>> from teleport_optim import LearnedTeleportOptimizer
            >>> from torch import nn
            >>> model = nn.Linear(2, 1)
            >>> optimizer = LearnedTeleportOptimizer.for_model(model)
            >>> model(torch.ones(3, 2)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.eval()
            >>> weights = {name: value.clone() for name, value in model.state_dict().items()}
            >>> optimizer.train()
        """
        if not self._has_average:
            return
        with self._swap_lock.lock:
            if self._progress.is_eval:
                return
            pairs = self._averages()
            # Set before the first tensor is written: after an interrupt, train() undoes what has been done.
            self._progress = self._progress._replace(is_eval=True, has_shown_average=True)
            try:
                with torch.inference_mode(False):
                    swap_in(pairs)
            except BaseException:
                self.train()
                raise

    @torch.no_grad()
    def train(self) -> None:
        """Undo :meth:`eval`: the parameters are what they were, bit for bit.

        What was written into the model in the meantime, such as the weights of the best epoch, stays; the average begins again
        there. Nothing happens if the average is not in the place of the parameters.
        """
        with self._swap_lock.lock:
            if self._progress.is_eval:
                with torch.inference_mode(False):
                    swap_out(self._with_state(), self._progress.num_steps)
                self._progress = self._progress._replace(is_eval=False)
                self._cache = None

    def averaged(self) -> AbstractContextManager[None]:
        """Put the average of the iterates in the place of the parameters for as long as the context lasts.

        Inside, everything sees it: evaluation, saving, ``state_dict()``. Copy what is to outlive the context. It may be entered
        again, which changes nothing, but by one thread at a time only: :meth:`averaged_parameters` is for the others.

        Raises:
            RuntimeError: if no average is kept (``average=False``), unless the run has come to its end, where the parameters are
                the result; if another thread is inside. From :meth:`step`, inside.

        Cost: a copy of the parameters while it lasts.

        Example:
            >>> from teleport_optim import LearnedTeleportOptimizer
            >>> from torch import nn
            >>> model = nn.Linear(2, 1)
            >>> optimizer = LearnedTeleportOptimizer.for_model(model)
            >>> model(torch.ones(3, 2)).sum().backward()
            >>> optimizer.step()
            >>> with optimizer.averaged():
            ...     weights = {name: value.clone() for name, value in model.state_dict().items()}
        """
        self._check_average()
        return self._averaged()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with self._swap_lock.by_this_thread():
            was_eval = self._progress.is_eval
            try:
                self.eval()
                yield
            finally:
                if not was_eval:
                    self.train()

    @torch.no_grad()
    def averaged_parameters(self) -> dict[str, Tensor]:
        """The average of the iterates by name, as new tensors; the parameters stay as they are.

        Names are those of ``model``, every one of a tensor that is used in several places, so that ``model.state_dict() |
        optimizer.averaged_parameters()`` is what to save; numbers without ``model`` and names. Any thread may ask, also during a
        training step of another one.

        Raises:
            RuntimeError: if no average is kept (``average=False``), unless the run has come to its end, where the parameters are
                the result.

        Example:
            >>> from teleport_optim import LearnedTeleportOptimizer
            >>> from torch import nn
            >>> model = nn.Linear(2, 1)
            >>> optimizer = LearnedTeleportOptimizer.for_model(model)
            >>> sorted(optimizer.averaged_parameters())
            ['bias', 'weight']
        """
        self._check_average()
        with self._swap_lock.lock, torch.inference_mode(False):
            self._progress = self._progress._replace(has_shown_average=True)
            if self._has_average and not self._progress.is_eval:
                self._averages()
            averages = {}
            for name, param, _ in self._entries():
                own = self.state.get(param, {})
                has_other = own and self._has_average and not self._progress.is_eval
                average = param.detach().clone()
                if has_other:
                    as_real(average).copy_(average_of(as_real(param), own))
                averages.update(dict.fromkeys(self._binding.aliases(name), average))
            return averages

    def _check_mode(self) -> None:
        """Raise ``RuntimeError`` for a step while the average is in the place of the parameters."""
        if self._progress.is_eval:
            raise RuntimeError(
                "a step while the average of the iterates is in the place of the parameters, at which its gradients should have "
                "been taken: call train() or leave averaged() before the forward pass"
            )

    def _check_average(self) -> None:
        """Raise ``RuntimeError`` where there is no average to show."""
        total_steps = self.param_groups[0]["total_steps"]
        if not self._has_average and (total_steps is None or self._progress.num_steps < total_steps):
            raise RuntimeError(
                f"no average of the iterates is kept (average=False), and after {self._progress.num_steps} steps the run is not at "
                f"its end (total_steps={total_steps}), where the parameters are the result: make the optimizer with average=True"
            )

    def _with_state(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Every parameter that has had a step, as real numbers, with its slots."""
        return [(as_real(param), self.state[param]) for _, param, _ in self._entries() if self.state.get(param)]

    def _averages(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Every parameter that has had a step, with its slots, after its average has been brought up to date."""
        pairs, step = self._with_state(), self._progress.num_steps
        self._cache = None
        for _, own in pairs:
            catch_up(own, step, self._progress.horizon)
        if pairs:
            for number in written(*map(list, zip(*pairs))):
                begin_again(pairs[number][1], step)
        return pairs
