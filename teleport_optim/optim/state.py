"""State of a tensor, and reading it from a state dict: checked as a whole before anything is used."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teleport_optim.optim.averaging import AVERAGE_SLOTS, END, FINGERPRINT, ITERATE, START, initial_average
from teleport_optim.optim.records import UpdateState, slot_dtype
from teleport_optim.optim.schedule import Horizon
from teleport_optim.optim.shapes import as_real
from teleport_optim.optim.sharding import is_distributed, local_tensor, shard_like

__all__ = ["CONTROLLER_KEYS", "OptimizerStateError", "Progress", "Slots", "initial_slots", "read_state_dict"]

CONTROLLER_KEYS = ("hidden", "outputs", "log_grad_rms")
"""Slots that hold the row of a tensor in the fields of UpdateState of the same name."""
_COUNTS = ("step", "skipped")
_MAX_COUNT = 2**53
"""Counts below it are exact as floats; nothing ever takes so many steps."""

Slots = dict[str, Tensor]


class OptimizerStateError(ValueError):
    """A state dict that is damaged, or is not one of this optimizer with these parameters."""


class Progress(NamedTuple):
    """Counts and switches that all tensors share. In a state dict they lie in every parameter group, as plain numbers.

    Attributes:
        num_steps: Steps taken; skipped ones do not count.
        num_skipped_steps: Steps that were not taken because a gradient was not finite.
        is_eval: Whether the average of the iterates is in the place of the parameters.
        has_shown_average: Whether somebody has asked for the average.
        is_balanced: Whether the run has begun, in balance.
        horizon: Length of the run, and what is known of its last change. The length itself is an option of every group.
    """

    num_steps: int = 0
    num_skipped_steps: int = 0
    is_eval: bool = False
    has_shown_average: bool = False
    is_balanced: bool = False
    horizon: Horizon = Horizon()

    def entries(self) -> dict[str, int | float]:
        """As entries of a parameter group."""
        counts = {name: getattr(self, name) for name in _COUNTERS}
        horizon = {"total_steps_changed_at": self.horizon.changed_at, "total_steps_level": self.horizon.level}
        return counts | horizon

    @classmethod
    def pop_from(cls, group: dict[str, Any], num_steps: int) -> Progress:
        """Take the entries out of a group again.

        torch.distributed.checkpoint drops them where it flattens a state: then ``num_steps`` counts, and the run has begun.
        """
        values: dict[str, Any] = {}
        for key, default in cls(num_steps=num_steps, is_balanced=num_steps > 0).entries().items():
            value = group.pop(key, default)
            if not _is_like(value, default):
                raise OptimizerStateError(f"{key} in a parameter group is {value!r}, expected a number as {default!r}")
            values[key] = type(default)(value)
        level = values["total_steps_level"]
        if not 0.0 < level <= 1.0:
            raise OptimizerStateError(f"total_steps_level in a parameter group is {level!r}, expected a share above 0")
        horizon = Horizon(group.get("total_steps"), values["total_steps_changed_at"], level)
        return cls(**{name: values[name] for name in _COUNTERS}, horizon=horizon)


_COUNTERS = tuple(name for name in Progress._fields if name != "horizon")


def _is_like(value: Any, default: float) -> bool:
    """Whether a number that was loaded is of the kind of its default: a switch, a count, or any number."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and 0 <= value < _MAX_COUNT
    return isinstance(value, int | float) and not math.isnan(value)


def initial_slots(param: Tensor, hidden: Tensor | None, *, average: bool, step: int) -> Slots:
    """Slots of ``param`` before its first step.

    Momentum and the average's offset are bfloat16, but float64 for parameters of that; the rest is float32.

    Args:
        param: The parameter.
        hidden: The controller's initial hidden state of one tensor, ``[size]``; None without a controller.
        average: Whether an average of the iterates is kept.
        step: Number of the step.
    """
    rows = {}
    if hidden is not None:
        initial = UpdateState.initial({}, hidden.unsqueeze(0))
        rows = {key: getattr(initial, key)[0].to(param.device) for key in CONTROLLER_KEYS}
    counts = {key: torch.zeros((), dtype=torch.float32) for key in _COUNTS}
    momentum = torch.zeros_like(param, dtype=slot_dtype(param))
    return {**counts, "exp_avg": momentum, **(initial_average(param, step) if average else {}), **rows}


@contextmanager
def _own_errors() -> Iterator[None]:
    """A damaged state dict may hold anything: whatever it leads to is an error of ours."""
    try:
        yield
    except OptimizerStateError:
        raise
    except Exception as error:
        raise OptimizerStateError(f"a state dict that cannot be used: {error}") from error


@_own_errors()
def read_state_dict(
    state_dict: Any,
    groups: Sequence[Mapping[str, Any]],
    hidden: Tensor | None,
    check_group: Callable[[Mapping[str, Any]], None],
    average: bool,
) -> tuple[dict[Tensor, Slots], list[dict[str, Any]], Progress]:
    """The state of every parameter, the parameter groups, and the counts that are in a state dict; nothing is aliased.

    Parameters are matched by name where both sides have the same names, else by order.

    Args:
        state_dict: What ``state_dict()`` gave.
        groups: The groups of the optimizer that loads it.
        hidden: The controller's initial hidden state of one tensor; None without a controller.
        check_group: Raises ``ValueError`` or ``TypeError`` for bad options of a group.
        average: Whether the optimizer keeps an average of the iterates.

    Raises:
        OptimizerStateError: saying what does not fit.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise OptimizerStateError("a state dict of an optimizer has the keys 'state' and 'param_groups'")
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    keys = _keys_of(saved_groups)
    if not isinstance(saved_state, Mapping):
        raise OptimizerStateError(f"'state' must be a mapping, got {type(saved_state).__name__}")
    if [len(own) for own in keys] != [len(group["params"]) for group in groups]:
        raise OptimizerStateError(
            f"the parameter groups loaded have {[len(own) for own in keys]} parameters, those of the optimizer "
            f"{[len(group['params']) for group in groups]}: make the optimizer with the same parameters"
        )
    params = _matched(saved_groups, keys, groups)
    state: dict[Tensor, Slots] = defaultdict(dict)  # A tensor without state gets it at its first step.
    for key, slots in saved_state.items():
        if key not in params:
            old = " (states of before the first release cannot be loaded: load the weights, and begin with a new optimizer)"
            raise OptimizerStateError(
                f"there is state for {key!r}, which is in no parameter group{old if key == 'meta_optimizer' else ''}"
            )
        if not isinstance(slots, Mapping) or slots:
            _check_keys(key, slots, ("exp_avg", *_COUNTS, *(() if hidden is None else CONTROLLER_KEYS)))
    counts = [own["step"] for own in saved_state.values() if isinstance(own, Mapping) and "step" in own]
    num_steps = max(map(int, counts), default=0)
    new_groups = []
    all_progress = set()
    for saved, group in zip(saved_groups, groups):
        new = copy.deepcopy({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        all_progress.add(Progress.pop_from(new, num_steps))
        own = {key: group[key] for key in ("params", "param_names") if key in group}
        try:
            check_group({**group, **new, **own})
        except (TypeError, ValueError) as error:
            raise OptimizerStateError(f"a parameter group cannot be used: {error}") from error
        new_groups.append({**new, **own})
    if len(all_progress) > 1 or len({group.get("total_steps") for group in new_groups}) > 1:
        raise OptimizerStateError("the parameter groups differ in what they share: the counts of steps and total_steps")
    progress = all_progress.pop()
    if progress.is_eval and not average:
        raise OptimizerStateError(
            "the state was saved while the average of the iterates was in the place of the parameters, and this optimizer keeps "
            "none: load it into one with average=True, or call train() before saving"
        )
    for key, slots in saved_state.items():
        if not isinstance(slots, Mapping) or slots:
            state[params[key]] = _read_slots(key, slots, params[key], hidden, average, progress)
    return state, new_groups, progress


def _keys_of(groups: Any) -> list[list[Any]]:
    """The keys of the parameters in every group."""
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Mapping) for group in groups):
        raise OptimizerStateError("'param_groups' must be a list of dictionaries")
    keys = [group.get("params") for group in groups]
    if not all(isinstance(own, list | tuple) and all(isinstance(key, int | str) for key in own) for own in keys):
        raise OptimizerStateError("every parameter group must list its parameters, by number or name, under 'params'")
    flat = [key for own in keys for key in own]
    if len(set(flat)) != len(flat):
        raise OptimizerStateError("a parameter is in the groups more than once")
    return keys


def _matched(
    saved_groups: Sequence[Mapping[str, Any]], keys: Sequence[Sequence[Any]], groups: Sequence[Mapping[str, Any]]
) -> dict[Any, Tensor]:
    """Which parameter a key of the state dict stands for."""
    params = [param for group in groups for param in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    flat = [key for own in keys for key in own]
    saved_names = [name for group in saved_groups for name in group.get("param_names") or ()]
    if all(isinstance(key, str) for key in flat):
        saved_names = flat
    if names and len(saved_names) == len(flat) and sorted(map(str, saved_names)) == sorted(names):
        by_name = dict(zip(names, params))
        return {key: by_name[str(name)] for key, name in zip(flat, saved_names)}
    return dict(zip(flat, params))


def _read_slots(
    key: Any, slots: Mapping[str, Any], param: Tensor, hidden: Tensor | None, average: bool, progress: Progress
) -> Slots:
    param = as_real(param)
    expected = initial_slots(param, hidden, average=average, step=progress.num_steps)
    if not average:
        slots = {name: value for name, value in slots.items() if name not in AVERAGE_SLOTS}
    elif not slots.keys() & set(AVERAGE_SLOTS):  # Saved without an average: it begins here.
        slots = {**slots, **{name: expected[name] for name in AVERAGE_SLOTS}}
    if progress.is_eval:
        expected[ITERATE] = param.detach()
    _check_keys(key, slots, expected)
    if ITERATE in slots and ITERATE not in expected:
        raise OptimizerStateError(
            f"the state of parameter {key!r} holds {ITERATE!r}, but was not saved in evaluation mode"
        )
    read = {name: _read_slot(key, name, slots[name], like, progress.num_steps) for name, like in expected.items()}
    if average and is_distributed(param):  # It was that of a part of the tensor, which may lie elsewhere now.
        read[FINGERPRINT].zero_()
    # Wrappers, such as Lookahead, keep slots of their own beside ours: they are given back as they were.
    read |= copy.deepcopy({name: value for name, value in slots.items() if name not in expected})
    if average and not read[START] <= read[END]:
        raise OptimizerStateError(f"the average of parameter {key!r} ends before it begins: {read[START]}, {read[END]}")
    return read


def _check_keys(key: Any, slots: Any, expected: Iterable[str]) -> None:
    """Raise ``OptimizerStateError`` for slots that are none, or are not all that are expected."""
    if not isinstance(slots, Mapping) or not set(slots) >= set(expected):
        found: object = sorted(map(str, slots)) if isinstance(slots, Mapping) else type(slots).__name__
        raise OptimizerStateError(
            f"the state of parameter {key!r} holds {found}, expected {sorted(expected)}: it is of another optimizer or a "
            "newer version"
        )


def _read_slot(key: Any, name: str, value: Any, like: Tensor, num_steps: int) -> Tensor:
    """One slot, checked and copied to where ``like`` is."""
    is_right = (
        isinstance(value, Tensor) and value.shape == like.shape and value.layout == torch.strided and not value.is_meta
    )
    is_integer = like.dtype == torch.int64
    if not is_right or (value.dtype != torch.int64 if is_integer else not value.is_floating_point()):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        kind = "64-bit integers" if is_integer else "real numbers"
        raise OptimizerStateError(
            f"{name} of parameter {key!r} is {found}, expected a tensor of {kind} of shape {tuple(like.shape)}"
        )
    new = value.detach().to(device=like.device, dtype=like.dtype, copy=True)
    values = local_tensor(new)
    is_good = values.isfinite() | values.isnan() if name == "log_grad_rms" else values.isfinite()
    if name in (START, END):
        is_good = (values >= 0) & (values <= num_steps)
    if not bool(is_good.all()) or (name in _COUNTS and not (values >= 0 and values == values.floor())):
        raise OptimizerStateError(
            f"{name} of parameter {key!r} holds values that cannot be: {local_tensor(value).flatten()[:4].tolist()}"
        )
    return shard_like(new, like)
