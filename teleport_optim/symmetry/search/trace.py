"""Run a model once without data and tell every analysis what each operation demands.

The model is copied with tensors that have a shape but no data (torch's fake tensors), so that a trace costs no arithmetic and
no memory, and the model itself is not run. Operations are seen as they are dispatched, in the evaluation and in the training
graph. Control flow that depends on data cannot be followed this way and is refused.
"""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributions import Distribution
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from teleport_optim.symmetry.inputs import Inputs, SilentHook
from teleport_optim.symmetry.search.analysis import ChannelAnalysis, Source, Value
from teleport_optim.symmetry.search.channels import Channels
from teleport_optim.symmetry.search.operations import COPIES, CREATIONS, RULES, Call, source_view
from teleport_optim.symmetry.search.reading import Readings, Scout
from teleport_optim.symmetry.search.recording.fakes import Fakes
from teleport_optim.symmetry.search.recording.isolation import Surroundings, drop_survivors, quiet
from teleport_optim.symmetry.search.recording.twin import Scripted, Untraceable, slot_attributes, twin_of
from teleport_optim.symmetry.search.recording.watch import Watch, between, other_sizes, random_states, sizes_of
from teleport_optim.symmetry.spec import Refusal

__all__ = ["Limits", "SearchStopped", "Untraceable", "leaves", "trace"]

_NORMALISATIONS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm"})
_NAMED_IN_PLACE = frozenset({"normal_", "uniform_", "bernoulli_", "random_", "zero_", "fill_"})
_ASSIGNS_DATA = "_has_compatible_shallow_copy_type"
"""What an assignment to ``.data`` asks; the assignment itself is no operation."""
_LONG = 3000
"""Operations from which on a model is followed with smaller inputs only."""
_LIFTS = frozenset({"lift", "lift_fresh"})
_GROUPED_PRODUCT = "_grouped_mm"
"""A product of experts, of which torch tells the shape for some types only."""
_MAX_OUTPUTS = 2**16
_MAX_DATA = 2**20
"""Most entries of a buffer whose values are looked at as indices."""


class SearchStopped(Untraceable):
    """The search has come to one of its limits; the message says which."""


class Limits(NamedTuple):
    """How long a search may take.

    Attributes:
        operations: Most operations of the model, in all its runs together.
        seconds: Most seconds.
        start: When the search began.
    """

    operations: int
    seconds: float
    start: float

    @classmethod
    def of(cls, operations: int, seconds: float) -> Limits:
        """Limits for a search that begins now."""
        return cls(operations, seconds, time.monotonic())

    def check(self, num_operations: int = 0) -> None:
        """Stop a search that has reached a limit.

        Raises:
            SearchStopped: if it has.
        """
        if num_operations > self.operations:
            raise SearchStopped(f"the search stopped after {self.operations:,} operations (max_operations)")
        if time.monotonic() - self.start > self.seconds:
            raise SearchStopped(f"the search stopped after {self.seconds:g} seconds (max_seconds)")


class _Operation(NamedTuple):
    """What the schema of an operation tells."""

    name: str
    namespace: str
    names: tuple[str, ...]
    defaults: dict[str, Any]
    written: frozenset[str]
    is_known: bool
    is_composite: bool

    @classmethod
    def of(cls, func: Any) -> _Operation:
        schema = func._schema
        name = schema.name.split("::")[-1]
        if name not in _NAMED_IN_PLACE:
            name = name if name.startswith("_") and not name.endswith("_") else name.rstrip("_") or name
        twin = name.removeprefix("unsafe_").removesuffix("_copy")
        if twin in RULES:  # the same, but for whether the result shares memory
            name = twin
        written = (a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
        return cls(
            name,
            func.namespace,
            tuple(argument.name for argument in schema.arguments),
            {a.name: a.default_value for a in schema.arguments if a.has_default_value()},
            frozenset(written if schema.is_mutable else ()),
            func.namespace == "aten" and (name in RULES or name in CREATIONS),
            func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd),
        )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears of every operation and applies its rule in every analysis."""

    def __init__(
        self, analyses: Sequence[ChannelAnalysis], fakes: Fakes, limits: Limits, names: Mapping[int, str]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.analyses = analyses
        self.readings = Readings(analyses)
        self.fakes = fakes
        self.names = names
        self.is_paused = False
        self.scout = Scout()
        self.is_scouting = False
        self.refusals: list[Refusal] = []
        self.module = ""
        self.used: set[str] = set()
        self._limits = limits
        self._num_operations = 0
        self._node = 0
        self._operations: dict[Any, _Operation] = {}
        self._still: dict[int, tuple[Value, set[str]]] = {}
        self._known: dict[int, tuple[Tensor, Value]] = {}
        self._aliases: dict[int, list[Tensor]] = {}

    # ---------------------------------------------------------------------------------------------------- tensors

    def introduce(self, tensor: Tensor, value: Value) -> None:
        """Tell what is known of a tensor."""
        self._known[id(tensor)] = (tensor, value)
        self._aliases.setdefault(_storage_of(tensor), []).append(tensor)

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""
        if id(tensor) not in self._known:
            real = self.fakes.real(tensor)
            storage = _storage_of(tensor if real is None else real)
            # a view of a parameter that was made before the trace, or what was computed from one
            relatives = [*self._aliases.get(storage, []), *_computed_from(real)]
            known = [self._known[id(one)][1] for one in relatives if id(one) in self._known]
            for value in known:
                self._freeze_value(value)
            self.introduce(tensor, Value(tuple(tensor.shape), reads_inputs=any(one.reads_inputs for one in known)))
        value = self._known[id(tensor)][1]
        if value.source is not None:
            self.used.add(value.source.name)
        return value

    def freeze(self, tree: Any) -> bool:
        """Let nothing about the tensors in ``tree`` move; returns whether anything could have."""
        if self.is_scouting:  # only the path counts
            return False
        values = [self.value(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        return sum(map(self._freeze_value, values)) > 0

    def _freeze_value(self, value: Value) -> bool:
        if value.is_still:
            return False
        for analysis in self.analyses:
            analysis.freeze(value)
        self.readings.note_use(value)
        return True

    def pin(self, tree: Any, reason: str) -> None:
        """Let nothing about the tensors in ``tree`` move, and note why."""
        if self.freeze(tree):
            self.refuse(self.module, reason)

    def freeze_content(self, tensor: Tensor) -> None:
        """Let what has been written into a tensor move no more; a parameter may."""
        if self.value(tensor).source is None:
            self.freeze(tensor)

    def refuse(self, name: str, reason: str) -> None:
        """Note a place through which nothing passes."""
        refusal = Refusal(name or "(root)", reason)
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    # ------------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        self._num_operations += 1
        if self._num_operations % 32 == 0:
            self._limits.check(self._num_operations)
        operation = self._operations.get(func)
        if operation is None:
            operation = self._operations[func] = _Operation.of(func)
        tensors: list[Tensor] = []
        key: list[Any] = []
        if operation.name in _LIFTS:  # of a tensor that the code has just written down, whose entries are known
            tensors += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        else:
            args, kwargs = self._without_data(args, tensors, key), self._without_data(kwargs, tensors, key)
        if self.is_paused:
            return func(*args, **kwargs)
        if operation.name == _ASSIGNS_DATA:
            self.pin(tensors, "another tensor is put in the place of a tensor by an assignment to its .data")
            return func(*args, **kwargs)
        if not operation.is_known and tensors and operation.is_composite:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        values = list(map(self._scouted if self.is_scouting else self.value, tensors))
        result = self._result(func, operation, args, kwargs, tensors, key)
        leaves = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        given = operation.defaults | dict(zip(operation.names, args)) | kwargs
        read = tuple(self.names[id(tensor)] for tensor in tensors if id(tensor) in self.names)
        self.scout.note(operation.name, values, read, given, [output.shape for output in outputs])
        if self.is_scouting:
            reads_inputs = any(value.reads_inputs for value in values)
            for output in outputs:
                if id(output) not in self._known:
                    self.introduce(output, Value(tuple(output.shape), reads_inputs=reads_inputs))
            return result
        if not outputs:
            return result
        self._record(operation, args, kwargs, tensors, values, outputs)
        return result

    def _scouted(self, tensor: Tensor) -> Value:
        """What is known of a tensor, where the analyses hear of nothing."""
        known = self._known.get(id(tensor))
        return known[1] if known is not None else Value(tuple(tensor.shape))

    def _without_data(self, tree: Any, tensors: list[Tensor], key: list[Any]) -> Any:
        """Arguments with tensors without data for all others; ``tensors`` gets these, ``key`` what else there is."""
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
        self, func: Any, operation: _Operation, args: Any, kwargs: Any, tensors: list[Tensor], key: list[Any]
    ) -> Any:
        def compute() -> Any:
            if operation.name in _NORMALISATIONS:  # torch would decompose it, which takes most of the time of a trace
                return torch.empty_like(args[0])
            if operation.name == _GROUPED_PRODUCT:
                return _grouped_product(*args, **kwargs)
            try:
                return func(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                raise
            except (RuntimeError, NotImplementedError) as error:
                if operation.is_known or operation.is_composite:
                    raise
                raise Untraceable(
                    f"{operation.name} does not tell what it returns for tensors without data ({error})"
                ) from error

        layouts = [self.fakes.layout(tensor) for tensor in tensors]
        try:
            return self.fakes.run(func, args, compute, tensors, tuple(key), layouts)
        except TypeError:
            if _is_hashable(key):
                raise
        return compute()

    def _record(
        self,
        operation: _Operation,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        values: list[Value],
        outputs: list[Tensor],
    ) -> None:
        """Tell the analyses of an operation, and take note of what they know of its results."""
        self._node += 1
        call = self._call(operation, args, kwargs, outputs)
        written = self._written(operation, args, kwargs)
        if operation.namespace == "aten" and not written:
            view = source_view(call)
            if view is not None:
                self.introduce(outputs[0], view)
                return
        different = list({id(value): value for value in values}.values())
        channels = self._apply(call, different, operation.is_known)
        source = values[0] if tensors and operation.name in COPIES else None
        fill, data = (source.fill, source.data) if source else (self._fill(call), None)
        reads_inputs = any(value.reads_inputs for value in different)
        results = []
        for number, output in enumerate(outputs):
            own = {analysis.name: each[number] for analysis, each in zip(self.analyses, channels)}
            if not (output.is_floating_point() or output.is_complex()):
                self._keep_numbers(own)
            if any(output is target for target in written):
                self._overwrite(output, own, fill, reads_inputs=reads_inputs)
            else:
                value = Value(tuple(output.shape), own, fill=fill, data=data, reads_inputs=reads_inputs)
                self.introduce(output, value)
                results.append(value)
        for target in written:
            if not any(target is output for output in outputs):
                self._overwrite(
                    target, {analysis.name: () for analysis in self.analyses}, None, reads_inputs=reads_inputs
                )
        self.readings.note(call, different, results)

    def _keep_numbers(self, channels: dict[str, tuple[Channels, ...]]) -> None:
        """Let no factor pass into integers and truth values, which are not multiplied along."""
        for analysis in self.analyses:
            if analysis.changes_numbers:
                analysis.pin(channels[analysis.name])
                channels[analysis.name] = ()

    def _call(self, operation: _Operation, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> Call:
        given = operation.defaults | dict(zip(operation.names, args)) | kwargs
        arguments = {name: self._as_values(argument) for name, argument in given.items()}
        return Call(operation.name, self._node, arguments, [tuple(output.shape) for output in outputs])

    def _as_values(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._known[id(argument)][1]
        if isinstance(argument, (list, tuple)):
            return [self._as_values(entry) for entry in argument]
        return argument

    def _apply(self, call: Call, values: list[Value], is_known: bool) -> list[list[tuple[Channels, ...]]]:
        nothing: list[tuple[Channels, ...]] = [()] * len(call.shapes)
        if call.name in CREATIONS:
            return [nothing for _ in self.analyses]
        is_still = [all(self._rests(value, analysis) for value in values) for analysis in self.analyses]
        if all(is_still):
            return [nothing for _ in self.analyses]
        if not is_known:
            self.refuse(self.module, f"{call.name} is not an operation whose symmetries are known")
        results = []
        for analysis, rests in zip(self.analyses, is_still):
            if rests:
                results.append(nothing)
                continue
            if is_known:
                outputs = self._follow(call, analysis, values)
                # each output is a place of its own
                result = [
                    analysis.record(call.node * _MAX_OUTPUTS + k, channels) for k, channels in enumerate(outputs, 1)
                ]
            else:
                result = nothing
                for value in values:
                    analysis.freeze(value)
            for value in values:
                analysis.close(value)
            results.append(result)
        return results

    def _rests(self, value: Value, analysis: ChannelAnalysis) -> bool:
        """Whether nothing about a tensor moves in an analysis, or ever will."""
        if value.source is None and not value.channels.get(analysis.name):
            return True
        known = self._still.get(id(value))
        if known is not None and analysis.name in known[1]:
            return True
        if not analysis.is_at_rest(value):
            return False
        self._still.setdefault(id(value), (value, set()))[1].add(analysis.name)
        return True

    def _follow(self, call: Call, analysis: ChannelAnalysis, values: list[Value]) -> list[tuple[Channels, ...]]:
        """Apply the rule of an operation; a form of it that the rule does not foresee lets nothing through."""
        try:
            return RULES[call.name](call, analysis)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self.refuse(self.module, f"{call.name} could not be followed: {type(error).__name__}: {error}")
            for value in values:
                analysis.freeze(value)
            return [()] * len(call.shapes)

    @staticmethod
    def _fill(call: Call) -> float | None:
        """The one number that the entries of a new tensor are, if they are."""
        if call.name in ("zeros", "zeros_like", "new_zeros", "zero_"):
            return 0.0
        if call.name in ("ones", "ones_like", "new_ones"):
            return 1.0
        fill = (
            call["fill_value"]
            if call.name in ("full", "full_like", "new_full")
            else call["value"]
            if call.name == "fill_"
            else None
        )
        return float(fill) if isinstance(fill, (int, float)) else None

    @staticmethod
    def _written(operation: _Operation, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors that an operation writes in place."""
        if not operation.written:
            return []
        pairs = [*zip(operation.names, args), *kwargs.items()]
        written = [value for name, value in pairs if name in operation.written]
        return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]

    def _overwrite(
        self, tensor: Tensor, channels: dict[str, tuple[Channels, ...]], fill: float | None, *, reads_inputs: bool
    ) -> None:
        """Take note that a tensor has been written in place, and what that means for those that share its memory."""
        before = self.value(tensor)
        others = [x for x in self._aliases[_storage_of(tensor)] if x is not tensor]
        for analysis in self.analyses:
            own, new = analysis.known(before), channels[analysis.name]
            is_same = len(own) == len(new) and all(
                a.ids is b.ids
                or (
                    a.ids.shape == b.ids.shape
                    and np.array_equal(a.ids, b.ids)
                    and np.array_equal(a.positions, b.positions)
                    and a.sign == b.sign
                )
                for a, b in zip(own, new)
            )
            if not is_same and (others or before.source is not None):
                for one in new:
                    analysis.classes.pin(one.ids)
                channels[analysis.name] = ()
                for other in [tensor, *others]:
                    analysis.freeze(self.value(other))
        if before.source is None:
            value = Value(tuple(tensor.shape), channels, fill=fill, reads_inputs=reads_inputs)
            self._known[id(tensor)] = (tensor, value)
        for other in others:
            value = self.value(other)
            value.fill, value.data = None, None
            value.reads_inputs = value.reads_inputs or reads_inputs


def _grouped_product(
    one: Tensor,
    other: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result of a product of experts, without data: the rows of a matrix, or its columns, are in groups."""
    shape = [one.shape[-2], other.shape[-1]]
    if one.dim() == other.dim():
        shape.insert(0, one.shape[0] if one.dim() == 3 or offs is None else offs.shape[0])
    return one.new_empty(shape, dtype=out_dtype or one.dtype)


def _storage_of(tensor: Tensor) -> int:
    """A number for the memory of a tensor; its own where it has none of the usual kind."""
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
    """The parameters from which a tensor was computed, as far as autograd knows."""
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


def trace(
    model: nn.Module,
    inputs: Inputs,
    analyses: Sequence[ChannelAnalysis],
    *,
    pinned: Mapping[str, str],
    limits: Limits,
) -> list[Refusal]:
    """Follow ``model`` in evaluation and in training mode and tell ``analyses`` what its operations demand.

    Args:
        model: The model; it is not changed and not run.
        inputs: Its inputs; only their shapes matter.
        analyses: The groups to follow.
        pinned: Parameters and buffers that may not move, with the reason.
        limits: How long it may take.

    Returns:
        The places through which nothing passes.

    Raises:
        Untraceable: if the model cannot be followed; :class:`SearchStopped` at a limit.
        ValueError: if it cannot take the inputs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise Untraceable("it is scripted: pass the module from which torch.jit made it")
    fakes = Fakes(FakeTensorMode(allow_non_fake_inputs=True))
    try:
        return _run(model, inputs, analyses, fakes, pinned, limits)
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        made = fakes.made
        del fakes
        holders = drop_survivors(made)
        if holders:
            warnings.warn(
                f"{', '.join(holders)}: objects of these types hold on to tensors without data, with which find_symmetries has "
                "called the model. Where the model keeps them for its next calls, let it make them anew",
                stacklevel=2,
            )


def _clear_frames(error: BaseException | None) -> None:
    """Let an error, and those from which it comes, keep the lines of the model that it tells of, but not their variables."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _run(
    model: nn.Module,
    inputs: Inputs,
    analyses: Sequence[ChannelAnalysis],
    fakes: Fakes,
    pinned: Mapping[str, str],
    limits: Limits,
) -> list[Refusal]:
    originals = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    device = next((tensor.device for tensor in originals.values()), torch.device("cpu"))
    memo: dict[int, Any] = {}
    names: dict[int, str] = {}
    with torch.inference_mode():
        for name, tensor in originals.items():
            if id(tensor) not in memo:
                memo[id(tensor)] = fakes.empty(tensor)
                names[id(memo[id(tensor)])] = name
    with _untouched_state(), quiet(), torch.inference_mode():
        twin, shared = twin_of(model, memo, fakes.of)
        recorder = _Recorder(analyses, fakes, limits, names)
        runs = _Runs(twin, inputs, recorder, device)
        _introduce_parameters(recorder, twin, originals, names, _constants(model), pinned)
        _guard_modules(recorder, twin, dict(model.named_modules()))
        lasting = _attributes(twin)
        surroundings = Surroundings([*model.modules(), *shared, *runs.shared], fakes.is_ours)
        try:
            for is_training in (False, True):
                runs.follow(is_training)
                for leaf in _attributes(twin) | lasting:  # what the model keeps for its next calls
                    recorder.freeze_content(leaf)
        finally:
            taken = surroundings.restore()
        for leaf in _tensors_in(taken):
            recorder.freeze(leaf)
    recorder.readings.pin_unread()
    unused = [name for name, _ in model.named_parameters() if name not in recorder.used]
    for name in unused:
        recorder.refuse(name, "the model never uses it")
    return recorder.refusals


class _Runs:
    """The calls of the copy: as often as what it asks for could change its way.

    Args:
        twin: The copy.
        inputs: The inputs of the model.
        recorder: Hears of the operations.
        device: Where the inputs are to be.

    Attributes:
        shared: The objects that the copies of the inputs share with them.
    """

    def __init__(self, twin: nn.Module, inputs: Inputs, recorder: _Recorder, device: torch.device) -> None:
        self._twin = twin
        self._recorder = recorder
        self._device = device
        self._inputs = inputs
        self._sizes = frozenset(size for size in sizes_of(inputs) or () if size is not None)
        self.shared = self._copy(inputs)[2]

    def follow(self, is_training: bool) -> None:
        """Follow the copy in one mode, on each way; what it returns does not move.

        Raises:
            Untraceable: if it cannot be followed.
            ValueError: if it cannot take the inputs.
        """
        self._twin.train(is_training)
        mode = "training" if is_training else "evaluation"
        states = random_states(self._twin)
        try:
            with Watch(self._recorder.pin, self._sizes, self._recorder.fakes.of) as watch:
                self._freeze(self._first())
                first = self._recorder.scout
                if watch.asks_for_gradients:
                    self._freeze(self._with_gradients(watch))
                # where nothing moves, other sizes cannot tell more
                if watch.asks_for_sizes and not all(analysis.is_exhausted for analysis in self._recorder.analyses):
                    self._with_other_sizes(first, in_both=watch.compares_sizes)
        except Untraceable:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Untraceable(f"its control flow or shapes depend on data in {mode} mode ({error.func})") from error
        except Exception as error:
            raise ValueError(
                f"the model cannot take example_inputs in {mode} mode: {type(error).__name__}: {error}. Pass them as you "
                "would pass them to the model: a tensor, the tuple of its inputs, or the dictionary of those that have names."
            ) from error
        if random_states(self._twin) != states:
            raise Untraceable(
                f"it draws from Python's or numpy's random numbers in {mode} mode, on which its path may depend: draw with "
                f"torch, on tensors"
            )

    def _freeze(self, output: Any) -> None:
        for leaf in leaves(output):
            self._recorder.freeze(leaf)

    def _copy(self, inputs: Inputs) -> tuple[Inputs, list[Tensor], list[object]]:
        """Inputs without data, their tensors, and what they share with the given ones."""
        tensors: list[Tensor] = []

        def fake(tensor: Tensor) -> Tensor:
            tensors.append(self._recorder.fakes.empty(tensor, self._device))
            return tensors[-1]

        values, shared = twin_of(inputs, {}, fake)
        return values, tensors, shared

    def _follow(self, inputs: Inputs, *, is_scouting: bool = False) -> Any:
        """Call the copy and tell the analyses what it does, if it is not only to be scouted; returns its output."""
        values, tensors, _ = self._copy(inputs)
        for tensor in tensors:
            self._recorder.introduce(tensor, Value(tuple(tensor.shape), reads_inputs=True))
        self._recorder.module, self._recorder.scout = "", Scout()
        self._recorder.is_scouting = is_scouting
        try:
            with self._recorder.fakes.mode, self._recorder:
                return self._twin(*values.args, **values.kwargs)
        finally:
            self._recorder.is_scouting = False

    def _first(self) -> Any:
        """The output of the copy; of a batch of two where it takes no batch of one, as some layers in training mode."""
        try:
            return self._follow(self._inputs)
        except (Untraceable, DataDependentOutputException, DynamicOutputShapeException):
            raise
        except Exception:
            doubled = _doubled(self._inputs)
            if doubled is None:
                raise
            with suppress(Exception):
                output = self._follow(doubled)
                self._inputs = doubled
                return output
            raise

    def _with_gradients(self, watch: Watch) -> Any:
        """Follow a copy that asks whether gradients are taken, and tell it that they are; returns its output."""
        watch.with_gradients = True
        try:
            return self._follow(self._inputs)
        except SearchStopped:
            raise
        except Exception as error:
            raise Untraceable(
                "it asks whether gradients are taken, and its way where they are cannot be followed: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            watch.with_gradients = False

    def _with_other_sizes(self, first: Scout, *, in_both: bool) -> None:
        """Follow a copy whose path may depend on the sizes of its inputs with others that it takes.

        Whether it takes another path is looked at first, which costs less than to follow it.

        Args:
            first: Its path with the inputs that are given.
            in_both: Whether it is to be called with smaller inputs and with larger ones although the first change nothing.

        Raises:
            Untraceable: if the parameters that it reads depend on the sizes.
        """
        for candidates in other_sizes(self._inputs):
            other, second = self._taken(candidates)
            if other is None:
                continue
            if second.parameters != first.parameters:
                # a branch has two ways; where there are more, as in a loop over layers, not all of them are seen
                ways = (first.parameters, second.parameters)
                middle, third = self._taken([between(self._inputs, other)])
                if middle is None or third.parameters not in ways:
                    raise Untraceable("which of its parameters it reads depends on the sizes of its inputs")
            self._recorder.readings.pin_choices(first.choices ^ second.choices)
            if second.differs(first):
                self._freeze(self._follow(other))
            if not in_both or first.num_operations > _LONG:
                break

    def _taken(self, candidates: Iterable[Inputs]) -> tuple[Inputs | None, Scout]:
        """The first of some inputs that the copy takes, and its path."""
        refused: set[tuple[tuple[int, ...], ...]] = set()
        for inputs in candidates:
            shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor))
            if shapes in refused:
                continue
            refused.add(shapes)
            try:
                self._follow(inputs, is_scouting=True)
            except SearchStopped:
                raise
            except Exception:  # it does not take such inputs
                continue
            return inputs, self._recorder.scout
        return None, Scout()


@contextmanager
def _untouched_state() -> Iterator[None]:
    """Leave logging and torch's fast path for attention, which is one opaque operation, as they are.

    Distributions would check their parameters, which have no data.
    """
    is_checked = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    is_fast = torch.backends.mha.get_fastpath_enabled()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    is_silent, log.disabled = log.disabled, True  # errors are raised, too
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(is_checked)
        torch.backends.mha.set_fastpath_enabled(is_fast)
        log.disabled = is_silent


def _constants(model: nn.Module) -> dict[str, Any]:
    """The buffers that do not move: integers, with their values where these are known, and what a state dict leaves out."""
    constants: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            is_integer = buffer.dtype in (torch.int32, torch.int64)
            if is_integer and not buffer.is_meta and buffer.numel() <= _MAX_DATA:
                constants[name] = buffer.detach().cpu().numpy()
            elif is_integer or name.rpartition(".")[2] in module._non_persistent_buffers_set:
                constants[name] = None
    return constants


def _introduce_parameters(
    recorder: _Recorder,
    twin: nn.Module,
    originals: Mapping[str, Tensor],
    names: Mapping[int, str],
    constants: Mapping[str, Any],
    pinned: Mapping[str, str],
) -> None:
    for tensor in [*twin.parameters(), *twin.buffers()]:
        name = names.get(id(tensor))
        if name is None:  # it hides in an object that the model does not list
            continue
        recorder.fakes.stand_for(originals[name], tensor)  # closures hold on to the tensors of the model itself
        if name in constants:
            recorder.introduce(tensor, Value(tuple(tensor.shape), data=constants[name]))
            continue
        value = Value(tuple(tensor.shape), source=Source(name, tuple(range(tensor.dim()))))
        is_real = tensor.is_floating_point() or tensor.is_complex()
        for analysis in recorder.analyses:
            analysis.add_parameter(name, tensor.dim(), is_data=not isinstance(tensor, nn.Parameter) or not is_real)
        if name in pinned:
            recorder.refuse(name, pinned[name])
            for analysis in recorder.analyses:
                analysis.close(value)
        recorder.introduce(tensor, value)
        recorder.introduce(originals[name], value)


def _guard_modules(recorder: _Recorder, twin: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Keep track of where an operation belongs, and let nothing pass modules that users have changed by hooks."""
    for name, module in twin.named_modules():
        if isinstance(module, Scripted):
            module.call = _scripted(recorder, name)
            continue
        original = originals[name]
        hooks = [*original._forward_hooks.values(), *original._forward_pre_hooks.values()]
        hooks = [hook for hook in hooks if not isinstance(hook, SilentHook)]
        backward = [*original._backward_hooks, *original._backward_pre_hooks, *_global_backward_hooks]
        backward += [*_global_backward_pre_hooks]
        if hooks or backward:
            recorder.refuse(
                name,
                "it has forward hooks, which may change what it computes: remove them"
                if hooks
                else "it has backward hooks, which may change its gradients: remove them",
            )
            for parameter in [*module.parameters(), *module.buffers()]:
                recorder.freeze(parameter)
        module.register_forward_pre_hook(_enter(recorder, name, bool(hooks or backward)), with_kwargs=True)
        module.register_forward_hook(_leave(recorder, name, bool(hooks or backward)), with_kwargs=True)


def _enter(recorder: _Recorder, name: str, is_hooked: bool) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.module = name
        if is_hooked:
            recorder.freeze((args, kwargs))

    return hook


def _leave(recorder: _Recorder, name: str, is_hooked: bool) -> Any:
    parent = name.rpartition(".")[0]

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder.module = parent
        if is_hooked:
            recorder.freeze(output)

    return hook


def _scripted(recorder: _Recorder, name: str) -> Callable[..., Any]:
    """A call of a scripted module, whose operations are not followed."""

    def call(original: torch.jit.ScriptModule, *args: Any, **kwargs: Any) -> Any:
        recorder.refuse(name, "it is scripted, so that its operations cannot be followed: leave torch.jit.script out")
        tensors = [*original.named_parameters(name), *original.named_buffers(name)]
        recorder.used |= {own for own, _ in tensors}
        recorder.freeze((args, kwargs))
        recorder.is_paused = True
        try:
            # else it would learn from the shapes and types of this call
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                output = original(*args, **kwargs)
        finally:
            recorder.is_paused = False
        for _, tensor in tensors:  # others may share them
            recorder.freeze(recorder.fakes.of(tensor))
        return output

    return call


def _doubled(inputs: Inputs) -> Inputs | None:
    """The inputs with a second example where there is only one, which some layers do not take in training mode."""

    def is_single(leaf: Tensor) -> bool:
        return leaf.dim() > 0 and len(leaf) == 1

    def double(leaf: Tensor) -> Tensor:
        return torch.empty((2, *leaf.shape[1:]), dtype=leaf.dtype, device="meta") if is_single(leaf) else leaf

    if not any(isinstance(leaf, Tensor) and is_single(leaf) for leaf in tree_leaves(inputs)):
        return None
    doubled: Inputs = tree_map_only(Tensor, double, inputs)
    return doubled


_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


def _attributes(model: nn.Module) -> set[Tensor]:
    """The tensors that the modules of a model keep outside their parameters and persistent buffers."""
    kept: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, Scripted):
            continue
        own = {
            key: value
            for key, value in vars(module).items()
            if key not in _OWN_ATTRIBUTES and not isinstance(value, (bool, int, float, str))
        }
        kept |= set(_tensors_in(list(own.values())))
        kept |= {x for key, x in module._buffers.items() if x is not None and key in module._non_persistent_buffers_set}
    return kept


_WITHOUT_TENSORS = (
    type(None), bool, int, float, complex, str, bytes, type, range, ModuleType, BuiltinFunctionType, Enum, np.ndarray, np.generic,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, nn.Module,
)  # fmt: skip


def _tensors_in(value: Any, *, is_strict: bool = False) -> Iterator[Tensor]:
    """The tensors in containers and in the attributes of objects.

    Raises:
        Untraceable: where ``is_strict``, if there is an object into which one cannot look.
    """
    queue, seen = [value], set()
    while queue:
        one = queue.pop()
        if isinstance(one, Tensor):
            yield one
            continue
        if isinstance(one, _WITHOUT_TENSORS) or id(one) in seen:
            continue
        seen.add(id(one))
        is_known = False
        if isinstance(one, Mapping):
            is_known = True
            queue += reversed(list(one.values()))
        elif isinstance(one, (list, tuple, set, frozenset, deque)):
            is_known = True
            queue += reversed(list(one))
        elif isinstance(one, FunctionType):
            is_known = True
            queue += [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
        elif isinstance(one, MethodType):
            is_known = True
            queue.append(one.__self__)
        if type(getattr(one, "__dict__", None)) is dict and not isinstance(one, FunctionType):
            is_known = True
            queue += reversed(list(vars(one).values()))
        for name in (name for kind in type(one).__mro__ for name in slot_attributes(kind)):
            is_known = True
            if hasattr(one, name):
                queue.append(getattr(one, name))
        if is_strict and not is_known:
            raise Untraceable(f"it returns an object of type {type(one).__name__}, whose tensors cannot be seen")


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def leaves(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, with those in objects.

    Raises:
        Untraceable: if it holds an object in which they cannot be seen.
    """
    yield from _tensors_in(output, is_strict=True)
