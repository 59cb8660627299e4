"""Tensors that a model returns, or keeps in its attributes, wherever they hide."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teleport_optim.symmetry.search.limits import Untraceable
from teleport_optim.symmetry.search.recording.twin import Scripted, slot_attributes

__all__ = ["attributes", "leaves", "tensors_in"]

_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


def attributes(model: nn.Module) -> set[Tensor]:
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
        kept |= set(tensors_in(list(own.values())))
        kept |= {x for key, x in module._buffers.items() if x is not None and key in module._non_persistent_buffers_set}
    return kept


_WITHOUT_TENSORS = (
    type(None), bool, int, float, complex, str, bytes, type, range, ModuleType, BuiltinFunctionType, Enum, np.ndarray, np.generic,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, nn.Module,
)  # fmt: skip


def tensors_in(value: Any, *, is_strict: bool = False) -> Iterator[Tensor]:
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
    yield from tensors_in(output, is_strict=True)
