"""Statistics of an optimizer: what its steps did, and how they are logged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.controls import PRIOR_MOMENTUM
from teleport_optim.optim.schedule import TELEPORT_INTERVAL
from tests.helpers.classification import network, train
from tests.helpers.expected_warnings import OF_OURS

pytestmark = OF_OURS

PRIOR_LOGIT = math.log(PRIOR_MOMENTUM / (1.0 - PRIOR_MOMENTUM))


def rms_where_it_moves(step: Tensor) -> float:
    """RMS of a step, without the rows of a matrix that belong to dead units."""
    rows = step.flatten(1) if step.dim() > 1 else step[None]
    is_moved = rows.abs().amax(dim=1) > 1e-6
    assert is_moved.float().mean() > 0.5
    return rows[is_moved].square().mean().sqrt().item()


def test_stats_tell_what_the_steps_did() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=2 * TELEPORT_INTERVAL)
    assert optimizer.stats() == (0, 0, 0.0, {})
    train(model, optimizer, TELEPORT_INTERVAL)
    train(model, optimizer, 1)
    assert optimizer.stats().teleport_size == optimizer.teleport_size > 0
    assert all((own.teleport_size > 0) == (name != "4.bias") for name, own in optimizer.stats().tensors.items())
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, optimizer, 1)
    stats = optimizer.stats()
    num_steps = TELEPORT_INTERVAL + 2
    assert (stats.num_steps, stats.num_skipped_steps) == (num_steps, 0)
    assert stats.teleport_size == 0.0
    assert len({own.momentum for own in stats.tensors.values()}) == 1
    assert list(stats.tensors) == [name for name, _ in model.named_parameters()]
    for name, param in model.named_parameters():
        own = stats.tensors[name]
        step = (param.detach() - (1.0 - own.decay) * before[name]) * (param != before[name])  # idle rows do not decay
        assert rms_where_it_moves(step) == pytest.approx(own.rate, rel=1e-3)
        assert abs(math.log(own.momentum / (1.0 - own.momentum)) - PRIOR_LOGIT) < 2.0
        assert all(-1.0 < value < 1.0 for value in (own.balance, own.gradient_balance))
        assert (own.decay > 0) == name.endswith("weight")


def test_stats_are_logged(tmp_path: Path) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=40)
    train(model, optimizer, 3)
    written: dict[str, tuple[float, int]] = {}

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> None:
            written[tag] = (scalar_value, global_step)

    optimizer.log(Writer())
    assert len(written) == 3 + 7 * 6
    assert written["optimizer/num_steps"] == (3, 3)
    assert written["optimizer_momentum/2.weight"] == (optimizer.stats().tensors["2.weight"].momentum, 3)
    optimizer.log(Writer(), step=7, prefix="mine")
    assert written["mine_rate/4.bias"][1] == 7
    with SummaryWriter(str(tmp_path)) as writer:  # type: ignore[no-untyped-call]
        optimizer.log(writer)
    assert list(tmp_path.iterdir())
