"""Fingerprints of tensors, by which a write of somebody else is noticed."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from teleport_optim.optim.kernels.native import all_fingerprints, are_plain
from teleport_optim.optim.sharding import local_tensors

__all__ = ["bits_of", "fingerprints"]


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int32}


_SPREAD = -0x61C8864680B583EB
"""Odd, so that multiplying by it loses nothing, and changes of few bits change many."""


_SMALL = 2**14
"""Entries of tensors that are put together, to call torch less often."""


_MOST_AT_ONCE = 2**22
"""Entries that are summed at once: torch makes 64-bit integers of them first."""


def fingerprints(tensors: list[Tensor]) -> Tensor:
    """A 64-bit integer for each tensor, which changes with its values; 0 stands for one that is not known.

    The bits of entries are read as integers and added up with weights, so that what is exchanged is noticed, too. Integers give
    the same result on every device. Those of plain tensors on the CPU are made in C and are odd; torch makes the others, which are
    even: two of different kinds say nothing about each other. Of a ``DTensor`` it is that of the part that lies in this process.

    Returns:
        ``[len(tensors)]``, int64.

    Cost: reads every entry, once in C.

    Example:
        >>> one, other = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> fingerprints([one, one.clone(), other]).unique().numel()
        2
    """
    tensors = [tensor.detach() for tensor in local_tensors(tensors)]
    if are_plain(tensors):
        return torch.tensor(all_fingerprints(tensors), dtype=torch.int64)
    kinds = [(tensor.dtype, are_plain([tensor]), tensor.numel() > _SMALL) for tensor in tensors]
    prints = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for kind in dict.fromkeys(kinds):
        numbers = [number for number, other in enumerate(kinds) if other == kind]
        own = [tensors[number] for number in numbers]
        _, is_plain, is_large = kind
        if is_plain:
            values = torch.tensor(all_fingerprints(own))
        else:
            values = _as_kept(torch.stack(list(map(_large_sum, own))) if is_large else _small_sums(own))
        if len(numbers) == len(tensors):
            return values
        prints[torch.tensor(numbers, device=prints.device)] = values
    return prints


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers; two for an entry of 64 bits, so that sums of signs do not leave the range."""
    return (tensor.contiguous() if tensor.element_size() == 8 else tensor).view(_INTEGERS[tensor.element_size()])


def _as_kept(sums: Tensor) -> Tensor:
    return (sums + 1).mul_(_SPREAD).bitwise_and_(~1)


def _small_sums(tensors: list[Tensor]) -> Tensor:
    """The bits of every tensor, all of one dtype, added up with weights of entries."""
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
    bits = bits_of(joined)
    per_entry = len(bits) // max(len(joined), 1)
    rows, weights = _places(tuple(per_entry * tensor.numel() for tensor in tensors), joined.device)
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=joined.device)
    return sums.index_add_(0, rows, bits.long().mul_(weights))


@lru_cache(maxsize=32)
def _places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of the tensor that every entry of joined ones is of, and the weight of the entry."""
    rows = [torch.full((size,), number) for number, size in enumerate(sizes)]
    weights = [_spread(torch.arange(size)) for size in sizes]
    return torch.cat(rows).to(device), torch.cat(weights).to(device)


def _spread(numbers: Tensor) -> Tensor:
    """An odd weight for every number. Small ones would add up to 0 too easily, with the signs that they get."""
    weights = (numbers + 1).mul_(_SPREAD)
    return weights.bitwise_xor_(weights >> 29).mul_(_SPREAD).bitwise_or_(1)


def _large_sum(tensor: Tensor) -> Tensor:
    """The bits of a tensor, added up with weights of rows and of columns."""
    bits = bits_of(tensor)
    while bits.dim() > 1 and bits.shape[0] == 1:
        bits = bits[0]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    first = 0
    for part in torch.split(bits, max(1, _MOST_AT_ONCE * len(bits) // bits.numel())):
        others = tuple(range(1, part.dim()))
        by_row = part.sum(dim=others, dtype=torch.int64) if others else part.long()
        total += (by_row * _spread(torch.arange(first, first + len(part), device=part.device))).sum()
        if others:
            by_column = part.sum(dim=0, dtype=torch.int64).reshape(-1)
            total += (by_column * _spread(torch.arange(-2, -2 - len(by_column), -1, device=part.device))).sum()
        first += len(part)
    return total
