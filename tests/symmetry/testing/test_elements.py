"""The strategy for group elements: they lie in their groups, shrink, and print as code."""

from dataclasses import replace

import pytest
import torch
from hypothesis import find, given, settings
from torch import Tensor, nn

from teleport_optim.symmetry import SymmetrySpec
from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.testing import assert_invariant, group_elements
from tests.helpers.written_specs import INPUTS, mlp, spec_of, without

quick = settings(max_examples=15, deadline=None, database=None, derandomize=True)
searching = settings(max_examples=2000, deadline=None, database=None, derandomize=True)


def everything() -> SymmetrySpec:
    return spec_of("permutation", "scaling", "sign", "linear")


@given(group_elements(everything()))
@settings(quick, max_examples=200)
def test_elements_lie_in_their_groups(element: dict[str, Tensor]) -> None:
    everything().check(element)
    if "0:linear" in element:
        assert torch.linalg.cond(element["0:linear"]) <= 55.0


def test_elements_shrink_to_the_identity_and_to_one_channel() -> None:
    spec = everything()
    assert find(group_elements(spec), lambda element: True, settings=searching) == {}
    for name, distance in (("permutation", 2), ("scaling", 1), ("sign", 1), ("linear", 1)):
        site, identity = f"0:{name}", GROUPS[name].identity(6)

        def moves(element: dict[str, Tensor], site: str = site, identity: Tensor = identity) -> bool:
            return site in element and not torch.equal(element[site], identity)

        element = find(group_elements(spec), moves, settings=searching)
        assert list(element) == [site]
        assert int((element[site] != identity).sum()) == distance


def test_elements_find_a_forgotten_bias_in_one_channel() -> None:
    """What fails shrinks to a message that can be read."""
    model = mlp(nn.ReLU())
    wrong = without(spec_of("scaling"), "0:scaling", "0.bias")

    def fails(element: dict[str, Tensor]) -> bool:
        try:
            assert_invariant(model, INPUTS, wrong, element)
        except AssertionError:
            return True
        return False

    element = find(group_elements(wrong), fails, settings=settings(searching, max_examples=100))
    assert int((element["0:scaling"] != 1).sum()) == 1


@given(group_elements(everything()))
@settings(quick, max_examples=100)
def test_an_element_prints_as_code_that_makes_it(element: dict[str, Tensor]) -> None:
    assert_same_element(evaluated(repr(element)), element)


@given(group_elements(spec_of("permutation", "scaling", "sign", "linear", size=50)))
@settings(quick, max_examples=50)
def test_large_elements_print_what_they_move(element: dict[str, Tensor]) -> None:
    code = repr(element)
    assert_same_element(evaluated(code), element)
    assert len(code) < 20_000


def evaluated(code: str) -> dict[str, Tensor]:
    names: dict[str, dict[str, Tensor]] = {}
    exec(f"import torch\nelement = {code}", names)
    return names["element"]


def assert_same_element(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, part in expected.items():
        assert actual[name].dtype == part.dtype
        assert torch.equal(actual[name], part)


def test_a_falsifying_example_is_code() -> None:
    """What hypothesis reports can be pasted, and fails as it did."""
    model, wrong = mlp(nn.ReLU()), without(spec_of("scaling"), "0:scaling", "0.bias")

    @given(group_elements(wrong))
    @settings(searching, max_examples=100)
    def check(element: dict[str, Tensor]) -> None:
        assert_invariant(model, INPUTS, wrong, element)

    with pytest.raises(AssertionError) as caught:
        check()
    (report,) = [note for note in caught.value.__notes__ if "element=" in note]
    code = report[report.index("element=") + len("element=") : report.rindex("}") + 1]
    with pytest.raises(AssertionError, match="0:scaling"):
        assert_invariant(model, INPUTS, wrong, evaluated(code))


def test_unknown_groups_have_no_elements() -> None:
    class Rotation(type(GROUPS["linear"])):  # type: ignore[misc]
        name = "rotation"

    spec = SymmetrySpec((replace(spec_of("linear").symmetries[0], group=Rotation()),))
    with pytest.raises(ValueError, match="no elements are known for the group 'rotation'"):
        group_elements(spec)
