"""Runs a model in float64 whatever it casts to, without dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["DoublePrecision", "torch"]


_WIDE = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}


_WIDE[torch.complex64] = torch.complex128


_OF_BYTES = {4: torch.float32, 2: torch.float16}


class DoublePrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computation in float64 whatever a model casts to, without dropout.

    Models cast to float32 where they were written for narrower types (in norms, softmax, rotary positions), and make tensors
    of the default type. Rounding errors of float32 would look like a wrong symmetry. Dropout is left out wherever it is
    called: its masks are drawn position by position and do not move along.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        if schema.name in ("aten::view", "aten::view_copy") and schema.overload_name == "dtype":
            return func(_as_many_bytes(*args), args[1])
        settings = {argument.name: position for position, argument in enumerate(schema.arguments)}
        off = {"dropout": 0.0, "dropout_p": 0.0} if "dropout" not in schema.name else {"train": False, "p": 0.0}
        off |= {"training": False} if "rrelu" in schema.name else {}
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        arguments = list(args)
        for name, position in settings.items():
            if position < len(arguments):
                arguments[position] = off.get(name, arguments[position])
                if name not in written:
                    arguments[position] = tree_map(_widened, arguments[position])
        kwargs = {
            key: value if key in written else tree_map(_widened, off.get(key, value))
            for key, value in (kwargs or {}).items()
        }
        result = func(*arguments, **kwargs)
        return result if written else tree_map(_widened, result)


def _widened(value: Any) -> Any:
    """A tensor or a type in double precision; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in _WIDE:
        return value.to(_WIDE[value.dtype])
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _as_many_bytes(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as the model would have it where it reads the bits: with entries of as many bytes as ``dtype`` has."""
    is_wide = tensor.dtype == torch.float64 and dtype.itemsize in _OF_BYTES
    return tensor.to(_OF_BYTES[dtype.itemsize]) if is_wide else tensor
