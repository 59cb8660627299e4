"""Record a model: call a copy of it, without data, and keep each call as a graph.

The copy has tensors with a shape but no data (torch's fake tensors), so that a call costs no arithmetic and no memory, and the
model itself does not run. All that its code could change elsewhere is put back. The machinery is in
:mod:`~teleport_optim.symmetry.search.recording`.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from teleport_optim.symmetry.inputs import Inputs
from teleport_optim.symmetry.named_tensors import named_tensors
from teleport_optim.symmetry.search.graph import Graph, Parameter, Source, Value
from teleport_optim.symmetry.search.limits import Limits, Untraceable
from teleport_optim.symmetry.search.recording.fakes import Fakes
from teleport_optim.symmetry.search.recording.isolation import Surroundings, drop_survivors, quiet
from teleport_optim.symmetry.search.recording.modules import watch_modules
from teleport_optim.symmetry.search.recording.recorder import Recorder
from teleport_optim.symmetry.search.recording.tensors import attributes, leaves, tensors_in
from teleport_optim.symmetry.search.recording.twin import twin_of
from teleport_optim.symmetry.search.recording.watch import Watch, random_states, sizes_of

__all__ = ["Session", "leaving_nothing", "record"]

_MAX_DATA = 2**20
"""Most entries of an integer buffer whose values are kept, since they may be indices."""

T = TypeVar("T")


def record(model: nn.Module, inputs: Inputs, *, is_training: bool = False) -> Graph:
    """Record what a model computes, with inputs of these shapes, in one mode.

    Args:
        model: The model; it is not changed and not run.
        inputs: Its inputs; only their shapes matter.
        is_training: Whether in training mode.

    Raises:
        Untraceable: if the model cannot be followed; and whatever the code of the model raises.

    Example:
        >>> print(record(nn.Sequential(nn.Linear(3, 8), nn.ReLU()), Inputs.of(torch.ones(2, 3))))
        %0 = input [2, 3]
        %1 = linear(%0, 0.weight, 0.bias) [2, 8]  # 0
        %2 = relu(%1) [2, 8]  # 1
        return %2
    """

    def run(fakes: Fakes) -> Graph:
        limits = Limits.of(2**62, float("inf"))
        with Session(model, inputs, fakes, limits, {}) as session, session.in_mode(is_training):
            return session.run(inputs)

    return leaving_nothing(run)


def leaving_nothing(work: Callable[[Fakes], T]) -> T:
    """Do some work with tensors without data, and let none of them outlive it.

    Args:
        work: Takes the maker of these tensors. Its result may not hold any.
    """
    fakes = Fakes()
    try:
        return work(fakes)
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
                stacklevel=4,
            )


class Session:
    """A copy of a model that can be called, each call recorded as a graph; use it as a context.

    Args:
        model: The model, which is neither run nor changed.
        inputs: Its inputs.
        fakes: Makes tensors without data.
        limits: Most operations and seconds.
        pinned: Parameters and buffers that may not move, with the reason.

    Attributes:
        graph: The last graph. First it has the parameters and what is refused before a run; after a run that fails, the calls
            until then; in the end, after the context, the tensors that the model has put elsewhere.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, fakes: Fakes, limits: Limits, pinned: Mapping[str, str]
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._fakes = fakes
        self._limits = limits
        self._pinned = pinned
        self._exit = ExitStack()

    @property
    def graph(self) -> Graph:
        """The last graph."""
        return self._recorder.graph

    def __enter__(self) -> Session:
        model = self._model
        with ExitStack() as stack:
            for context in (_untouched_state(), quiet(), torch.inference_mode()):
                stack.enter_context(context)
            originals = dict(named_tensors(model))
            self._device = next((tensor.device for tensor in originals.values()), torch.device("cpu"))
            memo: dict[int, Any] = {}
            names: dict[int, str] = {}
            for name, tensor in originals.items():
                if id(tensor) not in memo:
                    memo[id(tensor)] = self._fakes.empty(tensor)
                    names[id(memo[id(tensor)])] = name
            self._twin, shared = twin_of(model, memo, self._fakes.of)
            self._recorder = Recorder(self._fakes, self._limits, names)
            shared_inputs = self._copy(self._inputs)[2]
            _introduce_parameters(self._recorder, self._twin, originals, names, _constants(model), self._pinned)
            watch_modules(self._recorder, self._twin, dict(model.named_modules()))
            self._lasting = attributes(self._twin)
            surroundings = Surroundings([*model.modules(), *shared, *shared_inputs], self._fakes.is_ours)
            stack.callback(self._restore, surroundings)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def _restore(self, surroundings: Surroundings) -> None:
        taken = surroundings.restore()
        self._recorder.start()
        for leaf in tensors_in(taken):
            self._recorder.pin(leaf)

    @contextmanager
    def in_mode(self, is_training: bool) -> Iterator[Watch]:
        """Put the copy in a mode; the watch hears what it asks for there.

        Raises:
            Untraceable: if it draws random numbers of Python or numpy.
        """
        self._twin.train(is_training)
        states = random_states(self._twin)
        sizes = frozenset(size for size in sizes_of(self._inputs) or () if size is not None)
        with Watch(self._recorder.pin, sizes, self._fakes.of) as watch:
            yield watch
        if random_states(self._twin) != states:
            mode = "training" if is_training else "evaluation"
            raise Untraceable(
                f"it draws from Python's or numpy's random numbers in {mode} mode, on which its path may depend: draw with "
                f"torch, on tensors"
            )

    def run(self, inputs: Inputs) -> Graph:
        """Call the copy. What it returns are the outputs of the graph.

        Raises:
            Untraceable: if it returns an object into which one cannot look; and whatever the code of the model raises.
        """
        values, tensors, _ = self._copy(inputs)
        recorder = self._recorder
        graph = recorder.start()
        for tensor in tensors:
            recorder.introduce_input(tensor)
        with self._fakes.mode, recorder:
            output = self._twin(*values.args, **values.kwargs)
        graph.outputs += [recorder.value(leaf) for leaf in leaves(output)]
        return graph

    def kept(self) -> Graph:
        """Pin the tensors that the copy keeps for its next calls, but for parameters."""
        graph = self._recorder.start()
        for leaf in attributes(self._twin) | self._lasting:
            self._recorder.pin(leaf, spares_parameters=True)
        return graph

    def _copy(self, inputs: Inputs) -> tuple[Inputs, list[Tensor], list[object]]:
        """Inputs without data, their tensors, and the objects that they share with the given ones."""
        tensors: list[Tensor] = []

        def fake(tensor: Tensor) -> Tensor:
            tensors.append(self._fakes.empty(tensor, self._device))
            return tensors[-1]

        values, shared = twin_of(inputs, {}, fake)
        return values, tensors, shared


def _clear_frames(error: BaseException | None) -> None:
    """Clear the variables of the lines that an error tells of: they would keep tensors of the search alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextmanager
def _untouched_state() -> Iterator[None]:
    """Change some settings of torch, and put them back.

    The fast path for attention would be one operation that nothing is known of. Distributions would check their parameters,
    which have no data. torch would log errors of tensors without data, which are raised, too.
    """
    is_checked = Distribution._validate_args
    is_fast = torch.backends.mha.get_fastpath_enabled()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    is_silent, log.disabled = log.disabled, True
    Distribution.set_default_validate_args(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(is_checked)
        torch.backends.mha.set_fastpath_enabled(is_fast)
        log.disabled = is_silent


def _constants(model: nn.Module) -> dict[str, Any]:
    """Buffers that do not move: integers, with their values where these are known, and those that a state dict leaves out."""
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
    recorder: Recorder,
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
        is_real = tensor.is_floating_point() or tensor.is_complex()
        shape = tuple(tensor.shape)
        if name in constants:
            recorder.introduce(tensor, Value(shape, name, data=constants[name], is_discrete=not is_real))
            continue
        value = Value(shape, name, Source(name, tuple(range(tensor.dim()))), is_discrete=not is_real)
        is_data = not isinstance(tensor, nn.Parameter) or not is_real
        recorder.introduce_parameter(tensor, originals[name], Parameter(value, is_data, pinned.get(name, "")))
