"""State dicts that cannot be loaded are refused, and change nothing."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from teleport_optim import LearnedTeleportOptimizer, OptimizerStateError
from tests.helpers.classification import network, train
from tests.helpers.comparing import same
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.runs import adamw, by_position, horizon

pytestmark = OF_OURS


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
