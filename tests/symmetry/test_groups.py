"""The laws of the groups, for every group in the table."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teleport_optim.symmetry.groups import GROUPS, Group

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**20)
relaxed = settings(deadline=None, max_examples=50)
every_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
OFFENDERS = {
    "permutation": [torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), torch.tensor([0.0, 1.0, 2.0])],
    "scaling": [torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0]), torch.tensor([torch.inf]), torch.tensor([1, 2])],
    "sign": [torch.tensor([1.0, 0.5]), torch.tensor([0.0]), torch.tensor([torch.nan])],
    "linear": [
        torch.eye(2, dtype=torch.int64),
        torch.tensor([[1.0, torch.nan], [0.0, 1.0]]),
        torch.tensor([[1.0, 0.0], [0.0, torch.inf]]),
        torch.tensor([[1.0, 2.0], [2.0, 4.0]]),
        torch.zeros(1, 1),
        torch.tensor([[1.0, 0.0], [0.0, 1e-5]]),
    ],
}


def assert_same(group: Group, actual: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """Equal up to ``rtol`` of each entry; matrix products mix the entries and round relative to the largest one."""
    atol = 1e-13 * expected.abs().max().item() if group.name == "linear" else 0.0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def draw(group: Group, size: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [group.random(size, generator) for _ in range(3)]


@every_group
@given(sizes, seeds)
@relaxed
def test_composition_is_associative_and_has_identity_and_inverses(group: Group, size: int, seed: int) -> None:
    a, b, c = draw(group, size, seed)
    identity = group.identity(size)
    assert_same(group, group.compose(a, group.compose(b, c)), group.compose(group.compose(a, b), c), 1e-14)
    for one, other in ((a, identity), (identity, a)):
        assert torch.equal(group.compose(one, other), a)
    for one, other in ((a, group.inverse(a)), (group.inverse(a), a)):
        assert_same(group, group.compose(one, other), identity, 1e-15)


@every_group
@given(sizes, seeds, st.sampled_from([-2, -1, 1, 2]))
@relaxed
def test_action_is_a_homomorphism(group: Group, size: int, seed: int, degree: int) -> None:
    a, b, _ = draw(group, size, seed)
    x = torch.randn(size, 2, 3, dtype=torch.float64)
    assert torch.equal(group.act(a, x, 0), x)
    if group.name == "linear" and abs(degree) == 2:
        with pytest.raises(ValueError, match=f"cannot act with degree {degree}"):
            group.act(a, x, degree)
        return
    both = group.act(group.compose(a, b), x, degree)
    assert_same(group, both, group.act(a, group.act(b, x, degree), degree), 1e-13)
    assert_same(group, group.act(group.inverse(a), group.act(a, x, degree), degree), x, 1e-13)
    assert torch.equal(group.act(group.identity(size), x, degree), x)


@every_group
@given(sizes, seeds)
@relaxed
def test_degree_minus_one_is_the_dual(group: Group, size: int, seed: int) -> None:
    """The pairing of a vector with a covector does not change."""
    a, _, _ = draw(group, size, seed)
    vector, covector = torch.randn(2, size, dtype=torch.float64)
    paired = group.act(a, vector, 1) @ group.act(a, covector, -1)
    torch.testing.assert_close(paired, vector @ covector, rtol=1e-12, atol=1e-12)


@every_group
@given(sizes, seeds)
@relaxed
def test_random_elements_and_the_identity_are_members(group: Group, size: int, seed: int) -> None:
    for element in (*draw(group, size, seed), group.identity(size)):
        assert element.shape == group.shape(size)
        assert group.problem(element) is None
    assert torch.equal(draw(group, size, seed)[0], draw(group, size, seed)[0])


@pytest.mark.parametrize(("name", "element"), [(name, element) for name in OFFENDERS for element in OFFENDERS[name]])
def test_outsiders_are_named(name: str, element: torch.Tensor) -> None:
    assert GROUPS[name].problem(element)


@every_group
def test_the_action_keeps_dtype_and_does_not_write(group: Group) -> None:
    element = draw(group, 4, 0)[0]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(4, 2).to(dtype)
        before = x.clone()
        assert group.act(element, x, 1).dtype == dtype
        assert torch.equal(x, before)


@given(sizes, seeds)
@relaxed
def test_exp_is_the_one_parameter_group_of_scaling(size: int, seed: int) -> None:
    scaling = GROUPS["scaling"]
    algebra = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(scaling.compose(scaling.exp(algebra), scaling.exp(-algebra)), scaling.identity(size))
    torch.testing.assert_close(scaling.compose(scaling.exp(algebra), scaling.exp(algebra)), scaling.exp(2 * algebra))


@given(sizes, seeds)
@relaxed
def test_exp_of_matrices_is_a_one_parameter_group(size: int, seed: int) -> None:
    linear = GROUPS["linear"]
    algebra = 0.2 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert linear.problem(linear.exp(algebra)) is None
    torch.testing.assert_close(linear.compose(linear.exp(algebra), linear.exp(-algebra)), linear.identity(size))
    torch.testing.assert_close(linear.compose(linear.exp(algebra), linear.exp(algebra)), linear.exp(2 * algebra))


@given(sizes, seeds)
@relaxed
def test_random_matrices_are_well_conditioned(size: int, seed: int) -> None:
    for element in draw(GROUPS["linear"], size, seed):
        assert torch.linalg.cond(element) <= math.e**2 * (1 + 1e-12)


@pytest.mark.parametrize("name", ["permutation", "sign"])
def test_discrete_groups_have_no_exp(name: str) -> None:
    with pytest.raises(TypeError, match="discrete"):
        GROUPS[name].exp(torch.zeros(3))


@every_group
def test_a_group_prints_as_its_name(group: Group) -> None:
    assert repr(group) == f"{type(group).__name__}()"
