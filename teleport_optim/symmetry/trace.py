"""Run a model once without data and tell every theory what each operation demands.

The model is copied with tensors that have a shape but no data (torch's fake tensors), so that a trace costs no arithmetic and
no memory, and the model itself is not run. Operations are seen as they are dispatched, in the evaluation and in the training
graph. Control flow that depends on data cannot be followed this way and is refused.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from teleport_optim.symmetry.inputs import Inputs, SilentHook
from teleport_optim.symmetry.labels import Labels
from teleport_optim.symmetry.operations import COPIES, CREATIONS, RULES, Call, source_view
from teleport_optim.symmetry.reading import Readings, Scout
from teleport_optim.symmetry.spec import Refusal
from teleport_optim.symmetry.theories import Source, Theory, Value
from teleport_optim.symmetry.watch import Watch, other_sizes, random_states, sizes_of

__all__ = ["Untraceable", "leaves", "trace"]

_NORMALISATIONS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm"})
_NAMED_IN_PLACE = frozenset({"normal_", "uniform_", "bernoulli_", "random_", "zero_", "fill_"})
_ASSIGNS_DATA = "_has_compatible_shallow_copy_type"
"""What an assignment to ``.data`` asks; the assignment itself is no operation."""
_LONG = 3000
"""Operations from which on a model is followed with smaller inputs only."""
_MAX_OUTPUTS = 2**16
_MAX_DATA = 2**20
"""Most entries of a buffer whose values are looked at as indices."""


class Untraceable(ValueError):
    """The model cannot be followed; the message says why."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears of every operation and applies its rule in every theory."""

    def __init__(self, theories: Sequence[Theory]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.theories = theories
        self.readings = Readings(theories)
        self.refusals: list[Refusal] = []
        self.module = ""
        self.used: set[str] = set()
        self._node = 0
        self._known: dict[int, tuple[Tensor, Value]] = {}
        self._aliases: dict[int, list[Tensor]] = {}

    # ---------------------------------------------------------------------------------------------------- tensors

    def introduce(self, tensor: Tensor, value: Value) -> None:
        """Tell what is known of a tensor."""
        self._known[id(tensor)] = (tensor, value)
        self._aliases.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""
        if id(tensor) not in self._known:
            # a view that was made before the trace, or where no operation shows
            relatives = [self._known[id(one)][1] for one in self._aliases.get(tensor.untyped_storage()._cdata, [])]
            for relative in relatives:
                self._freeze_value(relative)
            self.introduce(tensor, Value(tuple(tensor.shape), reads_inputs=any(one.reads_inputs for one in relatives)))
        value = self._known[id(tensor)][1]
        if value.source is not None:
            self.used.add(value.source.name)
        return value

    def freeze(self, tree: Any) -> bool:
        """Let nothing about the tensors in ``tree`` move; returns whether anything could have."""
        values = [self.value(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        return sum(map(self._freeze_value, values)) > 0

    def _freeze_value(self, value: Value) -> bool:
        if value.is_still:
            return False
        for theory in self.theories:
            theory.freeze(value)
        self.readings.note_use(value)
        return True

    def pin(self, tree: Any, reason: str) -> None:
        """Let nothing about the tensors in ``tree`` move, and note why."""
        if self.freeze(tree):
            self.refuse(self.module, reason)

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
        name = func._schema.name.split("::")[-1]
        if name not in _NAMED_IN_PLACE:
            name = name if name.startswith("_") and not name.endswith("_") else name.rstrip("_") or name
        namespace = func.namespace
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == _ASSIGNS_DATA:
            self.pin(tensors, "another tensor is put in the place of a tensor by an assignment to its .data")
            return func(*args, **kwargs)
        is_known = namespace == "aten" and (name in RULES or name in CREATIONS)
        if (
            not is_known
            and tensors
            and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        ):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        written = self._written(func, args, kwargs)
        values = {id(tensor): self.value(tensor) for tensor in tensors}
        # torch would decompose a normalisation, which takes most of the time of a trace
        result = torch.empty_like(args[0]) if name in _NORMALISATIONS else func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs:
            return result
        self._node += 1
        call = self._call(name, func, args, kwargs, values, outputs)
        if namespace == "aten" and not written:
            view = source_view(call)
            if view is not None:
                self.introduce(outputs[0], view)
                return result
        labels = self._apply(call, list(values.values()), is_known)
        reads_inputs = any(value.reads_inputs for value in values.values())
        results = []
        source = values[id(tensors[0])] if tensors and name in COPIES else None
        fill, data = (source.fill, source.data) if source else (self._fill(call), None)
        for position, output in enumerate(outputs):
            own = {theory.name: each[position] for theory, each in zip(self.theories, labels)}
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
                self._overwrite(target, {theory.name: () for theory in self.theories}, None, reads_inputs=reads_inputs)
        self.readings.note(call, list(values.values()), results)
        return result

    def _keep_numbers(self, labels: dict[str, tuple[Labels, ...]]) -> None:
        """Let no factor pass into integers and truth values, which are not multiplied along."""
        for theory in self.theories:
            if theory.changes_numbers:
                theory.fix(labels[theory.name])
                labels[theory.name] = ()

    def _call(
        self, name: str, func: Any, args: Any, kwargs: Any, values: Mapping[int, Value], outputs: Sequence[Tensor]
    ) -> Call:
        names = [argument.name for argument in func._schema.arguments]
        defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given = defaults | dict(zip(names, args)) | kwargs
        arguments = tree_map_only(Tensor, lambda leaf: values[id(leaf)], given)
        return Call(name, self._node, arguments, [tuple(output.shape) for output in outputs])

    def _apply(self, call: Call, values: list[Value], is_known: bool) -> list[list[tuple[Labels, ...]]]:
        nothing: list[tuple[Labels, ...]] = [()] * len(call.shapes)
        if all(value.is_still for value in values) or call.name in CREATIONS:
            return [nothing for _ in self.theories]
        if not is_known:
            self.refuse(self.module, f"{call.name} is not an operation whose symmetries are known")
        results = []
        for theory in self.theories:
            if is_known:
                outputs = self._follow(call, theory, values)
                # each output is a place of its own
                result = [theory.record(call.node * _MAX_OUTPUTS + k, labels) for k, labels in enumerate(outputs, 1)]
            else:
                result = nothing
                for value in values:
                    theory.freeze(value)
            for value in values:
                theory.close(value)
            results.append(result)
        return results

    def _follow(self, call: Call, theory: Theory, values: list[Value]) -> list[tuple[Labels, ...]]:
        """Apply the rule of an operation; a form of it that the rule does not foresee lets nothing through."""
        try:
            return RULES[call.name](call, theory)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self.refuse(self.module, f"{call.name} could not be followed: {type(error).__name__}: {error}")
            for value in values:
                theory.freeze(value)
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
    def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors that an operation writes in place."""
        if not func._schema.is_mutable:
            return []
        arguments = zip(func._schema.arguments, args)
        pairs = [*arguments, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
        written = [
            value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]

    def _overwrite(
        self, tensor: Tensor, labels: dict[str, tuple[Labels, ...]], fill: float | None, *, reads_inputs: bool
    ) -> None:
        """Take note that a tensor has been written in place, and what that means for those that share its memory."""
        before = self.value(tensor)
        others = [x for x in self._aliases[tensor.untyped_storage()._cdata] if x is not tensor]
        for theory in self.theories:
            own, new = theory.known(before), labels[theory.name]
            is_same = len(own) == len(new) and all(
                a.units is b.units
                or (
                    a.units.shape == b.units.shape
                    and np.array_equal(a.units, b.units)
                    and np.array_equal(a.roles, b.roles)
                    and a.sign == b.sign
                )
                for a, b in zip(own, new)
            )
            if not is_same and (others or before.source is not None):
                for one in new:
                    theory.units.fix(one.units)
                labels[theory.name] = ()
                for other in [tensor, *others]:
                    theory.freeze(self.value(other))
        if before.source is None:
            value = Value(tuple(tensor.shape), labels, fill=fill, reads_inputs=reads_inputs)
            self._known[id(tensor)] = (tensor, value)
        for other in others:
            value = self.value(other)
            value.fill, value.data = None, None
            value.reads_inputs = value.reads_inputs or reads_inputs


def trace(
    model: nn.Module,
    inputs: Inputs,
    theories: Sequence[Theory],
    *,
    pinned: Mapping[str, str],
) -> list[Refusal]:
    """Follow ``model`` in evaluation and in training mode and tell ``theories`` what its operations demand.

    Args:
        model: The model; it is not changed and not run.
        inputs: Its inputs; only their shapes matter.
        theories: The groups to follow.
        pinned: Parameters and buffers that may not move, with the reason.

    Returns:
        The places through which nothing passes.

    Raises:
        Untraceable: if the model cannot be followed.
    """
    constants = _constants(model)
    sizes = frozenset(size for size in sizes_of(inputs) or () if size is not None)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    with _untouched_state(), FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode():
        recorder = _Recorder(theories)
        twin, names = _copy(model, fake)
        _introduce_parameters(recorder, twin, model, names, constants, pinned)
        _guard_modules(recorder, twin)
        attributes = _attributes(twin)

        def without_data(given: Inputs) -> tuple[Inputs, list[Tensor]]:
            values: Inputs = tree_map_only(Tensor, lambda leaf: fake.from_tensor(leaf).to(device), given)
            return values, [leaf for leaf in tree_leaves(tuple(values)) if isinstance(leaf, Tensor)]

        def follow(given: Inputs) -> Any:
            """Call the model and tell the theories what it does; returns its output."""
            values, tensors = without_data(given)
            for tensor in tensors:
                recorder.introduce(tensor, Value(tuple(tensor.shape), reads_inputs=True))
            recorder.module = ""
            with recorder:
                return twin(*values.args, **values.kwargs)

        def scout(given: Inputs) -> Scout:
            """Call the model and take note of its path."""
            values, tensors = without_data(given)
            path = Scout(tensors)
            with path:
                twin(*values.args, **values.kwargs)
            return path

        for is_training in (False, True):
            twin.train(is_training)
            mode = "training" if is_training else "evaluation"
            states = random_states(twin)
            try:
                with Watch(recorder.pin, sizes) as watch:
                    outputs = [follow(inputs)]
                    if watch.asks_for_gradients:
                        outputs.append(_with_gradients(watch, lambda: follow(inputs)))
                    if watch.compares_sizes or (watch.asks_for_sizes and recorder.readings.has_choices):
                        outputs += _with_other_sizes(recorder, inputs, follow, scout)
            except Untraceable:
                raise
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise Untraceable(f"its control flow or shapes depend on data in {mode} mode ({error.func})") from error
            except Exception as error:
                raise ValueError(
                    f"the model cannot take example_inputs in {mode} mode: {type(error).__name__}: {error}. Pass them as you "
                    f"would pass them to the model, with at least two examples in the batch."
                ) from error
            if random_states(twin) != states:
                raise Untraceable(
                    f"it draws from Python's or numpy's random numbers in {mode} mode, on which its path may depend: draw with "
                    f"torch, on tensors"
                )
            for output in outputs:
                for leaf in leaves(output):
                    recorder.freeze(leaf)
            for leaf in _attributes(twin) - attributes:
                recorder.freeze(leaf)
        recorder.readings.pin_unread()
        unused = [name for name, _ in model.named_parameters() if name not in recorder.used]
        for name in unused:
            recorder.refuse(name, "the model never uses it")
    return recorder.refusals


def _with_gradients(watch: Watch, follow: Callable[[], Any]) -> Any:
    """Follow a model that asks whether gradients are taken, and tell it that they are; returns its output."""
    watch.with_gradients = True
    try:
        return follow()
    except Exception as error:
        raise Untraceable(
            f"it asks whether gradients are taken, and its way where they are cannot be followed: {type(error).__name__}: {error}"
        ) from error
    finally:
        watch.with_gradients = False


def _with_other_sizes(
    recorder: _Recorder, inputs: Inputs, follow: Callable[[Inputs], Any], scout: Callable[[Inputs], Scout]
) -> list[Any]:
    """Follow a model whose path may depend on the sizes of its inputs with others that it takes; returns its outputs.

    Whether it takes another path is looked at first, which costs less than to follow it.
    """
    outputs: list[Any] = []
    first = scout(inputs)
    for candidates in other_sizes(inputs, is_long=len(first.path) > _LONG):
        for other in candidates:
            try:
                second = scout(other)
            except Exception:  # it does not take such inputs
                continue
            if second.path != first.path:
                outputs.append(follow(other))
            recorder.readings.pin_choices(first.choices ^ second.choices)
            break
    return outputs


@contextmanager
def _untouched_state() -> Iterator[None]:
    """Leave random states, logging and torch's fast path for attention, which is one opaque operation, as they are."""
    is_fast = torch.backends.mha.get_fastpath_enabled()
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what models may draw from
    log = logging.getLogger("torch._subclasses.fake_tensor")
    is_silent, log.disabled = log.disabled, True  # errors are raised, too
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        log.disabled = is_silent
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


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


def _copy(model: nn.Module, fake: FakeTensorMode) -> tuple[nn.Module, dict[int, str]]:
    """A copy of the model whose tensors have no data, and the names of those."""
    memo: dict[int, Any] = {}
    names: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if id(tensor) not in memo:
            memo[id(tensor)] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(memo[id(tensor)], requires_grad=False)
            names[id(memo[id(tensor)])] = name
    try:
        return copy.deepcopy(model, memo), names
    except Exception as error:
        raise Untraceable(f"it cannot be copied: {error}") from error


def _introduce_parameters(
    recorder: _Recorder,
    twin: nn.Module,
    model: nn.Module,
    names: Mapping[int, str],
    constants: Mapping[str, Any],
    pinned: Mapping[str, str],
) -> None:
    originals = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for tensor in [*twin.parameters(), *twin.buffers()]:
        name = names[id(tensor)]
        if name in constants:
            recorder.introduce(tensor, Value(tuple(tensor.shape), data=constants[name]))
            continue
        value = Value(tuple(tensor.shape), source=Source(name, tuple(range(tensor.dim()))))
        is_real = tensor.is_floating_point() or tensor.is_complex()
        for theory in recorder.theories:
            theory.add_parameter(name, tensor.dim(), is_data=not isinstance(tensor, nn.Parameter) or not is_real)
        if name in pinned:
            recorder.refuse(name, pinned[name])
            for theory in recorder.theories:
                theory.close(value)
        recorder.introduce(tensor, value)
        recorder.introduce(originals[name], value)  # closures hold on to the tensors of the model itself


def _guard_modules(recorder: _Recorder, twin: nn.Module) -> None:
    """Keep track of where an operation belongs, and let nothing pass modules that users have changed by hooks."""
    for name, module in twin.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks = [hook for hook in hooks if not isinstance(hook, SilentHook)]
        backward = [*module._backward_hooks, *module._backward_pre_hooks, *_global_backward_hooks]
        backward += [*_global_backward_pre_hooks]
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_hooks_always_called.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
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


def _attributes(model: nn.Module) -> set[Tensor]:
    """The tensors that the modules of a model keep outside their parameters."""
    kept: set[Tensor] = set()
    for module in model.modules():
        own = {
            key: value
            for key, value in vars(module).items()
            if key not in ("_parameters", "_modules") and "hooks" not in key
        }
        kept |= {leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor)}
    return kept


def leaves(output: Any) -> Iterator[Tensor]:
    """The tensors of an output.

    Raises:
        Untraceable: if it holds an object in which they cannot be seen.
    """
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            yield from leaves(dict(vars(leaf)))
        elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
            raise Untraceable(f"it returns an object of type {type(leaf).__name__}, whose tensors cannot be seen")
