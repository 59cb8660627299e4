"""Specs as data: printing, JSON and lookups."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from teleport_optim.symmetry import Leg, Refusal, Symmetry, SymmetrySpec, find_symmetries
from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.testing import Sample, sequential_models

LEGS = (Leg("a.weight", 0, 1, repeat=2), Leg("b.weight", 1, -1, offset=3, within=(0, 2, 4)), Leg("n.var", 0, 2))
LISTED = Leg("s.weight", 0, 1, index=(4, 0, 2))
SPEC = SymmetrySpec(
    (Symmetry("a:scaling", GROUPS["scaling"], 3, LEGS, exact=False), Symmetry("a:sign", GROUPS["sign"], 3, LEGS[:2])),
    (Refusal("c", "it is frozen"),),
)


def test_json_round_trip() -> None:
    assert SymmetrySpec.from_json(SPEC.to_json()) == SPEC
    assert SymmetrySpec.from_json(SymmetrySpec().to_json()) == SymmetrySpec()
    linear = SymmetrySpec((Symmetry("s:linear", GROUPS["linear"], 3, (LISTED,)),))
    assert SymmetrySpec.from_json(linear.to_json()) == linear


def test_json_without_lists_of_entries_is_read() -> None:
    """As earlier versions wrote it."""
    data = json.loads(SPEC.to_json())
    for symmetry in data["symmetries"]:
        for leg in symmetry["legs"]:
            del leg["index"]
    assert SymmetrySpec.from_json(json.dumps(data)) == SPEC


@given(sequential_models())
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_json_round_trip_of_found_specs(sample: Sample) -> None:
    spec = find_symmetries(sample.model, sample.inputs, include_approximate=True)
    assert SymmetrySpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "update it"),
        ({"symmetries": None}, "not the JSON"),
        ({"refusals": [{"name": "x"}]}, "not the JSON"),
        ({"symmetries": [json.loads(SPEC.to_json())["symmetries"][0] | {"group": "braid"}]}, "braid"),
    ],
)
def test_bad_json_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SymmetrySpec.from_json(json.dumps(json.loads(SPEC.to_json()) | change))


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_text_that_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the JSON"):
        SymmetrySpec.from_json(text)


def test_a_spec_prints_as_a_table() -> None:
    assert str(SPEC).splitlines() == [
        "site       size  group      legs",
        "a:scaling  3     scaling ~  a.weight[0x2]^+1 b.weight[1+3|0:2+4]^-1 n.var[0]^+2",
        "a:sign     3     sign       a.weight[0x2]^+1 b.weight[1+3|0:2+4]^-1",
        "refused  c: it is frozen",
    ]


def test_lookups() -> None:
    assert len(SPEC) == 2
    assert [symmetry.id for symmetry in SPEC] == ["a:scaling", "a:sign"]
    assert SPEC["a:sign"].writers == LEGS[:1]
    assert SPEC["a:sign"].readers == LEGS[1:2]
    assert [symmetry.id for symmetry in SPEC.of_group("sign")] == ["a:sign"]
    assert len(SPEC.of_group("permutation")) == 0
    with pytest.raises(KeyError, match="no symmetry 'x'"):
        SPEC["x"]
    with pytest.raises(ValueError, match="no group 'braid'"):
        SPEC.of_group("braid")


def test_a_leg_prints_the_first_entries_that_it_lists() -> None:
    assert str(LISTED) == "s.weight[0@4,0,..]^+1"
    assert str(replace(LISTED, index=(4,))) == "s.weight[0@4]^+1"


def test_the_share_of_the_parameters_that_moves() -> None:
    model = nn.Sequential(nn.Conv1d(1, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 1, groups=2))
    (first, *_) = find_symmetries(model, torch.randn(2, 1, 1)).of_group("permutation")
    assert SymmetrySpec((first,)).share_of(model) == pytest.approx((4 + 4 + 4 * 4) / 56)
    assert SymmetrySpec().share_of(model) == 0.0
    assert SymmetrySpec().share_of(nn.ReLU()) == 0.0
    listed = SymmetrySpec((Symmetry("site", GROUPS["scaling"], 2, (Leg("0.bias", 0, 1, index=(7, 0)),)),))
    assert listed.share_of(model) == pytest.approx(2 / 56)


def test_ids_are_unique() -> None:
    with pytest.raises(ValueError, match="occur twice"):
        SymmetrySpec((SPEC["a:sign"], SPEC["a:sign"]))


def test_elements_compose_and_invert_site_by_site() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
    spec = find_symmetries(model, torch.randn(3, 2))
    generator = torch.Generator().manual_seed(0)
    element = spec.random_element(generator)
    assert element.keys() == spec.identity().keys() == {"0:permutation", "0:scaling"}
    for key, part in spec.compose(element, spec.inverse(element)).items():
        torch.testing.assert_close(part, spec.identity()[key])
    only = {"0:scaling": element["0:scaling"]}
    assert spec.inverse(only).keys() == {"0:scaling"}
    assert torch.equal(spec.compose(only, {})["0:permutation"], torch.arange(5))
    with pytest.raises(ValueError, match="must have shape"):
        spec.compose({"0:scaling": torch.ones(4)}, {})


def test_matrices_compose_and_invert_site_by_site() -> None:
    spec = find_symmetries(nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1)), torch.randn(3, 2)).of_group("linear")
    element = spec.random_element(torch.Generator().manual_seed(0))
    assert {key: part.shape for key, part in element.items()} == {"0:linear": (5, 5)}
    for identity in (spec.compose(element, spec.inverse(element)), spec.compose(spec.inverse(element), element)):
        torch.testing.assert_close(identity, spec.identity())


def test_share_of_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False))
    assert find_symmetries(model, torch.randn(2, 2, 3, 3)).share_of(model) == 1.0
    assert SymmetrySpec().share_of(model) == 0.0
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2, bias=False))
    (first, *_) = find_symmetries(grouped, torch.randn(2, 4, 3, 3)).of_group("scaling")
    assert SymmetrySpec((first,)).share_of(grouped) == pytest.approx((8 + 4) / 24)
