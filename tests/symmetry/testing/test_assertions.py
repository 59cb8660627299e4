"""The assertions pass what holds, and name the site that does not."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport_optim.symmetry import Leg, Symmetry, SymmetrySpec, find_symmetries
from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.testing import (
    Sample,
    assert_equivariant_gradient,
    assert_invariant,
    assert_optimizer_equivariant,
    modules,
    sequential_models,
)
from tests.helpers.written_specs import INPUTS, adamw, convnet, mlp, replaced, sgd, spec_of, without

quick = settings(max_examples=15, deadline=None, database=None, derandomize=True)


def planted(spec: SymmetrySpec, seed: int) -> Iterator[tuple[str, SymmetrySpec]]:
    """One wrong spec for each kind of mistake, with the site that is wrong."""
    gelu = replace(spec["4:permutation"], id="4:scaling", group=GROUPS["scaling"])
    yield gelu.id, SymmetrySpec((*spec, gelu))
    site, bias = [("4:permutation", "4.bias"), ("0:permutation", "1.bias"), ("1:scaling", "1.bias")][seed % 3]
    yield site, without(spec, site, bias)
    site, buffer = [("0:permutation", "running_mean"), ("0:permutation", "running_var"), ("0:sign", "running_mean")][
        seed % 3
    ]
    yield site, without(spec, site, f"1.{buffer}")
    site = ["0:permutation", "1:scaling"][seed % 2]
    legs = tuple(replace(leg, repeat=leg.repeat - 1) if leg.repeat > 1 else leg for leg in spec[site].legs)
    assert legs != spec[site].legs
    yield site, replaced(spec, replace(spec[site], legs=legs))


@pytest.mark.slow
def test_planted_mistakes_are_caught_in_every_one_of_100_models() -> None:
    for seed in range(100):
        model, inputs = convnet(seed)
        spec = find_symmetries(model, inputs)
        assert_invariant(model, inputs, spec, other_sizes=False)
        for site, wrong in planted(spec, seed):
            with pytest.raises(AssertionError, match=f"site '{site}' .*changes the function"):
                assert_invariant(model, inputs, wrong, other_sizes=False)


def test_a_message_names_site_group_error_and_legs() -> None:
    wrong = SymmetrySpec((*spec_of("permutation"), *spec_of("scaling")))
    with pytest.raises(AssertionError) as caught:
        assert_invariant(mlp(nn.GELU()), INPUTS, wrong)
    pattern = (
        r"site '0:scaling' \(scaling of 6 channels\) changes the function by \d\.\de[-+]\d\d, more than 1e-10; "
        r"its legs: 0\.weight\[0\]\^\+1 0\.bias\[0\]\^\+1 2\.weight\[1\]\^-1"
    )
    assert re.fullmatch(pattern, str(caught.value))


def test_each_wrong_site_has_a_line() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_invariant(mlp(nn.GELU()), INPUTS, spec_of("scaling", "permutation", "sign"))
    assert [line.split()[1] for line in str(caught.value).splitlines()] == ["'0:scaling'", "'0:sign'"]


def test_an_element_says_what_to_move_by() -> None:
    spec, swap = spec_of("permutation", "scaling"), torch.tensor([1, 0, 2, 3, 4, 5])
    assert_invariant(mlp(nn.GELU()), INPUTS, spec, {"0:permutation": swap})
    assert_invariant(mlp(nn.GELU()), INPUTS, spec, spec.identity())
    assert_invariant(mlp(nn.GELU()), INPUTS, spec, {})
    with pytest.raises(AssertionError, match="0:scaling"):
        assert_invariant(mlp(nn.GELU()), INPUTS, spec, {"0:scaling": torch.tensor([1.0, 1, 1, 1, 1, 2])})
    with pytest.raises(ValueError, match="must have shape"):
        assert_invariant(mlp(nn.GELU()), INPUTS, spec, {"0:permutation": torch.tensor([0, 1])})


def test_a_default_element_moves_even_the_smallest_site() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        for group in ("permutation", "sign"):
            wrong = without(spec_of(group, size=2), f"0:{group}", "0.bias")
            with pytest.raises(AssertionError, match="0:"):
                assert_invariant(mlp(nn.Tanh(), width=2), INPUTS, wrong)


def test_approximate_sites_have_their_own_tolerance() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.randn(8, 3)
    spec = find_symmetries(model, inputs, include_approximate=True)
    assert not all(symmetry.exact for symmetry in spec)
    assert_invariant(model, inputs, spec)
    pretended = SymmetrySpec(tuple(replace(symmetry, exact=True) for symmetry in spec))
    with pytest.raises(AssertionError, match="scaling"):
        assert_invariant(model, inputs, pretended)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.GELU()])
def test_gradients_are_equivariant(activation: nn.Module) -> None:
    assert_equivariant_gradient(mlp(activation), INPUTS)
    assert_equivariant_gradient(mlp(activation), INPUTS, loss=lambda output: output.logsumexp(1).sum())


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (mlp(nn.GELU()), spec_of("scaling")),
        (mlp(nn.ReLU()), without(spec_of("scaling"), "0:scaling", "0.bias")),
        (mlp(nn.ReLU()), without(spec_of("permutation"), "0:permutation", "2.weight")),
    ],
)
def test_a_gradient_that_moves_otherwise_is_caught(model: nn.Module, spec: SymmetrySpec) -> None:
    site = spec.symmetries[0].id
    with pytest.raises(AssertionError, match=f"site '{site}' .*gradient.*its legs: 0.weight"):
        assert_equivariant_gradient(model, INPUTS, spec)


def test_a_loss_of_the_parameters_breaks_the_gradient() -> None:
    """A penalty is not invariant to scalings, so it must be seen through the loss."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net[0].weight.square().sum()

    legs = tuple(replace(leg, name=f"net.{leg.name}") for leg in spec_of("scaling").symmetries[0].legs)
    spec = SymmetrySpec((Symmetry("site", GROUPS["scaling"], 6, legs),))
    for check in (assert_invariant, assert_equivariant_gradient):
        with pytest.raises(AssertionError, match="site 'site'"):
            check(Penalised(), INPUTS, spec)


class RowSgd(torch.optim.SGD):
    """Not equivariant: the first entries of a parameter learn faster."""

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                rates = 1 / torch.arange(1, len(parameter) + 1).reshape(-1, *[1] * (parameter.dim() - 1))
                parameter -= self.param_groups[0]["lr"] * rates * parameter.grad
        return loss


@pytest.mark.parametrize("make", [sgd, adamw, lambda model: torch.optim.LBFGS(model.parameters())])
def test_optimizers_are_equivariant(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model, inputs = convnet(0)
    assert_optimizer_equivariant(make, model, inputs)
    assert_optimizer_equivariant(make, mlp(nn.Tanh()), INPUTS, groups=("permutation", "sign"))


@pytest.mark.parametrize("make", [sgd, adamw])
def test_optimizers_are_not_equivariant_to_scalings(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    assert_optimizer_equivariant(make, mlp(nn.ReLU()), INPUTS)
    with pytest.raises(AssertionError, match=r"site '0:scaling'.*does not commute with training"):
        assert_optimizer_equivariant(make, mlp(nn.ReLU()), INPUTS, groups=("scaling",))


@pytest.mark.parametrize("lr", [0.1, 1e-6])
def test_an_optimizer_that_tells_entries_apart_is_caught(lr: float) -> None:
    with pytest.raises(
        AssertionError, match=r"site '0:permutation' \(permutation of 6 channels\) does not commute.*, more than"
    ):
        assert_optimizer_equivariant(lambda model: RowSgd(model.parameters(), lr=lr), mlp(nn.Tanh()), INPUTS)


def test_unknown_groups_and_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="no group 'rotation'"):
        assert_optimizer_equivariant(sgd, mlp(nn.Tanh()), INPUTS, groups=("rotation",))

    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(ValueError, match="pass a loss"):
        assert_equivariant_gradient(Labels(), INPUTS)


def test_everything_is_left_as_it_was() -> None:
    model, inputs = convnet(1)
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    before, random_state = inputs.clone(), torch.get_rng_state()
    assert_invariant(model, inputs)
    assert_equivariant_gradient(model, inputs)
    assert_optimizer_equivariant(adamw, model, inputs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(inputs, before)
    assert GROUPS["sign"].random(3, torch.Generator().manual_seed(0)).shape == (3,)


@given(st.one_of(sequential_models(max_layers=3), modules(max_blocks=2)))
@quick
def test_assertions_hold_for_random_models(sample: Sample) -> None:
    spec = find_symmetries(sample.model, sample.inputs)
    assert_invariant(sample.model, sample.inputs, spec)
    assert_equivariant_gradient(sample.model, sample.inputs, spec)


def test_a_message_names_the_sizes_at_which_a_site_fails() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.read = nn.Parameter(torch.randn(20, 3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(x + self.places[: x.shape[1]])

    unread = SymmetrySpec((Symmetry("rows", GROUPS["permutation"], 16, (Leg("places", 0, 1, offset=4),)),))
    inputs = torch.randn(2, 4, 3)
    with pytest.raises(AssertionError, match="more than 1e-10 with 3 examples, 6 instead of 4; its legs: places"):
        assert_invariant(Positions(), inputs, unread)
    assert_invariant(Positions(), inputs, unread, other_sizes=False)
