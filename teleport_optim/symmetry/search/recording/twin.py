"""Copies of a model for a search: their tensors have no data, and what they keep does not reach the model."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from teleport_optim.symmetry.search.limits import Untraceable
from teleport_optim.symmetry.search.recording.isolation import HOOKS, is_users

__all__ = ["Scripted", "slot_attributes", "twin_of"]

_ATOMIC = (
    type(None), bool, int, float, complex, str, bytes, type, FunctionType, BuiltinFunctionType, ModuleType, Enum, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
"""Types whose values are not copied: nothing about them changes, or they are shared by all models."""
_EMPTY: tuple[Any, ...] = ([], (), {}, set(), "", range(0), {}.items(), {}.values())
_ITERATORS: tuple[type, ...] = (GeneratorType, map, zip, *(type(iter(x)) for x in _EMPTY))
_MAX_ENTRIES = 10_000
"""Containers with more entries are data, not parts of a model; they are shared, as are arrays with more bytes."""
_MAX_BYTES = 2**16


T = TypeVar("T")


class Scripted(nn.Module):
    """Stand-in for a scripted module, which can be called but neither copied nor hooked.

    Attributes:
        original: The scripted module.
        call: Takes the scripted module and the arguments of a call; None until the copy is watched.
    """

    def __init__(self, original: torch.jit.ScriptModule, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.call is not None
        return self.call(self.original, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class _Drawn:
    """Stand-in for a Python generator, which cannot be copied, and which a run would use up."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise Untraceable(
            f"its forward pass draws from a {self.kind}, which cannot be copied: keep a list or a function instead"
        )


def twin_of(model: T, memo: dict[int, Any], fake: Callable[[Tensor], Tensor]) -> tuple[T, list[object]]:
    """A copy of a model, or of its inputs; a tensor becomes what ``memo`` has for its id, else what ``fake`` makes of it.

    Modules (without their hooks), containers and plain objects of users are copied. All else is shared: what the copy does
    to it has to be undone.

    Returns:
        The copy, and the objects that it shares with the model.
    """
    copier = _Copier(memo, fake)
    try:
        return copier(model), copier.shared
    except RecursionError:
        raise Untraceable("it cannot be copied: its modules or attributes are nested too deeply") from None


class _Copier:
    """Copies a structure; an object in several places is one object in the copy, too."""

    def __init__(self, memo: dict[int, Any], fake: Callable[[Tensor], Tensor]) -> None:
        self._memo = memo
        self._fake = fake
        self._kept: list[object] = []  # what lives for a moment only would lend its id to another object
        self.shared: list[object] = []

    def __call__(self, value: Any) -> Any:
        if isinstance(value, _ATOMIC):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        self._kept.append(value)
        copied = self._copied(value)
        self._memo[id(value)] = copied
        if copied is value:
            self.shared.append(value)
        return copied

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._fake(value)
        if isinstance(value, torch.jit.ScriptModule):
            return Scripted(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        kind = type(value)
        if kind in (list, dict, set, tuple, frozenset, deque, OrderedDict, defaultdict) or _is_named_tuple(value):
            return value if len(value) > _MAX_ENTRIES else self._container(value)
        if kind is MethodType:
            return MethodType(value.__func__, self(value.__self__))
        if kind is functools.partial:
            return functools.partial(self(value.func), *self(value.args), **self(value.keywords))
        if kind is itertools.count:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return copy.copy(value)
        if isinstance(value, _ITERATORS):
            return _Drawn(kind.__name__)
        if isinstance(value, np.ndarray):
            return _array(value)
        if isinstance(value, torch.Generator):
            generator = torch.Generator(value.device)
            generator.set_state(value.get_state())
            return generator
        return self._object(value)

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, dict):
            new = defaultdict(self(value.default_factory)) if isinstance(value, defaultdict) else kind()
            self._memo[id(value)] = new
            new.update((self(key), self(entry)) for key, entry in list(value.items()))
            return new
        if kind in (list, set, deque):
            copied: Any = deque(maxlen=value.maxlen) if isinstance(value, deque) else kind()
            self._memo[id(value)] = copied
            (copied.update if kind is set else copied.extend)(map(self, list(value)))
            return copied
        return kind(*map(self, value)) if _is_named_tuple(value) else kind(map(self, value))

    def _module(self, module: nn.Module) -> nn.Module:
        new: nn.Module = object.__new__(type(module))
        self._memo[id(module)] = new
        state = module.__dict__
        if type(module).__getstate__ is not object.__getstate__ and not is_parametrized(module):
            state = module.__getstate__()  # type: ignore[no-untyped-call]
        if not isinstance(state, Mapping):
            raise Untraceable(f"it cannot be copied: the state of a {type(module).__name__} is no dictionary")
        copied = {key: OrderedDict() if key in HOOKS else self(entry) for key, entry in list(state.items())}
        if type(module).__setstate__ is nn.Module.__setstate__:
            new.__dict__.update(copied)
        else:
            new.__setstate__(copied)  # type: ignore[no-untyped-call]
        return new

    def _object(self, value: Any) -> Any:
        """Copy an object of a plain class of the user's; share all others."""
        kind = type(value)
        attributes = [name for own in kind.__mro__ for name in slot_attributes(own)]
        special = ("__reduce__", "__reduce_ex__", "__getstate__")
        is_plain = all(getattr(kind, name) is getattr(object, name) for name in special)
        if not is_plain or not is_users(kind) or hasattr(kind, "__deepcopy__") or hasattr(kind, "__del__"):
            return value
        try:
            new = object.__new__(kind)
        except TypeError:  # it is laid out by C, as dictionaries and exceptions are
            return value
        self._memo[id(value)] = new
        for name in attributes:
            if hasattr(value, name):
                object.__setattr__(new, name, self(getattr(value, name)))
        if hasattr(value, "__dict__"):
            new.__dict__.update((key, self(entry)) for key, entry in list(vars(value).items()))
        return new


def slot_attributes(kind: type) -> list[str]:
    """Attributes that a class keeps outside the dictionaries of its objects."""
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    return [name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__")]


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and type(value) is not tuple and hasattr(value, "_fields")


def _array(array: Any) -> Any:
    """Copy a small array; a large one is shared, but cannot be written."""
    if array.dtype == object:
        return array
    if array.nbytes <= _MAX_BYTES:
        return array.copy()
    view = array.view()
    view.flags.writeable = False
    return view
