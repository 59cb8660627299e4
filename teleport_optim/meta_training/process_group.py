"""The processes of a meta-training run: one, or those that torchrun starts."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["TIMEOUT", "ProcessGroup", "WorkerLostError", "join"]

TIMEOUT = datetime.timedelta(minutes=30)
"""Longest wait for another process that does not answer; one that has ended is noticed at once."""


class WorkerLostError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class ProcessGroup:
    """Rank of this process among those of the run, and what they do together; a single process by default.

    Example:
        >>> ProcessGroup(rank=1, size=2).local_range(5)
        range(2, 5)
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """True for the process that writes and reports."""
        return self.rank == 0

    def local_range(self, num_units: int) -> range:
        """The units of work that fall to this process: ranges of all processes are disjoint and nearly equal.

        Example:
            >>> [ProcessGroup(rank, 3).local_range(8) for rank in range(3)]
            [range(0, 2), range(2, 5), range(5, 8)]
        """
        return range(num_units * self.rank // self.size, num_units * (self.rank + 1) // self.size)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all processes, the same to the bit in each.

        Raises:
            WorkerLostError: if a process cannot be reached.
        """
        if self.size > 1:
            x = x.clone()
            with _lost_worker():
                dist.all_reduce(x)
        return x

    def wait(self) -> None:
        """Return once all processes have come here.

        Raises:
            WorkerLostError: if a process cannot be reached.
        """
        if self.size > 1:
            with _lost_worker():
                dist.barrier()


@contextmanager
def _lost_worker() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WorkerLostError("a process of this run has ended or cannot be reached") from error


@contextmanager
def join(device: str) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun's environment variables name; without them, be a single one.

    Args:
        device: Where the processes compute; with CUDA each takes the one of its local rank, in turn. What travels is always
            on the CPU, so that a lost process is noticed in the same way everywhere.

    Example:
        >>> with join("cpu") as group:
        ...     group.rank, group.size, group.is_first
        (0, 1, True)
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ProcessGroup()
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
