"""What an optimizer keeps: saved, loaded, copied and refused. AdamW is the control where the property is torch's too."""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer, OptimizerStateError
from teleport_optim.optim.optimizer import TeleportOptimizer
from tests.helpers.paths import ROOT
from tests.optim.test_optimizer import network, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:the state of an open-ended run is saved"),
    pytest.mark.filterwarnings("ignore:lr has changed"),
    pytest.mark.filterwarnings("ignore:an optimizer of a single matrix"),
]

ROWS = ("hidden", "outputs", "log_grad_rms")
FLOAT32 = (*ROWS, "step", "skipped")
_ADDED = {"initial_lr"}
"""What a scheduler adds to the groups that are there when it is made."""
Make = Callable[[nn.Module], Optimizer]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    weights, biases = ([p for name, p in named.items() if name.endswith(end)] for end in ("weight", "bias"))
    return [{"params": weights}, {"params": biases, "lr": 0.5, "weight_decay": 0.01}]


def horizon(model: nn.Module) -> Optimizer:
    return LearnedTeleportOptimizer.for_model(model, total_steps=200)


def all_learned(model: nn.Module) -> Optimizer:
    """Every output of the meta-optimizer has a say, where the default one moves none but the teleports."""
    meta_optimizer, generator = MetaOptimizer(), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(meta_optimizer.readout_weight, std=0.5, generator=generator)
    torch.nn.init.normal_(meta_optimizer.skip_weight, std=0.1, generator=generator)
    return LearnedTeleportOptimizer.for_model(model, total_steps=200, checkpoint=meta_optimizer)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.named_parameters(), lr=1e-2)


MAKERS: dict[str, Make] = {
    "horizon": horizon,
    "all learned": all_learned,
    "open-ended": LearnedTeleportOptimizer.for_model,
    "nothing learned": lambda model: TeleportOptimizer(model.parameters(), model=model, total_steps=200),
    "two groups": lambda model: LearnedTeleportOptimizer(two_groups(model), model=model, total_steps=200),
    "bfloat16": horizon,
    "AdamW": adamw,
}
every_case = pytest.mark.parametrize("case", MAKERS)
everyone = pytest.mark.parametrize("make", [horizon, adamw], ids=["ours", "AdamW"])


def same(first: Any, second: Any) -> bool:
    """Whether two nested structures are equal bit for bit, NaN being equal to NaN."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        is_alike = first.dtype == second.dtype and first.shape == second.shape
        return is_alike and torch.equal(first.nan_to_num(7.0e7), second.nan_to_num(7.0e7))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = first.keys() - _ADDED
        return keys == second.keys() - _ADDED and all(same(first[key], second[key]) for key in keys)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and bool(first == second)


def through_file(value: Any) -> Any:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def test_sameness_sees_every_difference() -> None:
    value = {"a": [torch.tensor([1.0, math.nan]), 2, None]}
    assert same(value, copy.deepcopy(value))
    for other in ([torch.tensor([1.0, 2.0]), 2, None], [torch.tensor([1.0, math.nan]), 2.0, None], [value["a"][0], 2]):
        assert not same(value, {"a": other})
    assert not same(torch.ones(2), torch.ones(2).double())
    assert not same(value, {"b": value["a"]})


# A run that is broken off and resumed.


@dataclass
class Run:
    """A model in training, with all that must be saved to go on."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler

    @classmethod
    def of(cls, case: str, seed: int = 0) -> Run:
        model = network(seed).to(torch.bfloat16 if case == "bfloat16" else torch.float32)
        optimizer = MAKERS[case](model)
        return cls(model, optimizer, LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.01 * step)))

    def train(self, first: int, last: int) -> list[float]:
        """Take the steps from ``first`` on, each with its own batch; steps 50 and 120 bring huge gradients."""
        sizes = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(16, 6, generator=generator).to(next(self.model.parameters()).dtype)
            targets = torch.randint(3, (16,), generator=generator)
            self.optimizer.zero_grad()
            scale = 1e3 if step in (50, 120) else 1.0
            (scale * F.cross_entropy(self.model(inputs).float(), targets)).backward()
            self.optimizer.step()
            self.scheduler.step()
            sizes.append(getattr(self.optimizer, "teleport_size", 0.0))
        return sizes

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]

    def load(self, state: dict[str, Any]) -> None:
        for name, part in (("model", self.model), ("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            part.load_state_dict(state[name])


def resume_everywhere(case: str) -> float:
    """Break a run of 200 steps off at 20 random ones, and resume from each up to the next one."""
    stops = [*sorted(random.Random(case).sample(range(1, 200), 20)), 200]
    run, saved, largest = Run.of(case), None, 0.0
    for first, last in zip([0, *stops], stops):
        sizes = run.train(first, last)
        largest = max(largest, *sizes)
        if saved is not None:
            resumed = Run.of(case, seed=9)
            resumed.load(saved)
            assert resumed.train(first, last) == sizes
            assert same(resumed.state(), run.state()), f"steps {first} to {last}"
        saved = through_file(run.state())
    return largest


@every_case
def test_a_run_is_resumed_bit_for_bit_anywhere(case: str) -> None:
    assert (resume_everywhere(case) > 1e-3) == (case != "AdamW")


RESUME = """
import sys, torch
from tests.optim.test_state import MAKERS, Run
saved = torch.load(sys.argv[1], weights_only=True)
runs = {case: Run.of(case, seed=9) for case in MAKERS}
for case, run in runs.items():
    run.load(saved[case])
    run.train(57, 90)
torch.save({case: run.state() for case, run in runs.items()}, sys.argv[2])
"""


def test_a_new_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    runs = {case: Run.of(case) for case in MAKERS}
    for run in runs.values():
        run.train(0, 57)
    torch.save({case: run.state() for case, run in runs.items()}, tmp_path / "before")
    paths = [str(ROOT), *sys.path]
    options = ["-W", "error", "-W", "ignore:the state of an open-ended run is saved", "-W", "ignore:lr has changed"]
    command = [sys.executable, *options, "-c", RESUME, str(tmp_path / "before"), str(tmp_path / "after")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
    after = torch.load(tmp_path / "after", weights_only=True)
    for case, run in runs.items():
        assert not same(run.state(), after[case])
        run.train(57, 90)
        assert same(run.state(), after[case]), case


@pytest.mark.parametrize("lost", ["nothing", "exp_avg", "average_offset", *ROWS, "num_steps", "scheduler"])
def test_whatever_is_lost_is_missed(lost: str) -> None:
    """The control of the tests above: every part of the state matters, up to the control and teleport of step 80 at the latest."""
    case, start = "all learned", 48
    run = Run.of(case)
    run.train(0, start)
    saved = through_file(run.state())
    (group,) = saved["optimizer"]["param_groups"]
    if lost == "scheduler":
        saved["scheduler"]["last_epoch"] = 0
    elif lost == "num_steps":
        group["num_steps"] -= 3
    elif lost != "nothing":
        for slots in saved["optimizer"]["state"].values():
            slots[lost] = torch.zeros_like(slots[lost])
    resumed = Run.of(case, seed=9)
    if lost == "num_steps":
        with pytest.raises(OptimizerStateError, match="average_end of parameter 0 holds values that cannot be"):
            resumed.load(saved)
        return
    resumed.load(saved)
    run.train(start, 84)
    resumed.train(start, 84)
    with run.optimizer.averaged(), resumed.optimizer.averaged():
        assert same(run.model.state_dict(), resumed.model.state_dict()) == (lost == "nothing")


@everyone
def test_parameters_without_state_may_get_it_after_loading(make: Make) -> None:
    """As where layers are frozen at first."""
    model, other = network(), network()
    optimizer, resumed = make(model), make(other)
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 37)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    model[0].weight.requires_grad_(True)
    assert train(model, optimizer, 8) == train(other, resumed, 8)
    assert same(optimizer.state_dict(), resumed.state_dict())


# Which parameter is which.


def by_position(named: list[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    return [{"params": named[:3]}, {"params": named[3:]}]


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [0, 3, 1, 5, 2, 4]])
@pytest.mark.parametrize("kind", ["model", "named", "unnamed", "prefixed"])
def test_names_are_matched_and_else_the_order(kind: str, order: list[int]) -> None:
    """Groups of equal sizes with other members load right by name; without common names, by order."""

    def make(model: nn.Module, order: list[int], prefix: str = "") -> LearnedTeleportOptimizer:
        named = [(prefix + name, param) for name, param in model.named_parameters()]
        groups = by_position([named[index] for index in order])
        if kind in ("model", "unnamed"):
            groups = [{"params": [param for _, param in group["params"]]} for group in groups]
        return LearnedTeleportOptimizer(groups, model=model if kind == "model" else None, total_steps=60)

    model, other = network(), network()
    optimizer = make(model, list(range(6)))
    train(model, optimizer, 37)
    saved = through_file(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    if kind in ("unnamed", "prefixed"):
        resumed = make(other, order, prefix="module." * (kind == "prefixed"))
        with pytest.raises(OptimizerStateError, match=r"exp_avg of parameter .* expected .* shape"):
            resumed.load_state_dict(saved)
        order = list(range(6))
    resumed = make(other, order, prefix="module." * (kind == "prefixed"))
    resumed.load_state_dict(saved)
    for param, own in zip(model.parameters(), other.parameters()):
        assert same(optimizer.state[param], resumed.state[own])
    ends = train(other, resumed, 9), train(model, optimizer, 9)
    assert math.isfinite(ends[0])
    if order == list(range(6)):  # The meta-optimizer knows where in the order a tensor stands.
        assert ends[0] == ends[1]


def test_names_that_are_numbers_are_matched() -> None:
    def make() -> tuple[nn.ParameterList, LearnedTeleportOptimizer]:
        params = nn.ParameterList([torch.ones(3), torch.ones(3)])
        return params, LearnedTeleportOptimizer(reversed(list(params)), model=params, teleport=False)

    params, optimizer = make()
    params[0].grad = torch.ones(3)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["1", "0"]
    saved["param_groups"][0]["param_names"] = [1, 0]
    others, resumed = make()
    resumed.load_state_dict(saved)
    assert others[0] in resumed.state
    assert others[1] not in resumed.state


def test_how_parameters_are_matched_is_documented() -> None:
    documentation = " ".join((LearnedTeleportOptimizer.load_state_dict.__doc__ or "").split())
    assert "matched by name where both sides have the same names, else by order" in documentation


# What a state dict is made of.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_meta_optimizers_state_is_never_rounded(dtype: torch.dtype) -> None:
    model = network()
    optimizer = horizon(model)
    train(model, optimizer, 13)
    saved = through_file(optimizer.state_dict())
    other = network().to(dtype)
    resumed = horizon(other)
    resumed.load_state_dict(saved)
    is_rounded = False
    for param, slots in zip(other.parameters(), saved["state"].values()):
        own = resumed.state[param]
        assert same({key: own[key] for key in FLOAT32}, {key: slots[key] for key in FLOAT32})
        assert all(own[key].dtype == torch.float32 for key in FLOAT32)
        is_rounded |= not torch.equal(own["hidden"], own["hidden"].to(dtype).float())
        kept = torch.float64 if dtype == torch.float64 else torch.bfloat16
        assert all(same(own[key], slots[key].to(kept)) for key in ("exp_avg", "average_offset"))
    assert is_rounded == (dtype != torch.float64)
    back = horizon(network())
    back.load_state_dict(resumed.state_dict())
    for slots, own in zip(saved["state"].values(), back.state_dict()["state"].values()):
        assert same({key: own[key] for key in FLOAT32}, {key: slots[key] for key in FLOAT32})


def leaves(value: Any) -> Iterator[Any]:
    if type(value) in (dict, list):
        for inner in value.values() if type(value) is dict else value:
            yield from leaves(inner)
    else:
        yield value


@every_case
def test_a_state_dict_is_plain(case: str) -> None:
    run = Run.of(case)
    run.train(0, 12)
    saved = run.optimizer.state_dict()
    allowed = (int, float, bool, str, type(None), Tensor, *([tuple] if case == "AdamW" else []))
    assert {type(leaf) for leaf in leaves(saved)} <= set(allowed)
    assert same(through_file(saved), saved)
    groups = json.loads(json.dumps(saved["param_groups"]))
    if case != "AdamW":  # JSON knows no tuple.
        assert same(groups, saved["param_groups"])
        loaded = Run.of(case, seed=9)
        loaded.optimizer.load_state_dict({**saved, "param_groups": groups})
        assert same(loaded.optimizer.state_dict(), saved)


def storages(value: Any) -> set[int]:
    return {leaf.data_ptr() for leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.numel()}


@everyone
def test_nothing_loaded_is_aliased(make: Make) -> None:
    """AdamW keeps the tensors that it loads, and so shows that this test can fail."""
    model, other = network(), network()
    optimizer, resumed = make(model), make(other)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.5)
    train(model, optimizer, 12)
    saved = through_file(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    resumed.load_state_dict(saved)
    is_ours = isinstance(resumed, LearnedTeleportOptimizer)
    assert (not storages(saved) & storages(resumed.state_dict())) == is_ours
    for group in resumed.param_groups:
        group["lr"] = group["lr"].mul_(0.5) if is_ours else group["lr"]
    train(other, resumed, 12)
    assert same(saved, kept) == is_ours
    before = copy.deepcopy(resumed.state_dict())
    for leaf in leaves(saved):
        if isinstance(leaf, Tensor):
            leaf.fill_(77.0)
    saved["param_groups"][0]["params"].clear()
    assert same(resumed.state_dict(), before) == is_ours


@every_case
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_share_nothing_and_go_on_bit_for_bit(case: str, clone: Callable[[Any], Any]) -> None:
    run = Run.of(case)
    run.train(0, 52)
    model, optimizer = clone((run.model, run.optimizer))
    before = copy.deepcopy(optimizer.state_dict())
    assert same(before, run.optimizer.state_dict())
    assert not storages(before) & storages(optimizer.state_dict())
    lrs = [group["lr"] for group in optimizer.param_groups]
    other = Run(model, optimizer, LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.01 * step)))
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr
    assert run.train(52, 65) == other.train(52, 65)
    assert same(run.state(), other.state())


def test_states_of_before_the_first_release_are_refused_with_a_sentence() -> None:
    """They kept the rows of all tensors together; what to do instead is said, and nothing has changed."""
    model = network()
    optimizer = horizon(model)
    train(model, optimizer, 3)
    old = through_file(optimizer.state_dict())
    old["state"]["meta_optimizer"] = {key: torch.stack([own[key] for own in old["state"].values()]) for key in ROWS}
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(OptimizerStateError, match="before the first release cannot be loaded: load the weights"):
        optimizer.load_state_dict(old)
    assert same(optimizer.state_dict(), before)


def test_states_with_six_outputs_are_refused() -> None:
    model = network()
    optimizer = horizon(model)
    train(model, optimizer, 3)
    old = through_file(optimizer.state_dict())
    for slots in old["state"].values():
        slots["outputs"] = torch.cat([slots["outputs"], torch.zeros(1)])
    with pytest.raises(OptimizerStateError, match=r"outputs of parameter 0 is \(6,\)"):
        optimizer.load_state_dict(old)


@pytest.mark.parametrize("is_learned", [True, False])
def test_a_state_of_another_controller_is_refused(is_learned: bool) -> None:
    """What a controller remembers is missing in a state without one; without a controller it is kept and does nothing."""
    model = network()
    rule = TeleportOptimizer(model.parameters(), model=model, total_steps=200)
    learned = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=200)
    train(model, rule if is_learned else learned, 3)
    if is_learned:
        with pytest.raises(OptimizerStateError, match="it is of another optimizer"):
            learned.load_state_dict(rule.state_dict())
    else:
        rule.load_state_dict(learned.state_dict())
        train(model, rule, 3)
        assert rule.stats().num_steps == 6


# Random use.

NUM_EXAMPLES = int(os.environ.get("RANDOM_USES", "0"))
"""How many random uses to test, of new seeds; 0 for a few that are always the same."""
NUM_PARAMS = 8


class Net(nn.Module):
    """Two sites, one of which reads from a tensor that an optimizer may be given later, as it may two that are on none."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)
            )
        self.shift, self.tilt, self.bend = (nn.Parameter(torch.zeros(shape)) for shape in ((2,), (4, 2), (1, 2)))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shift + x @ self.tilt + x[:, :1].square() @ self.bend  # type: ignore[no-any-return]


INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LATER = ("bend", "layers.4.weight", "tilt")


class Pair:
    """A network, the optimizer that teleports it, and a second one of the same parameters that does not."""

    def __init__(self, total_steps: int | None, average: bool, groups: tuple[str, ...] = ()) -> None:
        self.model = Net()
        named = {name: param for name, param in self.model.named_parameters() if name not in LATER}
        first = [param for name, param in named.items() if name.startswith("layers.0")]
        rest = [param for name, param in named.items() if not name.startswith("layers.0")]
        options: dict[str, Any] = {"model": self.model, "total_steps": total_steps, "example_inputs": INPUTS}
        self.optimizers = [
            LearnedTeleportOptimizer([{"params": first}, {"params": rest, "lr": 0.5}], average=average, **options),
            LearnedTeleportOptimizer(named.values(), teleport=False, **options),
        ]
        for name in groups:
            self.add_group(name)
        self.schedule()

    def schedule(self) -> None:
        self.scheduler = ExponentialLR(self.optimizers[0], 0.97)

    def add_group(self, name: str) -> None:
        self.optimizers[0].add_param_group({"params": [self.model.get_parameter(name)], "weight_decay": 0.02})

    def state(self) -> list[Any]:
        return [self.model.state_dict(), *(optimizer.state_dict() for optimizer in self.optimizers)]

    def load(self, state: list[Any]) -> None:
        for part, own in zip([self.model, *self.optimizers], state):
            part.load_state_dict(own)

    def step(self, which: int, seed: int, kind: str, missing: frozenset[int]) -> list[str]:
        """Take a step with random gradients; the names of the tensors that have one."""
        generator = torch.Generator().manual_seed(seed)
        self.optimizers[which].zero_grad()
        owned = {id(param) for group in self.optimizers[which].param_groups for param in group["params"]}
        active = []
        for index, (name, param) in enumerate(self.model.named_parameters()):
            grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) * 10.0 ** (seed % 7 - 3)
            param.grad = None
            if index not in missing and param.requires_grad:
                param.grad = grad if kind != "zero" else torch.zeros_like(grad)
                if id(param) in owned:
                    active.append(name)
        if kind == "nan" and active:
            self.model.get_parameter(active[seed % len(active)]).grad.fill_(math.nan)  # type: ignore[union-attr]
        self.optimizers[which].step()
        return active


class RandomUse(RuleBasedStateMachine):
    """Whatever is done is done to two pairs: one that goes on and one that was made of what it had saved."""

    @initialize(total_steps=st.sampled_from([None, 30, 1000]), average=st.booleans())
    def start(self, total_steps: int | None, average: bool) -> None:
        self.options = (total_steps, average)
        self.groups: tuple[str, ...] = ()
        self.pair = Pair(*self.options)
        self.twin = Pair(*self.options)
        self.counts: list[dict[str, Any]] = [{"steps": 0, "skipped": 0, "own": {}, "own skipped": {}} for _ in range(2)]
        self.saved = through_file(self.pair.state())
        self.saved_counts, self.saved_groups = copy.deepcopy(self.counts), self.groups

    def both(self, action: Callable[[Pair], Any]) -> Any:
        first, second = action(self.pair), action(self.twin)
        assert same(first, second)
        return first

    @rule(
        which=st.sampled_from([0, 0, 0, 1]),
        seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
        kind=st.sampled_from(["random", "random", "random", "zero", "nan"]),
        missing=st.frozensets(st.integers(0, NUM_PARAMS - 1), max_size=NUM_PARAMS),
        is_whole=st.booleans(),
    )
    def step(self, which: int, seeds: list[int], kind: str, missing: frozenset[int], is_whole: bool) -> None:
        counts = self.counts[which]
        for seed in seeds:
            before = self.pair.model(INPUTS).detach()
            is_still = all(float(group["lr"]) == 0.0 for group in self.pair.optimizers[which].param_groups)
            active = self.both(lambda pair, s=seed: pair.step(which, s, kind, frozenset() if is_whole else missing))
            if active and kind == "nan":
                counts["skipped"] += 1
                name = active[seed % len(active)]
                counts["own skipped"][name] = counts["own skipped"].get(name, 0) + 1
            elif active:
                counts["steps"] += 1
                counts["own"].update({name: counts["own"].get(name, 0) + 1 for name in active})
            if is_still:
                scale = before.abs().max().clamp_min(1.0)
                assert ((self.pair.model(INPUTS) - before).abs().max() / scale) < 1e-9

    @rule(lr=st.sampled_from([0.0, 0.1, 1.0, 2.0]), is_tensor=st.booleans(), group=st.integers(0, 3))
    def set_lr(self, lr: float, is_tensor: bool, group: int) -> None:
        def change(pair: Pair) -> None:
            groups = pair.optimizers[0].param_groups
            for own in groups if group >= len(groups) else [groups[group]]:
                own["lr"] = torch.tensor(lr) if is_tensor else lr

        self.both(change)

    @rule(weight_decay=st.sampled_from([None, 0.0, 0.1]), which=st.integers(0, 1))
    def set_weight_decay(self, weight_decay: float | None, which: int) -> None:
        self.both(lambda pair: pair.optimizers[which].param_groups[0].update(weight_decay=weight_decay))

    @rule(index=st.integers(0, NUM_PARAMS - 1), is_frozen=st.booleans())
    def freeze(self, index: int, is_frozen: bool) -> None:
        for pair in (self.pair, self.twin):
            [*pair.model.parameters()][index].requires_grad_(not is_frozen)

    @rule(set_to_none=st.booleans(), which=st.integers(0, 1))
    def zero_grad(self, set_to_none: bool, which: int) -> None:
        self.both(lambda pair: pair.optimizers[which].zero_grad(set_to_none))

    @rule()
    def scheduler_step(self) -> None:
        self.both(lambda pair: pair.scheduler.step())

    @precondition(lambda self: len(self.groups) < len(LATER))
    @rule()
    def add_group(self) -> None:
        name = LATER[len(self.groups)]
        self.groups += (name,)
        self.both(lambda pair: pair.add_group(name))

    @rule()
    def save_and_make_a_new_twin(self) -> None:
        self.saved = through_file(self.pair.state())
        self.saved_counts, self.saved_groups = copy.deepcopy(self.counts), self.groups
        self.twin = Pair(*self.options, self.groups)
        for param, own in zip(self.pair.model.parameters(), self.twin.model.parameters()):
            own.requires_grad_(param.requires_grad)
        self.twin.load(self.saved)

    @rule()
    def load_what_it_has(self) -> None:
        self.pair.load(self.pair.state())
        self.twin.load(through_file(self.twin.state()))

    @rule()
    def load_what_was_saved(self) -> None:
        if self.saved_groups == self.groups:
            self.both(lambda pair: pair.load(self.saved))
            self.counts = copy.deepcopy(self.saved_counts)
        else:
            for pair in (self.pair, self.twin):
                with pytest.raises(OptimizerStateError, match="the parameter groups loaded have"):
                    pair.optimizers[0].load_state_dict(self.saved[1])

    @rule(is_pickle=st.booleans(), of_twin=st.booleans())
    def clone(self, is_pickle: bool, of_twin: bool) -> None:
        pair = self.twin if of_twin else self.pair
        parts = (pair.model, pair.optimizers)
        pair.model, pair.optimizers = pickle.loads(pickle.dumps(parts)) if is_pickle else copy.deepcopy(parts)
        pair.schedule()

    @invariant()
    def twins_are_equal(self) -> None:
        if not hasattr(self, "pair"):
            return
        state = self.pair.state()
        assert same(state, self.twin.state())
        assert all(torch.isfinite(value).all() for value in state[0].values())

    @invariant()
    def the_state_is_sound_and_counted(self) -> None:
        if not hasattr(self, "pair"):
            return
        for optimizer, counts in zip(self.pair.optimizers, self.counts):
            stats = optimizer.stats()
            assert (stats.num_steps, stats.num_skipped_steps) == (counts["steps"], counts["skipped"])
            for name, param in self.pair.model.named_parameters():
                slots = optimizer.state.get(param, {})
                if slots:
                    assert_sound(param, slots)
                    assert ("average_offset" in slots) == optimizer._has_average
                assert int(slots.get("step", 0)) == counts["own"].get(name, 0)
                assert int(slots.get("skipped", 0)) == counts["own skipped"].get(name, 0)


def assert_sound(param: Tensor, slots: dict[str, Tensor]) -> None:
    assert set(slots) >= {"exp_avg", *FLOAT32}
    assert slots["exp_avg"].shape == param.shape
    if "average_offset" in slots:
        counts = {"fingerprint", "average_start", "average_end"}
        assert set(slots) >= counts
        assert all(slots[key].dtype == torch.int64 and slots[key].shape == () for key in counts)
        assert 0 <= slots["average_start"] <= slots["average_end"]
        assert slots["average_offset"].shape == param.shape
    assert all(slots[key].dtype == torch.float32 for key in FLOAT32)
    assert all(slots[key].isfinite().all() for key in slots if key != "log_grad_rms")
    assert not slots["log_grad_rms"].isinf().any()


RandomUse.TestCase.settings = settings(
    deadline=None,
    max_examples=NUM_EXAMPLES or 20,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    derandomize=not NUM_EXAMPLES,
    database=None,
)


@pytest.mark.filterwarnings(
    "ignore:no teleports where", "ignore:.*past total_steps", "ignore:a step is skipped", "ignore:.*lr_scheduler.step"
)
class TestRandomUse(RandomUse.TestCase):  # type: ignore[name-defined,misc]
    """Found by pytest, which does not look for it where hypothesis puts it."""


# torch.distributed.checkpoint, in one process.

no_group = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")
CHECKPOINTED: dict[str, Make] = {
    "ours": lambda model: LearnedTeleportOptimizer.for_model(model, total_steps=60),
    "ours, two groups": lambda model: LearnedTeleportOptimizer(two_groups(model), model=model, total_steps=60),
    "AdamW": adamw,
}
everyone_checkpointed = pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)


@no_group
@everyone_checkpointed
@pytest.mark.parametrize("is_flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("is_on_disk", [False, True], ids=["in memory", "on disk"])
def test_distributed_checkpoints_restore_everything(
    make: Make, is_flat: bool, is_on_disk: bool, tmp_path: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    model, other = network(), network(seed=9)
    optimizer, resumed = make(model), make(other)
    train(model, optimizer, 33)
    if not isinstance(optimizer, AdamW):
        model[0].weight.grad.fill_(math.nan)  # type: ignore[union-attr]
        with pytest.warns(UserWarning, match="a step is skipped"):
            optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        before = copy.deepcopy(other.state_dict())
        if is_on_disk:
            dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
            template: dict[str, Any] = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
            dcp.load(template, checkpoint_id=tmp_path)
            saved = template["optimizer"]
        set_optimizer_state_dict(other, resumed, saved, options=options)
    assert {str(warning.message)[:20] for warning in caught} <= {"torch.distributed is"}
    assert same(before, other.state_dict())
    expected, restored = optimizer.state_dict(), resumed.state_dict()
    if is_flat:  # Torch keeps of a flat state dict only the options that a fresh optimizer has.
        kept = {*optimizer.defaults, "params", "param_names", "num_steps"}
        for own in (expected, restored):
            own["param_groups"] = [{k: v for k, v in group.items() if k in kept} for group in own["param_groups"]]
    assert same(expected, restored)
    other.load_state_dict(model.state_dict())
    assert train(model, optimizer, 17) == train(other, resumed, 17)
    assert same(model.state_dict(), other.state_dict())


# What cannot be loaded.


def changed(*path: Any, to: Any) -> Callable[[dict[str, Any]], object]:
    """A mutation that puts something at one place of a state dict."""

    def change(saved: dict[str, Any]) -> None:
        at: Any = saved
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return change


NOWHERE = torch.empty(10, 6, device="meta")
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no state": (lambda saved: saved.pop("state"), "has the keys 'state' and 'param_groups'"),
    "no groups": (lambda saved: saved.pop("param_groups"), "has the keys 'state' and 'param_groups'"),
    "groups are no list": (changed("param_groups", to={}), "must be a list of dictionaries"),
    "state is no mapping": (changed("state", to=[]), "'state' must be a mapping, got list"),
    "another group": (lambda s: s["param_groups"].append({"params": []}), r"have \[3, 3, 0\] parameters.*\[3, 3\]"),
    "one group": (lambda s: s["param_groups"].pop(), r"have \[3\] parameters, .* \[3, 3\]"),
    "a parameter less": (lambda s: s["param_groups"][0]["params"].pop(), r"have \[2, 3\] parameters"),
    "a parameter twice": (changed("param_groups", 0, "params", to=[0, 1, 1]), "in the groups more than once"),
    "unnamable parameters": (changed("param_groups", 0, "params", to=[0, 1, []]), "by number or name"),
    "an unknown parameter": (lambda s: s["state"].update({99: s["state"][0]}), "state for 99, .* no parameter group"),
    "a wrong shape": (changed("state", 1, "exp_avg", to=torch.ones(3)), r"exp_avg of parameter 1 is \(3,\)"),
    "a transposed matrix": (changed("state", 0, "exp_avg", to=torch.ones(5, 6)), r"expected .* \(10, 6\)"),
    "seven outputs": (changed("state", 0, "outputs", to=torch.zeros(7)), r"outputs of parameter 0 is \(7,\)"),
    "six integer outputs": (changed("state", 0, "outputs", to=torch.zeros(6, dtype=torch.int64)), "of real numbers"),
    "six outputs without data": (changed("state", 0, "outputs", to=torch.zeros(6, device="meta")), "of real numbers"),
    "outputs, one NaN": (changed("state", 0, "outputs", to=torch.tensor([0, 0, 0, 0, math.nan])), "cannot be"),
    "other hidden size": (changed("state", 0, "hidden", to=torch.zeros(6)), r"hidden of parameter 0 is \(6,\)"),
    "no tensor": (changed("state", 0, "exp_avg", to=None), "exp_avg of parameter 0 is NoneType"),
    "a missing slot": (lambda s: s["state"][0].pop("hidden"), "it is of another optimizer or a newer version"),
    "half an average": (lambda s: s["state"][0].pop("fingerprint"), "it is of another optimizer or a newer version"),
    "an average of steps to come": (
        changed("state", 0, "average_end", to=torch.tensor(99)),
        "average_end of parameter 0 .* cannot be",
    ),
    "an average that ends before it begins": (
        lambda s: s["state"][0].update(average_start=torch.tensor(1), average_end=torch.tensor(0)),
        "average of parameter 0 ends before it begins",
    ),
    "parameters of evaluation mode outside of it": (
        changed("state", 0, "iterate", to=torch.ones(10, 6)),
        "holds 'iterate', but was not saved in evaluation mode",
    ),
    "evaluation mode without parameters to go back to": (
        lambda s: [group.update(is_eval=True) for group in s["param_groups"]],
        "expected .*'iterate'",
    ),
    "a tensor for slots": (changed("state", 0, to=torch.ones(3)), "state of parameter 0 holds Tensor"),
    "none for slots": (changed("state", 0, to=None), "state of parameter 0 holds NoneType"),
    "integers": (changed("state", 1, "exp_avg", to=torch.ones(10, dtype=torch.int64)), "of real numbers"),
    "complex": (changed("state", 1, "exp_avg", to=torch.ones(10, dtype=torch.complex64)), "of real numbers"),
    "sparse": (changed("state", 0, "exp_avg", to=torch.ones(10, 6).to_sparse()), "of real numbers"),
    "no data": (changed("state", 0, "exp_avg", to=NOWHERE), "of real numbers"),
    "NaN": (changed("state", 1, "exp_avg", to=torch.full((10,), math.nan)), "exp_avg .* cannot be: .*nan"),
    "infinity": (changed("state", 1, "exp_avg", to=torch.full((10,), math.inf)), "exp_avg .* cannot be: .*inf"),
    "beyond the dtype": (
        changed("state", 1, "exp_avg", to=torch.full((10,), 1e300, dtype=torch.float64)),
        r"exp_avg .* cannot be: \[1e\+300",
    ),
    "a negative count": (changed("state", 1, "step", to=torch.tensor(-1.0)), "step of parameter 1 .* cannot be"),
    "half a step": (changed("state", 1, "skipped", to=torch.tensor(0.5)), r"skipped .* cannot be: \[0.5\]"),
    "negative steps": (changed("param_groups", 0, "num_steps", to=-1), "num_steps .* is -1"),
    "too many steps": (changed("param_groups", 0, "num_steps", to=10**300), "num_steps .* is 1000"),
    "steps in words": (changed("param_groups", 0, "num_steps", to="13"), "num_steps .* is '13'"),
    "true steps": (changed("param_groups", 0, "num_steps", to=True), "num_steps .* is True"),
    "no level": (changed("param_groups", 0, "total_steps_level", to=math.nan), "total_steps_level .* is nan"),
    "groups that differ": (changed("param_groups", 1, "num_steps", to=7), "differ in what they share"),
    "runs that differ": (changed("param_groups", 1, "total_steps", to=7), "differ in what they share"),
    "a negative lr": (changed("param_groups", 0, "lr", to=-1.0), "cannot be used: Invalid learning rate: -1.0"),
    "no lr": (changed("param_groups", 0, "lr", to=None), "cannot be used"),
    "a bad weight_decay": (changed("param_groups", 0, "weight_decay", to=math.nan), "Invalid weight_decay value: nan"),
    "a bad total_steps": (changed("param_groups", 0, "total_steps", to=0), "Invalid total_steps value: 0"),
    "maximize in words": (changed("param_groups", 0, "maximize", to="yes"), "maximize must be True or False"),
    "betas": (changed("param_groups", 0, "betas", to=(0.9, 0.99)), "has no betas"),
    "names that are none": (changed("param_groups", 0, "param_names", to=3), "cannot be used"),
}


def position_groups(model: nn.Module) -> list[dict[str, Any]]:
    return by_position(list(model.named_parameters()))


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(what: str) -> None:
    change, message = REFUSED[what]
    model, other = network(), network()
    optimizer, control = (
        LearnedTeleportOptimizer(position_groups(own), model=own, total_steps=60) for own in (model, other)
    )
    train(model, optimizer, 37)
    train(other, control, 37)
    source = network(seed=5)
    saved_optimizer = LearnedTeleportOptimizer(position_groups(source), model=source, total_steps=60)
    train(source, saved_optimizer, 3)
    saved = copy.deepcopy(saved_optimizer.state_dict())
    change(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(OptimizerStateError, match=message):
        optimizer.load_state_dict(saved)
    assert same(before, optimizer.state_dict())
    assert train(model, optimizer, 8) == train(other, control, 8)
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("value", [None, 3, "state", [], {}, {"state": {}}, torch.ones(2)])
def test_what_is_no_state_dict_is_refused(value: Any) -> None:
    with pytest.raises(OptimizerStateError, match="has the keys 'state' and 'param_groups'"):
        horizon(network()).load_state_dict(value)


def test_the_state_of_other_optimizers_is_refused() -> None:
    model = network()
    other = adamw(model)
    train(model, other, 3)
    with pytest.raises(OptimizerStateError, match=re.escape("holds ['exp_avg', 'exp_avg_sq', 'step']")):
        horizon(model).load_state_dict(other.state_dict())
    saved = other.state_dict()
    saved["state"] = {}
    with pytest.raises(OptimizerStateError, match="has no betas"):
        horizon(model).load_state_dict(saved)


# Damage at random.


class Strange:
    """What no file should hold."""

    def __bool__(self) -> bool:
        raise ArithmeticError("neither true nor false")

    def __deepcopy__(self, memo: object) -> Strange:
        return self


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def junk(rng: random.Random) -> Any:
    numbers: list[Any] = [0, 1, -1, 2**40, 2**63, -(10**400), 10**400, True, 0.5, -0.5, 1e-300, math.nan, math.inf]
    plain = ["", "0", "0.weight", None, [], {}, (), [0], [[0]], {"a": {"b": {}}}, {0: None}, "1.0", b"x", {1, 2}, 1j]
    made = [deep(3), deep(5000), Strange(), object(), print, [None] * 3, torch.ones(()), torch.ones(2), torch.float32]
    return rng.choice([*numbers, *plain, *made, -math.inf, random_tensor(rng)])


DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
SHAPES = ((), (1,), (0,), (5,), (6,), (24,), (10, 6), (6, 10), (2, 0, 3))


def random_tensor(rng: random.Random) -> Tensor:
    return torch.full(rng.choice(SHAPES), rng.choice((0.0, 1.0, -1.0, 2.0, math.nan)))


def damaged_tensor(value: Tensor, rng: random.Random) -> Any:
    if value.dtype != torch.float32 or value.layout != torch.strided or value.is_meta or type(value) is not Tensor:
        return None  # It has been damaged before.
    values = value.detach().clone().contiguous()
    if values.numel() and rng.random() < 0.4:
        values.view(-1)[rng.randrange(values.numel())] = rng.choice((math.nan, math.inf, -math.inf, -3.0, 0.5, 1e9))
        return values
    ways: list[Callable[[], Any]] = [
        lambda: values.to(rng.choice(DTYPES)),
        lambda: values.to("meta"),
        lambda: values.to_sparse(),
        lambda: values.tolist(),
        lambda: values.reshape(-1),
        lambda: values.unsqueeze(0),
        lambda: values.mT if values.dim() > 1 else values[..., None].expand(*values.shape, 2),
        lambda: nn.Parameter(values),
        lambda: values.new_zeros(values.shape),
        lambda: nn.UninitializedParameter(),
        lambda: values.double() * 1e300,
    ]
    return rng.choice(ways)()


def damage(saved: dict[str, Any], rng: random.Random) -> None:
    """Change one place, drawn at random at any depth."""
    at: Any = saved
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.15:
            break
        at = at[key]
    other = rng.choice(keys)
    what = rng.randrange(7)
    if what == 0:
        del at[key]
    elif what == 1 and isinstance(at, dict):
        at[rng.choice([key, str(key), 0, 5, 77, "x", (1,), None, "meta_optimizer", "betas", "num_steps"])] = at.pop(key)
    elif what == 2 and isinstance(at, dict):
        at[rng.choice(["copy", 6, "1", None, "exp_avg", "param_names"])] = copy.copy(at[key])
    elif what == 2:
        at.append(at[key])
    elif what == 3:
        at[key], at[other] = at[other], at[key]
    elif isinstance(at[key], Tensor) and what < 6:
        at[key] = damaged_tensor(at[key], rng)
    else:
        at[key] = junk(rng)


def fuzzed() -> tuple[list[tuple[nn.Module, LearnedTeleportOptimizer]], list[dict[str, Any]]]:
    """Optimizers that load, each for the state dict of the same index."""
    pairs, saved = [], []
    for make in (MAKERS["open-ended"], MAKERS["two groups"], horizon, lambda own: make_plain(own)):
        model, other = network(), network(seed=4)
        optimizer, target = make(model), make(other)
        assert isinstance(target, LearnedTeleportOptimizer)
        train(model, optimizer, 39)  # The two steps after loading are one without anything and one with all there is.
        train(other, target, 3)
        pairs.append((other, target))
        saved.append(copy.deepcopy(optimizer.state_dict()))
    return pairs, saved


def make_plain(model: nn.Module) -> Optimizer:
    return LearnedTeleportOptimizer(model.parameters(), total_steps=60, teleport=False)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:no teleports where", "ignore:.*past total_steps", "ignore:a step is skipped", "ignore:Sparse"
)
def test_damage_at_random_is_refused_or_loads_wholly() -> None:
    rng = random.Random(0)
    pairs, good = fuzzed()
    befores = [(copy.deepcopy(own.state_dict()), copy.deepcopy(optimizer.state_dict())) for own, optimizer in pairs]
    counts, slowest = {"refused": 0, "loaded": 0}, 0.0
    for trial in range(2000):
        index = rng.randrange(len(pairs))
        saved = copy.deepcopy(good[index])
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            damage(saved, rng)
        model, optimizer = pairs[index]
        start = time.perf_counter()
        try:
            optimizer.load_state_dict(saved)
        except OptimizerStateError:
            counts["refused"] += 1
            is_loaded = False
        else:
            counts["loaded"] += 1
            is_loaded = True
        slowest = max(slowest, time.perf_counter() - start)
        before = befores[index]
        if not is_loaded:
            assert same(before, (model.state_dict(), optimizer.state_dict())), trial
            continue
        for param, slots in optimizer.state.items():
            assert_sound(param, slots)
        group = optimizer.param_groups[0]
        train(model, optimizer, 2)
        if all(float(own["lr"]) < 10.0 and float(own["weight_decay"] or 0.0) < 10.0 for own in optimizer.param_groups):
            assert all(param.isfinite().all() for param in model.parameters()), (trial, group)
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
    print(counts, f"slowest load: {1e3 * slowest:.1f} ms")
    assert min(counts.values()) > 200
    assert slowest < 2.0


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize("is_leaking", [False, True])
@pytest.mark.parametrize("is_saved", [False, True])
def test_memory_stays_flat(is_saved: bool, is_leaking: bool) -> None:
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = LearnedTeleportOptimizer([param], total_steps=None)
    kept = []
    sizes: list[tuple[int, int]] = []
    num_steps = 500 if is_leaking or is_saved else 10_000
    for step in range(num_steps):
        param.grad = torch.full_like(param, math.cos(step))
        optimizer.step()
        if is_saved:
            optimizer.load_state_dict(through_file(optimizer.state_dict()))
        if is_leaking:
            kept.append([param.grad])
        if step in (num_steps // 5, num_steps - 1):
            gc.collect()
            sizes.append((len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    objects, peaks = (last - first for first, last in zip(*sizes))
    assert (objects < 100) == (not is_leaking)
    assert peaks < 8 * 1024 * (1024 if sys.platform == "darwin" else 1)
