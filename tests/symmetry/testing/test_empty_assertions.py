"""An assertion that would show nothing fails: no training, no gradient, or too few parameters that move."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from teleport_optim.symmetry import Refusal, SymmetrySpec
from teleport_optim.testing import assert_equivariant_gradient, assert_invariant, assert_optimizer_equivariant
from tests.helpers.written_specs import INPUTS, adamw, mlp, sgd, spec_of


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def of_another_model(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "num_steps"),
    [(frozen, 3), (of_another_model, 3), (lambda model: torch.optim.AdamW(model.parameters()), 0)],
)
def test_training_that_changes_nothing_fails(
    make: Callable[[nn.Module], torch.optim.Optimizer], num_steps: int
) -> None:
    with pytest.raises(AssertionError, match=f"changed no parameter in {num_steps} steps.*make_optimizer must return"):
        assert_optimizer_equivariant(make, mlp(nn.Tanh()), INPUTS, num_steps=num_steps)


def test_a_model_without_gradients_fails() -> None:
    frozen_model = mlp(nn.Tanh()).requires_grad_(False)
    with pytest.raises(AssertionError, match="no parameter has a gradient"):
        assert_equivariant_gradient(frozen_model, INPUTS, spec_of("permutation"))
    with pytest.raises(AssertionError, match="changed no parameter"):
        assert_optimizer_equivariant(adamw, frozen_model, INPUTS, spec_of("permutation"))
    for loss in (lambda output: 0.0 * output.sum(), lambda output: torch.ones(())):
        with pytest.raises(AssertionError, match="no parameter has a gradient"):
            assert_equivariant_gradient(mlp(nn.Tanh()), INPUTS, loss=loss)


def test_one_parameter_that_trains_is_enough() -> None:
    model = mlp(nn.Tanh())
    model[0].requires_grad_(False)
    assert_optimizer_equivariant(adamw, model, INPUTS)
    assert_equivariant_gradient(model, INPUTS)


CHECKS: dict[str, Callable[..., None]] = {
    "invariant": assert_invariant,
    "gradient": assert_equivariant_gradient,
    "optimizer": lambda *arguments, **options: assert_optimizer_equivariant(adamw, *arguments, **options),
}


@pytest.mark.parametrize("name", CHECKS)
def test_min_share_fails_a_model_without_symmetries(name: str) -> None:
    check = CHECKS[name]
    model, inputs = nn.Linear(3, 2), INPUTS
    check(model, inputs)
    with pytest.raises(
        AssertionError, match=r"^the sites \(0\) move 0\.0% of the parameters, less than the 10\.0% of min_share"
    ):
        check(model, inputs, min_share=0.1)
    share = spec_of("permutation").share_of(mlp(nn.Tanh()))
    check(mlp(nn.Tanh()), inputs, spec_of("permutation"), min_share=share)
    with pytest.raises(AssertionError, match=r"the sites \(1\) move 94.\d% of the parameters.*refused: nothing"):
        check(mlp(nn.Tanh()), inputs, spec_of("permutation"), min_share=share + 0.01)
    refusals = tuple(Refusal(f"layer{number}", "it is odd") for number in range(7))
    with pytest.raises(AssertionError, match=r"refused: layer0: it is odd; .*layer4: it is odd; and 2 more$"):
        check(model, inputs, SymmetrySpec(refusals=refusals), min_share=0.5)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="min_share must lie between 0 and 1"):
            check(model, inputs, min_share=wrong)


def test_min_share_counts_the_groups_that_are_tested() -> None:
    """Scalings alone do not pass a test of permutations."""
    with pytest.raises(AssertionError, match=r"the sites \(0\) move"):
        assert_optimizer_equivariant(sgd, mlp(nn.ReLU()), INPUTS, spec_of("scaling"), min_share=0.5)
