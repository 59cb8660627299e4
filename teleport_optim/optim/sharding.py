"""Tensors that are split over processes: what an optimizer reads is whole, what it writes is the part that lies here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "full_tensor",
    "full_tensors",
    "is_distributed",
    "local_tensor",
    "local_tensors",
    "shard_like",
    "shards_like",
]


def full_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or all of a ``DTensor``, gathered from all processes."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or the part of a ``DTensor`` that lies in this process."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process has as a whole, placed as ``like`` is; without communication."""
    if not is_distributed(like) or is_distributed(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)


def full_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """:func:`full_tensor` of every tensor; it costs nothing where there is no ``DTensor``."""
    return [full_tensor(tensor) for tensor in tensors] if _any_distributed(tensors) else tensors


def local_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """:func:`local_tensor` of every tensor."""
    return [local_tensor(tensor) for tensor in tensors] if _any_distributed(tensors) else tensors


def shards_like(values: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """Of values, which every process has as a whole, the parts that lie where those of the targets lie in this process."""
    return [local_tensor(shard_like(*pair)) for pair in zip(values, targets)] if _any_distributed(targets) else values


def _any_distributed(tensors: list[Tensor]) -> bool:
    module = _module()
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a ``DTensor``."""
    module = _module()
    return module is not None and isinstance(tensor, module.DTensor)


def _module() -> Any:
    return sys.modules.get("torch.distributed.tensor")  # Slow to import, and needed only where it has been.
