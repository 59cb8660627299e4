"""The optimizer without its learned part: the class around the update rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from teleport_optim.optim.averaged import AveragedOptimizer
from teleport_optim.optim.averaging import SwapLock
from teleport_optim.optim.binding import Binding, unwrapped
from teleport_optim.optim.checks import check_group
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.diagnostics import Notices, OptimizerStats, ScalarWriter, brief_list, tensor_stats
from teleport_optim.optim.orthogonalise import Step, compute_steps
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import HyperParameters
from teleport_optim.optim.rounding import rounding_errors
from teleport_optim.optim.schedule import is_control_step, rate_and_decay
from teleport_optim.optim.shapes import BLOCK_ROWS, as_real
from teleport_optim.optim.state import Progress, Slots, initial_slots, read_state_dict
from teleport_optim.optim.step import Controller, StepCache, StepPlan, StepTensors
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["TeleportOptimizer"]

_MEMORY = 300
"""Steps after which a momentum has forgotten a gradient of any size."""
_SMALLEST_USUAL_LR = 0.03


class TeleportOptimizer(AveragedOptimizer):
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
        if plan is not None:  # torch.compile(optimizer.step) compiles compute_steps, and nothing else.
            self._finish(plan, {} if plan.arguments is None else compute_steps(*plan.arguments))
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
        if is_control_step(step) or may_balance:
            control = None if self._controller is None else self._controller.control
            plan.steer(control, still, may_balance=may_balance, may_move=has_gradient)
        plan.take_controls()
        is_native = tensors.fits(cache.native)
        if not all(1e-12 < norm < 1e12 or norm == 0.0 for norm in norms):
            self._unusual_until = step + _MEMORY
        prior = rate_and_decay(step, progress.horizon, cache.table)
        base = cache.base(plan.controls, hyper)
        plan.choose_kernel(base, *prior, is_native=is_native, is_unusual=step < self._unusual_until)
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
        if self._cache is None or self._cache.table.names != tuple(names):
            self._cache = StepCache(self._layout_of(dict(zip(names, params)), self._binding.spec))
        return self._cache

    def _layout_of(self, params: Mapping[str, Tensor], spec: SymmetrySpec | None) -> ParameterTable:
        depth = self._binding.depth({name: param for name, param, _ in self._entries()})
        block_rows = BLOCK_ROWS if self._controller is None else self._controller.block_rows
        return ParameterTable.of(params, spec, self._binding.embeddings, depth=depth, block_rows=block_rows)

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

    # ------------------------------------------------------------------------------------------------ reports and state

    def stats(self) -> OptimizerStats:
        """Plain numbers about the run so far.

        Cost: a few operations per tensor; on an accelerator it waits for the last step.

        Example:
            >>> from teleport_optim import LearnedTeleportOptimizer
            >>> from torch import nn
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
                hyper=HyperParameters.of(rates, _decays(groups), self._horizon(step)),
                table=self._layout_of({name: as_real(param) for name, param, _ in active}, None),
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
