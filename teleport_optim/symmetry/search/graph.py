"""Graph of the calls of a model, as plain data.

A graph holds no tensors and asks nothing of torch. It is recorded from a model (:mod:`~teleport_optim.symmetry.search.record`)
or written by hand, prints as one line per call, and can be kept and analysed many times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from teleport_optim.symmetry.spec import Refusal

__all__ = ["Call", "Graph", "Parameter", "Pin", "Source", "Step", "Value", "Write", "values_in"]


class Source(NamedTuple):
    """Parameter of which a tensor is a view, with the parameter's axis for each axis of the view; None for a new axis."""

    name: str
    axes: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor without its data. Two values are the same tensor only if they are the same object.

    Attributes:
        shape: Its shape.
        name: Name of the parameter or buffer that it is; None for all other tensors.
        source: The parameter that it is, or of which it is a view. A buffer that may not move has none.
        fill: The number that all its entries are, if they are known to be one number.
        data: Its entries, if they depend neither on inputs nor on parameters (buffers of indices).
        reads_inputs: Whether it depends on the inputs of the model. Otherwise it comes from parameters and constants.
        is_discrete: Whether its entries are integers or truth values, which no factor multiplies.
    """

    shape: tuple[int, ...]
    name: str | None = None
    source: Source | None = None
    fill: float | None = None
    data: Any = None
    reads_inputs: bool = False
    is_discrete: bool = False


class Parameter(NamedTuple):
    """A parameter, or a buffer that may move.

    Attributes:
        value: The tensor.
        is_data: Whether its entries are data (a mask, integers): they may change places but are not multiplied.
        refusal: The reason why it may not move; empty if it may.
    """

    value: Value
    is_data: bool = False
    refusal: str = ""


class Write(NamedTuple):
    """A tensor that a call writes in place.

    Attributes:
        before: The tensor before the call.
        after: The tensor after it. A parameter stays the same value.
        shared: Other tensors that share its memory, each before and after the call.
        output: Number of the output that is the tensor; None if the call does not return it.
    """

    before: Value
    after: Value
    shared: tuple[tuple[Value, Value], ...] = ()
    output: int | None = None


@dataclass(eq=False)
class Call:
    """One operation.

    Attributes:
        name: Name of the operation: as in torch's ATen, without the overload; with the namespace if it is not ATen's.
        arguments: Arguments by the names of the schema; a :class:`Value` in place of each tensor.
        results: The tensors that it returns.
        module: Name of the module that calls it.
        writes: The tensors that it writes in place.
        values: The different tensors among the arguments, in their order.
        shapes: The shapes of the results.
    """

    name: str
    arguments: Mapping[str, Any]
    results: tuple[Value, ...]
    module: str = ""
    writes: tuple[Write, ...] = ()
    values: tuple[Value, ...] = field(init=False)
    shapes: list[tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.values = tuple(dict.fromkeys(values_in(self.arguments)))
        self.shapes = [result.shape for result in self.results]

    def __getitem__(self, key: str) -> Any:
        return self.arguments.get(key)

    @property
    def first(self) -> Value:
        """The first tensor among the arguments."""
        return self.values[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return self.results[0].shape


@dataclass(frozen=True, eq=False)
class Pin:
    """Tensors that something else than a call uses, so that nothing about them may move.

    Attributes:
        values: The tensors.
        reason: The reason, if the spec should tell it.
        module: Name of the module in which this happens.
        spares_parameters: Whether parameters may move all the same.
    """

    values: tuple[Value, ...]
    reason: str = ""
    module: str = ""
    spares_parameters: bool = False


Step = Call | Pin | Refusal


@dataclass
class Graph:
    """The calls of one run of a model, in their order.

    Attributes:
        parameters: The parameters of the model, and the buffers that may move, by name.
        inputs: The inputs of the model.
        steps: Calls; pins; and refusals, where nothing passes whatever the analysis says.
        outputs: The outputs of the model, about which nothing may move.
        used: Names of the parameters that the run uses.

    Example:
        >>> graph = Graph()
        >>> x, weight = graph.input(2, 3), graph.parameter("0.weight", 8, 3)
        >>> (hidden,) = graph.call("linear", {"input": x, "weight": weight, "bias": None}, (2, 8), module="0")
        >>> graph.outputs += graph.call("relu", {"self": hidden}, (2, 8), module="1")
        >>> print(graph)
        %0 = input [2, 3]
        %1 = linear(%0, 0.weight) [2, 8]  # 0
        %2 = relu(%1) [2, 8]  # 1
        return %2
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @property
    def calls(self) -> Iterator[Call]:
        """The steps that are calls."""
        return (step for step in self.steps if isinstance(step, Call))

    def input(self, *shape: int) -> Value:
        """Add an input of the model."""
        self.inputs.append(Value(shape, reads_inputs=True))
        return self.inputs[-1]

    def parameter(self, name: str, *shape: int, is_data: bool = False) -> Value:
        """Add a parameter, or a buffer that may move (``is_data``)."""
        value = Value(shape, name, Source(name, tuple(range(len(shape)))))
        self.parameters[name] = Parameter(value, is_data)
        return value

    def call(self, name: str, arguments: Mapping[str, Any], *shapes: tuple[int, ...], module: str = "") -> list[Value]:
        """Add a call that returns new tensors of the given shapes."""
        values = list(values_in(arguments))
        reads_inputs = any(value.reads_inputs for value in values)
        self.used |= {value.source.name for value in values if value.source is not None}
        results = tuple(Value(shape, reads_inputs=reads_inputs) for shape in shapes)
        self.steps.append(Call(name, arguments, results, module))
        return list(results)

    def __str__(self) -> str:
        names = _Names()
        lines = [f"{names.of(value)} = input {list(value.shape)}" for value in self.inputs]
        lines += [_line(step, names) for step in self.steps]
        lines += [f"return {', '.join(map(names.of, self.outputs))}"] if self.outputs else []
        return "\n".join(lines)


def values_in(argument: Any) -> Iterator[Value]:
    """The tensors in an argument, with those in lists and dictionaries."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, Mapping):
        for value in argument.values():
            yield from values_in(value)
    elif isinstance(argument, (list, tuple)):
        for value in argument:
            yield from values_in(value)


class _Names:
    """Names of tensors in a printed graph: a parameter's own, a number in the order of appearance for all others."""

    def __init__(self) -> None:
        self._numbers: dict[Value, str] = {}

    def of(self, value: Value) -> str:
        return value.name or self._numbers.setdefault(value, f"%{len(self._numbers)}")

    def argument(self, argument: Any) -> str:
        if isinstance(argument, Value):
            return self.of(argument)
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(map(self.argument, argument))}]"
        return str(argument)


def _line(step: Step, names: _Names) -> str:
    if isinstance(step, Refusal):
        return f"refuse {step.name}: {step.reason}"
    if isinstance(step, Pin):
        return f"pin {', '.join(map(names.of, step.values))}" + (f": {step.reason}" if step.reason else "")
    arguments = [
        names.argument(argument) if any(True for _ in values_in(argument)) else f"{key}={names.argument(argument)}"
        for key, argument in step.arguments.items()
        if argument is not None
    ]
    written = [names.of(write.before) for write in step.writes]
    results = ", ".join(map(names.of, step.results))
    shapes = ", ".join(str(list(shape)) for shape in step.shapes)
    line = (
        f"{results} = {step.name}({', '.join(arguments)}) {shapes}"
        if results
        else f"{step.name}({', '.join(arguments)})"
    )
    line += f" in place of {', '.join(written)}" if written else ""
    return line + (f"  # {step.module}" if step.module else "")
