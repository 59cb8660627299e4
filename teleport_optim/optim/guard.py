"""Watching a run for divergence, from what an optimizer sees by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["Guard"]

_LOG_DECAY = 0.02
"""By how much the log of the peak falls at every step."""
_MAX_LOG_RISE = math.log(10.0)
_NUM_SAFE_STEPS = 20


@dataclass(frozen=True)
class Guard:
    """What is remembered of a run to tell when it diverges; plain numbers, of which infinity stands for none yet.

    A run diverges where its gradient norm is 10 times its recent peak, a peak that is forgotten by 2 % at every step, or where
    a loss is not finite or higher than the first one by more than the loss has ever fallen and by more than a tenth. (A peak
    rather than a mean, since late in training most minibatches have small gradients and a few have large ones.) From then on
    the next 20 steps are to be safe ones; every further sign of divergence starts them anew.

    Attributes:
        log_peak: Log of the recent peak of the gradient norm. It does not rise faster than by the factor that is an alarm.
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

    log_peak: float = math.inf
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
            if math.isfinite(self.log_peak):
                is_alarm = log_norm > self.log_peak + _MAX_LOG_RISE
                log_norm = max(self.log_peak - _LOG_DECAY, min(log_norm, self.log_peak + _MAX_LOG_RISE))
            guard = replace(guard, log_peak=log_norm)
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
