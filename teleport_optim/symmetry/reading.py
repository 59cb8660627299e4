"""Which entries of its parameters a model reads, and whether that depends on the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teleport_optim.symmetry.labels import Array, Labels
from teleport_optim.symmetry.operations import CREATIONS, RULES, SELECTIONS, Call
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
                choice = _choice(call.name, value.shape, call.arguments, Value)
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


def _choice(name: str, shape: Sequence[int], arguments: Mapping[str, Any], tensor: type) -> Choice:
    return name, tuple(shape), str([given for given in arguments.values() if not isinstance(given, tensor)])


class Scout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes note of a model's path and of what it chooses from its parameters, and no more.

    Args:
        inputs: The tensors among the inputs of the model.

    Attributes:
        path: The names of the operations.
        choices: What is taken by its numbers from what does not depend on the inputs.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path: list[str] = []
        self.choices: set[Choice] = set()
        self._reading_inputs = {id(tensor): tensor for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.split("::")[-1].rstrip("_")
        is_composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        if is_composite and tensors and name not in RULES and name not in CREATIONS:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self.path.append(name)
        if any(id(tensor) in self._reading_inputs for tensor in tensors):
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self._reading_inputs |= {id(output): output for output in outputs}
        elif name in SELECTIONS and tensors:
            names = [argument.name for argument in func._schema.arguments]
            defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            given = defaults | dict(zip(names, args)) | kwargs
            self.choices.add(_choice(name, tensors[0].shape, given, Tensor))
        return result
