"""The optimizer for training loops."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.optimizer import Optimizer, ParamsT

from teleport_optim.averaging import Exchange, average_on_forward
from teleport_optim.checkpoints import load_checkpoint
from teleport_optim.first_call import FirstCall, unwrapped
from teleport_optim.layout import Layout, embedding_names, in_full_precision
from teleport_optim.meta_optimizer import Controls, MetaOptimizer
from teleport_optim.native import NativeStep, all_norms, are_plain
from teleport_optim.optimizer_state import LAG, ROW_KEYS, Progress, initial_slots, read_state_dict
from teleport_optim.sharding import all_local, all_parts_like, all_whole
from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.spec import SymmetrySpec
from teleport_optim.update import (
    Factors,
    Hyper,
    Pace,
    Step,
    UpdateState,
    averaged,
    balanced,
    control,
    descend,
    is_due,
    kept_share,
    lagging,
    rate_and_decay,
    step_factors,
    teleport,
)

__all__ = ["LearnedTeleportOptimizer", "OptimizerStats", "ScalarWriter", "TensorStats"]

_MAX_NORM = 1e18
"""A gradient whose norm is larger than this counts as not finite: its square is not a float32."""
_SMALLEST_USUAL_LR = 0.03
_SAFE_RATE = 0.1
"""Factor on the rate of a safe step."""

_UNSUPPORTED = {
    "betas": "momentum is learned",
    "momentum": "momentum is learned",
    "dampening": "momentum is learned",
    "nesterov": "momentum is learned",
    "eps": "directions are normalised",
    "amsgrad": "there is no second moment",
    "foreach": "tensors of one shape always go together",
    "fused": "there is no fused kernel; torch.compile(optimizer.step) is supported",
    "capturable": "a step cannot be captured in a CUDA graph",
    "differentiable": "use teleport_optim.update, which is pure and differentiable",
}
"""Options of torch's optimizers that would have no effect here, and why."""


class TensorStats(NamedTuple):
    """What the last step did to one tensor."""

    rate: float
    """RMS of the step, decay not counted, over rows that have a gradient."""
    decay: float
    """Share by which the values were shrunk."""
    momentum: float
    """Decay of the gradient average."""
    balance: float
    """Strength of the teleport that balances the norms of weights."""
    gradient_balance: float
    """Strength of the teleport that balances the norms of gradients."""
    teleport_size: float
    """RMS of the log-scales of the sites on the tensor, at the last teleport."""
    num_skipped_steps: int
    """Steps skipped since the gradient of this tensor was not finite."""


class OptimizerStats(NamedTuple):
    """What an optimizer has done so far, as plain numbers.

    Attributes:
        num_steps: Steps taken.
        num_skipped_steps: Steps not taken because a gradient was not finite.
        num_guarded_steps: Steps that the guard made safe ones.
        teleport_size: RMS over channels of the log-scale of the last step's teleport; 0 if it took none.
        tensors: By name, for every tensor that has had a step.
    """

    num_steps: int
    num_skipped_steps: int
    num_guarded_steps: int
    teleport_size: float
    tensors: dict[str, TensorStats]


class ScalarWriter(Protocol):
    """What writes scalars, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Write one number."""
        ...


class _Point(NamedTuple):
    """Where a step is taken from, by name; whole tensors."""

    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    momenta: dict[str, Tensor]
    lags: dict[str, Tensor]


@dataclass
class _Plan:
    """A step that is ready to be taken. What the momentum step reads comes first; a compiled one is guarded by nothing else."""

    arguments: tuple[dict[str, Tensor], Factors, Layout] | None
    """Those of :func:`descend`; None where ``take`` does it all."""
    take: Callable[[], None] | None
    """The momentum step in C."""
    point: _Point | None
    """Where the step is taken from; None where ``take`` does it all."""
    keep: float
    """What is kept of the lags."""
    rows: dict[str, Tensor]
    """The rows of the state that the step changes."""
    layout: Layout
    controls: Controls
    """What the meta-optimizer has said last; of a safe step, too."""
    teleport_sizes: Tensor | None
    targets: list[Tensor]
    slots: list[dict[str, Tensor]]
    progress: Progress


class LearnedTeleportOptimizer(Optimizer):
    r"""A learned optimizer that needs no tuning and moves along the model's symmetries.

    Every step, with :math:`c = 1` for matrices and :math:`\sqrt{\text{entries}}/6` for vectors:

    .. math::
        \begin{aligned}
        &\text{at steps 0, 80, 160, 320, ...: } (\rho, \beta, \omega, \tau), h \leftarrow \mathrm{LSTM}(\text{features}, h) \\
        &\text{and } \theta \leftarrow s \cdot \theta, \quad (g, m) \leftarrow s^{-1} \cdot (g, m),
            \quad \log s = \tau \tfrac14 \log(\text{read} / \text{written}) \\
        &m \leftarrow \beta m + (1 - \beta) g \\
        &d = \text{rows of } m \text{, their columns rescaled, orthogonalised 64 at a time, of unit norm, for matrices, }
            m / \lVert m \rVert \text{ for vectors} \\
        &\theta \leftarrow (1 - \gamma a \rho \omega \lambda)\, \theta - \gamma a \rho\, c\, d \\
        &\bar\theta \leftarrow \bar\theta + \tfrac{7}{t + 7} (\theta - \bar\theta)
        \end{aligned}

    where :math:`\gamma` is ``lr``, :math:`a` a rate that falls with the root of time and :math:`\lambda` a decay that goes with
    it. The loss is never needed. See ``teleport_optim.update`` for the rule.

    Gradients are taken at :math:`\theta`, which the parameters are. What is learned is the average of the iterates
    :math:`\bar\theta`: calls of ``model`` in which no gradients are recorded (``torch.no_grad()``, ``torch.inference_mode()``) see
    it, and :meth:`averaged` shows it elsewhere. In the last 30 % of a run of known length the rate falls to zero, and the
    parameters end where the average is.

    Args:
        params: Parameters, named parameters or groups, as for every torch optimizer.
        lr: Factor on the learned rate, at least 0. Leave it at 1, or let a scheduler move it.
        weight_decay: Decoupled weight decay per unit of rate, at least 0; None for the learned decay.
        model: The module that owns ``params``. Its symmetries are found when it is first called, and the optimizer teleports
            along those positive scalings whose tensors it manages. Without it the optimizer works and does not teleport.
        total_steps: Number of steps of the run, in the last 30 % of which the rate falls to zero. Without it the run is
            open-ended, and its average as good. Past it the optimizer goes on at the last rate and warns once.
        checkpoint: Name of a shipped checkpoint, a path, or a :class:`~teleport_optim.MetaOptimizer`.
        teleport: Whether to teleport.
        maximize: Climb instead of descending.
        guard: Watch for divergence (a sudden rise of the gradient norm, or of the loss where a closure gives it) and take
            plain steps at a tenth of the rate, without teleports, until it has passed.
        average: Whether calls of ``model`` in which no gradients are recorded see the average of the iterates. (Where the length of
            the run is known, it is what the parameters end at.) :meth:`averaged` shows it everywhere else.
        example_inputs: Inputs of ``model`` as :func:`~teleport_optim.find_symmetries` takes them, to find its symmetries at
            once; needed only where a training loop never calls ``model`` itself.
        symmetries: The symmetries of ``model`` where they were found beforehand, as before ``fully_shard``.

    Raises:
        ValueError: for an empty parameter list, a negative or non-finite hyper-parameter, options of other optimizers that
            would have no effect, or parameters that are not in ``model``, have no data or are shards that cannot be put together.
        TypeError: if ``model`` is not a module.
        CheckpointError: if the checkpoint cannot be used.

    State: ``exp_avg`` (a covector) and ``lag`` (a vector: what the average of the iterates has more than the parameter) per
    parameter, both in bfloat16, and about 40 numbers per tensor.

    A step whose gradients are not all finite is skipped, counted in :meth:`stats` and warned about once.

    References: Zamir et al., 2025, arXiv 2504.15399 (learned teleportation); Jordan et al., 2024 (Muon).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=100)
        >>> x = torch.randn(32, 4)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(loss < 0.1)
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        *,
        model: nn.Module | None = None,
        total_steps: int | None = None,
        checkpoint: str | Path | MetaOptimizer = "default",
        teleport: bool = True,
        maximize: bool = False,
        guard: bool = False,
        average: bool = True,
        example_inputs: ExampleInputs | None = None,
        symmetries: SymmetrySpec | None = None,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(checkpoint, MetaOptimizer):
            self._meta_optimizer = copy.deepcopy(checkpoint)
        else:
            self._meta_optimizer = load_checkpoint(checkpoint)
        self._block_rows = self._meta_optimizer.block_rows
        if model is not None:
            model = unwrapped(model)
        self._tensor_names: dict[Tensor, str] = (
            {} if model is None else {p: name for name, p in model.named_parameters()}
        )
        self._model_name = type(model).__name__
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._held: tuple[Layout, Controls] | None = None
        self._last_pace: tuple[tuple[Controls, Hyper, Layout], Pace] | None = None
        self._last_hyper: tuple[tuple[Any, ...], Hyper] | None = None
        self._last_native: tuple[Layout, NativeStep] | None = None
        self._warned: set[str] = set()
        self._spec = self._found = SymmetrySpec()
        self._first_call: FirstCall | None = None
        self._embeddings: frozenset[str] = frozenset()
        self._progress = Progress()
        self._is_guarded = guard
        self._exchange = Exchange(self._lagging)
        self._teleport_sizes: dict[str, float] = {}
        self._teleport_size = 0.0
        defaults = {"lr": lr, "weight_decay": weight_decay, "total_steps": total_steps, "maximize": maximize}
        super().__init__(params, defaults)
        if 0.0 < float(lr) < _SMALLEST_USUAL_LR:
            self._warn(
                f"lr={float(lr)} is a factor on the learned rate, not a rate such as Adam's: leave it out (it is 1 by default)"
            )
        if model is not None:
            self._embeddings = embedding_names(model)
            if teleport and symmetries is not None:
                self._use(symmetries, model)
            elif teleport and example_inputs is not None:
                self._use(find_symmetries(model, example_inputs, groups=["scaling"]), model)
            elif teleport:
                self._first_call = FirstCall(model)
            if average and self._tensor_names:
                average_on_forward(model, self._exchange)

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """The optimizer of all parameters of ``model``; ``options`` are those of the class.

        Example:
            >>> optimizer = LearnedTeleportOptimizer.for_model(nn.Linear(2, 1), total_steps=10)
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        return cls(model.parameters(), model=model, **options)

    @property
    def spec(self) -> SymmetrySpec:
        """The positive scalings along which the optimizer may teleport; none before the first step, unless inputs were given."""
        return self._spec

    @property
    def teleport_size(self) -> float:
        """RMS over channels of the log-scale by which the last step teleported; 0 if it did not."""
        return self._teleport_size

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``lr``, ``weight_decay`` and ``maximize``.

        Raises:
            ValueError: for bad or unsupported options, or parameters that cannot be optimized or are not in the model.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            checked = {**self.defaults, **param_group}
            _check_group(checked)
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
                param_group["params"] = [self._checked_entry(entry) for entry in entries]
        super().add_param_group(param_group)
        if len(self._found):
            self._select()

    def _checked_entry(self, entry: Any) -> Any:
        """One entry of the parameters of a group, with its name in the model if there is a model."""
        param = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if not isinstance(param, Tensor):
            return entry
        _check_parameter(param)
        if not self._tensor_names:
            return entry
        if param not in self._tensor_names:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is not in the model ({self._model_name}): pass the model "
                "that owns all parameters, or no model"
            )
        return self._tensor_names[param], param

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
            RuntimeError: for sparse or complex gradients, or parameters on several devices; nothing has changed then.
        """
        if self._exchange.is_active:
            raise RuntimeError(
                "a step inside averaged(), where parameters are not what gradients are taken at: leave it first"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._prepare(loss, may_be_native=not torch.compiler.is_compiling())
        if plan is not None:  # torch.compile(optimizer.step) compiles descend
            self._finish(plan, {} if plan.arguments is None else descend(*plan.arguments))
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _prepare(self, loss: Any, may_be_native: bool) -> _Plan | None:
        """Everything before the momentum step; None if there is no step to take."""
        self._teleport_size = 0.0
        active = [entry for entry in self._entries() if entry[1].grad is not None]
        if not active:
            return None
        names, targets, groups = map(list, zip(*active))
        own_grads = [target.grad for target in targets]
        is_native = may_be_native and are_plain(own_grads)
        if not is_native:
            _check_active(names, targets, own_grads)
        slots = [self.state[target] or self._new_slots(target) for target in targets]
        averages, own_lags, counts = ([own[key] for own in slots] for key in ("exp_avg", LAG, "step"))
        is_native = is_native and are_plain(targets + counts) and are_plain(averages + own_lags, torch.bfloat16)
        grads = all_whole(own_grads)
        if not is_native or any(group["maximize"] for group in self.param_groups):
            grads = [_gradient(grad, group["maximize"]) for grad, group in zip(grads, groups)]
        norms = (all_norms if is_native else _all_norms)(grads)
        if not all(norm <= _MAX_NORM for norm in norms):
            self._skip([(name, own) for name, own, norm in zip(names, slots, norms) if not norm <= _MAX_NORM])
            return None
        progress, is_safe = self._progress, False
        if self._is_guarded:
            guard = progress.guard.watch(math.hypot(*norms), None if loss is None else float(loss))
            is_safe = guard.num_safe_steps > 0
            progress = progress._replace(guard=guard, num_guarded_steps=progress.num_guarded_steps + is_safe)
        has_gradient = any(norms)
        step = progress.num_steps
        if has_gradient or step:  # Others, to load a state, first take a step that is to change nothing.
            self._learn_symmetries()
        layout = self._layout(names, targets)
        hyper = self._hyper(groups, step)
        rate, decay = rate_and_decay(step, hyper.total_steps, layout)
        keep = kept_share(step, hyper.total_steps)
        native = self._native(layout)
        is_native = is_native and native.fits(targets, grads, averages, own_lags, counts=counts)
        point: _Point | None = None
        if not is_native or is_due(step):
            whole = [all_whole(targets), grads, *map(all_whole, (averages, own_lags))]
            point = _Point(*(dict(zip(names, tensors)) for tensors in whole))
        rows: dict[str, Tensor] = {}
        sizes = None
        if point is not None and is_due(step):
            may_move = has_gradient and not is_safe and len(layout.spec) > 0
            point, rows, sizes = self._steered(point, slots, step, hyper.total_steps, layout, may_move)
            learned = Controls.from_outputs(rows["outputs"])
        elif self._held is not None and self._held[0] is layout:
            learned = self._held[1]
        else:
            learned = Controls.from_outputs(torch.stack([own["outputs"] for own in slots]))
        controls, hyper = _safe(learned, hyper) if is_safe else (learned, hyper)
        pace = self._pace(controls, hyper, layout)
        arguments = take = None
        if is_native or point is None:
            here = grads if point is None else list(point.grads.values())
            tensors = (targets, here, averages, own_lags, counts)
            take = partial(native.take, *tensors, pace=pace, rate=rate, decay=decay, keep=keep)
        else:
            factors = pace.factors(rate, decay)
            momenta = {name: averaged(point.momenta[name], point.grads[name], factors.beta) for name in names}
            arguments = (momenta, factors, layout)
        return _Plan(arguments, take, point, keep, rows, layout, learned, sizes, targets, slots, progress)

    def _steered(
        self,
        point: _Point,
        slots: list[dict[str, Tensor]],
        step: int,
        total_steps: int | None,
        layout: Layout,
        may_move: bool,
    ) -> tuple[_Point, dict[str, Tensor], Tensor | None]:
        """Ask the meta-optimizer, and teleport where that may be: the new point, new rows of the state, sizes of the teleport."""
        sizes = None
        if step == 0 and may_move:
            params, grads, sizes = balanced(point.params, point.grads, layout)
            point = point._replace(params=dict(params), grads=dict(grads))
        held = {key: torch.stack([own[key] for own in slots]) for key in ROW_KEYS}
        state = UpdateState(momenta=point.momenta, lags=point.lags, **held)
        meta_optimizer = self._meta_optimizer.to(held["hidden"].device)
        state = control(
            meta_optimizer, point.params, point.grads, state, step=step, total_steps=total_steps, layout=layout
        )
        if may_move:
            *moved, own_sizes = teleport(*point, Controls.from_outputs(state.outputs), layout)
            point = _Point(*map(dict, moved))
            sizes = own_sizes if sizes is None else torch.hypot(sizes, own_sizes)
        return point, {key: getattr(state, key) for key in ROW_KEYS}, sizes

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _finish(self, plan: _Plan, steps: dict[str, Step]) -> None:
        """Write what a step computed."""
        momenta, lags = ([own[key] for own in plan.slots] for key in ("exp_avg", LAG))
        if plan.point is not None and plan.teleport_sizes is not None:
            _copy(plan.targets, plan.point.params)
            _copy(momenta, plan.point.momenta)
            _copy(lags, plan.point.lags)
        for key, rows in plan.rows.items():
            _copy([own[key] for own in plan.slots], dict(enumerate(rows.unbind(0))))
        if plan.take is not None:
            plan.take()
        elif plan.arguments is not None:
            new_momenta, factors, layout = plan.arguments
            _copy(momenta, new_momenta)
            _descend_in_place(plan.targets, lags, [steps[name] for name in layout.names], factors.shrinks, plan.keep)
            torch._foreach_add_([own["step"] for own in plan.slots], 1.0)
        self._progress = plan.progress._replace(num_steps=plan.progress.num_steps + 1)
        self._held = (plan.layout, plan.controls)
        sizes = plan.teleport_sizes
        if sizes is not None:
            channels = torch.tensor([float(symmetry.size) for symmetry in plan.layout.spec], device=sizes.device)
            self._teleport_size = float((sizes.square() @ channels / channels.sum()).sqrt())
            self._teleport_sizes = plan.layout.teleport_sizes(sizes)

    def _entries(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Every parameter under its name, or its number, with its group."""
        params = [(param, group) for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return [(name, *entry) for name, entry in zip(names or map(str, range(len(params))), params)]

    def _new_slots(self, param: Tensor) -> dict[str, Tensor]:
        slots: dict[str, Tensor] = self.state[param]
        slots.update(initial_slots(param, self._meta_optimizer.initial_hidden(1)[0]))
        return slots

    def _skip(self, tensors: list[tuple[str, dict[str, Tensor]]]) -> None:
        """Count a step that is not taken because of the gradients of these tensors, given with their slots."""
        self._progress = self._progress._replace(num_skipped_steps=self._progress.num_skipped_steps + 1)
        for _, own in tensors:
            own["skipped"].add_(1.0)
        names = _list([name for name, _ in tensors])
        self._warn(
            f"a step is skipped, since the gradient of {names} is not finite. Further ones will be skipped without a warning; "
            "optimizer.stats() counts them",
            once="skipped",
        )

    def _learn_symmetries(self) -> None:
        """Find the symmetries of the model with the inputs of its first call, once it has been called."""
        call = self._first_call
        if call is None:
            return
        if len(self._entries()) < 2:  # a scaling moves two tensors at least
            self._first_call = None
            call.cancel()
            return
        try:
            inputs = call.take()
            if inputs is not None:
                self._first_call = None
                self._use(find_symmetries(call.model, inputs, groups=["scaling"]), call.model)
        except Exception as error:  # the search runs code of the model's, whose failure must not cost a step
            self._first_call = None
            call.cancel()
            self._warn(
                f"no teleports: the search for symmetries failed ({type(error).__name__}: {error}). Training goes on without "
                "them; pass symmetries= that were found beforehand, or teleport=False"
            )
            return
        if inputs is None:
            self._warn(
                f"no teleports yet: the model ({self._model_name}) has not been called since the optimizer was made, so "
                "that the shapes of its inputs are not known. Pass example_inputs, or teleport=False",
                once="not called",
            )

    def _hyper(self, groups: list[dict[str, Any]], step: int) -> Hyper:
        total_steps = self.param_groups[0]["total_steps"]
        if total_steps is not None and step >= total_steps:
            self._warn(
                f"step {step + 1} lies past total_steps={total_steps}: going on at the last rate. Give the length of the "
                "whole run, or leave total_steps out.",
                once="past total_steps",
            )
        rates = [float(group["lr"]) for group in groups]
        decays = [None if group["weight_decay"] is None else float(group["weight_decay"]) for group in groups]
        key = (rates, decays, total_steps)
        if self._last_hyper is None or self._last_hyper[0] != key:
            numbers = [math.nan if decay is None else decay for decay in decays]
            lr, weight_decay = (torch.tensor(values, dtype=torch.float32) for values in (rates, numbers))
            self._last_hyper = (key, Hyper(lr, weight_decay, total_steps))
        return self._last_hyper[1]

    def _pace(self, controls: Controls, hyper: Hyper, layout: Layout) -> Pace:
        """The pace under these controls, which most steps share with the step before."""
        key = (controls, hyper, layout)
        if self._last_pace is None or any(new is not old for new, old in zip(key, self._last_pace[0])):
            self._last_pace = (key, Pace.of(*key))
        return self._last_pace[1]

    def _native(self, layout: Layout) -> NativeStep:
        if self._last_native is None or self._last_native[0] is not layout:
            self._last_native = (layout, NativeStep(layout))
        return self._last_native[1]

    def _layout(self, names: list[str], params: list[Tensor]) -> Layout:
        key = tuple(names)
        if key not in self._layouts:
            self._layouts = {key: self._layout_of(dict(zip(names, params)), self._spec)}
        return self._layouts[key]

    def _layout_of(self, params: Mapping[str, Tensor], spec: SymmetrySpec | None) -> Layout:
        is_whole = len(params) == len(self._tensor_names)  # without a model there are no names
        return Layout.of(params, spec, self._embeddings, is_whole=is_whole, block_rows=self._block_rows)

    def _use(self, spec: SymmetrySpec, model: nn.Module) -> None:
        """Teleport along the scalings of ``spec``, as far as the optimizer manages their tensors."""
        names = {name: self._tensor_names[p] for name, p in model.named_parameters(remove_duplicate=False)}
        scalings = []
        for symmetry in spec.of_group("scaling"):
            legs = dict.fromkeys(replace(leg, name=names.get(leg.name, leg.name)) for leg in symmetry.legs)
            scalings.append(replace(symmetry, legs=tuple(legs)))
        self._found = SymmetrySpec(tuple(scalings), spec.refusals)
        self._select()

    def _select(self) -> None:
        managed = {name for name, *_ in self._entries()}
        outside = sorted({leg.name for symmetry in self._found for leg in symmetry.legs} - managed)
        if outside:
            self._warn(
                f"no teleports where {', '.join(outside)} take part: these tensors are not among the parameters of the "
                "optimizer"
            )
        usable = (symmetry for symmetry in self._found if all(leg.name in managed for leg in symmetry.legs))
        self._spec = SymmetrySpec(tuple(usable), self._found.refusals)
        self._layouts = {}

    def _warn(self, message: str, once: str | None = None) -> None:
        """Warn at the line of the user that made or stepped the optimizer."""
        if once is not None:
            if once in self._warned:
                return
            self._warned.add(once)
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN_FILES):
            frame, level = frame.f_back, level + 1
        warnings.warn(message, stacklevel=level)

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the parameters are the average of the iterates, which is what a run is about.

        Calls of ``model`` without gradients need none. It is for all else that reads parameters, such as saving them before the
        end of a run, and for optimizers made without ``model``. Copy what is to outlive the context: its ``state_dict()`` holds
        the parameters themselves.

        Raises:
            RuntimeError: from :meth:`step`, inside.

        Cost: a copy of the parameters while it lasts.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = LearnedTeleportOptimizer.for_model(model)
            >>> model(torch.ones(3, 2)).sum().backward()
            >>> optimizer.step()
            >>> with optimizer.averaged():
            ...     weights = {name: value.clone() for name, value in model.state_dict().items()}
        """
        return self._exchange

    def _lagging(self) -> list[tuple[Tensor, Tensor]]:
        return [(param, self.state[param][LAG]) for _, param, _ in self._entries() if self.state.get(param)]

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
        progress = self._progress
        active = [entry for entry in self._entries() if self.state.get(entry[1])]
        tensors = {}
        if active:
            step = max(progress.num_steps - 1, 0)
            outputs = torch.stack([self.state[param]["outputs"] for _, param, _ in active])
            hyper = self._hyper([group for _, _, group in active], step)
            is_safe = self._is_guarded and progress.guard.num_safe_steps > 0
            controls = Controls.from_outputs(outputs)
            controls, hyper = _safe(controls, hyper) if is_safe else (controls, hyper)
            layout = self._layout_of({name: param for name, param, _ in active}, None)
            factors, known = step_factors(controls, step=step, hyper=hyper, layout=layout), layout.table(controls.rate)
            table = torch.stack(
                [
                    factors.lengths * known.step_scale / known.step_length,
                    1.0 - factors.shrinks,
                    factors.beta.expand_as(factors.shrinks),
                    controls.balance,
                    controls.gradient_balance,
                ],
                dim=-1,
            )
            for (name, param, _), row in zip(active, table.tolist()):
                skipped = int(self.state[param]["skipped"])
                tensors[name] = TensorStats._make([*row, self._teleport_sizes.get(name, 0.0), skipped])
        counts = (progress.num_steps, progress.num_skipped_steps, progress.num_guarded_steps)
        return OptimizerStats(*counts, self._teleport_size, tensors)

    def log(self, writer: ScalarWriter, step: int | None = None, prefix: str = "optimizer") -> None:
        """Write :meth:`stats` to TensorBoard, one scalar for every tensor and number.

        Args:
            writer: Such as ``torch.utils.tensorboard.SummaryWriter``.
            step: Where on the time axis; the number of steps taken by default.
            prefix: What the tags begin with.
        """
        stats = self.stats()
        step = stats.num_steps if step is None else step
        for key, value in stats._asdict().items():
            if key != "tensors":
                writer.add_scalar(f"{prefix}/{key}", value, step)
        for name, tensor in stats.tensors.items():
            for key, value in tensor._asdict().items():
                writer.add_scalar(f"{prefix}_{key}/{name}", value, step)

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer; the counts that all tensors share lie in the groups."""
        entries = self._progress.entries()
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
        hidden = self._meta_optimizer.initial_hidden(1)[0]
        state, groups, progress = read_state_dict(state_dict, self.param_groups, hidden, _check_group)
        self.__setstate__({"state": state, "param_groups": groups})
        self._progress = progress
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in self.__dict__.items() if key in _OWN_ATTRIBUTES}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = self._last_pace = self._last_hyper = self._last_native = None
        if "_exchange" not in self.__dict__:  # a copy; loading comes here, too
            self._exchange = Exchange(self._lagging)
        self.defaults.pop("differentiable", None)  # an option that torch adds, and of which there is none here
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)


def _safe(controls: Controls, hyper: Hyper) -> tuple[Controls, Hyper]:
    """The prior, at a tenth of the rate that the user set."""
    prior = Controls.prior(controls.rate.shape[-1])
    return Controls(*(value.to(controls.rate) for value in prior)), hyper._replace(lr=_SAFE_RATE * hyper.lr)


def _all_norms(tensors: list[Tensor]) -> list[float]:
    norms: list[float] = torch.stack(torch._foreach_norm([in_full_precision(tensor) for tensor in tensors])).tolist()
    return norms


def _copy(targets: list[Tensor], values: Mapping[Any, Tensor]) -> None:
    """Write values, which are whole, where the targets lie; both are in one order."""
    torch._foreach_copy_(all_local(targets), all_parts_like(list(values.values()), targets))


def _descend_in_place(
    targets: list[Tensor], lags: list[Tensor], steps: list[Step], shrinks: Tensor, keep: float
) -> None:
    """Shrink the parameters and take the steps, where they lie; then move their average."""
    here = all_local(targets)
    if any(part is not target for part, target in zip(here, targets)):
        moves = [step.product().view(target.shape) for step, target in zip(steps, targets)]
        steps = list(map(Step, all_parts_like(moves, targets)))
    parts = list(zip(here, all_local(lags), steps, shrinks.tolist()))
    small = [part for part in parts if part[2].lengths is None]
    for group in (
        small,
        *([part] for part in parts if part[2].lengths is not None),
    ):  # a copy of one large tensor at a time
        if group:
            own, own_lags, own_steps, own_shrinks = map(list, zip(*group))
            old = [target.clone() for target in own]
            _take_steps(own, own_steps, own_shrinks)
            torch._foreach_copy_(own_lags, [lagging(*tensors, keep) for tensors in zip(own_lags, old, own)])


def _take_steps(targets: list[Tensor], steps: list[Step], shrinks: list[float]) -> None:
    if any(in_full_precision(target) is not target for target in targets):
        for target, shrink, step in zip(targets, shrinks, steps):
            target.copy_(step.taken_from(in_full_precision(target) * shrink))
        return
    shrunk = [(target, shrink) for target, shrink in zip(targets, shrinks) if shrink != 1.0]
    if shrunk:
        torch._foreach_mul_(*map(list, zip(*shrunk)))
    if steps[0].lengths is None:
        torch._foreach_sub_(targets, [step.move for step in steps])
    else:
        steps[0].take_from_(targets[0])


_OWN_FILES = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
"""Where the code lies between a user's line and a warning."""
_OWN_ATTRIBUTES = frozenset(
    (
        "_meta_optimizer",
        "_block_rows",
        "_tensor_names",
        "_model_name",
        "_layouts",
        "_warned",
        "_found",
        "_spec",
        "_embeddings",
        "_first_call",
        "_progress",
        "_is_guarded",
        "_teleport_sizes",
        "_teleport_size",
    )
)


def _check_group(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` or ``TypeError`` for options of a group that are bad or would be ignored."""
    for key, reason in _UNSUPPORTED.items():
        if group.get(key):
            raise ValueError(f"LearnedTeleportOptimizer has no {key} (got {group[key]!r}): {reason}")
    lr, weight_decay, total_steps = group["lr"], group["weight_decay"], group["total_steps"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Invalid learning rate: a tensor lr must have one element, got shape {tuple(lr.shape)}")
    for key in ("lr", "weight_decay"):
        if isinstance(group[key], bool) or not isinstance(group[key], int | float | Tensor | None):
            raise TypeError(f"{key} must be a number, got {group[key]!r}")
    if not (float(lr) >= 0.0 and math.isfinite(float(lr))):
        raise ValueError(
            f"Invalid learning rate: {lr}: it multiplies the learned rate and must be finite and at least 0"
        )
    if weight_decay is not None and not (float(weight_decay) >= 0.0 and math.isfinite(float(weight_decay))):
        raise ValueError(f"Invalid weight_decay value: {weight_decay}: it must be finite and at least 0, or None")
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or not 1 <= total_steps <= 2**53
    ):
        raise ValueError(f"Invalid total_steps value: {total_steps}: it must be an integer from 1 to 2**53, or None")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"maximize must be True or False, got {group['maximize']!r}")


def _check_parameter(param: Tensor) -> None:
    """Raise ``ValueError`` for a tensor that can never be optimized here."""
    if isinstance(param, UninitializedParameter):
        return
    reason = ""
    if param.is_meta:
        reason = "is on the meta device: give it data first (module.to_empty(device=...), then initialise or load it)"
    elif param.is_quantized:
        reason = "is quantised: optimize the float weights, then quantise"
    elif getattr(param, "_fsdp_flattened", False):
        reason = (
            "is a flattened shard of FullyShardedDataParallel, whose layers cannot be seen: use "
            "torch.distributed.fsdp.fully_shard"
        )
    if reason:
        raise ValueError(f"a parameter of shape {tuple(param.shape)} {reason}")


def _check_active(names: list[str], params: list[Tensor], grads: list[Tensor]) -> None:
    """Raise ``RuntimeError`` for gradients that cannot be used."""
    for name, grad in zip(names, grads):
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {name} is sparse, which LearnedTeleportOptimizer does not support: make it "
                "dense (nn.Embedding(..., sparse=False)) or give that parameter to torch.optim.SparseAdam"
            )
        if grad.is_complex():
            raise RuntimeError(
                f"the gradient of parameter {name} is complex, which LearnedTeleportOptimizer does not support: keep real "
                "and imaginary parts as two real parameters"
            )
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise RuntimeError(
            f"parameters lie on several devices ({', '.join(sorted(map(str, devices)))}): make one optimizer for each device"
        )


def _gradient(grad: Tensor, maximize: bool) -> Tensor:
    """The gradient to descend; that of float16 in float32, whose range teleports need."""
    grad = grad.float() if grad.dtype == torch.float16 else grad
    return -grad if maximize else grad


def _list(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(itertools.islice(names, 3)) + more
