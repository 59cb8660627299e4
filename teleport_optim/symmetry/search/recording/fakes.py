"""Tensors without data, and the results of operations on them.

torch's fake tensors tell shapes, types and memory of results, at a tenth of a millisecond for each operation. A model repeats
the same operations, so that results for tensors of the same shapes are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

__all__ = ["DATA_DEPENDENT", "Fakes"]

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
"""Errors of an operation whose result, or its shape, depends on data that are not there."""


class _Layout(NamedTuple):
    """Layout of a tensor: all about it but its entries.

    Attributes:
        shape: Its shape.
        stride: Its strides.
        offset: Where it begins, from the beginning of the tensor of which it is a view.
        dtype: Type of its entries.
        device: Its device.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Made(NamedTuple):
    """Result of an operation: number ``same`` of its tensors, a view of number ``view``, or a new tensor."""

    same: int | None
    view: int | None
    layout: _Layout


_UNSTEADY = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)


class Fakes:
    """Tensors without data of one search.

    Attributes:
        mode: torch's mode for them.
        made: A weak reference to each tensor, by which it is found whether one outlives the search.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.made: list[ref[Tensor]] = []
        self._of_real: dict[int, tuple[Tensor, Tensor]] = {}
        self._reals: dict[int, Tensor] = {}
        self._layouts: dict[tuple[Any, ...], int] = {}
        self._results: dict[Hashable, tuple[type, list[_Made]]] = {}
        self._is_steady: dict[Any, bool] = {}

    def is_ours(self, value: object) -> bool:
        """Whether an object is a tensor of this search."""
        return isinstance(value, FakeTensor) and value.fake_mode is self.mode

    def empty(self, like: Tensor, device: torch.device | None = None) -> Tensor:
        """Make a tensor without data of the shape and strides of another one; a parameter for a parameter."""
        if like.layout != torch.strided or type(like) not in (Tensor, nn.Parameter) or like.is_quantized:
            fake: Tensor = self.mode.from_tensor(like)
        else:
            fake = self._new(None, _Layout(tuple(like.shape), like.stride(), 0, like.dtype, device or like.device))
        if isinstance(like, nn.Parameter):
            fake._is_param = True
        self._keep(fake)
        return fake

    def stand_for(self, real: Tensor, fake: Tensor) -> None:
        """Let ``fake`` take the place of a tensor of the model wherever an operation meets that."""
        self._of_real[id(real)] = (real, fake)
        self._reals.setdefault(id(fake), real)

    def of(self, tensor: Tensor) -> Tensor:
        """Tensor without data that takes the place of a real one, to which operations would write."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._of_real:
            self.stand_for(tensor, self.empty(tensor))
        return self._of_real[id(tensor)][1]

    def real(self, fake: Tensor) -> Tensor | None:
        """Real tensor whose place one without data takes; None if there is none."""
        return self._reals.get(id(fake))

    def layout(self, tensor: Tensor) -> int:
        """Number of the layout of a tensor, on which results depend; -1 if results cannot be looked up."""
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None or tensor.layout != torch.strided:
            return -1
        if tensor.dtype.is_complex or tensor.is_quantized:
            return -1
        own = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.fake_device)
        return self._layouts.setdefault(own, len(self._layouts))

    def run(
        self,
        func: Any,
        args: Sequence[Any],
        compute: Callable[[], Any],
        tensors: Sequence[Tensor],
        key: Hashable,
        layouts: Sequence[int],
    ) -> Any:
        """Run an operation, or look its result up if it has run on tensors of such layouts.

        Args:
            func: The operation.
            args: Its positional arguments.
            compute: Computes its result.
            tensors: Its tensors.
            key: What else the result depends on.
            layouts: The layouts of the tensors.
        """
        if func is torch.ops.aten.select.int and len(layouts) == 1 and layouts[0] != -1 and len(args) == 3:
            return self._select(*args)
        full = (func, key, tuple(layouts), torch.get_default_dtype())
        is_steady = bool(tensors) and -1 not in layouts and self._steady(func)
        if is_steady and full in self._results:
            return self._again(self._results[full], tensors)
        result = compute()
        leaves = result if isinstance(result, (list, tuple)) else (result,)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._keep(leaf)
        if is_steady and (type(result) in (list, tuple) or isinstance(result, Tensor)):
            made = [one for leaf in leaves if (one := self._describe(leaf, tensors)) is not None]
            if len(made) == len(leaves):
                self._results[full] = (type(result), made)
        return result

    def _select(self, tensor: FakeTensor, dim: int, index: int) -> Tensor:
        """Make a view of one entry along an axis. Loops over time select another entry in each step, so that no look-up helps."""
        dim, index = range(tensor.dim())[dim], range(tensor.shape[dim])[index]
        shape, stride = list(tensor.shape), list(tensor.stride())
        del shape[dim]
        offset = index * stride.pop(dim)
        view = self._new(tensor, _Layout(tuple(shape), tuple(stride), offset, tensor.dtype, tensor.fake_device))
        self._keep(view)
        return view

    def _steady(self, func: Any) -> bool:
        if func not in self._is_steady:
            is_own = (
                isinstance(func, torch._ops.OpOverload)
                and func.namespace == "aten"
                and "as_strided" not in func._schema.name
            )
            self._is_steady[func] = is_own and not any(tag in func.tags for tag in _UNSTEADY)
        return self._is_steady[func]

    def _describe(self, leaf: object, tensors: Sequence[Tensor]) -> _Made | None:
        if not self.is_ours(leaf):
            return None
        assert isinstance(leaf, FakeTensor)
        number = self.layout(leaf)
        if number == -1:
            return None
        same = next((k for k, tensor in enumerate(tensors) if tensor is leaf), None)
        storage = leaf.untyped_storage()._cdata
        view = next((k for k, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage), None)
        if view is not None and tensors[view].dtype != leaf.dtype:
            return None
        offset = leaf.storage_offset() - (0 if view is None else tensors[view].storage_offset())
        return _Made(same, view, _Layout(tuple(leaf.shape), leaf.stride(), int(offset), leaf.dtype, leaf.fake_device))

    def _again(self, known: tuple[type, list[_Made]], tensors: Sequence[Tensor]) -> Any:
        kind, made = known
        leaves = []
        for one in made:
            if one.same is not None:
                leaves.append(tensors[one.same])
                continue
            leaf = self._new(None if one.view is None else tensors[one.view], one.layout)
            self._keep(leaf)
            leaves.append(leaf)
        return kind(leaves) if kind in (list, tuple) else leaves[0]

    def _new(self, base: Tensor | None, layout: _Layout) -> Tensor:
        shape, stride, offset, dtype, device = layout
        with torch._C._DisableTorchDispatch():
            own = (shape, stride) if base is None else ((0,), (1,))
            memory = torch.empty_strided(*own, dtype=dtype, device="meta")
            if base is not None:
                memory.set_(base.untyped_storage(), base.storage_offset() + offset, shape, stride)
        return FakeTensor(self.mode, memory, device)

    def _keep(self, tensor: Tensor) -> None:
        self.made.append(ref(tensor))
