"""Hears of each operation as torch dispatches it, and adds it to a graph.

This is the only file that hooks into torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teleport_optim.symmetry.search.graph import Call, Graph, Parameter, Pin, Value, Write
from teleport_optim.symmetry.search.limits import Limits, Untraceable
from teleport_optim.symmetry.search.operations import COPIES, fill_of, source_view
from teleport_optim.symmetry.search.recording.fakes import DATA_DEPENDENT, Fakes
from teleport_optim.symmetry.search.recording.operation import Operation
from teleport_optim.symmetry.spec import Refusal

__all__ = ["Recorder"]

_NORMALISATIONS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm"})
_ASSIGNS_DATA = "_has_compatible_shallow_copy_type"
"""Operation that an assignment to ``.data`` asks for; the assignment itself is no operation."""
_LIFTS = frozenset({"lift", "lift_fresh"})
_GROUPED_PRODUCT = "_grouped_mm"
"""Product of experts, of which torch tells the shape for some types only."""
_CHECK_INTERVAL = 32
"""Number of operations after which the limits are checked again: to ask for the time costs as much as some operations."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears of every operation and adds it to the present graph.

    What is known of a tensor outlives a graph, since a model may keep tensors from one run to the next.

    Args:
        fakes: Makes tensors without data.
        limits: Most operations and seconds.
        names: Names of the parameters and buffers of the copy, by the ids of their tensors.

    Attributes:
        graph: The present graph.
        module: Name of the module that runs.
        is_paused: Whether operations pass unheard.
    """

    def __init__(self, fakes: Fakes, limits: Limits, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fakes = fakes
        self.graph = Graph()
        self.module = ""
        self.is_paused = False
        self._names = names
        self._limits = limits
        self._num_operations = 0
        self._operations: dict[Any, Operation] = {}
        self._known: dict[int, tuple[Tensor, Value]] = {}
        self._aliases: dict[int, list[Tensor]] = {}
        self._lasting: list[Pin] = []

    def start(self) -> Graph:
        """Begin a new graph of the same model."""
        self.graph = Graph(self.graph.parameters, steps=list(self._lasting))
        self.module = ""
        return self.graph

    # ---------------------------------------------------------------------------------------------------- tensors

    def introduce(self, tensor: Tensor, value: Value) -> None:
        """Tell which value a tensor is."""
        self._known[id(tensor)] = (tensor, value)
        self._aliases.setdefault(_storage_of(tensor), []).append(tensor)

    def introduce_input(self, tensor: Tensor) -> None:
        """Add an input to the graph."""
        value = self._new(tensor, reads_inputs=True)
        self.graph.inputs.append(value)
        self.introduce(tensor, value)

    def introduce_parameter(self, tensor: Tensor, original: Tensor, parameter: Parameter) -> None:
        """Add a parameter to the graphs; ``original`` is the model's own tensor, which closures may hold."""
        assert parameter.value.name is not None
        self.graph.parameters[parameter.value.name] = parameter
        self.introduce(tensor, parameter.value)
        self.introduce(original, parameter.value)

    def value(self, tensor: Tensor) -> Value:
        """Look up the value of a tensor."""
        if id(tensor) not in self._known:
            self._introduce_foreign(tensor)
        value = self._known[id(tensor)][1]
        if value.source is not None:
            self.graph.used.add(value.source.name)
        return value

    def _introduce_foreign(self, tensor: Tensor) -> None:
        """Introduce a tensor that no recorded operation made; what it was made of may not move, in this graph and later ones."""
        real = self.fakes.real(tensor)
        storage = _storage_of(tensor if real is None else real)
        # it may be a view of a parameter that was made before the recording, or computed from one
        relatives = [*self._aliases.get(storage, []), *_computed_from(real)]
        known = tuple(self._known[id(one)][1] for one in relatives if id(one) in self._known)
        if known:
            self._lasting.append(Pin(known))
            self.graph.steps.append(self._lasting[-1])
        self.introduce(tensor, self._new(tensor, reads_inputs=any(value.reads_inputs for value in known)))

    def _new(self, tensor: Tensor, **facts: Any) -> Value:
        is_discrete = not (tensor.is_floating_point() or tensor.is_complex())
        return Value(tuple(tensor.shape), self._names.get(id(tensor)), is_discrete=is_discrete, **facts)

    def pin(self, tree: Any, reason: str = "", *, spares_parameters: bool = False) -> None:
        """Note that nothing about the tensors in ``tree`` may move, and why."""
        values = tuple(self.value(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
        if values:
            self.graph.steps.append(Pin(values, reason, self.module, spares_parameters))

    def refuse(self, name: str, reason: str) -> None:
        """Note a module or parameter through which nothing passes."""
        self.graph.steps.append(Refusal(name, reason))

    # ------------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # torch asks for facts about a tensor, such as its device
            return func(*args, **kwargs)
        self._num_operations += 1
        if self._num_operations % _CHECK_INTERVAL == 0:
            self._limits.check(self._num_operations)
        operation = self._operations.get(func)
        if operation is None:
            operation = self._operations[func] = Operation.of(func)
        tensors: list[Tensor] = []
        key: list[Any] = []
        # A lift is of a tensor that the code has just written down: its entries are known, and stay so.
        if operation.name in _LIFTS:
            tensors += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        else:
            args, kwargs = self._without_data(args, tensors, key), self._without_data(kwargs, tensors, key)
        if self.is_paused:
            return func(*args, **kwargs)
        if operation.name == _ASSIGNS_DATA:
            self.pin(tensors, "another tensor is put in the place of a tensor by an assignment to its .data")
            return func(*args, **kwargs)
        if not operation.is_known and tensors and operation.is_composite:
            with self:  # torch leaves a mode while it is heard
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        values = list(map(self.value, tensors))
        result = self._result(func, operation, args, kwargs, tensors, key)
        leaves = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._record(operation, args, kwargs, values, outputs)
        return result

    def _without_data(self, tree: Any, tensors: list[Tensor], key: list[Any]) -> Any:
        """Replace all tensors by such without data; ``tensors`` gets these, ``key`` all other arguments."""
        if isinstance(tree, Tensor):
            fake = self.fakes.of(tree)
            tensors.append(fake)
            key.append(Tensor)
            return fake
        if isinstance(tree, (list, tuple)):
            key += (type(tree), len(tree))
            entries = [self._without_data(entry, tensors, key) for entry in tree]
            return entries if isinstance(tree, list) else tuple(entries)
        if isinstance(tree, dict):
            key += (dict, *tree)
            return {name: self._without_data(entry, tensors, key) for name, entry in tree.items()}
        key += (type(tree), tree)
        return tree

    def _result(
        self, func: Any, operation: Operation, args: Any, kwargs: Any, tensors: list[Tensor], key: list[Any]
    ) -> Any:
        def compute() -> Any:
            # torch would decompose a normalisation, which takes most of the time of a recording.
            if operation.name in _NORMALISATIONS:
                return torch.empty_like(args[0])
            if operation.name == _GROUPED_PRODUCT:
                return _grouped_product(*args, **kwargs)
            try:
                return func(*args, **kwargs)
            except DATA_DEPENDENT:
                raise
            except (RuntimeError, NotImplementedError) as error:
                if operation.is_known or operation.is_composite:
                    raise
                name = operation.name.rpartition("::")[2]
                raise Untraceable(f"{name} does not tell what it returns for tensors without data ({error})") from error

        layouts = [self.fakes.layout(tensor) for tensor in tensors]
        try:
            return self.fakes.run(func, args, compute, tensors, tuple(key), layouts)
        except TypeError:
            if _is_hashable(key):
                raise
        return compute()  # an argument that cannot be a key, so that no result can be looked up

    def _record(self, operation: Operation, args: Any, kwargs: Any, values: list[Value], outputs: list[Tensor]) -> None:
        """Add an operation to the graph, and the values of its results to what is known."""
        arguments = {name: self._as_values(given) for name, given in operation.arguments(args, kwargs).items()}
        targets = operation.targets(args, kwargs)
        if outputs and not targets and len(values) == 1 and values[0].source is not None:
            call = Call(operation.name, arguments, (self._new(outputs[0]),), self.module)
            source = source_view(call)
            if source is not None:
                view = self._new(outputs[0], source=source)
                self.introduce(outputs[0], view)
                self.graph.steps.append(replace(call, results=(view,)))
                return
        reads_inputs = any(value.reads_inputs for value in values)
        origin = values[0] if values and operation.name in COPIES else None
        fill, data = (origin.fill, origin.data) if origin is not None else (fill_of(operation.name, arguments), None)
        results, writes = [], []
        for number, output in enumerate(outputs):
            is_written = any(output is target for target in targets)
            value = self._new(output, reads_inputs=reads_inputs, fill=fill, data=None if is_written else data)
            if is_written:
                writes.append(self._write(output, value, number))
                value = writes[-1].after
            else:
                self.introduce(output, value)
            results.append(value)
        for target in targets:
            if not any(target is output for output in outputs):
                writes.append(self._write(target, self._new(target, reads_inputs=reads_inputs), None))
        self.graph.steps.append(Call(operation.name, arguments, tuple(results), self.module, tuple(writes)))

    def _as_values(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._known[id(argument)][1]
        if isinstance(argument, (list, tuple)):
            return [self._as_values(entry) for entry in argument]
        return argument

    def _write(self, tensor: Tensor, value: Value, output: int | None) -> Write:
        """Note that an operation has written a tensor, which is ``value`` from now on, if it is no parameter."""
        before = self.value(tensor)
        shared = []
        for other in self._aliases[_storage_of(tensor)]:
            if other is tensor:
                continue
            old = new = self.value(other)
            reads_inputs = old.reads_inputs or value.reads_inputs
            if old.fill is not None or old.data is not None or old.reads_inputs != reads_inputs:
                new = replace(old, fill=None, data=None, reads_inputs=reads_inputs)
                self._known[id(other)] = (other, new)
            shared.append((old, new))
        if before.source is None:
            self._known[id(tensor)] = (tensor, value)
        return Write(before, self._known[id(tensor)][1], tuple(shared), output)


def _grouped_product(
    one: Tensor,
    other: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Result of a product of experts, without data: the rows of a matrix, or its columns, are in groups."""
    shape = [one.shape[-2], other.shape[-1]]
    if one.dim() == other.dim():
        shape.insert(0, one.shape[0] if one.dim() == 3 or offs is None else offs.shape[0])
    return one.new_empty(shape, dtype=out_dtype or one.dtype)


def _storage_of(tensor: Tensor) -> int:
    """Number of the memory of a tensor; its own id where it has none of the usual kind."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _is_hashable(key: list[Any]) -> bool:
    try:
        hash(tuple(key))
    except TypeError:
        return False
    return True


def _computed_from(tensor: Tensor | None) -> list[Tensor]:
    """Parameters from which a tensor was computed, as far as autograd knows."""
    found: list[Tensor] = []
    queue = [None if tensor is None else tensor.grad_fn]
    seen: set[Any] = set()
    while queue:
        node: Any = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        queue += [function for function, _ in node.next_functions]
    return found
