"""Limits of a search, and the errors that end one."""

from __future__ import annotations

import time
from typing import NamedTuple

__all__ = ["Limits", "SearchStopped", "Untraceable"]


class Untraceable(ValueError):
    """Error of a model that cannot be followed; the message says why."""


class SearchStopped(Untraceable):
    """Error of a search that has reached a limit; the message says which."""


class Limits(NamedTuple):
    """Limits of the work of a search.

    Attributes:
        operations: Most operations of the model, in all its runs together.
        seconds: Most seconds.
        start: Time at which the search began.
    """

    operations: int
    seconds: float
    start: float

    @classmethod
    def of(cls, operations: int, seconds: float) -> Limits:
        """Make limits for a search that begins now."""
        return cls(operations, seconds, time.monotonic())

    def check(self, num_operations: int = 0) -> None:
        """Stop a search that has reached a limit.

        Raises:
            SearchStopped: if it has.
        """
        if num_operations > self.operations:
            raise SearchStopped(f"the search stopped after {self.operations:,} operations (max_operations)")
        if time.monotonic() - self.start > self.seconds:
            raise SearchStopped(f"the search stopped after {self.seconds:g} seconds (max_seconds)")
