"""Whatever is done with an optimizer, one that was made of its state does the same."""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from teleport_optim import LearnedTeleportOptimizer, OptimizerStateError
from tests.helpers.comparing import same, through_file
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.runs import assert_sound

pytestmark = OF_OURS
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
