"""Specs as data: printing, JSON and lookups."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import Sample, sequential_models
from torch import nn

from teleport_optim.groups import GROUPS
from teleport_optim.symmetry import Leg, Refusal, Symmetry, SymmetrySpec, find_symmetries

LEGS = (Leg("a.weight", 0, 1, repeat=2), Leg("b.weight", 1, -1, offset=3, within=(0, 2, 4)), Leg("n.var", 0, 2))
SPEC = SymmetrySpec(
    (Symmetry("a:scaling", GROUPS["scaling"], 3, LEGS, exact=False), Symmetry("a:sign", GROUPS["sign"], 3, LEGS[:2])),
    (Refusal("c", "it is frozen"),),
)


def test_json_round_trip() -> None:
    assert SymmetrySpec.from_json(SPEC.to_json()) == SPEC
    assert SymmetrySpec.from_json(SymmetrySpec().to_json()) == SymmetrySpec()


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


def test_ids_are_unique() -> None:
    with pytest.raises(ValueError, match="occur twice"):
        SymmetrySpec((SPEC["a:sign"], SPEC["a:sign"]))


def test_elements_compose_and_invert_site_by_site() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
    spec = find_symmetries(model)
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
