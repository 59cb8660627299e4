"""The limits of a search: operations, seconds, and work that grows with the length of a model."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_optim.symmetry import find_symmetries
from tests.helpers.small_models import Model
from tests.helpers.specs import reasons_of

pytestmark = pytest.mark.private_torch


def repeated(steps: int) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(steps):
            x = m.a(x).relu()
        out: Tensor = m.b(x)
        return out

    return Model(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))


def test_a_search_stops_after_some_operations_and_says_so() -> None:
    model, x = repeated(40), torch.randn(3, 4)
    with pytest.warns(
        UserWarning, match=r"100 operations .*Raise max_operations.*symmetries=.*teleport=False"
    ) as record:
        spec = find_symmetries(model, x, max_operations=100)
    assert len(record) == 1
    assert len(spec) == 0
    assert "100 operations" in reasons_of(spec)["(root)"]
    assert reasons_of(find_symmetries(model, x)) == {}


def test_a_search_stops_after_some_seconds() -> None:
    model, x = repeated(100_000), torch.randn(3, 4)
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"0\.2 seconds"):
        assert len(find_symmetries(model, x, max_seconds=0.2)) == 0
    assert time.monotonic() - start < 10


def test_a_long_loop_is_searched_in_time_that_grows_with_its_length() -> None:
    def seconds(steps: int) -> float:
        model, x = repeated(steps), torch.randn(3, 4)
        start = time.process_time()
        find_symmetries(model, x, groups=["scaling"])
        return time.process_time() - start

    seconds(10)
    assert seconds(400) < 8 * seconds(100) + 0.5
