"""The verifier tries inputs of other sizes than those it is given."""

import pytest
import torch
from torch import Tensor, nn

from teleport_optim.symmetry import Leg, Symmetry, SymmetrySpec, find_symmetries, verify_symmetries
from teleport_optim.symmetry.groups import GROUPS

pytestmark = pytest.mark.private_torch


class Positions(nn.Module):
    """Learned positions, of which a sequence reads as many as it is long."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places, self.read = nn.Embedding(9, 4), nn.Parameter(torch.randn(12, 4)), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(tokens) + self.places[: tokens.shape[1]]
        return self.read(hidden if mask is None else hidden * mask.unsqueeze(-1))


class Thresholded(nn.Module):
    """Another activation for many examples or long inputs."""

    def __init__(self, most_examples: int, longest: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.most_examples, self.longest = most_examples, longest

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        is_usual = len(x) <= self.most_examples and x.shape[1] <= self.longest
        return self.second(hidden.relu() if is_usual else hidden.sigmoid())


def rows_that_the_example_leaves_out() -> SymmetrySpec:
    return SymmetrySpec((Symmetry("rows", GROUPS["permutation"], 7, (Leg("places", 0, 1, offset=5),)),))


def test_a_symmetry_must_hold_for_longer_sequences() -> None:
    tokens = torch.randint(9, (2, 5))
    model, spec = Positions(), rows_that_the_example_leaves_out()
    report = verify_symmetries(model, spec, tokens)
    assert report.failed == ("rows",)
    assert report.tried == {"as given": True, "3 examples": True, "7 instead of 5": True}
    assert report.where == {"rows": "3 examples, 7 instead of 5"}
    assert verify_symmetries(model, spec, tokens, other_sizes=False).ok


def test_all_inputs_grow_together() -> None:
    report = verify_symmetries(
        Positions(), rows_that_the_example_leaves_out(), {"tokens": torch.randint(9, (2, 5)), "mask": torch.ones(2, 5)}
    )
    assert report.tried == {"as given": True, "3 examples": True, "7 instead of 5": True}
    assert not report.ok


@pytest.mark.parametrize(("most_examples", "longest", "is_right"), [(4, 9, False), (9, 5, False), (9, 9, True)])
def test_a_symmetry_must_hold_on_every_branch(most_examples: int, longest: int, is_right: bool) -> None:
    model = Thresholded(most_examples, longest)
    legs = (Leg("first.weight", 0, 1), Leg("first.bias", 0, 1), Leg("second.weight", 1, -1))
    spec = SymmetrySpec((Symmetry("site", GROUPS["scaling"], 6, legs),))
    assert verify_symmetries(model, spec, torch.randn(4, 5, 3)).ok == is_right


def test_sizes_that_a_model_does_not_take_are_left_out() -> None:
    """One that fails for longer inputs, and one whose cache they spoil."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
            self.register_buffer("cache", torch.zeros(5))
            self.longest = 5

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > self.longest:
                self.cache = torch.zeros(x.shape[1], dtype=x.dtype)
                self.longest = x.shape[1]
            return self.second(self.first(x).relu()) + self.longest + self.cache[: x.shape[1], None]

    model = Fixed()
    spec = find_symmetries(model, torch.randn(2, 5, 3))
    report = verify_symmetries(model, spec, torch.randn(2, 5, 3))
    assert report.ok
    assert report.tried["3 examples"]
    assert not any(taken for name, taken in report.tried.items() if "instead of 5" in name)
    assert model.longest == 5
