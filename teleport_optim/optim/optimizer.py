"""The optimizer without its learned part: the class around the update rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from teleport_optim.optim.averaging import SwapLock, average_of, begin_again, catch_up, swap_in, swap_out, written
from teleport_optim.optim.binding import Binding, unwrapped
from teleport_optim.optim.checks import check_group
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.diagnostics import Notices, OptimizerStats, ScalarWriter, brief_list, tensor_stats
from teleport_optim.optim.orthogonalise import Step, descend
from teleport_optim.optim.parameters import BLOCK_ROWS, Layout, as_real
from teleport_optim.optim.records import Hyper
from teleport_optim.optim.rounding import rounding_errors
from teleport_optim.optim.schedule import Horizon, is_due, rate_and_decay
from teleport_optim.optim.state import Progress, Slots, initial_slots, read_state_dict
from teleport_optim.optim.step import Controller, StepCache, StepPlan, StepTensors
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["TeleportOptimizer"]

_MEMORY = 300
"""Steps after which a momentum has forgotten a gradient of any size."""
_SMALLEST_USUAL_LR = 0.03


class TeleportOptimizer(Optimizer):
    """The update rule as a ``torch.optim.Optimizer``, with or without a controller.

    Without one it is the rule with nothing learned: the start in balance, orthogonalised momentum, and the average of the
    iterates, but no later teleports. :class:`~teleport_optim.LearnedTeleportOptimizer` has a controller, and explains everything
    else: arguments, state and errors are the same.

    Args:
        params: Parameters, named parameters or groups.
        controller: Sets the controls at control steps, and is kept as it is.
        lr, weight_decay, model, total_steps, teleport, maximize, foreach, average, example_inputs, symmetries: As for
            :class:`~teleport_optim.LearnedTeleportOptimizer`.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = TeleportOptimizer(model.parameters(), model=model, total_steps=10)
        >>> model(torch.ones(3, 2)).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        *,
        controller: Controller | None = None,
        model: nn.Module | None = None,
        total_steps: int | None = None,
        teleport: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        average: bool = True,
        example_inputs: ExampleInputs | None = None,
        symmetries: SymmetrySpec | None = None,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        model = None if model is None else unwrapped(model)
        self._controller = controller
        self._notices = Notices()
        self._binding = Binding(model, self._notices)
        self._progress = Progress()
        self._has_average = average
        self._first_lrs: list[float] | None = None
        self._unusual_until = 0
        self._last_teleport: tuple[float, dict[str, float]] = (0.0, {})
        self._own_attributes = frozenset(vars(self))  # What copies and pickles keep; below is what they make anew.
        self._cache: StepCache | None = None
        self._swap_lock = SwapLock()
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "total_steps": total_steps, "maximize": maximize}
        )
        if 0.0 < float(lr) < _SMALLEST_USUAL_LR:
            self._notices.warn(
                f"lr={float(lr)} is a factor on the learned rate, not a rate such as Adam's: leave it out (it is 1 by default)"
            )
        if model is not None and teleport:
            self._binding.search(model, self._names(), example_inputs=example_inputs, symmetries=symmetries)

    @property
    def spec(self) -> SymmetrySpec:
        """The positive scalings along which the optimizer may teleport; none before the first step, unless inputs were given."""
        return self._binding.spec

    @property
    def teleport_size(self) -> float:
        """RMS over channels of the log-scale by which the last step teleported; 0 if it did not."""
        return self._last_teleport[0]

    # ------------------------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``lr``, ``weight_decay`` and ``maximize``.

        Raises:
            ValueError: for bad or unsupported options, or parameters that cannot be optimized or are not in the model.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            checked = {**self.defaults, **param_group}
            check_group(checked)
            if self.param_groups and checked["total_steps"] != self.param_groups[0]["total_steps"]:
                raise ValueError(
                    f"total_steps is one number for the whole run: got {checked['total_steps']} beside "
                    f"{self.param_groups[0]['total_steps']}"
                )
            params = param_group["params"]
            if not isinstance(params, Tensor | set):
                param_group["params"] = params = list(params)
            if isinstance(params, Tensor | list):
                entries = [params] if isinstance(params, Tensor) else params
                check = self._binding.checked_entry
                param_group["params"] = [check(entry, average=self._has_average) for entry in entries]
        super().add_param_group(param_group)
        if len(self._binding.found):
            self._binding.select(self._names())
            self._cache = None

    def _entries(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Every parameter under its name, or its number, with its group."""
        params = [(param, group) for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return [(name, *entry) for name, entry in zip(names or map(str, range(len(params))), params)]

    def _names(self) -> list[str]:
        return [name for name, *_ in self._entries()]

    # ------------------------------------------------------------------------------------------------ step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss; not needed.

        Raises:
            RuntimeError: for sparse gradients, parameters on several devices, or while the average is in the place of
                the parameters; nothing has changed then.
        """
        self._check_mode()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._prepare(may_be_native=not torch.compiler.is_compiling())
        if plan is not None:  # torch.compile(optimizer.step) compiles descend, and nothing else.
            self._finish(plan, {} if plan.arguments is None else descend(*plan.arguments))
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _prepare(self, *, may_be_native: bool) -> StepPlan | None:
        """Everything before the momentum step; None if there is no step to take."""
        self._last_teleport = (0.0, self._last_teleport[1])
        active = [entry for entry in self._entries() if entry[1].grad is not None]
        if not active:
            return None
        names, params, groups = map(list, zip(*active))
        maximize = [group["maximize"] for group in groups]
        tensors = StepTensors.gather(names, params, maximize, self._slots_of, may_be_native=may_be_native)
        norms = tensors.norms()
        if not all(map(math.isfinite, norms)):
            self._skip([number for number, norm in enumerate(norms) if not math.isfinite(norm)], tensors)
            return None
        has_gradient, step = any(norms), self._progress.num_steps
        progress = self._progress._replace(horizon=self._horizon(step))
        # torch.distributed.checkpoint initialises the state by a step with zero gradients: the model is not searched then.
        if (has_gradient or step) and self._binding.search_after_call(self._names):
            self._cache = None
        cache = self._cache_of(names, tensors.params)
        rates = [float(group["lr"]) for group in groups]
        still = {name for name, lr in zip(names, rates) if not lr}
        for number in rounding_errors(cache.bias_pairs, norms, tensors.grads, tensors.momenta):
            rates[number] = 0.0
        self._check_schedule(step, progress.horizon.total_steps)
        hyper = cache.hyper(rates, _decays(groups), progress.horizon)
        plan = StepPlan(tensors, cache, progress)
        may_balance = not progress.is_balanced and has_gradient and len(still) < len(names)
        if is_due(step) or may_balance:
            control = None if self._controller is None else self._controller.control
            plan.steer(control, still, may_balance=may_balance, may_move=has_gradient)
        plan.take_controls()
        is_native = tensors.fits(cache.native)
        if not all(1e-12 < norm < 1e12 or norm == 0.0 for norm in norms):
            self._unusual_until = step + _MEMORY
        prior = rate_and_decay(step, progress.horizon, cache.layout)
        pace = cache.pace(plan.controls, hyper)
        plan.choose_kernel(pace, *prior, is_native=is_native, is_unusual=step < self._unusual_until)
        return plan

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _finish(self, plan: StepPlan, steps: dict[str, Step]) -> None:
        """Write what a step computed."""
        with self._swap_lock.lock:  # Whoever looks on from another thread sees all of a step or nothing of it.
            self._check_mode()
            plan.write(steps)
        self._progress = plan.progress._replace(num_steps=plan.progress.num_steps + 1)
        if plan.moved is not None and plan.teleport_sizes is not None:
            self._last_teleport = (plan.teleport_size(), plan.moved.teleport_sizes(plan.teleport_sizes))

    def _slots_of(self, param: Tensor) -> Slots:
        """The state of a parameter, which begins here if there is none."""
        slots: Slots = self.state[param]
        if not slots:
            step = self._progress.num_steps
            slots.update(initial_slots(as_real(param), self._initial_hidden(), average=self._has_average, step=step))
        return slots

    def _initial_hidden(self) -> Tensor | None:
        """The controller's hidden state of one tensor before its first control step, if there is a controller."""
        return None if self._controller is None else self._controller.initial_hidden(1)[0]

    def _cache_of(self, names: list[str], params: list[Tensor]) -> StepCache:
        """The cache of these tensors: that of the step before if they are the same."""
        if self._cache is None or self._cache.layout.names != tuple(names):
            self._cache = StepCache(self._layout_of(dict(zip(names, params)), self._binding.spec))
        return self._cache

    def _layout_of(self, params: Mapping[str, Tensor], spec: SymmetrySpec | None) -> Layout:
        depth = self._binding.depth({name: param for name, param, _ in self._entries()})
        block_rows = BLOCK_ROWS if self._controller is None else self._controller.block_rows
        return Layout.of(params, spec, self._binding.embeddings, depth=depth, block_rows=block_rows)

    def _skip(self, numbers: list[int], tensors: StepTensors) -> None:
        """Count a step that is not taken because of the gradients of these tensors."""
        self._progress = self._progress._replace(num_skipped_steps=self._progress.num_skipped_steps + 1)
        for number in numbers:
            tensors.slots[number]["skipped"].add_(1.0)
        self._notices.warn(
            f"a step is skipped, since the gradient of {brief_list([tensors.names[number] for number in numbers])} is not finite. "
            "Further ones will be skipped without a warning; optimizer.stats() counts them",
            once="skipped",
        )

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

    # ------------------------------------------------------------------------------------------------ reports and state

    def stats(self) -> OptimizerStats:
        """What the optimizer has done so far.

        Cost: a few operations per tensor; on an accelerator it waits for the last step.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=10, teleport=False)
            >>> model(torch.ones(3, 2)).sum().backward()
            >>> optimizer.step()
            >>> stats = optimizer.stats()
            >>> stats.num_steps, stats.num_skipped_steps, sorted(stats.tensors)
            (1, 0, ['bias', 'weight'])
        """
        active = [entry for entry in self._entries() if self.state.get(entry[1])]
        tensors = {}
        if active:
            step = max(self._progress.num_steps - 1, 0)
            slots = [self.state[param] for _, param, _ in active]
            groups = [group for _, _, group in active]
            rates = [float(group["lr"]) for group in groups]
            prior = torch.zeros(len(Controls._fields))
            tensors = tensor_stats(
                slots,
                Controls.from_outputs(torch.stack([own.get("outputs", prior) for own in slots])),
                step=step,
                hyper=Hyper.of(rates, _decays(groups), self._horizon(step)),
                layout=self._layout_of({name: as_real(param) for name, param, _ in active}, None),
                teleport_sizes=self._last_teleport[1],
            )
        counts = (self._progress.num_steps, self._progress.num_skipped_steps)
        return OptimizerStats(*counts, self.teleport_size, tensors)

    def log(self, writer: ScalarWriter, step: int | None = None, prefix: str = "optimizer") -> None:
        """Write :meth:`stats` to TensorBoard, one scalar for every tensor and number.

        Args:
            writer: Such as ``torch.utils.tensorboard.SummaryWriter``.
            step: Where on the time axis; the number of steps taken by default.
            prefix: What the tags begin with.
        """
        self.stats().log(writer, step, prefix)

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer; the counts that all tensors share lie in the groups."""
        self._progress = progress = self._progress._replace(horizon=self._horizon(self._progress.num_steps))
        is_open = self._has_average and progress.horizon.total_steps is None
        if is_open and progress.num_steps and not progress.has_shown_average:
            self._notices.warn(
                "the state of an open-ended run is saved, and nobody has looked at its result yet, which is the average of the "
                "iterates: evaluate and save the model inside `with optimizer.averaged():`, or between optimizer.eval() and "
                "optimizer.train(), or set total_steps, at the end of which the parameters are the result",
                once="not shown",
            )
        entries = progress.entries()
        try:
            for group in self.param_groups:
                group.update(entries)
            return super().state_dict()
        finally:
            for group in self.param_groups:
                for key in entries:
                    group.pop(key, None)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of this or an earlier version; training then goes on bit for bit.

        Parameters are matched by name where both sides have the same names, else by order. The meta-optimizer's state is
        never rounded to the dtype of a parameter.

        Raises:
            OptimizerStateError: saying what does not fit; nothing has changed then.
        """
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state, groups, progress = read_state_dict(
            state_dict, self.param_groups, self._initial_hidden(), check_group, average=self._has_average
        )
        with self._swap_lock.lock:
            self.__setstate__({"state": state, "param_groups": groups})
            self._progress, self._first_lrs = progress, None
            self._unusual_until = progress.num_steps + _MEMORY  # What the momentum remembers is not known.
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {key: vars(self)[key] for key in (*self._own_attributes, "_own_attributes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = None
        if "_swap_lock" not in vars(self):  # A copy; loading comes here, too.
            self._swap_lock = SwapLock()
            self._first_lrs = None
        self.defaults.pop("differentiable", None)  # An option that torch adds, and of which there is none here.
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)


def _decays(groups: list[dict[str, Any]]) -> list[float]:
    """The weight decay of every tensor; NaN stands for the learned one."""
    return [math.nan if group["weight_decay"] is None else float(group["weight_decay"]) for group in groups]
