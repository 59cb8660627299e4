"""When the controller is asked, how the rate falls, and what weight an iterate has in the average."""

from __future__ import annotations

import math
from typing import NamedTuple

from teleport_optim.optim.parameters import ParameterTable

__all__ = ["TELEPORT_INTERVAL", "Horizon", "averaging_weight", "is_control_step", "prior_rate", "rate_and_decay"]


TELEPORT_INTERVAL = 80
"""Steps before the meta-optimizer is asked, and the network teleports, for the second time; after twice as many, the third time."""


_FIRST_RATE, _FLAT_STEPS = 0.22, 20
"""The rate in networks of one layer, and for how many steps; it falls with the root of time after that."""


_DEPTH_POWER, _MOST_LAYERS = -0.7, 11
"""Of the number of layers, with which the rate goes, up to so many; deeper networks normalise their layers, and want no less."""


_ANNEALED = 0.3
"""Share of a run of known length in which the rate falls to zero."""


_POWER, _TAIL = 6, 3
"""An iterate after t steps has the weight t^6 in the average; in the end of a run, only the last three iterates count."""


_LINEAR_RATE = 3.0
"""Factor on the rate of a model of one matrix, such as logistic regression: nothing comes after it that a step could upset."""


class Horizon(NamedTuple):
    """Length of a run, which may be changed while it runs.

    Attributes:
        total_steps: Number of steps of the run; None for an open-ended one.
        changed_at: Step at which ``total_steps`` was changed last; 0 if it never was.
        level: Share of its usual size that the rate had then.

    Example:
        >>> run = Horizon(100)
        >>> [run.annealing(step) for step in (0, 70, 85, 99)]
        [1.0, 1.0, 0.5, 0.03333333333333333]
        >>> longer = run.changed(200, step=85)
        >>> [longer.annealing(step) for step in (85, 100, 115, 170)]
        [0.5, 0.75, 1.0, 0.5]
    """

    total_steps: int | None = None
    changed_at: int = 0
    level: float = 1.0

    def steps_left(self, step: float) -> float:
        """Steps from this one on, this one included: at least 1, and infinite in an open-ended run."""
        return math.inf if self.total_steps is None else max(self.total_steps - step, 1)

    def annealing(self, step: float) -> float:
        """Share of its usual size that the rate has at this step: 1, and falling to zero in the last 30 % of the run.

        After a change of ``total_steps`` it goes on from the level that it had, so that the rate makes no jump. It rises no
        faster than it would have fallen; it falls faster where fewer steps are left than 30 % of the run.
        """
        end = self.changed_at if self.total_steps is None else self.total_steps
        usual_fall = _ANNEALED * max(end, 1)
        fall = min(usual_fall, self.steps_left(self.changed_at) / self.level)
        rise = self.level + max(step - self.changed_at, 0) / usual_fall
        return min(1.0, rise, self.steps_left(step) / fall)

    def changed(self, total_steps: int | None, step: int) -> Horizon:
        """The horizon of a run whose length is changed before this step."""
        return Horizon(total_steps, step, self.annealing(step))


def prior_rate(step: float, horizon: Horizon, num_layers: int) -> tuple[float, float]:
    """The unlearned rate ``a`` of a step, and the unlearned ``weight_decay`` that goes with it.

    Where the length of the run is known the rate falls to zero over the last part of it; past it, it stays at its last value.
    """
    step = min(step, (horizon.total_steps or math.inf) - 1)
    share = min(1.0, math.sqrt(_FLAT_STEPS / max(step, 1)))
    depth = min(num_layers, _MOST_LAYERS) ** _DEPTH_POWER
    return _FIRST_RATE * share * horizon.annealing(step) * depth, 0.5 / ((step + 50) * _FIRST_RATE * share)


def averaging_weight(age: int, steps_left: float = math.inf) -> float:
    """Weight of the newest iterate in the average of the iterates.

    Args:
        age: Iterates that are in the average already.
        steps_left: Steps until the end of the run, this one included. In the last ones the average goes to the parameters.
    """
    return max((_POWER + 1.0) / (age + _POWER + 1.0), min(1.0, _TAIL / steps_left))


def rate_and_decay(step: int, horizon: Horizon, table: ParameterTable) -> tuple[float, float]:
    """:func:`prior_rate` for the tensors of ``table``."""
    rate, decay = prior_rate(step, horizon, table.num_layers)
    return (_LINEAR_RATE * rate, decay / _LINEAR_RATE) if table.is_linear else (rate, decay)


def is_control_step(step: int) -> bool:
    """Whether the step of this number begins with asking the meta-optimizer, and with a teleport: 0, 80, 160, 320 and so on.

    What changes with the root of time changes ever slower.
    """
    count, rest = divmod(step, TELEPORT_INTERVAL)
    return rest == 0 and count & (count - 1) == 0
