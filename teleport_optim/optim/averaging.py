"""The average of the iterates: noticing who writes into parameters, and putting the average in their place and back.

An optimizer keeps four slots for the average of a parameter. ``average_offset`` is the average minus the parameter.
``average_start`` is the number of the step with which the average begins, and ``average_end`` that of the first step that is
not in it. ``fingerprint`` is that of the parameter after the last step, by which a write of somebody else is noticed. A fifth
one, ``iterate``, is there while the average is in the place of the parameter: the values to go back to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from teleport_optim.optim.kernels.native import all_fingerprints, are_plain
from teleport_optim.optim.records import slot_dtype
from teleport_optim.optim.schedule import Horizon, averaging_weight
from teleport_optim.optim.sharding import all_local, local

__all__ = [
    "AVERAGE_SLOTS",
    "END",
    "FINGERPRINT",
    "ITERATE",
    "OFFSET",
    "START",
    "average_of",
    "begin_again",
    "can_be_averaged",
    "catch_up",
    "fingerprints",
    "initial_average",
    "swap_in",
    "swap_out",
    "written",
]

OFFSET, FINGERPRINT, START, END = "average_offset", "fingerprint", "average_start", "average_end"
AVERAGE_SLOTS = (OFFSET, FINGERPRINT, START, END)
ITERATE = "iterate"
"""Slot of the parameter while the average is in its place."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int32}
_SPREAD = -0x61C8864680B583EB
"""Odd, so that multiplying by it loses nothing, and changes of few bits change many."""
_SMALL = 2**14
"""Entries of tensors that are put together, to call torch less often."""
_MOST_AT_ONCE = 2**22
"""Entries that are summed at once: torch makes 64-bit integers of them first."""

Slots = dict[str, Tensor]


def can_be_averaged(param: Tensor) -> bool:
    """Whether an average of the parameter can be kept: dense numbers of 16 bits or more."""
    return param.layout == torch.strided and (param.is_complex() or param.dtype in _DTYPES)


def initial_average(param: Tensor, step: int) -> Slots:
    """Slots of an average that begins with this step."""
    return {
        OFFSET: torch.zeros_like(param, dtype=slot_dtype(param)),
        FINGERPRINT: torch.zeros((), dtype=torch.int64, device=param.device),
        START: torch.tensor(step),
        END: torch.tensor(step),
    }


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
    tensors = [tensor.detach() for tensor in all_local(tensors)]
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


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers; two for an entry of 64 bits, so that sums of signs do not leave the range."""
    return (tensor.contiguous() if tensor.element_size() == 8 else tensor).view(_INTEGERS[tensor.element_size()])


def _as_kept(sums: Tensor) -> Tensor:
    return (sums + 1).mul_(_SPREAD).bitwise_and_(~1)


def _small_sums(tensors: list[Tensor]) -> Tensor:
    """The bits of every tensor, all of one dtype, added up with weights of entries."""
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
    bits = _bits(joined)
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
    bits = _bits(tensor)
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


def written(params: list[Tensor], slots: list[Slots]) -> list[int]:
    """Numbers of the parameters that somebody has written into since the last step.

    Cost: reads all parameters; on an accelerator it waits for it.
    """
    now = fingerprints(params)
    known = torch.stack([own[FINGERPRINT] for own in slots]).to(now.device)
    differs = known != now
    if not bool(differs.any()):
        return []
    differs &= (known != 0) & ((known ^ now) & 1 == 0)  # Both are known, and of one kind.
    return torch.nonzero(differs).flatten().tolist()


def begin_again(own: Slots, step: int) -> None:
    """Let the average begin again at the parameter as it is; step is the number of the next one."""
    own[OFFSET].zero_()
    own[START].fill_(step)
    own[END].fill_(step)


def catch_up(own: Slots, step: int, horizon: Horizon) -> None:
    """Bring an average up to date with steps in which its parameter did not move, up to this one."""
    start, end = int(own[START]), int(own[END])
    if end != step:
        weights = (averaging_weight(earlier - start, horizon.steps_left(earlier)) for earlier in range(end, step))
        own[OFFSET].mul_(math.prod(1.0 - weight for weight in weights))
        own[END].fill_(step)


def average_of(param: Tensor, own: Slots) -> Tensor:
    """The average, in the dtype of the parameter; a new tensor."""
    return param.detach().clone().add_(own[OFFSET])


def swap_in(pairs: Iterable[tuple[Tensor, Slots]]) -> None:
    """Put the averages in the place of parameters, and the parameters into their slots.

    Autograd takes no notice: a backward pass that is waiting goes on once they are back.
    """
    for param, own in pairs:
        own[ITERATE] = param.detach().clone()
        local(param).data.add_(local(own[OFFSET]))


def swap_out(pairs: Iterable[tuple[Tensor, Slots]], step: int) -> None:
    """Undo :func:`swap_in`, bit for bit; but what has been written in the meantime stays, and the average begins again there.

    It may be called again after an interrupt, also of :func:`swap_in`.
    """
    for param, own in pairs:
        if ITERATE not in own:
            continue
        values, iterate = local(param).data, local(own[ITERATE])
        if _same_bits(values, average_of(iterate, {OFFSET: local(own[OFFSET])})):
            values.copy_(iterate)
        elif not _same_bits(values, iterate):
            begin_again(own, step)
            own[FINGERPRINT].zero_()
        del own[ITERATE]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))
