"""Values that are equal bit for bit, before and after."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
_ADDED = {"initial_lr"}
"""What a scheduler adds to the groups that are there when it is made."""


def weights_of(model: nn.Module) -> Weights:
    """Copies of all that a state dict of the model holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(one: Weights, other: Weights) -> bool:
    """Whether they are equal bit for bit, NaN being equal to nothing."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same(first: Any, second: Any) -> bool:
    """Whether two nested structures are equal bit for bit, NaN being equal to NaN."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        is_alike = first.dtype == second.dtype and first.shape == second.shape
        return is_alike and torch.equal(first.nan_to_num(7.0e7), second.nan_to_num(7.0e7))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = first.keys() - _ADDED
        return keys == second.keys() - _ADDED and all(same(first[key], second[key]) for key in keys)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and bool(first == second)


def through_file(value: Any) -> Any:
    """The value, saved and loaded."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)
