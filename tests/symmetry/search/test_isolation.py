"""A search leaves no trace: a process in which models were searched behaves as one in which none was."""

import functools
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from teleport_optim.symmetry import find_symmetries
from tests.helpers.paths import ROOT
from tests.helpers.small_models import Model
from tests.helpers.specs import reasons_of

pytestmark = pytest.mark.private_torch


@functools.cache
def ramp(size: int) -> Tensor:
    return torch.linspace(0.5, 2.0, size)


@functools.lru_cache(maxsize=4)
def mask(size: int) -> list[Tensor]:
    return [torch.ones(size, size).tril()]


TABLES: dict[int, Tensor] = {}
LOSSES: list[Tensor] = []
NAMESPACE = SimpleNamespace(last=None)
COUNTER = torch.zeros(3)


class Layer(nn.Module):
    """A layer that keeps what it computes in places of all kinds."""

    kept: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.own: dict[str, Tensor] = {}

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a cache of a method is what is tested
    def scale(self, size: int) -> Tensor:
        return torch.full((size,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        x = x * ramp(size) * self.scale(size)
        x = x @ mask(size)[0]
        if size not in TABLES:
            TABLES[size] = torch.eye(size)
        x = self.linear(x) @ TABLES[size]
        LOSSES.append(x.square().mean())
        NAMESPACE.last = x
        Layer.kept = x
        self.own["x"] = x
        COUNTER.add_(1)
        return x.relu()


def fakes() -> int:
    gc.collect()
    return sum(type(one) is FakeTensor for one in gc.get_objects())


def test_no_tensor_of_the_search_is_left_anywhere() -> None:
    mask(7)
    before = fakes()
    model = nn.Sequential(Layer(), nn.Linear(4, 2))
    spec = find_symmetries(model, torch.randn(2, 4))
    assert "could not" not in str(spec)
    assert fakes() == before
    assert mask.cache_info().currsize == 1
    assert type(mask(4)[0]) is Tensor
    assert ramp.cache_info().currsize == 0
    assert TABLES == {}
    assert LOSSES == []
    assert Layer.kept is None
    assert COUNTER.tolist() == [0, 0, 0]
    assert model[0].own == {}
    assert getattr(NAMESPACE, "last", None) is None


def test_fake_tensors_would_be_left_without_the_search_taking_care() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ramp(6)
    assert isinstance(ramp(6), FakeTensor)
    ramp.cache_clear()


def test_a_loss_that_is_kept_aside_moves_no_more() -> None:
    """What the model puts into a list of the user's is an output, too."""

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            LOSSES.append(h)
            return self.b(h)

    assert len(find_symmetries(Aside(), torch.randn(2, 3))) == 0
    assert LOSSES == []


def test_a_model_that_fails_leaves_nothing_either() -> None:
    def fail(model: nn.Module, x: Tensor) -> Tensor:
        LOSSES.append(model.a(x))
        ramp(5)
        raise OSError("no such file")

    before = fakes()
    with pytest.raises(ValueError, match="OSError: no such file"):
        find_symmetries(Model(fail, a=nn.Linear(3, 2)), torch.randn(2, 3))
    assert fakes() == before
    assert LOSSES == []
    assert ramp.cache_info().currsize == 0


def test_random_states_stay() -> None:
    def draw(model: nn.Module, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()  # noqa: NPY002 - what a model may draw from
        torch.manual_seed(3)
        return model.a(x) + torch.rand(2)

    model, inputs = Model(draw, a=nn.Linear(3, 2)), torch.randn(2, 3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    find_symmetries(model, inputs)
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert now == states


def test_garbage_is_collected_again_afterwards() -> None:
    find_symmetries(nn.Linear(3, 2), torch.randn(2, 3))
    assert gc.isenabled()
    gc.disable()
    try:
        find_symmetries(nn.Linear(3, 2), torch.randn(2, 3))
        assert not gc.isenabled()
    finally:
        gc.enable()


TWO_MODELS = """
import collections, functools, itertools, random, sys
import numpy as np, torch
from torch import nn

CALLS, HISTORY, SEEN, RECENT = 0, [], set(), collections.deque(maxlen=3)
RNG, NP_RNG = random.Random(1), np.random.default_rng(2)
GENERATOR = torch.Generator().manual_seed(4)
STATISTICS = np.zeros(3)

@functools.lru_cache
def registry():
    return {}

def counting():
    total = 0
    def count():
        nonlocal total
        total += 1
        return total
    return count

COUNT = counting()

class Helper:
    step = 0
    def __init__(self): self.log = []
    def __call__(self, x):
        Helper.step += 1
        self.log.append(tuple(x.shape))
        return x * (1 + len(self.log))

HELPER = Helper()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.ticks = itertools.count()
    def forward(self, x):
        global CALLS
        CALLS += 1
        HISTORY.append(x.shape[0]); SEEN.add(CALLS); RECENT.append(CALLS)
        registry()[CALLS] = True
        STATISTICS[:] += 1
        x = x * (1 + RNG.random() + NP_RNG.random() + next(self.ticks) + COUNT())
        return HELPER(self.b(self.n(self.a(x)).relu()))

torch.manual_seed(0)
random.seed(5)
models = [Net(), Net()]
x = torch.randn(5, 4)
if sys.argv[1] == "search":
    from teleport_optim import find_symmetries
    registry()["mine"] = 1
    for model in models:
        assert len(find_symmetries(model, x)) > 0
else:
    registry()["mine"] = 1
outputs = [model(x).sum().item() for model in models]
print(CALLS, HISTORY, SEEN, list(RECENT), registry(), STATISTICS, Helper.step, HELPER.log, outputs)
print([b.tolist() for model in models for b in model.buffers()], random.random(), torch.rand(1, generator=GENERATOR))
"""
"""A script that calls two models with all kinds of counters; with the argument ``search``, after a search in each."""


def test_a_process_behaves_the_same_after_a_search(tmp_path: Path) -> None:
    """Counters, generators and iterators of the user's, in a process of one thread."""
    script = tmp_path / "script.py"
    script.write_text(TWO_MODELS)
    runs = [
        subprocess.run(
            [sys.executable, str(script), mode],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=_environment(),
            check=False,
        )
        for mode in ("search", "nothing")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) > 300


def _environment() -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def generator() -> Any:
    yield from (1.0, 2.0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


ATTRIBUTES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(3),
    "tensor with a gradient": lambda: torch.ones(3, requires_grad=True) * 2,
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "list of tensors": lambda: [torch.ones(2), [torch.zeros(1)]],
    "dictionary of tensors": lambda: {"a": torch.ones(2), 3: (torch.zeros(1), None)},
    "torch generator": lambda: torch.Generator().manual_seed(3),
    "python generator": generator,
    "iterator": lambda: iter([1, 2]),
    "counter": itertools.count,
    "lock": threading.Lock,
    "array": lambda: np.arange(5.0),
    "large array": lambda: np.zeros(100_000),
    "function": lambda: lambda x: x,
    "object": lambda: SimpleNamespace(x=torch.ones(2)),
    "large list": lambda: list(range(20_000)),
    "file": lambda: open(__file__),  # noqa: SIM115
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes_of_every_kind_cost_no_symmetry(kind: str) -> None:
    model, inputs = mlp(), torch.randn(3, 4)
    expected = find_symmetries(model, inputs)
    model[0].extra = ATTRIBUTES[kind]()
    model.more = [model[0].extra]
    assert find_symmetries(model, inputs) == expected
    assert model.more[0] is model[0].extra
    if kind == "python generator":
        assert list(model[0].extra) == [1.0, 2.0]
    if kind == "file":
        assert not model[0].extra.closed
        model[0].extra.close()


def test_a_plain_tensor_is_used_as_a_constant() -> None:
    model = mlp()
    model.shift = torch.randn(6)
    model[1].forward = lambda x: x.relu()  # as before
    centred = Model(lambda m, x: m.b((m.a(x) - m.shift).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    centred.shift = torch.randn(6)
    assert len(find_symmetries(centred, torch.randn(2, 4))) == 0
    centred.shift = torch.randn(2)
    read = Model(lambda m, x: m.b(m.a(x).relu()) - m.shift, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    read.shift = torch.randn(2)
    assert [symmetry.id for symmetry in find_symmetries(read, torch.randn(2, 4))] == ["a:permutation", "a:scaling"]


def test_a_plain_tensor_that_shares_memory_with_a_parameter_holds_it() -> None:
    model = Model(lambda m, x: m.b(m.a(x).relu()) + m.view.sum(), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    assert len(find_symmetries(changed(model, torch.zeros(1)), torch.randn(2, 4))) == 2
    spec = find_symmetries(changed(model, model.a.weight.detach()[:2]), torch.randn(2, 4))
    assert not any(leg.name == "a.weight" for symmetry in spec for leg in symmetry.legs)


def test_a_plain_tensor_that_was_computed_from_a_parameter_holds_it() -> None:
    """As where a kernel is made anew after each step, outside of the forward pass."""
    model = Model(lambda m, x: m.b(m.a(x).relu()) + m.view.sum(), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    spec = find_symmetries(changed(model, model.a.weight.tanh().cumsum(0)), torch.randn(2, 4))
    assert not any(leg.name == "a.weight" for symmetry in spec for leg in symmetry.legs)
    assert len(find_symmetries(changed(model, model.a.weight.tanh().detach()), torch.randn(2, 4))) == 2


def changed(model: nn.Module, view: Tensor) -> nn.Module:
    model.view = view
    return model


def test_a_generator_that_the_forward_pass_draws_from_is_not_drawn_from() -> None:
    model = Model(lambda m, x: m.a(x) * next(m.factors), a=nn.Linear(4, 6))
    model.factors = generator()
    spec = find_symmetries(model, torch.randn(2, 4))
    assert "draws from a generator" in reasons_of(spec)["(root)"]
    assert next(model.factors) == 1.0


def test_state_that_a_call_leaves_in_a_plain_tensor_does_not_move() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        out: Tensor = m.b(h + m.memory)
        m.memory.copy_(h.mean(0))
        return out

    model = Model(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model.memory = torch.zeros(6)
    assert len(find_symmetries(model, torch.randn(2, 4))) == 0
    assert model.memory.tolist() == [0.0] * 6


def test_a_view_of_a_tensor_that_a_cache_has_kept_from_a_call_before_is_followed() -> None:
    @functools.cache
    def order() -> Tensor:
        return torch.tensor([[2, 0], [1, 3]])

    model = Model(lambda m, x: m.b(m.a(x).relu()[:, order().view(-1)]), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    cold = [symmetry.id for symmetry in find_symmetries(model, torch.randn(2, 3))]
    kept = order()
    assert [symmetry.id for symmetry in find_symmetries(model, torch.randn(2, 3))] == cold
    assert order() is kept
