"""The momentum step in C: what torch computes, on the same tensors, with the same promises."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.optim.kernels import native
from teleport_optim.optim.kernels.native import NativeStep, all_norms, are_plain
from teleport_optim.optim.orthogonalise import compute_steps
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import BaseCoefficients, StepCoefficients
from teleport_optim.optim.rule import active_rows, average_offset, ema
from teleport_optim.optim.schedule import TELEPORT_INTERVAL
from tests.helpers.classification import X, Y, network, train

built = pytest.mark.skipif(native._native is None, reason="needs a C compiler at the installation")
SIZES = st.integers(0, 40)
SHAPES = st.one_of(
    st.tuples(SIZES),
    st.tuples(SIZES, SIZES),
    st.tuples(SIZES, SIZES, st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(), (70, 20), (129, 3), (3, 300), (1, 1), (16, 16), (64, 33)]),
)


def modules() -> list[ModuleType]:
    """What was built: for all processors, and for those with 512-bit vectors, where this is one."""
    names = ["_native", "_native_wide"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else ["_native"]
    found = [name for name in names if importlib.util.find_spec(f"teleport_optim.optim.kernels.{name}")]
    return [importlib.import_module(f"teleport_optim.optim.kernels.{name}") for name in found]


def test_it_is_built_where_there_is_a_compiler() -> None:
    has_compiler = shutil.which("cc") is not None or shutil.which("gcc") is not None
    assert (native._native is not None) == has_compiler
    assert native._native is None or native._native is modules()[-1]


def coefficients(num_tensors: int, generator: torch.Generator, beta: float = 0.65) -> StepCoefficients:
    decay_factors, lengths = torch.rand(2, num_tensors, generator=generator)
    return StepCoefficients(torch.tensor(beta), 1.0 - 0.1 * decay_factors, 0.01 + 0.1 * lengths)


class Tensors(NamedTuple):
    """What a step reads and writes, every tensor of the table in each list."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    offsets: list[Tensor]

    @classmethod
    def random(cls, shapes: Sequence[tuple[int, ...]], generator: torch.Generator) -> Tensors:
        params, grads, momenta, offsets = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(4))
        return cls(params, grads, [m.bfloat16() for m in momenta], [offset.bfloat16() for offset in offsets])


WEIGHT = 0.1


def by_torch(tensors: Tensors, known: StepCoefficients, table: ParameterTable) -> None:
    """The step in place, as :mod:`teleport_optim.optim.rule` writes it."""
    averages = [ema(m, g, known.beta) for m, g in zip(tensors.momenta, tensors.grads)]
    masks = [active_rows(name, grad, table) for name, grad in zip(table.names, tensors.grads)]
    steps = compute_steps({n: a * mask for n, a, mask in zip(table.names, averages, masks)}, known, table)
    for momentum, average in zip(tensors.momenta, averages):
        momentum.copy_(average)
    for name, param, offset, shrink, mask in zip(
        table.names, tensors.params, tensors.offsets, known.decay_factors, masks
    ):
        old = param.clone()
        param.copy_(torch.where(mask, steps[name].taken_from(param * shrink), param))
        offset.copy_(average_offset(offset, old, param, WEIGHT))


def natively(tensors: Tensors, known: StepCoefficients, table: ParameterTable) -> None:
    counts = [torch.tensor(3.0) for _ in tensors.params]
    base = BaseCoefficients(
        known.beta, known.step_lengths / 0.1, (1.0 - known.decay_factors) / 0.1, torch.zeros(len(counts))
    )
    prints, ends = ([torch.tensor(0) for _ in counts] for _ in range(2))
    weights = [WEIGHT] * len(counts)
    NativeStep(table).take(*tensors, counts, prints, ends, base=base, rate=0.1, decay=1.0, weights=weights)
    assert counts == [4.0] * len(counts)
    assert ends == [1] * len(counts)


@torch.no_grad()
def assert_same_step(step: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    """Singular values next to zero are amplified, and so are rounding errors, 76 times: in torch's steps as in these."""
    assert float((step - expected).norm()) <= tolerance * float(expected.norm()) + 1e-6


@built
@settings(max_examples=300, deadline=None)
@given(
    st.lists(SHAPES, max_size=6),
    st.sampled_from([1, 4, 17, 64, 128]),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.65, 0.99]),
    st.booleans(),
)
def test_it_takes_the_step_of_torch(
    shapes: list[tuple[int, ...]], block_rows: int, seed: int, beta: float, has_zeros: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = Tensors.random(shapes, generator)
    if has_zeros:
        for tensor in (tensor for tensor in [*tensors.momenta, *tensors.grads] if tensor.dim()):
            tensor[: len(tensor) // 2] = 0.0
    table = ParameterTable.of(
        {str(number): param for number, param in enumerate(tensors.params)}, block_rows=block_rows
    )
    known = coefficients(len(shapes), generator, beta)
    expected = copy.deepcopy(tensors)
    by_torch(expected, known, table)
    for module in modules():
        ours = copy.deepcopy(tensors)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_native", module)
            natively(ours, known, table)
        for before, own, right in zip(zip(*tensors), zip(*ours), zip(*expected)):
            old, new, there = (Tensors._make(each) for each in (before, own, right))
            torch.testing.assert_close(new.momenta, there.momenta, rtol=2**-7, atol=1e-6)
            assert_same_step(old.params - new.params, old.params - there.params)
            exact = (1.0 - WEIGHT) * (old.offsets.float() + (old.params - new.params))
            torch.testing.assert_close(new.offsets, exact.bfloat16(), rtol=2**-7, atol=1e-6)
            assert torch.isfinite(new.params).all()


@built
def test_it_rounds_as_torch_does() -> None:
    """To the nearest of 16 bits, to the even one of two that are as near: every upper half and its neighbourhood."""
    upper = torch.arange(1, 0x7F00, 7, dtype=torch.int32)
    grads = torch.cat([(upper << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    grads = grads[grads < 1e18]
    table = ParameterTable.of({"v": grads})
    tensors = Tensors([torch.zeros_like(grads)], [grads], *([torch.zeros_like(grads).bfloat16()] for _ in range(2)))
    natively(tensors, StepCoefficients(torch.tensor(0.0), torch.ones(1), torch.ones(1)), table)
    assert torch.equal(tensors.momenta[0], grads.bfloat16())


@built
def test_norms_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in (0, 1, 5, 16, 33, 4095, 4096, 10_001)]
    assert all_norms(tensors) == pytest.approx([float(tensor.norm()) for tensor in tensors], rel=1e-6)
    tensors[2][3] = torch.nan
    tensors[4][:2] = torch.tensor([torch.inf, -torch.inf])
    tensors[5][7] = 1e30
    norms = all_norms(tensors)
    assert norms[2] != norms[2]
    assert norms[4] == torch.inf
    assert norms[5] == pytest.approx(1e30, rel=1e-6)
    assert all_norms([torch.full((100,), 1e-30)]) == pytest.approx([1e-29], rel=1e-6)


@built
def test_norms_of_many_numbers_are_found_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.full((size,), 2.0) for size in (3, 0, 100, 7, 1000)]
    alone = all_norms(tensors)
    monkeypatch.setattr(native, "_THREAD_WORK", 10.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all_norms(tensors) == alone == pytest.approx([2.0 * len(tensor) ** 0.5 for tensor in tensors])


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@built
def test_threads_make_no_difference(num_threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 2000), (2000,), (256, 256), (10, 30)]
    start = Tensors.random(shapes, generator)
    table = ParameterTable.of({str(number): param for number, param in enumerate(start.params)})
    known = coefficients(len(shapes), generator)
    results = []
    for number in (1, 2, 3, 50):
        num_threads(number)
        parts = NativeStep(table)._parts()
        assert (len(parts) > 1) == (number > 1)
        assert b"".join(bytes(part) for part in parts) == bytes(NativeStep(table)._blocks)
        tensors = copy.deepcopy(start)
        natively(tensors, known, table)
        results.append([*tensors.params, *tensors.momenta, *tensors.offsets])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@built
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True, "lr": 0.01},
        {"weight_decay": 0.1},
        {"checkpoint": "light"},
        {"checkpoint": MetaOptimizer(4, block_rows=1)},
        {"teleport": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:lr=0.01")
def test_every_step_of_a_training_is_that_of_torch(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    take = NativeStep.take
    monkeypatch.setattr(NativeStep, "take", lambda *args, **options: taken.append(1) or take(*args, **options))
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=100, **options)
    for _ in range(TELEPORT_INTERVAL + 5):
        before = [param.detach().clone() for param in model.parameters()]
        other, other_optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, 1)
        num_native = len(taken)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_native", None)
            train(other, other_optimizer, 1)
        assert len(taken) == num_native
        for start, ours, theirs in zip(before, model.parameters(), other.parameters()):
            assert_same_step(start - ours, start - theirs)
        for own, others in zip(optimizer.state.values(), other_optimizer.state.values()):
            assert own.keys() == others.keys()
            assert torch.equal(own["step"], others["step"])
            torch.testing.assert_close(own["exp_avg"], others["exp_avg"], rtol=2**-7, atol=1e-7)
            assert_same_step(own["average_offset"].float(), others["average_offset"].float(), 2**-7)
    assert len(taken) == TELEPORT_INTERVAL + 5


class Tagged(Tensor):
    """A class of tensors of somebody else's."""


@pytest.mark.private_torch
@pytest.mark.parametrize(
    ("tensor", "is_plain"),
    [
        (torch.ones(3, 2), True),
        (nn.Parameter(torch.ones(3, 2)), True),
        (torch.ones(0), True),
        (torch.ones(3, 2).double(), False),
        (torch.ones(3, 2).bfloat16(), False),
        (torch.ones(3, 2).mT, False),
        (torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), False),
        (torch.ones(1).expand(3), False),
        (torch.ones(3, 2, device="meta"), False),
        (torch.ones(3, 2).to_sparse(), False),
        (torch.ones(3, 2).to_mkldnn(), False),
        (torch._neg_view(torch.ones(3, 2)), False),
        (torch.ones(3, 2).as_subclass(Tagged), False),
    ],
)
def test_only_plain_tensors_are_touched(tensor: Tensor, is_plain: bool) -> None:
    assert are_plain([torch.ones(2), tensor]) == (is_plain and native._native is not None)
    assert not are_plain([torch.ones(2), tensor], torch.bfloat16)


def test_everything_else_is_left_to_torch() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    inputs = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for network_ in (model, plain):
        optimizer = LearnedTeleportOptimizer.for_model(network_, total_steps=20)
        for _ in range(2):
            optimizer.zero_grad()
            network_(inputs).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def swap_weight(model: nn.Module, optimizer: LearnedTeleportOptimizer) -> None:
    model[0].weight.data = torch.ones(1, 6)
    model[0].bias.data = torch.ones(1)
    model[0].weight.grad = model[0].bias.grad = None
    model[2].weight.data = torch.ones(10, 1)
    model[2].weight.grad = None


def shorten_average(model: nn.Module, optimizer: LearnedTeleportOptimizer) -> None:
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(2, 6)


def empty_count(model: nn.Module, optimizer: LearnedTeleportOptimizer) -> None:
    optimizer.state[model[0].weight]["step"] = torch.zeros(0)


@pytest.mark.parametrize("spoil", [swap_weight, shorten_average, empty_count])
def test_sizes_that_have_changed_are_not_written_to(
    spoil: Callable[[nn.Module, LearnedTeleportOptimizer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address is taken at its word, so torch gets whatever is not as the table says: it raises, or computes nothing."""
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=20, teleport=False)
    train(model, optimizer, 2)
    spoil(model, optimizer)
    monkeypatch.setattr(NativeStep, "take", lambda *args, **options: pytest.fail("taken in C"))
    with contextlib.suppress(RuntimeError):
        train(model, optimizer, 1)


def test_a_stale_graph_is_noticed() -> None:
    """As after a step of any other optimizer: its tensors have changed since the forward pass."""
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=10, teleport=False)
    train(model, optimizer, 3)
    loss = nn.functional.cross_entropy(model(X), Y)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@built
@pytest.mark.parametrize(
    "arguments",
    [
        ((), [], [], [], b"", 0.1, 1.0, 0.5, b"", bytearray(), 1, b""),
        ([], [1], [], [], b"", 0.1, 1.0, 0.5, b"", bytearray(), 1, b""),
        ([], [], [], [], bytes(24), 0.1, 1.0, 0.5, b"", bytearray(), 1, b""),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[object, ...]) -> None:
    assert native._native is not None
    with pytest.raises(ValueError, match="lists of one length"):
        native._native.step(*arguments)
    with pytest.raises(TypeError):
        native._native.count(["a"], [])
    with pytest.raises(TypeError):
        native._native.count([], ["a"])


def test_it_is_not_needed() -> None:
    program = """
import sys
sys.modules["teleport_optim.optim.kernels._native"] = None
import torch, teleport_optim
from teleport_optim.optim.kernels import native
assert native._native is None
model = torch.nn.Linear(3, 2)
optimizer = teleport_optim.LearnedTeleportOptimizer.for_model(model, total_steps=5)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
assert optimizer.stats().num_steps == 5
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
