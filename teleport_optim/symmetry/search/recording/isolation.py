"""State outside a model that its code may change, put back as it was.

A search runs a copy of the model, but the code reaches further: caches of ``functools``, dictionaries and counters of modules
and classes, lists in closures. State that the code can reach is noted before the search and restored after it. Other traces of
the search are found by its tensors, none of which may outlive it.
"""

from __future__ import annotations

import functools
import gc
import random
import sys
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["HOOKS", "Surroundings", "drop_survivors", "is_users", "quiet"]

_LIBRARIES = frozenset({"torch", "numpy", "functorch", "sympy", "scipy", "teleport_optim"}) | (
    sys.stdlib_module_names - {"__main__"}
)
"""Packages whose own caches and settings are theirs: no model keeps anything there."""
_MAX_OBJECTS = 50_000
_MAX_ENTRIES = 10_000
_CACHE: type = type(functools.cache(len))


def _package(name: str) -> str:
    return name.partition(".")[0]


_DICTS = (dict, OrderedDict, defaultdict, Counter)
_LISTS = (list, deque)


HOOKS = frozenset(key for key in vars(nn.Module()) if "hooks" in key)
"""Attributes in which a module keeps its hooks."""


def is_users(kind: Any) -> bool:
    """Whether a class or function is neither Python's nor torch's nor of this package."""
    name = getattr(kind, "__module__", None)
    return isinstance(name, str) and _package(name) not in _LIBRARIES


@contextmanager
def quiet() -> Iterator[None]:
    """Keep random states, keep warnings of the model for its own run, and collect no garbage, which takes longer than a search."""
    is_collecting = gc.isenabled()
    gc.disable()
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what models may draw from
    # a device that nothing has run on yet is not to be woken up
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(list(devices)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if is_collecting:
            gc.enable()
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


class Surroundings:
    """State that the code of some objects can reach, as it is now.

    Only the user's code and other libraries' is looked into, not Python's and torch's. With other threads at work, only what
    holds tensors of the search is restored, since the rest may be theirs.

    Args:
        roots: The objects: modules, containers, functions.
        is_ours: Whether an object belongs to the search.
    """

    def __init__(self, roots: Iterable[object], is_ours: Callable[[object], bool]) -> None:
        self._is_ours = is_ours
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any], bool]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._caches: list[tuple[Any, int, frozenset[Any]]] = []
        self._states: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        self._queue: deque[Any] = deque(roots)
        # of what is installed, only the packages from which the model comes
        kinds = {kind for root in self._queue if isinstance(root, nn.Module) for kind in type(root).__mro__}
        self._packages = {_package(kind.__module__): True for kind in kinds if is_users(kind)}
        while self._queue and len(self._seen) < _MAX_OBJECTS:
            self._visit(self._queue.popleft())
        self._queue.clear()

    def _visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if kind in _DICTS:
            self._add_dict(value)
        elif kind in _LISTS:
            entries = list(value)
            self._lists.append((value, entries))
            self._follow(entries)
        elif kind is set:
            self._sets.append((value, set(value)))
            self._follow(list(value))
        elif kind in (tuple, frozenset):
            self._follow(list(value))
        elif kind is FunctionType:
            self._add_function(value)
        elif kind is _CACHE:
            self._add_cache(value)
        elif kind is MethodType:
            self._queue += (value.__func__, value.__self__)
        elif kind is functools.partial:
            self._queue += (value.func, value.args, value.keywords)
        elif kind in (staticmethod, classmethod):
            self._queue.append(value.__func__)
        elif kind is property:
            self._queue += (value.fget, value.fset)
        elif isinstance(value, type):
            if is_users(value) and self._is_near(value.__module__):
                own = dict(vars(value))
                self._classes.append((value, own))
                self._queue += (*own.values(), *value.__bases__, sys.modules.get(value.__module__))
        elif isinstance(value, ModuleType):
            if self._is_near(value.__name__):
                self._add_dict(vars(value), is_namespace=True)
        elif isinstance(value, threading.local):
            self._add_dict(vars(value))
        elif isinstance(value, (WeakKeyDictionary, WeakValueDictionary)):
            self._add_dict(vars(value)["data"])
        elif isinstance(value, torch.Generator):
            self._states.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._states.append((value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            generator = value.bit_generator
            self._states.append((functools.partial(setattr, generator, "state"), generator.state))
        elif isinstance(value, np.ndarray):
            if value.size <= _MAX_ENTRIES and value.dtype != object and value.flags.writeable:
                self._states.append((functools.partial(np.copyto, value), value.copy()))
        elif isinstance(value, nn.Module):
            self._add_dict(value.__dict__, skip=HOOKS)
            self._queue.append(kind)
        elif is_users(kind) and not isinstance(value, Tensor):
            attributes = getattr(value, "__dict__", None)
            if type(attributes) is dict:
                self._add_dict(attributes)
            self._queue.append(kind)

    def _is_near(self, name: object) -> bool:
        """Whether a module may hold the code of the model: its own package, or one that is not installed but at work."""
        if not isinstance(name, str):
            return False
        package = _package(name)
        if package not in self._packages:
            file = getattr(sys.modules.get(package), "__file__", None) or ""
            is_installed = "site-packages" in file or "dist-packages" in file
            self._packages[package] = package not in _LIBRARIES and not is_installed
        return self._packages[package]

    def _add_dict(self, value: dict[Any, Any], is_namespace: bool = False, skip: frozenset[str] = frozenset()) -> None:
        self._seen.add(id(value))
        entries = dict(value)
        self._dicts.append((value, entries, is_namespace))
        self._follow([entry for key, entry in entries.items() if key not in skip] if skip else list(entries.values()))

    def _follow(self, entries: list[Any]) -> None:
        if len(entries) <= _MAX_ENTRIES:
            self._queue += [entry for entry in entries if type(entry) not in _PLAIN]

    def _add_function(self, function: FunctionType) -> None:
        name = function.__globals__.get("__name__")
        if self._is_near(name):
            if id(function.__globals__) not in self._seen:
                self._add_dict(function.__globals__, is_namespace=True)
        elif function.__closure__ is None or not str(name).startswith("torch"):  # torch wraps functions of the user's
            return
        self._queue += (*(function.__defaults__ or ()), function.__dict__)
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # it is empty
                continue
            self._cells.append((cell, content))
            self._queue.append(content)

    def _add_cache(self, cache: Any) -> None:
        if is_users(cache):
            self._caches.append((cache, cache.cache_info().misses, frozenset(_entries_of(cache))))
            table = _table_of(cache)
            if table:  # a result may be a list or a dictionary that later calls change
                is_plain = cache.cache_info().maxsize is None
                self._follow(list(table.values()) if is_plain else [result for _, result in _linked(cache, table)])
        self._queue.append(cache.__wrapped__)

    def restore(self) -> list[Any]:
        """Put everything back; returns what has been taken out."""
        is_alone = threading.active_count() == 1
        taken: list[Any] = []

        def may_remove(new: Any) -> bool:
            return is_alone or self._is_ours(new)

        for container, before, is_namespace in self._dicts:
            if len(container) == len(before) and all(a is b for a, b in zip(container.values(), before.values())):
                continue
            now = dict(container)
            lost = before.keys() - now.keys()
            new = {key: entry for key, entry in now.items() if key not in before or entry is not before[key]}
            if is_namespace:  # what was imported or defined meanwhile is there to stay
                new = {key: x for key, x in new.items() if not isinstance(x, (ModuleType, type, FunctionType))}
            new = {key: entry for key, entry in new.items() if may_remove(entry)}
            taken += new.values()
            for key in new:
                if key in before:
                    container[key] = before[key]
                else:
                    del container[key]
            if lost and is_alone:
                rest = {key: entry for key, entry in container.items() if key not in before}
                container.clear()
                container.update(before | rest)
        for entries, own in self._lists:
            if len(entries) != len(own) or any(a is not b for a, b in zip(entries, own)):
                known = set(map(id, own))
                new_entries = [entry for entry in entries if id(entry) not in known]
                if is_alone or any(map(self._is_ours, new_entries)):
                    taken += new_entries
                    entries.clear()
                    entries.extend(own)
        for members, own_members in self._sets:
            added = {member for member in members - own_members if may_remove(member)}
            taken += added
            members -= added
            if is_alone:
                members |= own_members
        for kind, attributes in self._classes:
            for key, entry in list(vars(kind).items()):
                is_known = key in attributes
                if (not is_known or entry is not attributes[key]) and may_remove(entry) and not key.startswith("__"):
                    taken.append(entry)
                    if is_known:
                        setattr(kind, key, attributes[key])
                    else:
                        delattr(kind, key)
        for cell, content in self._cells:
            if cell.cell_contents is not content and may_remove(cell.cell_contents):
                taken.append(cell.cell_contents)
                cell.cell_contents = content
        for cache, misses, keys in self._caches:
            if cache.cache_info().misses != misses:
                taken += _remove_entries(cache, keys)
        if is_alone:
            for put, state in self._states:
                put(state)
        return taken


_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter, torch.dtype, torch.device})


def _table_of(cache: Any) -> dict[Any, Any] | None:
    """Find the dictionary in which CPython keeps the results of a function; None if that fails."""
    referents = gc.get_referents(
        cache
    )  # the results first, which may be dictionaries, too; then the table, the function
    place = next((k for k, x in enumerate(referents) if x is cache.__wrapped__), 0)
    table = referents[place - 1] if place else None
    is_table = type(table) is dict and len(table) == cache.cache_info().currsize
    return table if is_table else None


def _linked(cache: Any, table: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Keys and results of a cache of bounded size, whose table hides the results."""
    referents = gc.get_referents(cache)
    start = next(k for k, x in enumerate(referents) if x is table) if table else 0
    return [(referents[k], referents[k + 1]) for k in range(1, start - 2, 3)]


def _entries_of(cache: Any) -> list[Any]:
    table = _table_of(cache)
    return [] if table is None else list(table)


def _remove_entries(cache: Any, keep: frozenset[Any]) -> list[Any]:
    """Remove the new entries of a cache; returns them, as far as they can be seen."""
    table = _table_of(cache)
    if table is None or not keep:
        taken = list(gc.get_referents(cache))
        cache.cache_clear()
        return taken
    return [table.pop(key) for key in list(table) if key not in keep]


def drop_survivors(made: Sequence[ref[Tensor]]) -> list[str]:
    """Clear all that still holds tensors of a search after it; returns the types of objects that cannot be cleared."""
    if not _alive(made):
        return []
    gc.collect()
    for _ in range(3):  # what holds a tensor may be held by something that can be cleared
        survivors = _alive(made)
        if not survivors:
            return []
        _clear_holders(survivors, {id(survivors)})
        del survivors
    gc.collect()
    survivors = _alive(made)
    holders = gc.get_referrers(*survivors) if survivors else []
    names = {type(holder).__name__ for holder in holders if holder is not survivors and not _is_orphan(holder)}
    return sorted(names)


def _alive(made: Sequence[ref[Tensor]]) -> list[Tensor]:
    return [tensor for reference in made if (tensor := reference()) is not None]


def _is_orphan(holder: Any) -> bool:
    """Whether a cache, or a link of one, holds a result that no call can get any more."""
    return type(holder).__name__ == "_lru_list_elem" or type(holder) is _CACHE


def _clear_holders(survivors: list[Any], own: set[int], depth: int = 3) -> None:
    """Clear all that holds ``survivors``; ``own`` are the ids of our own lists, which hold them, too."""
    gone = {id(tensor) for tensor in survivors}
    holders = gc.get_referrers(*survivors)
    tuples: list[Any] = []
    own |= {id(holders), id(tuples)}
    for holder in holders:
        if id(holder) in own:
            continue
        if isinstance(holder, tuple):
            tuples.append(holder)
            continue
        with suppress(Exception):  # a class of the user's may refuse
            _clear(holder, gone)
    if tuples and depth:
        _clear_holders(tuples, own, depth - 1)


def _clear(holder: Any, gone: set[int]) -> None:
    if isinstance(holder, dict):
        for key in [key for key, entry in holder.items() if id(entry) in gone]:
            del holder[key]
    elif isinstance(holder, _LISTS):
        kept = [entry for entry in holder if id(entry) not in gone]
        holder.clear()
        holder.extend(kept)
    elif isinstance(holder, set):
        holder.difference_update([entry for entry in holder if id(entry) in gone])
    elif type(holder) is _CACHE:
        _forget(holder, gone)
    elif isinstance(holder, CellType):
        del holder.cell_contents
    elif type(getattr(holder, "__dict__", None)) is dict:
        for key in [key for key, entry in vars(holder).items() if id(entry) in gone]:
            delattr(holder, key)


def _forget(cache: Any, gone: set[int]) -> None:
    """Remove from a cache the results that are gone."""
    table = _table_of(cache)
    if table is None:
        cache.cache_clear()
        return
    entries = list(table.items()) if cache.cache_info().maxsize is None else _linked(cache, table)
    for key, result in entries:
        if id(result) in gone:
            table.pop(key, None)
