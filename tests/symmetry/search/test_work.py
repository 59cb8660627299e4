"""How much work a search is, counted in calls and not in seconds."""

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_optim.symmetry import SymmetrySpec, find_symmetries
from tests.helpers.small_models import Model
from tests.helpers.specs import reasons_of

pytestmark = pytest.mark.private_torch


def deep(num_layers: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), *[nn.Linear(3, 3) for _ in range(num_layers)])


def looped(num_steps: int) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x).tanh()
        for _ in range(num_steps):
            h = m.cell(x, h)
        out: Tensor = m.last(h)
        return out

    return Model(forward, first=nn.Linear(5, 3), cell=nn.GRUCell(5, 3), last=nn.Linear(3, 2))


def num_calls(work: Callable[[], object], code: CodeType | None = None) -> int:
    """Calls of Python functions during ``work``, those of one function if it is given."""
    count = 0

    def hear(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call" and (code is None or frame.f_code is code)

    sys.setprofile(hear)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("make", [deep, looped])
@pytest.mark.parametrize("group", ["permutation", "scaling", "linear"])
def test_twice_the_operations_are_twice_the_work(make: Callable[[int], nn.Module], group: str) -> None:
    x = torch.randn(2, 5)
    find_symmetries(make(2), x, groups=[group])  # torch imports and caches

    def work(size: int) -> int:
        model = make(size)
        return num_calls(lambda: find_symmetries(model, x, groups=[group]))

    small, large = work(40), work(80)
    assert 1.1 * small < large < 2.2 * small


def test_what_only_training_mode_does_is_followed() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        out: Tensor = m.b(h)
        return out + m.a(x).relu().exp().sum(1, keepdim=True) if m.training else out

    parts = {"a": nn.Linear(5, 3), "b": nn.Linear(3, 2)}
    plain = Model(lambda m, x: m.b(m.a(x).relu()), **parts)
    x = torch.randn(2, 5)
    assert [one.id for one in find_symmetries(plain, x, groups=["scaling"])] == ["a:scaling"]
    assert len(find_symmetries(Model(forward, **parts), x, groups=["scaling"])) == 0


def test_other_sizes_are_tried_only_where_something_moves() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.net(x)
        return out if x.shape[0] > 1 else out + 1

    def num_forwards(net: nn.Module) -> int:
        model, x = Model(forward, net=net), torch.randn(2, 5)
        return num_calls(lambda: find_symmetries(model, x), forward.__code__)

    assert num_forwards(nn.Linear(5, 2)) == 2
    assert num_forwards(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))) > 2


# ------------------------------------------------------------------------------------------ operations of another name


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "split": lambda h: torch.split(h, 3, 1),
    "unsafe_split": lambda h: torch.unsafe_split(h, 3, 1),
    "unsafe_split_with_sizes": lambda h: torch.unsafe_split_with_sizes(h, [3, 3], 1),
    "unsafe_chunk": lambda h: torch.unsafe_chunk(h, 2, 1),
    "split_copy": lambda h: torch.split_copy(h, 3, 1),
    "split_with_sizes_copy": lambda h: torch.split_with_sizes_copy(h, [3, 3], 1),
    "slice_copy": lambda h: (torch.slice_copy(h, 1, 0, 3), torch.slice_copy(h, 1, 3, 6)),
    "permute_copy": lambda h: torch.permute_copy(torch.permute_copy(h, (1, 0)).view(2, 3, -1), (0, 2, 1)),
    "unbind_copy": lambda h: torch.unbind_copy(torch.view_copy(h, (-1, 2, 3)), 1),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_not_safe_or_no_view_moves_as_what_is(name: str) -> None:
    def found(take: Callable[[Tensor], Any]) -> SymmetrySpec:
        def forward(m: Any, x: Tensor) -> Tensor:
            one, two = take(m.a(x))
            out: Tensor = m.b(one.relu()) + m.c(two.relu())
            return out

        model = Model(forward, a=nn.Linear(5, 6), b=nn.Linear(3, 2), c=nn.Linear(3, 2))
        return find_symmetries(model, torch.randn(4, 5), groups=["permutation", "scaling"])

    spec = found(PARTS[name])
    assert reasons_of(spec) == {}
    assert spec.to_json() == found(PARTS["split"]).to_json()
    assert len(spec) > 0


@pytest.mark.parametrize("cell", [nn.GRUCell(5, 3), nn.LSTMCell(5, 3)])
def test_recurrent_cells_are_known(cell: nn.Module) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.cell(x)
        out: Tensor = m.out(state[0] if isinstance(state, tuple) else state)
        return out

    spec = find_symmetries(Model(forward, cell=cell, out=nn.Linear(3, 2)), torch.randn(4, 5))
    assert reasons_of(spec) == {}
