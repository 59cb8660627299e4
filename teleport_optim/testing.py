"""Property tests for symmetries: strategies for hypothesis, and assertions that name the site that is wrong.

For tests of models, of specs written by hand and of optimizers. It needs ``hypothesis``. The strategies draw models, inputs and
group elements that shrink to small ones. The assertions work on float64 copies with generic parameters and leave model and random
state as they were.
"""

import importlib.util

if importlib.util.find_spec("hypothesis") is None:
    raise ImportError("teleport_optim.testing needs hypothesis: pip install hypothesis")

from teleport_optim.symmetry.testing.assertions import (
    assert_equivariant_gradient,
    assert_invariant,
    assert_optimizer_equivariant,
)
from teleport_optim.symmetry.testing.elements import example_inputs, group_elements
from teleport_optim.symmetry.testing.graphs import modules
from teleport_optim.symmetry.testing.sequential import Sample, sequential_models

__all__ = [
    "Sample",
    "assert_equivariant_gradient",
    "assert_invariant",
    "assert_optimizer_equivariant",
    "example_inputs",
    "group_elements",
    "modules",
    "sequential_models",
]
