"""Property tests for symmetries: strategies for hypothesis, and assertions that name the site that is wrong.

For tests of models, of specs written by hand and of optimizers. It needs ``hypothesis``. The strategies draw models, inputs and
group elements that shrink to small ones. The assertions work on float64 copies with generic parameters and leave model and random
state as they were.
"""

from teleport_optim.symmetry.testing import (
    Sample,
    assert_equivariant_gradient,
    assert_invariant,
    assert_optimizer_equivariant,
    example_inputs,
    group_elements,
    modules,
    sequential_models,
)

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
