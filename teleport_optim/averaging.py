"""Putting the average of the iterates where the parameters are, for as long as somebody looks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from teleport_optim.sharding import is_distributed, local
from teleport_optim.symmetry.inputs import SilentHook

__all__ = ["Exchange", "average_on_forward"]

Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class Exchange(AbstractContextManager[None]):
    """A context in which parameters are moved by their lags; afterwards they are what they were, bit for bit.

    It may be entered again inside itself, which changes nothing. Autograd takes no notice: a backward pass that is waiting goes
    on afterwards.

    Args:
        pairs: Parameters and how far each is to be moved, asked for when the context is entered.

    Memory: a copy of the parameters while it lasts.

    Example:
        >>> param = nn.Parameter(torch.zeros(2))
        >>> with Exchange(lambda: [(param, torch.ones(2))]):
        ...     param.tolist()
        [1.0, 1.0]
        >>> param.tolist()
        [0.0, 0.0]
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._depth = 0
        self._saved: list[tuple[Tensor, Tensor]] = []

    @property
    def is_active(self) -> bool:
        """Whether the context has been entered."""
        return self._depth > 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        for param, lag in self._pairs():
            values = local(param).data
            self._saved.append((values, values.clone()))
            values.add_(local(lag))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        for values, saved in self._saved:
            values.copy_(saved)
        self._saved = []


def average_on_forward(model: nn.Module, exchange: Exchange) -> tuple[RemovableHandle, RemovableHandle]:
    """Enter an :class:`Exchange` for every call of a model in which no gradients are recorded.

    Calls in a graph of ``torch.compile``, calls of copies of the model, with other parameters (``functional_call``) or with sharded
    ones are left alone. The hooks keep neither the model nor the exchange alive, and on a copy of the model they do nothing.

    Args:
        model: What is called; it has parameters.
        exchange: What is entered.

    Returns:
        Handles that remove the hooks.
    """
    watch = _Watch(weakref.ref(exchange), weakref.ref(model), weakref.ref(next(model.parameters())))
    return (
        model.register_forward_pre_hook(_Before(watch)),
        model.register_forward_hook(_After(watch), always_call=True),
    )


class _Watch:
    """What both hooks know. A copy knows nothing, so that it does nothing."""

    def __init__(
        self,
        exchange: weakref.ref[Exchange] | None = None,
        model: weakref.ref[nn.Module] | None = None,
        first: weakref.ref[Tensor] | None = None,
    ) -> None:
        self._references = (exchange, model, first)
        self._entered: list[Exchange] = []

    def __reduce__(self) -> tuple[type[_Watch], tuple[()]]:
        return _Watch, ()

    def enter(self, module: nn.Module) -> None:
        """Enter the exchange if this call is one that should see the average."""
        exchange, model, first = (None if reference is None else reference() for reference in self._references)
        if not isinstance(exchange, Exchange) or module is not model:
            return
        param = next(module.parameters(), None)
        if param is first and param is not None and not is_distributed(param):
            exchange.__enter__()
            self._entered.append(exchange)

    def leave(self, module: nn.Module) -> None:
        """Leave what :meth:`enter` has entered."""
        model = self._references[1]
        if self._entered and model is not None and module is model():
            self._entered.pop().__exit__(None, None, None)


class _Before(SilentHook):
    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self._watch.enter(module)


class _After(SilentHook):
    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self._watch.leave(module)
