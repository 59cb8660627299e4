"""Models that take another path with other sizes, modes or draws."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.testing.idioms import Branch
from tests.helpers.invariance import Case, assert_holds, between, by_kind, ids, images, sequences, vectors
from tests.helpers.small_models import N, build
from tests.helpers.specs import reasons_of

pytestmark = pytest.mark.private_torch


def chain(layers: Iterable[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = layer(h).relu()
    return h


def kernel_of_one() -> nn.Module:
    return nn.Conv2d(2, N, 1)


def mixed(model: Any, h: Tensor) -> Tensor:
    """A sum with entries that are read in another order: ``[pixels, channels]`` as if these were ``[channels, pixels]``."""
    other: Tensor = model.c(h).flatten(2).transpose(1, 2).reshape(len(h), N, h.shape[2], h.shape[3])
    return h + other


def restored(model: Any, h: Tensor) -> Tensor:
    """The same sum with the entries in their order."""
    other: Tensor = model.c(h).flatten(2).transpose(1, 2).transpose(1, 2).reshape(len(h), N, h.shape[2], h.shape[3])
    return h + other


PATHS: dict[str, Case] = {
    "grad mode": (
        between(lambda m, x: m.b((F.gelu if torch.is_grad_enabled() else torch.relu)(m.a(x)))),
        vectors,
        "a:permutation",
    ),
    "skipped without gradients": (
        between(
            lambda m, x: m.b(m.c(h).relu() if (h := m.a(x).relu()).requires_grad else h), c=lambda: nn.Linear(N, N)
        ),
        vectors,
        "a:permutation a:scaling",
    ),
    "only in training with gradients": (
        between(lambda m, x: m.b(m.a(x).sigmoid() if m.training and torch.is_grad_enabled() else m.a(x).relu())),
        vectors,
        "a:permutation",
    ),
    "even batches": (
        between(lambda m, x: m.b(m.a(x).relu() if len(x) % 2 == 0 else m.a(x).sigmoid())),
        vectors,
        "a:permutation",
    ),
    "long sequences": (
        between(lambda m, x: m.b((m.a(x).relu() if x.shape[1] > 6 else m.a(x).tanh()).mean(1))),
        sequences,
        "a:permutation",
    ),
    "short sequences": (
        between(lambda m, x: m.b((m.a(x).relu() if x.size(1) >= 4 else m.c(x)).mean(1)), c=lambda: nn.Linear(3, N)),
        sequences,
        "a:permutation a:scaling",
    ),
    "number of entries": (
        between(lambda m, x: m.b((m.a(x).relu() if x.shape[0] * x.shape[1] < 16 else m.a(x).tanh()).mean(1))),
        sequences,
        "a:permutation",
    ),
    "as many layers as the sequence is long": (
        between(
            lambda m, x: m.b(chain(list(m.layers)[: x.shape[1] - 3], m.a(x)).mean(1)),
            layers=lambda: nn.ModuleList([nn.Linear(N, N) for _ in range(4)]),
        ),
        sequences,
        "",
    ),
    "a loop over the sequence": (
        between(
            lambda m, x: m.b(sum(m.a(x[:, k]).relu() for k in range(x.shape[1]))),
        ),
        sequences,
        "a:permutation a:scaling",
    ),
    "large images": (
        between(lambda m, x: m.b((m.k(x).relu() if x.shape[-1] < 9 else m.k(x).tanh()).mean((2, 3))), k=kernel_of_one),
        lambda: [*images(), torch.randn(2, 2, 9, 9)],
        "k:permutation",
    ),
    "channels cut by the size of images": (
        between(lambda m, x: m.b(mixed(m, m.k(x).relu()).mean((2, 3))), k=kernel_of_one, c=lambda: nn.Conv2d(N, N, 1)),
        lambda: [torch.randn(3, 2, 2, 1), torch.randn(2, 2, 2, 3), torch.randn(2, 2, 5, 3)],
        "k:scaling",
    ),
    "channels cut and joined again": (
        between(
            lambda m, x: m.b(restored(m, m.k(x).relu()).mean((2, 3))), k=kernel_of_one, c=lambda: nn.Conv2d(N, N, 1)
        ),
        images,
        "k:permutation k:scaling",
    ),
    "looked up by its length": (
        between(lambda m, x: m.b({5: F.relu}.get(x.shape[1], F.gelu)(m.a(x)).mean(1))),
        sequences,
        "a:permutation",
    ),
}

ALL = by_kind(path=PATHS)


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_found_holds_with_other_inputs(name: str) -> None:
    assert_holds(ALL[name])


class Counted(nn.Module):
    """A model that tells of its calls where the search puts nothing back."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, N), nn.Linear(N, 2), function

    def forward(self, x: Tensor) -> Tensor:
        print("called")
        output: Tensor = self.b(self.function(self.a(x)))
        return output


@pytest.mark.parametrize(
    ("function", "is_more"),
    [
        (lambda h: h.relu().flatten(1), False),
        (lambda h: h.relu().view(h.shape[0], -1), True),
        (lambda h: h.relu() if h.shape[0] > 5 else torch.relu(h), True),
        (lambda h: h.relu() if torch.is_grad_enabled() else torch.relu(h), True),
    ],
)
def test_a_model_is_followed_more_than_twice_only_where_it_asks(
    function: Callable[[Tensor], Tensor], is_more: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = find_symmetries(build(lambda: Counted(function)), torch.randn(4, 3))
    assert ids(spec) == "a:permutation a:scaling"
    assert (capsys.readouterr().out.count("called") > 2) is is_more


@pytest.mark.parametrize("asks_for_size", [False, True])
def test_a_model_of_the_testing_kit_is_asked_like_any_other(asks_for_size: bool) -> None:
    model = build(lambda: nn.Sequential(nn.Linear(3, N), Branch(asks_for_size=asks_for_size), nn.Linear(N, 2)))
    assert ids(find_symmetries(model, torch.randn(5, 3))) == "0:permutation"


def test_sizes_that_a_model_keeps_are_plain_numbers_afterwards() -> None:
    kept: list[int] = []
    model = build(
        lambda: Counted(lambda h: h.relu() if kept.append(h.shape[0] * 2) is None and kept[-1] != 3 else h)  # type: ignore[func-returns-value]
    )
    done = threading.Event()
    other = threading.Thread(target=done.wait)  # beside it, the search leaves numbers where they are
    other.start()
    try:
        find_symmetries(model, torch.randn(4, 3))
    finally:
        done.set()
        other.join()
    assert kept[0] == 8
    assert kept[0] + 1 == 9
    assert {8: "found"}[kept[0]] == "found"


class Rolling(nn.Module):
    """A model that leaves out a layer now and then, by a draw of its own."""

    def __init__(self, draw: Callable[[nn.Module], float]) -> None:
        super().__init__()
        self.a, self.c, self.b, self.draw = nn.Linear(3, N), nn.Linear(N, N), nn.Linear(N, 2), draw
        self.own, self.numpy = random.Random(0), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if not self.training or self.draw(self) > 0.1:
            h = self.c(h).relu()
        output: Tensor = self.b(h)
        return output


@pytest.mark.parametrize(
    "draw",
    [
        lambda m: random.random(),
        lambda m: random.choice([0.0, 1.0]),
        lambda m: np.random.rand(),  # noqa: NPY002 - what models draw from
        lambda m: m.own.random(),
        lambda m: m.numpy.random(),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_on_the_host_refuse_a_model(draw: Callable[[nn.Module], float], seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    inputs = torch.randn(4, 3)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]  # noqa: NPY002
    spec = find_symmetries(build(lambda: Rolling(draw)), inputs)
    assert len(spec) == 0
    assert "random numbers in training mode" in reasons_of(spec)["(root)"]
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before[:2]  # type: ignore[union-attr]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_model_that_draws_nothing_is_not_refused() -> None:
    spec = find_symmetries(build(lambda: Rolling(lambda m: 1.0)), torch.randn(4, 3))
    assert ids(spec) == "a:permutation c:permutation a:scaling c:scaling"
