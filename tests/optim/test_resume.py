"""A run that is broken off goes on bit for bit: from a file, in a new process, as a copy."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from teleport_optim import OptimizerStateError
from tests.helpers.classification import network, train
from tests.helpers.comparing import same, through_file
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.paths import ROOT
from tests.helpers.runs import MAKERS, ROWS, Make, Run, every_case, everyone, storages

pytestmark = OF_OURS


def test_sameness_sees_every_difference() -> None:
    value = {"a": [torch.tensor([1.0, math.nan]), 2, None]}
    assert same(value, copy.deepcopy(value))
    for other in ([torch.tensor([1.0, 2.0]), 2, None], [torch.tensor([1.0, math.nan]), 2.0, None], [value["a"][0], 2]):
        assert not same(value, {"a": other})
    assert not same(torch.ones(2), torch.ones(2).double())
    assert not same(value, {"b": value["a"]})


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
from tests.helpers.runs import MAKERS, Run
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
