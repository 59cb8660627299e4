"""Tensors of a model by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["cuda_devices", "named_tensors"]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under every name that they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def cuda_devices(model: nn.Module) -> list[int]:
    """CUDA devices whose random state a run of ``model`` may change."""
    return sorted({tensor.get_device() for _, tensor in named_tensors(model) if tensor.is_cuda})
