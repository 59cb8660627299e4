"""Seeing a model through its wrappers, and learning from its first call what inputs it takes."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from teleport_optim.symmetry.inputs import Inputs, InputWatch

__all__ = ["FirstCall", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> unwrapped(torch.compile(model)) is model
        True
    """
    inner: object = model
    while isinstance(inner, nn.Module):
        model = inner
        is_replicated = isinstance(model, DistributedDataParallel | DataParallel)
        inner = model.module if is_replicated else getattr(model, "_orig_mod", None)
    return model


class FirstCall:
    """Waits for a model to be called and keeps the shapes of its inputs, with a hook that it takes away afterwards.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._watch = InputWatch()
        self._handle = model.register_forward_pre_hook(self._watch, with_kwargs=True)

    def take(self) -> Inputs | None:
        """The inputs, without data, upon which the waiting ends; None if the model has not been called.

        Raises:
            TypeError: if it was called with a tensor whose shape does not tell what it is.
        """
        inputs = self._watch.inputs
        if inputs is not None:
            self.cancel()
        return inputs

    def cancel(self) -> None:
        """Wait no more."""
        if not self._watch.is_compiled:
            self._handle.remove()
