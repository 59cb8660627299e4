"""The momentum step in C, where all tensors are contiguous ones of float32 on the CPU.

It is the arithmetic of ``ema``, ``compute_steps`` and ``average_offset`` in one call, where torch needs a hundred. Results differ
in rounding only. ``_native`` is built where there is a compiler when the package is installed. Without it, and for all other
tensors, the step is taken with torch.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import accumulate, chain, groupby, pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from teleport_optim.optim.buckets import RowBlock
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import BaseCoefficients
from teleport_optim.optim.shapes import matrix_shape
from teleport_optim.symmetry.moves import pick

try:
    import teleport_optim.optim.kernels._native as _native
except ImportError:
    _native = None  # type: ignore[assignment]
if _native is not None and torch.backends.cpu.get_cpu_capability() == "AVX512":
    with suppress(ImportError):
        _native = import_module("teleport_optim.optim.kernels._native_wide")

__all__ = ["NativeStep", "all_fingerprints", "all_norms", "are_plain"]

_PLAIN = {Tensor, torch.nn.Parameter}
_SHAPE = attrgetter("shape")
_KIND = attrgetter("dtype", "is_cpu", "layout")
_MOST_ROWS = 128
"""Blocks of more rows go to torch, which multiplies large matrices as fast."""
_THREAD_WORK = 2.5e7
"""Multiplications for which another thread pays."""
_READING = 10
"""Multiplications in the time of reading a number."""
_MOST_COMPUTED = 2**20
"""Entries of gradients that are computed at a time, or one block."""


def are_plain(tensors: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> bool:
    """Whether the module is there, and all are contiguous tensors of this dtype on the CPU, of no class of their own."""
    if _native is None:
        return False
    tensors = list(tensors)
    return (
        _PLAIN.issuperset(map(type, tensors))
        and {(dtype, True, torch.strided)}.issuperset(map(_KIND, tensors))
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


def all_norms(tensors: list[Tensor]) -> list[float]:
    """Euclidean norms of plain tensors."""
    addresses, sizes = _addresses(tensors), array("q", map(Tensor.numel, tensors))
    bounds = _bounds([_READING * size for size in accumulate(sizes)])
    parts = [(addresses[first:last], sizes[first:last]) for first, last in pairwise(bounds)]
    return list(chain.from_iterable(_in_threads(lambda part: _native.norms(*part), parts)))


def all_fingerprints(tensors: list[Tensor]) -> array[int]:
    """Odd 64-bit integers, one for each of these plain tensors, which change with its values; the step in C makes the same."""
    shapes = [matrix_shape(tensor.shape) or (1, tensor.numel()) for tensor in tensors]
    prints = array("q", bytes(8 * len(tensors)))
    _native.fingerprints(_addresses(tensors), array("q", chain.from_iterable(shapes)), prints)
    return prints


class NativeStep:
    """The momentum step of a table, for plain tensors."""

    def __init__(self, table: ParameterTable) -> None:
        blocks = table.blocks
        self._blocks = array("q", [number for block in blocks for number in block])
        self._layout = table
        self._work = list(accumulate(block.work for block in blocks))
        self._most_rows = max((block.rows for block in blocks if block.is_mixed), default=1)
        self._numbers: tuple[BaseCoefficients, array[float], float] | None = None
        self._shapes = list(table.shapes.values())

    def fits(self, *lists: list[Tensor], numbers: list[Tensor]) -> bool:
        """Whether plain tensors have the shapes of the table, list by list, and ``numbers`` have no axes.

        What lies at an address is not looked at any more after this.
        """
        return (
            self._most_rows <= _MOST_ROWS
            and list(map(_SHAPE, chain(*lists))) == self._shapes * len(lists)
            and {()}.issuperset(map(_SHAPE, numbers))
        )

    def take(
        self,
        params: list[Tensor],
        grads: list[Tensor] | Mapping[str, Tensor],
        momenta: list[Tensor],
        offsets: list[Tensor],
        counts: list[Tensor],
        fingerprints: list[Tensor],
        ends: list[Tensor],
        *,
        base: BaseCoefficients,
        rate: float,
        decay: float,
        weights: list[float],
    ) -> list[int]:
        """Average the gradients, move the parameters and their averages and count the step, in place.

        Tensors are in the order of the table. Large steps are split over as many threads as torch has; which takes what makes no
        difference to the result.

        Args:
            grads: A mapping is of those that are computed when they are asked for: here some rows at a time, which need little
                memory.
            offsets, fingerprints, ends: Of the averages of the iterates; empty where there are none.
            weights: :func:`~teleport_optim.optim.rule.averaging_weight` of every tensor, if there are averages.

        Returns:
            Numbers of the tensors whose parameters were not, before the step, what their fingerprint says.
        """
        if self._numbers is None or self._numbers[0] is not base:
            rows = (base.step_lengths, base.user_decays, base.learned_decays)
            self._numbers = (base, array("d", torch.stack(rows, dim=-1).flatten().tolist()), 1.0 - base.beta.item())
        _, numbers, gradient_weight = self._numbers
        prints = array("q", bytes(16 * len(params)))  # of every tensor before and after the step
        here, averages = _addresses(params), _addresses(momenta)
        others = _addresses(offsets) if offsets else None
        keeps = array("f", [1.0 - weight for weight in weights])
        turns = self._computed(grads) if isinstance(grads, Mapping) else [(_addresses(grads), 0, None)]
        for slopes, first, last in turns:
            take = partial(
                _native.step,
                here,
                averages,
                others,
                slopes,
                numbers,
                rate,
                decay,
                gradient_weight,
                keeps,
                prints,
                self._most_rows,
            )
            _in_threads(take, self._parts(first, last))
        _native.count(_addresses(counts), _addresses(ends))
        torch.autograd.graph.increment_version(params)
        return _native.compare(_addresses(fingerprints), prints) if offsets else []

    def _computed(self, grads: Mapping[str, Tensor]) -> Iterator[tuple[list[int], int, int]]:
        """Addresses of gradients, of which some rows are computed at a time, with the blocks that they are for."""
        blocks, last = self._layout.blocks, 0
        addresses, parts = [0] * len(self._shapes), list[Tensor]()
        while last < len(blocks):
            first, size = last, 0
            while last < len(blocks) and (last == first or size + blocks[last].size <= _MOST_COMPUTED):
                size += blocks[last].size
                last += 1
            parts.clear()  # The step has been taken with those of the last turn.
            for tensor, group in groupby(blocks[first:last], key=attrgetter("tensor")):
                own = list(group)
                parts.append(self._rows(grads, own))
                addresses[tensor] = parts[-1].data_ptr() - parts[-1].element_size() * own[0].offset
            yield addresses, first, last

    def _rows(self, grads: Mapping[str, Tensor], blocks: list[RowBlock]) -> Tensor:
        """The rows of a gradient that lie in neighbouring blocks."""
        name = self._layout.names[blocks[0].tensor]
        axes = [axis for axis, size in enumerate(self._layout.row_shape(name)) if size > 1]
        if not axes:
            return grads[name]
        (axis,), first, count = axes, blocks[0].offset // blocks[0].columns, sum(block.rows for block in blocks)
        return pick(grads, name, lambda tensor: tensor.narrow(axis, first, count))

    def _parts(self, first: int = 0, last: int | None = None) -> list[memoryview]:
        """Blocks, all by default, in parts of about equal work, one for each thread."""
        before = self._work[first - 1] if first else 0
        bounds = _bounds([work - before for work in self._work[first:last]])
        whole, size = memoryview(self._blocks), len(RowBlock._fields)
        return [whole[size * (first + start) : size * (first + end)] for start, end in pairwise(bounds)]


def _bounds(work: list[int]) -> list[int]:
    """Where to cut a list, of whose entries the work is given in running sums, into parts for as many threads as pay."""
    total = work[-1] if work else 0
    number = max(1, min(torch.get_num_threads(), int(total / _THREAD_WORK)))
    return [0, *(bisect_left(work, total * part / number) + 1 for part in range(1, number)), len(work)]


def _in_threads(function: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
    """Results of a function for all parts, each in a thread of its own."""
    if len(parts) == 1:
        return [function(parts[0])]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(function, parts))


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
