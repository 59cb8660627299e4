"""Entries of parameters that a model reads, and the path that it takes.

Both may depend on the sizes of the inputs: a table of positions is read up to the length of a sequence. Entries that no run reads
do not move, since longer inputs may read them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from teleport_optim.symmetry.search.analysis import ChannelAnalysis
from teleport_optim.symmetry.search.channels import Array, Channels
from teleport_optim.symmetry.search.graph import Call, Graph, Value
from teleport_optim.symmetry.search.operations import SELECTIONS, VIEWS

__all__ = ["Path", "Readings"]

Choice = tuple[str, tuple[int, ...], str]
"""Choice of entries along an axis: the operation, the shape of the tensor, and the other arguments."""


@dataclass
class _Reading:
    """Parts that are read of a tensor that is computed from parameters alone.

    Attributes:
        value: The tensor.
        parts: The tensors that were taken from it.
        is_whole: Whether a call reads all of it.
    """

    value: Value
    parts: list[Value] = field(default_factory=list)
    is_whole: bool = False


class Readings:
    """Parts that calls read of the parameters, and of tensors that are computed from parameters alone.

    Args:
        analyses: The groups.
    """

    def __init__(self, analyses: Sequence[ChannelAnalysis]) -> None:
        self._analyses = analyses
        self._readings: dict[Any, _Reading] = {}
        self._choices: dict[Choice, list[tuple[Value, int]]] = {}

    def _of(self, value: Value) -> _Reading:
        key = value.source.name if value.source is not None else id(value)
        return self._readings.setdefault(key, _Reading(value))

    def note(self, call: Call) -> None:
        """Note which tensors a call reads, and which parts."""
        written = {write.output for write in call.writes}
        results = [result for number, result in enumerate(call.results) if number not in written]
        for number, value in enumerate(call.values):
            if value.reads_inputs or self._is_still(value):
                continue
            if number > 0 or call.name not in SELECTIONS:
                self._of(value).is_whole = True
                continue
            self._of(value).parts += results
            if isinstance(call["dim"], int):
                self._choices.setdefault(_choice(call), []).append((value, call["dim"] % max(len(value.shape), 1)))

    def _is_still(self, value: Value) -> bool:
        return all(analysis.is_still(value) for analysis in self._analyses)

    def note_use(self, value: Value) -> None:
        """Note that something else than a call uses all of a tensor."""
        if not value.reads_inputs and not self._is_still(value):
            self._of(value).is_whole = True

    def pin_unread(self) -> None:
        """Pin the entries of parameters that nothing reads: longer inputs may read them."""
        for reading in self._readings.values():
            if reading.is_whole or not reading.parts:
                continue
            for analysis in self._analyses:
                unread = np.setdiff1d(_ids(analysis.known(reading.value)), self._ids_read(analysis, reading))
                analysis.classes.pin(unread)

    def _ids_read(self, analysis: ChannelAnalysis, reading: _Reading) -> Array:
        if reading.is_whole:
            return _ids(analysis.known(reading.value))
        parts = [self._readings.get(id(part)) for part in reading.parts]
        return np.concatenate([_ids(()), *(self._ids_read(analysis, part) for part in parts if part is not None)])

    def pin_choices(self, choices: Iterable[Choice]) -> None:
        """Pin the channels along the axes of parameters on which ``choices`` are made."""
        for choice in choices:
            for value, axis in self._choices.get(choice, []):
                for analysis in self._analyses:
                    analysis.pin(one for one in analysis.channels_of(value) if axis in one.axes)


def _ids(channels: Iterable[Channels]) -> Array:
    """Ids of all channels, in one row."""
    return np.concatenate([np.zeros(0, np.int64), *(one.ids.ravel() for one in channels)])


def _choice(call: Call) -> Choice:
    return call.name, call.first.shape, str([_plain(given) for given in call.arguments.values()])


def _plain(given: Any) -> Any:
    """Argument with None in place of each tensor."""
    if isinstance(given, (list, tuple)):
        return [_plain(entry) for entry in given]
    return None if isinstance(given, Value) else given


_View = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of a tensor before and after a view."""


class Path:
    """Path of a run: its operations without their sizes, and the choices that it makes from its parameters.

    Attributes:
        parameters: Names of the parameters and buffers that it reads.
        choices: Selections, by numbers, from tensors that do not depend on the inputs.
        num_operations: Number of operations.
    """

    def __init__(self, graph: Graph) -> None:
        self.parameters: set[str] = set()
        self.choices: set[Choice] = set()
        self.num_operations = 0
        self._steps: set[tuple[Any, ...]] = set()
        self._views: list[_View] = []
        last: tuple[Any, ...] = ()
        last_read: tuple[str, ...] = ()
        for call in graph.calls:
            self.num_operations += 1
            read = tuple(value.name for value in call.values if value.name is not None)
            if read:
                self.parameters.update(read)
                last_read = read
            step = (call.name, *map(len, call.shapes))
            self._steps.add((last_read, last, step))
            last = step
            if call.name in VIEWS and call.values and call.shapes:
                self._views.append((call.first.shape, call.shape))
            if call.name in SELECTIONS and not any(value.reads_inputs for value in call.values):
                self.choices.add(_choice(call))

    def differs(self, other: Path) -> bool:
        """Whether an analysis of this path can tell anything else than one of ``other``, with inputs of other sizes.

        How often a loop runs does not count. A view counts where the places between which it spreads an axis, whose size is
        the same with both inputs, depend on the sizes.
        """
        if self._steps != other._steps or len(self._views) != len(other._views):
            return True
        return any(_spreads_otherwise(one, two) for one, two in set(zip(self._views, other._views)) if one != two)


def _spreads_otherwise(one: _View, two: _View) -> bool:
    """Whether one of two views, at different sizes, cuts an axis that has the same size in both at other places."""
    old, other_old = one[0], two[0]
    if len(old) != len(other_old) or 0 in old + other_old:
        return True
    cuts, other_cuts = (_cuts(*view) for view in (one, two))
    return any(cuts[k] != other_cuts[k] for k, (a, b) in enumerate(zip(old, other_old)) if a == b)


def _cuts(old: Sequence[int], new: Sequence[int]) -> list[list[Fraction]]:
    """Cuts of each axis before a view: the places in its midst where an axis after the view begins."""
    ends = sorted(set(itertools.accumulate(reversed(new), operator.mul)))
    steps = [*itertools.accumulate(reversed(old), operator.mul, initial=1)][-2::-1]
    return [[Fraction(end, step) for end in ends if step < end < step * size] for size, step in zip(old, steps)]
