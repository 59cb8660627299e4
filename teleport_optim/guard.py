"""Watching a run for divergence, from what an optimizer sees by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["Guard"]

_AVERAGING = 0.05
_MAX_LOG_RISE = 3.0
"""A gradient norm that is larger than its running mean by this much (20 times) counts as divergence."""
_NUM_SAFE_STEPS = 20


@dataclass(frozen=True)
class Guard:
    """What is remembered of a run to tell when it diverges; plain numbers, of which infinity stands for none yet.

    A run diverges where its gradient norm is 20 times the running (geometric) mean, or where a loss is not finite or higher
    than the first one by more than the loss has ever fallen and by more than a tenth. From then on the next 20 steps are to
    be safe ones; every further sign of divergence starts them anew. The running mean moves on meanwhile, so that a gradient
    that has grown for good passes in the end.

    Attributes:
        log_norm: Running mean of the log of the gradient norm.
        first_loss: The first loss that was seen.
        least_loss: The least loss that was seen.
        num_safe_steps: How many steps are still to be safe, this one included.

    Example:
        >>> guard = Guard()
        >>> for norm in (1.0, 1.2, 0.9, 50.0):
        ...     guard = guard.watch(norm, None)
        >>> guard.num_safe_steps
        20
    """

    log_norm: float = math.inf
    first_loss: float = math.inf
    least_loss: float = math.inf
    num_safe_steps: int = 0

    def watch(self, norm: float, loss: float | None) -> Guard:
        """The guard before a step.

        Args:
            norm: The norm of all gradients together, finite.
            loss: The loss, if it is known.
        """
        guard = self
        is_alarm = False
        if norm > 0.0:
            log_norm = math.log(norm)
            known = self.log_norm if math.isfinite(self.log_norm) else log_norm
            is_alarm = log_norm - known > _MAX_LOG_RISE
            guard = replace(guard, log_norm=known + _AVERAGING * (log_norm - known))
        if loss is not None:
            is_alarm |= not math.isfinite(loss)
            if math.isfinite(self.first_loss):
                margin = max(self.first_loss - self.least_loss, 0.1 * abs(self.first_loss))
                is_alarm |= loss > self.first_loss + margin
            elif math.isfinite(loss):
                guard = replace(guard, first_loss=loss)
            if math.isfinite(loss):
                guard = replace(guard, least_loss=min(self.least_loss, loss))
        return replace(guard, num_safe_steps=_NUM_SAFE_STEPS if is_alarm else max(self.num_safe_steps - 1, 0))
