"""Questions of a model to torch and Python: grad mode, sizes, hooks, backward passes of its own, random numbers.

The answers decide what a model computes although no operation shows them. A :class:`Watch` hears of the questions, so that the
search can follow the model once more with another answer, and only then.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from teleport_optim.symmetry.inputs import Inputs

__all__ = ["Watch", "between", "other_sizes", "random_states", "sizes_of"]

_Pin = Callable[[Any, str], None]
_INSIDE = ("torch", "teleport_optim.symmetry.search")
"""Packages whose own questions do not count, since they do not change the result. The testing kit is not one: it has models."""

_CUSTOM_BACKWARD = "{} has a backward pass of its own, whose gradients may not move with the parameters"
_HOOKED = "a hook in the forward pass may change its gradient"


class Watch(TorchFunctionMode):
    """Hears of a model's questions while it is followed.

    Args:
        pin: Takes a tree of tensors and a reason, and notes that nothing about them may move.
        sizes: The sizes of the batch and of a sequence, whose uses count.
        stand_in: Gives a tensor without data for one with data.

    Attributes:
        asks_for_gradients: Whether the model has asked whether gradients are taken.
        with_gradients: The answer.
        asks_for_sizes: Whether it has asked for a size of a tensor that is no parameter.
        compares_sizes: Whether it has compared one, as control flow does.
    """

    def __init__(self, pin: _Pin, sizes: frozenset[int], stand_in: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.asks_for_gradients = False
        self.with_gradients = False
        self.asks_for_sizes = False
        self.compares_sizes = False
        self._pin = pin
        self._stand_in = stand_in
        self._sizes = sizes
        self._thread = threading.get_ident()
        self._restore: list[Callable[[], None]] = []
        self._wrapped: set[type] = set()
        self._answers: dict[Any, Callable[[Any, Any, Any], Any]] = {
            **dict.fromkeys((Tensor.shape.__get__, Tensor.size, Tensor.__len__), self._size),  # type: ignore[attr-defined]
            **dict.fromkeys((Tensor.numel, Tensor.nelement, torch.numel), self._count),
            Tensor.requires_grad.__get__: self._requires_grad,  # type: ignore[attr-defined]
            **dict.fromkeys((Tensor.register_hook, Tensor.register_post_accumulate_grad_hook), self._hook),
            Tensor.retain_grad: lambda func, args, kwargs: None,
        }

    def __enter__(self) -> Watch:
        _Size.watch = self
        for name in ("is_grad_enabled", "is_inference_mode_enabled"):
            self._replace(torch, name, self._grad_mode(getattr(torch, name), answer=name == "is_grad_enabled"))
        self._replace(BackwardCFunction, "__init__", self._wrapping_init())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _Size.watch = None
        while self._restore:
            self._restore.pop()()
        self._wrapped.clear()
        self._answers.clear()  # methods of this object, a cycle that would keep all tensors until garbage is collected

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self._answers.get(func)
        if threading.get_ident() != self._thread:
            return func(*args, **(kwargs or {}))
        if answer is None:
            try:
                return func(*args, **(kwargs or {}))
            except RuntimeError:
                # torch makes no view without data of a tensor of the model's own, as caches keep it
                given = tree_map_only(Tensor, self._stand_in, (args, kwargs or {}))
                if all(one is two for one, two in zip(tree_leaves(given), tree_leaves((args, kwargs or {})))):
                    raise
                return func(*given[0], **given[1])
        return answer(func, args, kwargs or {})

    # ---------------------------------------------------------------------------------------------------- answers

    def _size(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if isinstance(args[0], nn.Parameter):
            return result
        sizes = (result,) if isinstance(result, int) else tuple(result)
        is_other = self._sizes.isdisjoint(sizes)
        if (is_other and self.asks_for_sizes) or _is_asked_from_inside():
            return result
        self.asks_for_sizes = True
        if is_other:
            return result
        self.compares_sizes |= func is Tensor.__len__  # Python makes a plain number of what this returns
        own = [_Size(size) if size in self._sizes else size for size in sizes]
        return own[0] if isinstance(result, int) else torch.Size(own)

    def _count(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if not self._sizes or _is_asked_from_inside():
            return result
        self.asks_for_sizes = True
        return _Size(result)

    def _requires_grad(self, func: Any, args: Any, kwargs: Any) -> Any:
        if _is_asked_from_inside():
            return func(*args, **kwargs)
        self.asks_for_gradients = True
        return self.with_gradients and (args[0].is_floating_point() or args[0].is_complex())

    def _grad_mode(self, real: Callable[[], bool], *, answer: bool) -> Callable[[], bool]:
        def asked() -> bool:
            if threading.get_ident() != self._thread or _is_asked_from_inside():
                return real()
            self.asks_for_gradients = True
            return answer is self.with_gradients

        return asked

    def _hook(self, func: Any, args: Any, kwargs: Any) -> RemovableHandle:
        self._pin(args[0], _HOOKED)
        return RemovableHandle(OrderedDict())

    # ------------------------------------------------------------------------------------- backward passes of its own

    def _wrapping_init(self) -> Callable[..., None]:
        real, watch = BackwardCFunction.__init__, self

        def init(context: Any, *args: Any, **kwargs: Any) -> None:
            real(context, *args, **kwargs)
            function = getattr(context, "_forward_cls", None)
            # torch makes the context first and looks for ``forward`` then
            if threading.get_ident() == watch._thread and function is not None:
                watch._wrap(function)

        return init

    def _wrap(self, function: type[Function]) -> None:
        if function in self._wrapped or function.__module__.split(".")[0] == "torch":
            return
        self._wrapped.add(function)
        real, reason = function.forward, _CUSTOM_BACKWARD.format(function.__name__)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return real(*args, **kwargs)
            self._pin((args, kwargs), reason)
            result = real(*args, **kwargs)
            self._pin(result, reason)
            return result

        self._replace(function, "forward", staticmethod(forward))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        """Put ``value`` in the place of an attribute until the watch ends."""
        before = vars(owner).get(name)
        setattr(owner, name, value)
        self._restore.append(lambda: delattr(owner, name) if before is None else setattr(owner, name, before))


def _is_asked_from_inside() -> bool:
    """Whether torch asks, and not the model's own code."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "torch.overrides", "torch._tensor"):
        frame = frame.f_back
    name = frame.f_globals.get("__name__", "") if frame is not None else ""
    return any(name == package or name.startswith(f"{package}.") for package in _INSIDE)


class _Size(int):
    """A size of a batch or of a sequence, which tells the present watch when it is compared.

    What a model keeps of it is a number like any other once the watch has ended.
    """

    watch: ClassVar[Watch | None] = None


def _comparing(name: str) -> Callable[..., Any]:
    real = getattr(int, name)

    def compare(self: int, *other: Any) -> Any:
        if _Size.watch is not None:
            _Size.watch.compares_sizes = True
        return real(self, *other)

    return compare


def _computing(name: str) -> Callable[..., Any]:
    real = getattr(int, name)

    def compute(self: int, *other: Any) -> Any:
        result = real(self, *other)
        return _Size(result) if type(result) is int and _Size.watch is not None else result

    return compute


for _name in (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "bool",
    "hash",
    "int",
    "float",
    "truediv",
    "rtruediv",
    "divmod",
    "pow",
):
    setattr(_Size, f"__{_name}__", _comparing(f"__{_name}__"))  # a comparison, or what is no size any more afterwards
for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(_Size, f"__{_name}__", _computing(f"__{_name}__"))
    setattr(_Size, f"__r{_name}__", _computing(f"__r{_name}__"))


# ------------------------------------------------------------------------------------------------------ other answers


def sizes_of(inputs: Inputs) -> tuple[int, int | None] | None:
    """The sizes of the batch and of a sequence, as far as the first tensors of a model's inputs tell; None without tensors."""
    tensors = [leaf for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors:
        return None
    return tensors[0].shape[0], next((tensor.shape[1] for tensor in tensors if tensor.dim() in (2, 3)), None)


def other_sizes(inputs: Inputs) -> Iterator[list[Inputs]]:
    """Inputs of the same kind with other batches, sequences and images, some smaller and some larger.

    Yields:
        Inputs, of which the first that the model takes tells what it does with such sizes.
    """
    sizes = sizes_of(inputs)
    if sizes is None:
        return
    batch, length = sizes
    for new_batch, new_length, shrinks in (
        (batch + 1, _shorter(length), False),
        (2 * batch + 3, 2 * (length or 0) + 1, True),
    ):
        other_batch = {batch: new_batch}
        other_length = {} if length is None else {length: new_length}
        yield [
            _resized(inputs, other_batch, other_length, shrinks=shrinks),
            _resized(inputs, other_batch, {}, shrinks=shrinks),
            _resized(inputs, {}, other_length, shrinks=shrinks),
            _resized(inputs, other_batch, other_length),
            _resized(inputs, other_batch, {}),
        ]


def between(inputs: Inputs, other: Inputs) -> Inputs:
    """Inputs of sizes halfway between those of two others of the same kind."""
    sizes = iter([leaf.shape for leaf in tree_leaves(tuple(other)) if isinstance(leaf, Tensor)])

    def resize(tensor: Tensor) -> Tensor:
        shape = [(one + two) // 2 for one, two in zip(tensor.shape, next(sizes))]
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    resized: Inputs = tree_map_only(Tensor, resize, inputs)
    return resized


def _shorter(length: int | None) -> int:
    return 0 if length is None else (length + 1) // 2 if length > 3 else length + 1


def _resized(
    inputs: Inputs, batches: dict[int, int], lengths: dict[int, int], *, shrinks: bool | None = None
) -> Inputs:
    """Inputs of other sizes.

    Args:
        inputs: The inputs.
        batches: The new number of examples for the old one.
        lengths: The new length of sequences for the old one.
        shrinks: Whether images are halved, else they are doubled; None for no change. Where ``lengths`` is empty, this is so
            of signals ``[batch, channels, length]``, too.
    """

    def resize(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        is_mask = len(shape) > 1 and shape[-1] == shape[-2] and shape[-1] in lengths
        is_image = shrinks is not None and not is_mask and len(shape) >= (4 if lengths else 3)
        for axis, size in enumerate(shape):
            if axis == 0:
                shape[axis] = batches.get(size, lengths.get(size, size))
            elif axis < 2 or is_mask:
                shape[axis] = lengths.get(size, size) if axis < 2 or axis >= len(shape) - 2 else size
            elif is_image:
                shape[axis] = (size + 1) // 2 if shrinks else 2 * size
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    resized: Inputs = tree_map_only(Tensor, resize, inputs)
    return resized


_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator)


def random_states(model: nn.Module) -> list[Any]:
    """The states of Python's and numpy's random numbers, those of generators that modules keep among them."""
    states: list[Any] = [random.getstate(), _plain(np.random.get_state())]  # noqa: NPY002 - what models draw from
    for module in model.modules():
        for value in vars(module).values():
            if not isinstance(value, _GENERATORS):
                continue
            if isinstance(value, random.Random):
                states += [] if isinstance(value, random.SystemRandom) else [value.getstate()]
            elif isinstance(value, np.random.RandomState):
                states.append(_plain(value.get_state()))
            else:
                states.append(str(value.bit_generator.state))
    return states


def _plain(state: Any) -> Any:
    """A state of numpy's generators that can be compared."""
    return [part.tobytes() if isinstance(part, np.ndarray) else part for part in state]
