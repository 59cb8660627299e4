"""The optimizer for training loops."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.optimizer import Optimizer, ParamsT

from teleport_optim.controller.checkpoints import load_checkpoint
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.optim.averaging import (
    END,
    FINGERPRINT,
    OFFSET,
    START,
    average_of,
    begin_again,
    can_be_averaged,
    catch_up,
    fingerprints,
    swap_in,
    swap_out,
    written,
)
from teleport_optim.optim.binding import FirstCall, unwrapped
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.kernels.native import NativeStep, all_norms, are_plain
from teleport_optim.optim.orthogonalise import Step, descend
from teleport_optim.optim.parameters import Depth, Layout, as_real, embedding_names, in_full_precision, matrix_shape
from teleport_optim.optim.records import Factors, Hyper, Pace, UpdateState, step_factors
from teleport_optim.optim.rule import active_rows, average_offset, ema
from teleport_optim.optim.schedule import Horizon, averaging_weight, is_due, rate_and_decay
from teleport_optim.optim.sharding import all_local, all_parts_like, all_whole, local, part_like, whole
from teleport_optim.optim.state import ROW_KEYS, Progress, initial_slots, read_state_dict
from teleport_optim.optim.teleport import balanced, teleport
from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.moves import Moved, unmoved
from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["LearnedTeleportOptimizer", "OptimizerStats", "ScalarWriter", "TensorStats"]

_ROUNDING, _ROUNDING_64 = (32.0 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
"""A bias whose gradient is a smaller share of that of its matrix may have none but rounding errors."""
_MEMORY = 300
"""Steps after which a momentum has forgotten a gradient of any size."""
_AGREEMENT = 0.9
"""Least cosine with the momentum of a gradient that is so small and still no rounding error."""
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
    """Where a step is taken from, by name; whole tensors, computed when they are asked for where the point is moved."""

    params: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    momenta: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    """Of the averages; empty where none are kept."""


@dataclass
class _Plan:
    """A step that is ready to be taken. What the momentum step reads comes first; a compiled one is guarded by nothing else."""

    arguments: tuple[dict[str, Tensor], Factors, Layout] | None
    """Those of :func:`descend`; None where ``take`` does it all."""
    take: Callable[..., list[int]] | None
    """The momentum step in C."""
    point: _Point | None
    """Where the step is taken from; None where ``take`` does it all."""
    momenta: dict[str, Tensor]
    """New momenta; none where ``take`` does it all."""
    masks: dict[str, Tensor]
    """Which rows have a gradient, of tensors of which some have none."""
    rows: dict[str, Tensor]
    """The rows of the state that the step changes."""
    layout: Layout
    controls: Controls
    """What the meta-optimizer has said last; of a safe step, too."""
    moved: Layout | None
    """The sites along which the parameters may move; None if they must not."""
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
    it. The loss is never needed. See ``teleport_optim.optim.rule`` for the rule.

    The parameters are :math:`\theta`, for everybody who looks: training, evaluation, saving, other optimizers. In the last 30 % of
    a run of known length the rate falls to zero, and the parameters end where the average of the iterates :math:`\bar\theta` is.
    In an open-ended run the average is the result: :meth:`eval` puts it in the place of the parameters and :meth:`train` takes it
    out again, ``with optimizer.averaged():`` does both, and :meth:`averaged_parameters` gives it as tensors.

    Args:
        params: Parameters, named parameters or groups, as for every torch optimizer.
        lr: Factor on the learned rate, at least 0. Leave it at 1, or let a scheduler move it.
        weight_decay: Decoupled weight decay per unit of rate, at least 0; None for the learned decay.
        model: The module that owns ``params``. Its symmetries are found when it is first called, and the optimizer teleports
            along those positive scalings whose tensors it manages. Without it the optimizer works and does not teleport.
        total_steps: Number of steps of the run, in the last 30 % of which the rate falls to zero. Without it the run is
            open-ended, and its average as good. Past it the optimizer goes on at the last rate and warns once. It can be changed
            while the run goes on: :meth:`set_total_steps`, :meth:`finish_in`.
        checkpoint: Name of a shipped checkpoint, a path, or a :class:`~teleport_optim.MetaOptimizer`.
        teleport: Whether to teleport.
        maximize: Climb instead of descending.
        foreach: Taken for the sake of loops that pass it; tensors of one shape always go together.
        guard: Watch for divergence (a sudden rise of the gradient norm, or of the loss where a closure gives it) and take
            plain steps at a tenth of the rate, without teleports, until it has passed.
        average: Keep an average of the iterates. Without it, state is 2 bytes per parameter less, and a run should have
            ``total_steps``.
        example_inputs: Inputs of ``model`` as :func:`~teleport_optim.find_symmetries` takes them, to find its symmetries at
            once; needed only where a training loop never calls ``model`` itself.
        symmetries: The symmetries of ``model`` where they were found beforehand, as before ``fully_shard``.

    Raises:
        ValueError: for an empty parameter list, a negative or non-finite hyper-parameter, options of other optimizers that
            would have no effect, or parameters that are not in ``model``, have no data, are shards that cannot be put together or
            are of a dtype of which no average can be kept.
        TypeError: if ``model`` is not a module.
        CheckpointError: if the checkpoint cannot be used.

    State: ``exp_avg`` (a covector) and ``average_offset`` (a vector: the average of the iterates minus the parameter) per
    parameter, both in bfloat16, and about 40 numbers per tensor. In evaluation mode the parameters, too.

    Who writes into parameters between steps (masks, clipping, loading) is noticed, and the average of such a tensor begins again at
    what was written.

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
        foreach: bool | None = None,
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
        self._held_starts: tuple[Layout, list[int]] | None = None
        self._last_pace: tuple[tuple[Controls, Hyper, Layout], Pace] | None = None
        self._last_hyper: tuple[tuple[Any, ...], Hyper] | None = None
        self._last_native: tuple[Layout, NativeStep] | None = None
        self._warned: set[str] = set()
        self._spec = self._found = SymmetrySpec()
        self._first_call: FirstCall | None = None
        self._embeddings: frozenset[str] = frozenset()
        self._progress = Progress()
        self._is_guarded = guard
        self._has_average = average
        self._first_lrs: list[float] | None = None
        self._unusual_until = 0
        self._biases: tuple[Layout, list[tuple[int, int]]] | None = None
        self._swapping = _Swapping()
        self._all_names: dict[str, list[str]] = {}
        if model is not None:
            for name, param in model.named_parameters(remove_duplicate=False):
                self._all_names.setdefault(self._tensor_names[param], []).append(name)
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
        _check_parameter(param, self._has_average)
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
            RuntimeError: for sparse gradients, parameters on several devices, or while the average is in the place of
                the parameters; nothing has changed then.
        """
        self._check_mode()
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
        names, params, groups = map(list, zip(*active))
        own_grads = [param.grad for param in params]
        targets = params
        is_native = may_be_native and are_plain(own_grads)
        if not is_native:
            _check_active(names, params, own_grads)
            targets, own_grads = list(map(as_real, params)), list(map(as_real, own_grads))
        slots = [self.state[param] or self._new_slots(param) for param in params]
        momenta, counts = ([own[key] for own in slots] for key in ("exp_avg", "step"))
        offsets, prints, ends = ([own[key] for own in slots if self._has_average] for key in (OFFSET, FINGERPRINT, END))
        is_native = (
            is_native
            and are_plain(targets + counts)
            and are_plain(momenta + offsets, torch.bfloat16)
            and are_plain(prints + ends, torch.int64)
        )
        grads = all_whole(own_grads)
        if not is_native or any(group["maximize"] for group in self.param_groups):
            grads = [_gradient(grad, group["maximize"]) for grad, group in zip(grads, groups)]
        norms = (all_norms if is_native else _all_norms)(grads)
        if not all(map(math.isfinite, norms)):
            self._skip([(name, own) for name, own, norm in zip(names, slots, norms) if not math.isfinite(norm)])
            return None
        progress, is_safe = self._progress, False
        if self._is_guarded:
            guard = progress.guard.watch(math.hypot(*norms), None if loss is None else float(loss))
            is_safe = guard.num_safe_steps > 0
            progress = progress._replace(guard=guard, num_guarded_steps=progress.num_guarded_steps + is_safe)
        has_gradient = any(norms)
        step = progress.num_steps
        progress = progress._replace(horizon=self._horizon(step))
        if has_gradient or step:  # Others, to load a state, first take a step that is to change nothing.
            self._learn_symmetries()
        layout = self._layout(names, targets)
        rates = [float(group["lr"]) for group in groups]
        still = {name for name, lr in zip(names, rates) if not lr}
        for number in self._rounding_errors(layout, norms, grads, momenta):
            rates[number] = 0.0
        hyper = self._hyper(rates, groups, step, progress.horizon)
        rate, decay = rate_and_decay(step, progress.horizon, layout)
        native = self._native(layout)
        lists = [targets, grads, momenta, *([offsets] if offsets else [])]
        is_native = is_native and native.fits(*lists, numbers=counts + prints + ends)
        point: _Point | None = None
        may_balance = not progress.is_balanced and has_gradient and len(still) < len(names)
        if not is_native or is_due(step) or may_balance:
            whole = [all_whole(targets), grads, *map(all_whole, (momenta, offsets))]
            point = _Point(*(dict(zip(names, tensors)) for tensors in whole))
        rows: dict[str, Tensor] = {}
        sizes = moved = None
        if point is not None and (is_due(step) or may_balance):
            may_move = has_gradient and not is_safe
            moved = _without(layout, still) if may_move else None
            point, rows, sizes = self._steered(point, slots, step, progress, layout, moved)
            progress = progress._replace(is_balanced=progress.is_balanced or may_balance)
        if rows:
            learned = Controls.from_outputs(rows["outputs"])
        elif self._held is not None and self._held[0] is layout:
            learned = self._held[1]
        else:
            learned = Controls.from_outputs(torch.stack([own["outputs"] for own in slots]))
        controls, hyper = _safe(learned, hyper) if is_safe else (learned, hyper)
        pace = self._pace(controls, hyper, layout)
        arguments = take = None
        new_momenta, masks = dict[str, Tensor](), dict[str, Tensor]()
        if is_native or point is None:
            here = grads if point is None else point.grads
            tensors = (targets, here, momenta, offsets, counts, prints, ends)
            take = partial(native.take, *tensors, pace=pace, rate=rate, decay=decay)
        else:
            factors = pace.factors(rate, decay)
            new_momenta = {name: ema(point.momenta[name], point.grads[name], factors.beta) for name in names}
            masks = _masks(point.grads, layout)
            arguments = (self._directions(new_momenta, masks, norms, step), factors, layout)
        return _Plan(
            arguments, take, point, new_momenta, masks, rows, layout, learned, moved, sizes, targets, slots, progress
        )

    def _steered(
        self,
        point: _Point,
        slots: list[dict[str, Tensor]],
        step: int,
        progress: Progress,
        layout: Layout,
        moved: Layout | None,
    ) -> tuple[_Point, dict[str, Tensor], Tensor | None]:
        """Begin in balance, and when it is due ask the meta-optimizer and teleport.

        Args:
            moved: A layout with the sites along which the parameters may move; None if they must not.

        Returns:
            The new point, new rows of the state, and sizes of the teleport.
        """
        sizes = None
        if moved is not None and not progress.is_balanced:
            *tensors, sizes = balanced(*point, moved)
            point = _Point(*tensors)
        if not is_due(step):
            return point, {}, sizes
        total_steps = progress.horizon.total_steps
        held = {key: torch.stack([own[key] for own in slots]) for key in ROW_KEYS}
        state = UpdateState(momenta=point.momenta, average_offsets=point.offsets, **held)
        state = self._meta_optimizer.control(
            point.params, point.grads, state, step=step, total_steps=total_steps, layout=layout
        )
        if moved is not None:
            *tensors, own_sizes = teleport(*point, Controls.from_outputs(state.outputs), moved)
            point = _Point(*tensors)
            sizes = own_sizes if sizes is None else torch.hypot(sizes, own_sizes)
        return point, {key: getattr(state, key) for key in ROW_KEYS}, sizes

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _finish(self, plan: _Plan, steps: dict[str, Step]) -> None:
        """Write what a step computed."""
        with self._swapping.lock:  # Whoever looks on from another thread sees all of a step or nothing of it.
            self._check_mode()
            self._write(plan, steps)
        self._progress = plan.progress._replace(num_steps=plan.progress.num_steps + 1)
        self._held = (plan.layout, plan.controls)
        sizes = plan.teleport_sizes
        if sizes is not None and plan.moved is not None:
            channels = torch.tensor([float(symmetry.size) for symmetry in plan.moved.spec], device=sizes.device)
            self._teleport_size = float((sizes.square() @ channels / channels.sum()).sqrt())
            self._teleport_sizes = plan.moved.teleport_sizes(sizes)

    def _write(self, plan: _Plan, steps: dict[str, Step]) -> None:
        step, horizon = plan.progress.num_steps, plan.progress.horizon
        targets, slots = plan.targets, plan.slots
        is_moved = plan.point is not None and plan.teleport_sizes is not None
        weights: list[float] = []
        starts: list[int] = []
        if self._has_average:
            starts = self._starts(plan)
            # The step in C notices by itself what was written, but for a teleport, which writes before it.
            if plan.take is None or is_moved:
                for number in written(targets, slots):
                    begin_again(slots[number], step)
                    starts[number] = step
            left = horizon.steps_left(step)
            by_start = {start: averaging_weight(step - start, left) for start in set(starts)}
            weights = [by_start[start] for start in starts]
        if plan.point is not None and is_moved:
            _move(targets, plan.point.params)
            _move([own["exp_avg"] for own in slots], plan.point.momenta)
            if self._has_average:
                _move([own[OFFSET] for own in slots], plan.point.offsets)
                self._take_fingerprints(targets, slots)
        for key, rows in plan.rows.items():
            _copy([own[key] for own in slots], dict(enumerate(rows.unbind(0))))
        if plan.take is not None:
            for number in plan.take(weights=weights):  # Their new average has one value so far, the new parameter.
                begin_again(slots[number], step)
                slots[number][END].fill_(step + 1)
                starts[number] = step
        elif plan.arguments is not None:
            _, factors, layout = plan.arguments
            _copy([own["exp_avg"] for own in slots], plan.momenta)
            offsets = [own[OFFSET] for own in slots] if self._has_average else None
            all_steps = [steps[name] for name in layout.names]
            masks = {layout.names.index(name): mask for name, mask in plan.masks.items()}
            _descend_in_place(targets, offsets, all_steps, masks, factors.shrinks, weights)
            torch._foreach_add_([own["step"] for own in slots], 1.0)
            if self._has_average:
                torch._foreach_add_([own[END] for own in slots], 1)
                self._take_fingerprints(targets, slots)
        if self._has_average:
            self._held_starts = (plan.layout, starts)

    def _starts(self, plan: _Plan) -> list[int]:
        """The steps with which the averages begin, after they have been brought up to date."""
        if self._held_starts is not None and self._held_starts[0] is plan.layout:
            return self._held_starts[
                1
            ]  # The step before was one of the same tensors, and nobody has changed their averages.
        for own in plan.slots:
            catch_up(own, plan.progress.num_steps, plan.progress.horizon)
        return [int(own[START]) for own in plan.slots]

    def _take_fingerprints(self, targets: list[Tensor], slots: list[dict[str, Tensor]]) -> None:
        """Remember what the parameters are, to notice who else writes into them."""
        torch._foreach_copy_([own[FINGERPRINT] for own in slots], list(fingerprints(targets).unbind()))

    def _entries(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Every parameter under its name, or its number, with its group."""
        params = [(param, group) for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return [(name, *entry) for name, entry in zip(names or map(str, range(len(params))), params)]

    def _new_slots(self, param: Tensor) -> dict[str, Tensor]:
        slots: dict[str, Tensor] = self.state[param]
        hidden = self._meta_optimizer.initial_hidden(1)[0]
        slots.update(initial_slots(as_real(param), hidden, average=self._has_average, step=self._progress.num_steps))
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

    def _horizon(self, step: int) -> Horizon:
        """The length of the run, which may have been changed in the groups since the last step."""
        horizon, total_steps = self._progress.horizon, self.param_groups[0]["total_steps"]
        return horizon if horizon.total_steps == total_steps else horizon.changed(total_steps, step)

    def _hyper(self, rates: list[float], groups: list[dict[str, Any]], step: int, horizon: Horizon) -> Hyper:
        if horizon.total_steps is not None and step >= horizon.total_steps:
            self._warn(
                f"step {step + 1} lies past total_steps={horizon.total_steps}: going on at the last rate. Give the length of the "
                "whole run (set_total_steps), or leave total_steps out.",
                once="past total_steps",
            )
        decays = [None if group["weight_decay"] is None else float(group["weight_decay"]) for group in groups]
        key = (rates, decays, horizon)
        if self._last_hyper is None or self._last_hyper[0] != key:
            self._check_schedule(horizon.total_steps)
            numbers = [math.nan if decay is None else decay for decay in decays]
            lr, weight_decay = (torch.tensor(values, dtype=torch.float32) for values in (rates, numbers))
            self._last_hyper = (key, Hyper(lr, weight_decay, horizon))
        return self._last_hyper[1]

    def _check_schedule(self, total_steps: int | None) -> None:
        """Warn of a scheduler on top of the schedule that is built in."""
        lrs = [float(group["lr"]) for group in self.param_groups]
        if self._first_lrs is None or len(self._first_lrs) != len(lrs):
            self._first_lrs = lrs
        elif total_steps is not None and self._first_lrs != lrs:
            self._warn(
                f"lr has changed from {self._first_lrs} to {lrs} in a run with total_steps={total_steps}, whose rate falls to "
                "zero by itself in the last 30 %: a scheduler multiplies with that. Leave the scheduler out (where a library "
                "makes one, ask for a constant one), or leave total_steps out.",
                once="scheduler",
            )

    def _rounding_errors(
        self, layout: Layout, norms: list[float], grads: list[Tensor], momenta: list[Tensor]
    ) -> list[int]:
        """Numbers of biases whose gradients are nothing but rounding errors, such as those before a normalisation.

        They are less than a few roundings of the gradient of the matrix of the same layer, and do not agree from step to step.
        Neither changes when the loss or the layer is scaled. Such a bias would otherwise walk at full length in any direction.
        """
        if self._biases is None or self._biases[0] is not layout:
            self._biases = (layout, _biases_of(layout))
        found = []
        for bias, matrix in self._biases[1]:
            grad = grads[bias]
            rounding = _ROUNDING_64 if grad.dtype == torch.float64 else _ROUNDING
            if 0.0 < norms[bias] < rounding * norms[matrix]:
                own, other = (in_full_precision(one).flatten() for one in (grad, whole(momenta[bias])))
                # Divided by their largest entries, since squares of very small numbers are no floats.
                own, other = (one / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny) for one in (own, other))
                if not float(own @ other) > _AGREEMENT * float(own.norm() * other.norm()):
                    found.append(bias)
        return found

    def _directions(
        self, momenta: dict[str, Tensor], masks: Mapping[str, Tensor], norms: list[float], step: int
    ) -> dict[str, Tensor]:
        """Momenta of the rows that have a gradient, zeros for the others, in a range in which squares are numbers."""
        if not all(1e-12 < norm < 1e12 or norm == 0.0 for norm in norms):
            self._unusual_until = step + _MEMORY
        if step < self._unusual_until:
            most = torch.stack(torch._foreach_norm(list(momenta.values()), math.inf)).tolist()
            scales = [1.0 if 1e-12 < norm < 1e12 or norm == 0.0 else norm for norm in most]
            momenta = {
                name: value if scale == 1.0 else value / scale for (name, value), scale in zip(momenta.items(), scales)
            }
        return {name: value * masks[name] if name in masks else value for name, value in momenta.items()}

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
        return Layout.of(params, spec, self._embeddings, depth=self._depth(), block_rows=self._block_rows)

    def _depth(self) -> Depth:
        """The depth of the model, or of all parameters here, whichever of them have a gradient in this step."""
        if self._tensor_names:
            params = {name: param for param, name in self._tensor_names.items()}
        else:
            params = {name: param for name, param, _ in self._entries()}
        shapes = {name: as_real(p).shape for name, p in params.items() if not isinstance(p, UninitializedParameter)}
        depth = Depth.of(shapes, self._embeddings, is_whole=bool(self._tensor_names))
        if not self._tensor_names and sum(matrix_shape(shape) is not None for shape in shapes.values()) == 1:
            self._warn(
                "an optimizer of a single matrix does not know the depth of the network, with which steps get shorter: it takes "
                "those of a network of one layer. Pass model=, the module that owns the parameters",
                once="depth",
            )
        return depth

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
        _check_group({**self.defaults, "total_steps": total_steps})
        taken = self._progress.num_steps
        if total_steps is not None and total_steps <= taken:
            raise ValueError(
                f"total_steps={total_steps} is not more than the {taken} steps that have been taken: finish_in(n) ends the run "
                "after n more"
            )
        for group in self.param_groups:
            group["total_steps"] = total_steps
        self._warned.discard("past total_steps")

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
        _check_group({**self.defaults, "total_steps": num_steps})
        self.set_total_steps(self._progress.num_steps + num_steps)

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
        with self._swapping.lock:
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
        with self._swapping.lock:
            if self._progress.is_eval:
                with torch.inference_mode(False):
                    swap_out(self._with_state(), self._progress.num_steps)
                self._progress = self._progress._replace(is_eval=False)
                self._held_starts = None

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
        with self._swapping.by_this_thread():
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
        with self._swapping.lock, torch.inference_mode(False):
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
                averages.update(dict.fromkeys(self._all_names.get(name, [name]), average))
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
        self._held_starts = None
        for _, own in pairs:
            catch_up(own, step, self._progress.horizon)
        if pairs:
            for number in written(*map(list, zip(*pairs))):
                begin_again(pairs[number][1], step)
        return pairs

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
            groups = [group for _, _, group in active]
            hyper = self._hyper([float(group["lr"]) for group in groups], groups, step, self._horizon(step))
            is_safe = self._is_guarded and progress.guard.num_safe_steps > 0
            controls = Controls.from_outputs(outputs)
            controls, hyper = _safe(controls, hyper) if is_safe else (controls, hyper)
            layout = self._layout_of({name: as_real(param) for name, param, _ in active}, None)
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
        self._progress = progress = self._progress._replace(horizon=self._horizon(self._progress.num_steps))
        is_open = self._has_average and progress.horizon.total_steps is None
        if is_open and progress.num_steps and not progress.has_shown_average:
            self._warn(
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
        hidden = self._meta_optimizer.initial_hidden(1)[0]
        state, groups, progress = read_state_dict(
            state_dict, self.param_groups, hidden, _check_group, average=self._has_average
        )
        with self._swapping.lock:
            self.__setstate__({"state": state, "param_groups": groups})
            self._progress, self._first_lrs = progress, None
            self._unusual_until = progress.num_steps + _MEMORY  # What the momentum remembers is not known.
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in self.__dict__.items() if key in _OWN_ATTRIBUTES}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = self._held_starts = self._biases = None
        self._last_pace = self._last_hyper = self._last_native = None
        if "_swapping" not in self.__dict__:  # a copy; loading comes here, too
            self._swapping, self._first_lrs = _Swapping(), None
        self.defaults.pop("differentiable", None)  # an option that torch adds, and of which there is none here
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)


class _Swapping:
    """Who may put the average in the place of the parameters: one thread at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while parameters or averages are written or read as a whole."""
        self._thread: int | None = None

    @contextmanager
    def by_this_thread(self) -> Iterator[None]:
        """A context that one thread at a time may enter, also again inside itself.

        Raises:
            RuntimeError: if another thread is inside.
        """
        thread = threading.get_ident()
        with self.lock:
            before = self._thread
            if before not in (None, thread):
                raise RuntimeError(
                    "another thread is inside averaged(): wait for it, or take averaged_parameters(), which moves nothing"
                )
            self._thread = thread
        try:
            yield
        finally:
            self._thread = before


def _biases_of(layout: Layout) -> list[tuple[int, int]]:
    """Numbers of biases, each with that of the matrix of its layer: by name, or else what comes before it with as many rows."""
    numbers = {name: number for number, name in enumerate(layout.names)}
    pairs = []
    last: str | None = None
    for name, shape in layout.shapes.items():
        if name in layout.matrices:
            last = name
        elif len(shape) == 1:
            own = next((n for n in (name.replace("bias", "weight"), last) if n in layout.matrices and n != name), None)
            if own is not None and layout.matrices[own][0] == shape[0]:
                pairs.append((numbers[name], numbers[own]))
    return pairs


def _without(layout: Layout, names: set[str]) -> Layout | None:
    """The layout with the sites on which none of these tensors lie; None if there are none."""
    sites = [site for site in layout.spec if not any(leg.name in names for leg in site.legs)]
    if not sites:
        return None
    return layout if len(sites) == len(layout.spec) else replace(layout, spec=SymmetrySpec(tuple(sites)))


def _masks(grads: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Which rows have a gradient, for the tensors of which some rows have none."""
    masks = {}
    for name, grad in grads.items():
        if int(torch.count_nonzero(grad)) < grad.numel():  # a quick look, since most gradients have no zeros at all
            mask = active_rows(name, grad, layout)
            if not bool(mask.all()):
                masks[name] = mask
    return masks


def _safe(controls: Controls, hyper: Hyper) -> tuple[Controls, Hyper]:
    """The prior, at a tenth of the rate that the user set."""
    prior = Controls.prior(controls.rate.shape[-1])
    return Controls(*(value.to(controls.rate) for value in prior)), hyper._replace(lr=_SAFE_RATE * hyper.lr)


def _all_norms(tensors: list[Tensor]) -> list[float]:
    tensors = [in_full_precision(tensor.detach()) for tensor in tensors]
    norms: list[float] = torch.stack(torch._foreach_norm(tensors)).tolist()
    for number, norm in enumerate(norms):
        if (
            not 1e-12 < norm < 1e18 and tensors[number].numel()
        ):  # squares of very large or very small numbers are no floats
            most = tensors[number].abs().max()
            is_usual = bool(most > 0) and bool(most.isfinite())
            norms[number] = float(most) * float((tensors[number] / most).norm()) if is_usual else float(most)
    return norms


def _copy(targets: list[Tensor], values: Mapping[Any, Tensor]) -> None:
    """Write values, which are whole, where the targets lie; both are in one order."""
    torch._foreach_copy_(all_local(targets), all_parts_like(list(values.values()), targets))


def _move(targets: list[Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values, which are whole and in the same order, where the targets lie: one at a time, in place where they lie there."""
    for target, (name, source) in zip(targets, unmoved(values).items()):
        if source is target and isinstance(values, Moved):
            values.write(name)
        elif source is not target:
            local(target).copy_(local(part_like(values[name], target)))


def _descend_in_place(
    targets: list[Tensor],
    offsets: list[Tensor] | None,
    steps: list[Step],
    masks: dict[int, Tensor],
    shrinks: Tensor,
    weights: list[float],
) -> None:
    """Shrink the parameters and take the steps, where they lie, but not in rows that are masked; then move their averages."""
    here = all_local(targets)
    if any(part is not target for part, target in zip(here, targets)):
        moves = [step.product().view(target.shape) for step, target in zip(steps, targets)]
        steps = list(map(Step, all_parts_like(moves, targets)))
    if offsets is None:
        offsets, weights = [], []
    numbers = range(len(here))
    small = [number for number in numbers if steps[number].lengths is None]
    large = [[number] for number in numbers if steps[number].lengths is not None]  # a copy of one at a time
    local_offsets, all_shrinks = all_local(offsets), shrinks.tolist()
    for group in [small, *large] if small else large:
        own = [here[number] for number in group]
        old = {number: here[number].clone() for number in group if offsets or number in masks}
        _take_steps(own, [steps[number] for number in group], [all_shrinks[number] for number in group])
        for number in masks.keys() & set(group):
            mask = local(part_like(masks[number].expand(targets[number].shape), targets[number]))
            here[number].copy_(torch.where(mask, here[number], old[number]))
        if offsets:
            own_offsets = [local_offsets[number] for number in group]
            own_weights = [weights[number] for number in group]
            torch._foreach_copy_(own_offsets, list(map(average_offset, own_offsets, old.values(), own, own_weights)))


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


_OWN_FILES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
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
        "_has_average",
        "_all_names",
        "_unusual_until",
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


def _check_parameter(param: Tensor, average: bool) -> None:
    """Raise ``ValueError`` for a tensor that can never be optimized here, or of which no average can be kept."""
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
    elif average and not can_be_averaged(param):
        reason = (
            f"is {param.layout}, {param.dtype}: no average of such iterates can be kept. Use average=False, or dense parameters of "
            "16, 32 or 64 bits"
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
