"""One step in three parts: gather the tensors, steer at control steps, and write the result where the tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from teleport_optim.optim.averaging import END, FINGERPRINT, OFFSET, START, begin_again, catch_up, written
from teleport_optim.optim.checks import check_gradients
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.fingerprints import fingerprints
from teleport_optim.optim.kernels import inplace, native
from teleport_optim.optim.kernels.native import NativeStep, are_plain
from teleport_optim.optim.orthogonalise import Step
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import BaseCoefficients, HyperParameters, StepCoefficients, UpdateState
from teleport_optim.optim.rounding import bias_pairs
from teleport_optim.optim.rule import Control, ema
from teleport_optim.optim.schedule import Horizon, averaging_weight, is_control_step
from teleport_optim.optim.shapes import as_real
from teleport_optim.optim.sharding import full_tensors
from teleport_optim.optim.state import CONTROLLER_KEYS, Progress, Slots
from teleport_optim.optim.teleport import Point, balance, teleport
from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["Controller", "StepCache", "StepPlan", "StepTensors"]


class Controller(Protocol):
    """A learned part of an optimizer, which sets the controls; :class:`~teleport_optim.MetaOptimizer` is one."""

    @property
    def block_rows(self) -> int:
        """Number of rows of a matrix whose steps are made orthogonal to each other."""
        ...

    @property
    def control(self) -> Control:
        """Sets the controls at a control step."""
        ...

    def initial_hidden(self, num_tensors: int) -> Tensor:
        """Hidden state before the first control step, ``[num_tensors, size]``."""
        ...


@dataclass
class StepTensors:
    """The tensors of one step, those that have a gradient, all lists in one order.

    Attributes:
        names: Names of the parameters.
        params: The parameters, as real numbers.
        grads: Gradients to compute_steps, put together from all processes.
        slots: State of every parameter.
        is_plain: Whether all are contiguous ones of the usual dtypes on the CPU, as the step in C takes them.
    """

    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    slots: list[Slots]
    is_plain: bool
    momenta: list[Tensor] = field(init=False)
    counts: list[Tensor] = field(init=False)
    offsets: list[Tensor] = field(init=False)
    fingerprints: list[Tensor] = field(init=False)
    ends: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.momenta = [own["exp_avg"] for own in self.slots]
        self.counts = [own["step"] for own in self.slots]
        has_average = bool(self.slots) and OFFSET in self.slots[0]
        averages = self.slots if has_average else []
        self.offsets, self.fingerprints, self.ends = (
            [own[key] for own in averages] for key in (OFFSET, FINGERPRINT, END)
        )
        self.is_plain = (
            self.is_plain
            and are_plain(self.params + self.counts)
            and are_plain(self.momenta + self.offsets, torch.bfloat16)
            and are_plain(self.fingerprints + self.ends, torch.int64)
        )

    @classmethod
    def gather(
        cls,
        names: list[str],
        params: list[Tensor],
        maximize: Sequence[bool],
        slots_of: Callable[[Tensor], Slots],
        *,
        may_be_native: bool,
    ) -> StepTensors:
        """The tensors of a step of these parameters.

        Raises:
            RuntimeError: for sparse gradients or parameters on several devices; nothing has changed then.
        """
        grads: list[Tensor] = [param.grad for param in params]  # type: ignore[misc]
        is_plain = may_be_native and are_plain(grads)
        if not is_plain:
            check_gradients(names, params, grads)
        slots = [slots_of(param) for param in params]
        if not is_plain:
            params, grads = list(map(as_real, params)), list(map(as_real, grads))
        tensors = cls(names, params, full_tensors(grads), slots, is_plain)
        if not tensors.is_plain or any(maximize):
            tensors.grads = [_to_descend(*pair) for pair in zip(tensors.grads, maximize)]
        return tensors

    def norms(self) -> list[float]:
        """Euclidean norms of the gradients; not finite where an entry is not."""
        return (native.all_norms if self.is_plain else inplace.all_norms)(self.grads)

    def whole(self) -> Point:
        """Whole tensors by name."""
        lists = (full_tensors(self.params), self.grads, full_tensors(self.momenta), full_tensors(self.offsets))
        return Point(*(dict(zip(self.names, tensors)) for tensors in lists))

    def fits(self, step: NativeStep) -> bool:
        """Whether the step in C can be taken: all tensors are plain, and of the sizes that it was made for."""
        lists = [self.params, self.grads, self.momenta, *([self.offsets] if self.offsets else [])]
        return self.is_plain and step.fits(*lists, numbers=self.counts + self.fingerprints + self.ends)

    def take_fingerprints(self) -> None:
        """Remember what the parameters are, to notice who else writes into them."""
        if self.offsets:
            torch._foreach_copy_(self.fingerprints, list(fingerprints(self.params).unbind()))


def _to_descend(grad: Tensor, maximize: bool) -> Tensor:
    """The gradient to descend; that of float16 in float32, whose range teleports need."""
    grad = grad.float() if grad.dtype == torch.float16 else grad
    return -grad if maximize else grad


class StepCache:
    """Numbers that steps of the same tensors share; dropped as a whole when tensors, symmetries or state change.

    Attributes:
        table: The table of the tensors, whose names are the key.
        native: The step in C for them.
        bias_pairs: Biases with the matrices of their layers.
        controls: Last controls; None before the first step.
        starts: The steps with which the averages begin; None where they have to be read.
    """

    def __init__(self, table: ParameterTable) -> None:
        self.table = table
        self.native = NativeStep(table)
        self.bias_pairs = bias_pairs(table)
        self.controls: Controls | None = None
        self.starts: list[int] | None = None
        self._hyper: tuple[tuple[Any, ...], HyperParameters] | None = None
        self._base: tuple[Controls, HyperParameters, BaseCoefficients] | None = None

    def hyper(self, rates: list[float], decays: list[float], horizon: Horizon) -> HyperParameters:
        """Settings of the user, which rarely change from step to step."""
        key = (rates, decays, horizon)
        if self._hyper is None or self._hyper[0] != key:
            self._hyper = (key, HyperParameters.of(*key))
        return self._hyper[1]

    def base(self, controls: Controls, hyper: HyperParameters) -> BaseCoefficients:
        """Base coefficients under these controls, which most steps share with the step before."""
        if self._base is None or self._base[0] is not controls or self._base[1] is not hyper:
            self._base = (controls, hyper, BaseCoefficients.of(controls, hyper, self.table))
        return self._base[2]

    def starts_of(self, slots: list[Slots], step: int, horizon: Horizon) -> list[int]:
        """The steps with which the averages begin, after they have been brought up to date."""
        # If they are known, the step before was one of the same tensors, and nobody has changed their averages.
        if self.starts is not None:
            return self.starts
        for own in slots:
            catch_up(own, step, horizon)
        return [int(own[START]) for own in slots]


@dataclass
class StepPlan:
    """A step that is ready to be taken. A compiled momentum step reads ``arguments`` alone, and is guarded by nothing else."""

    arguments: tuple[dict[str, Tensor], StepCoefficients, ParameterTable] | None = field(init=False, default=None)
    """Those of :func:`~teleport_optim.optim.orthogonalise.compute_steps`; None where the step is taken in C."""
    tensors: StepTensors
    cache: StepCache
    progress: Progress
    controls: Controls = field(init=False)
    take: Callable[..., list[int]] | None = field(init=False, default=None)
    """The momentum step in C."""
    point: Point | None = field(init=False, default=None)
    """Where the step is taken from, if it is not where the tensors lie."""
    momenta: dict[str, Tensor] = field(init=False, default_factory=dict)
    """New momenta; none where the step is taken in C."""
    masks: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Which rows have a gradient, of tensors of which some have none."""
    controller_slots: dict[str, Tensor] = field(init=False, default_factory=dict)
    """New state of the controller, after a control step."""
    moved: ParameterTable | None = field(init=False, default=None)
    """The sites along which the parameters move; None if they do not."""
    teleport_sizes: Tensor | None = field(init=False, default=None)

    def steer(self, control: Control | None, still: set[str], *, may_balance: bool, may_move: bool) -> None:
        """Begin in balance, and at a control step set the controls and teleport.

        Args:
            control: Sets the controls; without it they stay at their prior, with which no teleport moves anything.
            still: Names of the tensors that must not move, since their rate is 0.
            may_balance: Whether this is the first step that may move to the balanced point.
            may_move: Whether the parameters may move along their orbit at all.
        """
        step, slots = self.progress.num_steps, self.tensors.slots
        table, point = self.cache.table, self.tensors.whole()
        self.moved = _without(table, still) if may_move else None
        if self.moved is not None and not self.progress.is_balanced:
            point, self.teleport_sizes = balance(point, self.moved)
        self.progress = self.progress._replace(is_balanced=self.progress.is_balanced or may_balance)
        if is_control_step(step) and control is not None:
            held = {key: torch.stack([own[key] for own in slots]) for key in CONTROLLER_KEYS}
            state = UpdateState(momenta=point.momenta, average_offsets=point.offsets, **held)
            total_steps = self.progress.horizon.total_steps
            state = control(point.params, point.grads, state, step=step, total_steps=total_steps, table=table)
            self.controller_slots = {key: getattr(state, key) for key in CONTROLLER_KEYS}
            if self.moved is not None:
                point, sizes = teleport(point, Controls.from_outputs(state.outputs), self.moved)
                self.teleport_sizes = sizes if self.teleport_sizes is None else torch.hypot(self.teleport_sizes, sizes)
        self.point = point

    def take_controls(self) -> None:
        """Read the controls: those that have just been set, those of the step before, or those in the state."""
        slots = self.tensors.slots
        if self.controller_slots:
            self.controls = Controls.from_outputs(self.controller_slots["outputs"])
        elif self.cache.controls is not None:
            self.controls = self.cache.controls
        elif "outputs" in slots[0]:
            self.controls = Controls.from_outputs(torch.stack([own["outputs"] for own in slots]))
        else:
            prior = Controls.prior(len(slots))
            self.controls = Controls(*(value.to(self.tensors.params[0].device) for value in prior))

    def choose_kernel(
        self, base: BaseCoefficients, rate: float, decay: float, *, is_native: bool, is_unusual: bool
    ) -> None:
        """Make the momentum step ready, in C or in torch.

        Args:
            base, rate, decay: The controls' share in the step, and the prior rate and decay that they multiply.
            is_native: Whether it is taken in C.
            is_unusual: Whether a square of an entry of a momentum may be no float.
        """
        tensors = self.tensors
        if is_native:
            grads = tensors.grads if self.point is None else self.point.grads
            lists = (tensors.params, grads, tensors.momenta, tensors.offsets)
            numbers = (tensors.counts, tensors.fingerprints, tensors.ends)
            self.take = partial(self.cache.native.take, *lists, *numbers, base=base, rate=rate, decay=decay)
            return
        point = tensors.whole() if self.point is None else self.point
        coefficients, table = base.coefficients(rate, decay), self.cache.table
        self.momenta = {name: ema(point.momenta[name], point.grads[name], coefficients.beta) for name in tensors.names}
        self.masks = inplace.gradient_masks(point.grads, table)
        directions = inplace.in_range(self.momenta) if is_unusual else self.momenta
        directions = {
            name: value * self.masks[name] if name in self.masks else value for name, value in directions.items()
        }
        self.arguments = (directions, coefficients, table)

    def write(self, steps: Mapping[str, Step]) -> None:
        """Write everything that the step changes; ``steps`` are those of the kernel in torch."""
        tensors, step, horizon = self.tensors, self.progress.num_steps, self.progress.horizon
        params, slots = tensors.params, tensors.slots
        is_moved = self.point is not None and self.teleport_sizes is not None
        starts: list[int] = []
        weights: list[float] = []
        if tensors.offsets:
            starts = self.cache.starts_of(slots, step, horizon)
            # The step in C notices by itself what was written, but for a teleport, which writes before it.
            if self.take is None or is_moved:
                for number in written(params, slots):
                    begin_again(slots[number], step)
                    starts[number] = step
            left = horizon.steps_left(step)
            by_start = {start: averaging_weight(step - start, left) for start in set(starts)}
            weights = [by_start[start] for start in starts]
        if is_moved:
            self._write_teleport()
        for key, rows in self.controller_slots.items():
            inplace.copy_all([own[key] for own in slots], rows.unbind(0))
        if self.take is not None:
            for number in self.take(weights=weights):  # Their new average has one value so far, the new parameter.
                begin_again(slots[number], step)
                slots[number][END].fill_(step + 1)
                starts[number] = step
        elif self.arguments is not None:
            _, coefficients, table = self.arguments
            inplace.copy_all(tensors.momenta, list(self.momenta.values()))
            masks = {table.names.index(name): mask for name, mask in self.masks.items()}
            all_steps = [steps[name] for name in table.names]
            inplace.take_steps(params, tensors.offsets, all_steps, masks, coefficients.decay_factors, weights)
            torch._foreach_add_(tensors.counts, 1.0)
            if tensors.ends:
                torch._foreach_add_(tensors.ends, 1)
            tensors.take_fingerprints()
        self.cache.controls = self.controls
        self.cache.starts = starts if tensors.offsets else None

    def _write_teleport(self) -> None:
        """Move parameters, momenta and averages, where they lie, to the point that the step is taken from."""
        assert self.point is not None
        tensors = self.tensors
        inplace.move_all(tensors.params, self.point.params)
        inplace.move_all(tensors.momenta, self.point.momenta)
        if tensors.offsets:
            inplace.move_all(tensors.offsets, self.point.offsets)
        tensors.take_fingerprints()

    def teleport_size(self) -> float:
        """RMS over channels of the log-scale by which the parameters teleport; 0 if they do not."""
        if self.teleport_sizes is None or self.moved is None:
            return 0.0
        channels = torch.tensor(
            [float(symmetry.size) for symmetry in self.moved.spec], device=self.teleport_sizes.device
        )
        return float((self.teleport_sizes.square() @ channels / channels.sum()).sqrt())


def _without(table: ParameterTable, names: set[str]) -> ParameterTable | None:
    """The table with the sites on which none of these tensors lie; None if there are none."""
    sites = [site for site in table.spec if not any(leg.name in names for leg in site.legs)]
    if not sites:
        return None
    return table if len(sites) == len(table.spec) else replace(table, spec=SymmetrySpec(tuple(sites)))
