"""The average of the iterates: noticing who writes into parameters, and putting the average in their place and back.

An optimizer keeps four slots for the average of a parameter. ``average_offset`` is the average minus the parameter.
``average_start`` is the number of the step with which the average begins, and ``average_end`` that of the first step that is
not in it. ``fingerprint`` is that of the parameter after the last step, by which a write of somebody else is noticed. A fifth
one, ``iterate``, is there while the average is in the place of the parameter: the values to go back to.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from teleport_optim.optim.fingerprints import bits_of, fingerprints
from teleport_optim.optim.records import slot_dtype
from teleport_optim.optim.schedule import Horizon, averaging_weight
from teleport_optim.optim.sharding import local_tensor

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
        local_tensor(param).data.add_(local_tensor(own[OFFSET]))


def swap_out(pairs: Iterable[tuple[Tensor, Slots]], step: int) -> None:
    """Undo :func:`swap_in`, bit for bit; but what has been written in the meantime stays, and the average begins again there.

    It may be called again after an interrupt, also of :func:`swap_in`.
    """
    for param, own in pairs:
        if ITERATE not in own:
            continue
        values, iterate = local_tensor(param).data, local_tensor(own[ITERATE])
        if _same_bits(values, average_of(iterate, {OFFSET: local_tensor(own[OFFSET])})):
            values.copy_(iterate)
        elif not _same_bits(values, iterate):
            begin_again(own, step)
            own[FINGERPRINT].zero_()
        del own[ITERATE]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits_of(one), bits_of(other))


class SwapLock:
    """Lock under which one thread at a time puts the average in the place of the parameters."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while parameters or averages are written or read as a whole."""
        self._thread: int | None = None

    @contextmanager
    def by_this_thread(self) -> Iterator[None]:
        """A context that one thread at a time may enter, also again inside itself.

        Raises:
            RuntimeError: if another thread is inside.
        """
        thread = threading.get_ident()
        with self.lock:
            before = self._thread
            if before not in (None, thread):
                raise RuntimeError(
                    "another thread is inside averaged(): wait for it, or take averaged_parameters(), which moves nothing"
                )
            self._thread = thread
        try:
            yield
        finally:
            self._thread = before
