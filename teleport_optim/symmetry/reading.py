"""Which entries of its parameters a model reads, and whether that depends on the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from teleport_optim.symmetry.labels import Array, Labels
from teleport_optim.symmetry.operations import SELECTIONS, Call
from teleport_optim.symmetry.theories import Theory, Value

__all__ = ["Readings", "Scout"]

Choice = tuple[str, tuple[int, ...], str]
"""A choice of entries along an axis: the operation, the shape of the tensor, and what else the operation takes."""


@dataclass
class _Reading:
    """What is read of a tensor that is computed from parameters alone.

    Attributes:
        value: The tensor.
        parts: What was taken from it.
        is_whole: Whether an operation reads all of it.
    """

    value: Value
    parts: list[Value] = field(default_factory=list)
    is_whole: bool = False


class Readings:
    """What the operations of a model read of what is computed from its parameters alone.

    Args:
        theories: The groups.
    """

    def __init__(self, theories: Sequence[Theory]) -> None:
        self._theories = theories
        self._readings: dict[Any, _Reading] = {}
        self._choices: dict[Choice, list[tuple[Value, int]]] = {}

    def _of(self, value: Value) -> _Reading:
        key = value.source.name if value.source is not None else id(value)
        return self._readings.setdefault(key, _Reading(value))

    def note(self, call: Call, values: Sequence[Value], results: Sequence[Value]) -> None:
        """Take note of what an operation reads.

        Args:
            call: The operation.
            values: Its tensors.
            results: The tensors that it returns.
        """
        for position, value in enumerate(values):
            if value.reads_inputs or value.is_still:
                continue
            if position > 0 or call.name not in SELECTIONS:
                self._of(value).is_whole = True
                continue
            self._of(value).parts += results
            if isinstance(call["dim"], int):
                choice = _choice(call.name, value.shape, call.arguments)
                self._choices.setdefault(choice, []).append((value, call["dim"] % len(value.shape)))

    def note_use(self, value: Value) -> None:
        """Take note that all of a tensor is used in a way that is no operation."""
        if not value.reads_inputs and not value.is_still:
            self._of(value).is_whole = True

    @property
    def has_choices(self) -> bool:
        """Whether the model takes some entries of a parameter by their numbers."""
        return bool(self._choices)

    def pin_unread(self) -> None:
        """Let the entries of parameters that nothing reads not move: longer inputs may read them."""
        for reading in self._readings.values():
            if reading.is_whole or not reading.parts:
                continue
            for theory in self._theories:
                unread = np.setdiff1d(_units(theory.known(reading.value)), self._units_read(theory, reading))
                theory.units.fix(unread)

    def _units_read(self, theory: Theory, reading: _Reading) -> Array:
        if reading.is_whole:
            return _units(theory.known(reading.value))
        parts = [self._readings.get(id(part)) for part in reading.parts]
        return np.concatenate([_units(()), *(self._units_read(theory, part) for part in parts if part is not None)])

    def pin_choices(self, choices: Iterable[Choice]) -> None:
        """Let nothing move along the axes of parameters along which ``choices`` are made."""
        for choice in choices:
            for value, axis in self._choices.get(choice, []):
                for theory in self._theories:
                    theory.fix(one for one in theory.settle(value) if axis in one.axes)


def _units(labels: Iterable[Labels]) -> Array:
    """The units in ``labels``, in one row."""
    return np.concatenate([np.zeros(0, np.int64), *(one.units.ravel() for one in labels)])


def _choice(name: str, shape: Sequence[int], arguments: Mapping[str, Any]) -> Choice:
    return name, tuple(shape), str([_plain(given) for given in arguments.values()])


def _plain(given: Any) -> Any:
    """An argument with nothing but its place where it is a tensor."""
    if isinstance(given, (list, tuple)):
        return [_plain(entry) for entry in given]
    return None if isinstance(given, (Tensor, Value)) else given


class Scout:
    """Takes note of a model's path and of what it chooses from its parameters, and no more.

    Attributes:
        path: The names of the operations, and of the parameters that they read.
        choices: What is taken by its numbers from what does not depend on the inputs.
    """

    def __init__(self) -> None:
        self.path: list[tuple[str, ...]] = []
        self.choices: set[Choice] = set()

    def note(self, name: str, values: Sequence[Value], arguments: Mapping[str, Any]) -> None:
        """Take note of an operation.

        Args:
            name: Its name.
            values: Its tensors, as far as the inputs and parameters tell.
            arguments: What it takes.
        """
        self.path.append((name, *(value.source.name for value in values if value.source is not None)))
        if name in SELECTIONS and values and not any(value.reads_inputs for value in values):
            self.choices.add(_choice(name, values[0].shape, arguments))
