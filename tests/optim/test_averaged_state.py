"""Saving and loading in either mode, with and without an average."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from teleport_optim import LearnedTeleportOptimizer, OptimizerStateError
from tests.helpers.averages import trained
from tests.helpers.classification import X, Y, network, train
from tests.helpers.comparing import same_weights, through_file, weights_of
from tests.helpers.expected_warnings import OPEN_ENDED_SAVED

pytestmark = OPEN_ENDED_SAVED


@pytest.mark.parametrize("options", [{}, {"total_steps": 90}, {"average": False}])
@pytest.mark.parametrize("is_eval", [True, False])
@pytest.mark.parametrize("is_optimizer_first", [True, False])
def test_a_run_resumes_bit_for_bit_from_either_mode(
    options: dict[str, object], is_eval: bool, is_optimizer_first: bool
) -> None:
    model, optimizer = trained(40, **options)
    if is_eval:
        optimizer.eval()
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = network(seed=3)
    resumed = LearnedTeleportOptimizer.for_model(other, **options)
    loads = [(other, "model"), (resumed, "optimizer")]
    for target, key in reversed(loads) if is_optimizer_first else loads:
        target.load_state_dict(saved[key])
    assert same_weights(weights_of(other), weights_of(model))
    assert saved["optimizer"]["param_groups"][0]["is_eval"] == (is_eval and options.get("average", True))
    for own in (optimizer, resumed):
        own.train()
    assert same_weights(weights_of(other), weights_of(model))
    train(model, optimizer, 50)
    train(other, resumed, 50)
    assert same_weights(weights_of(other), weights_of(model))
    if options.get("average", True):
        assert same_weights(resumed.averaged_parameters(), optimizer.averaged_parameters())


def test_a_state_of_evaluation_mode_says_so_at_the_first_step() -> None:
    model, optimizer = trained()
    optimizer.eval()
    other = network(seed=3)
    resumed = LearnedTeleportOptimizer.for_model(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    nn.functional.cross_entropy(other(X), Y).backward()
    with pytest.raises(RuntimeError, match=r"call train\(\)"):
        resumed.step()


def test_other_weights_beside_a_state_of_evaluation_mode_stay() -> None:
    _, optimizer = trained()
    optimizer.eval()
    other = network(seed=3)
    resumed = LearnedTeleportOptimizer.for_model(other)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.train()
    assert same_weights(weights_of(other), weights_of(network(seed=3)))


def test_states_of_the_other_setting() -> None:
    model, optimizer = trained()
    other = network(seed=3)
    other.load_state_dict(model.state_dict())
    without = LearnedTeleportOptimizer.for_model(other, average=False)
    without.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3)
    train(other, without, 3)
    assert same_weights(weights_of(model), weights_of(other))
    with_average = LearnedTeleportOptimizer.for_model(other)
    with_average.load_state_dict(without.state_dict())
    assert same_weights(with_average.averaged_parameters(), weights_of(other))  # It begins here.
    optimizer.eval()
    before = copy.deepcopy(without.state_dict())
    with pytest.raises(OptimizerStateError, match="load it into one with average=True, or call train"):
        without.load_state_dict(optimizer.state_dict())
    assert str(before) == str(without.state_dict())


@pytest.mark.filterwarnings("error:the state of an open-ended run is saved")
def test_saving_an_open_ended_run_whose_result_nobody_has_seen_warns_once() -> None:
    _, optimizer = trained(3)
    with pytest.warns(UserWarning, match="the average of the iterates"):
        optimizer.state_dict()
    optimizer.state_dict()
    for options in ({"average": False}, {"total_steps": 9}):
        trained(3, **options)[1].state_dict()
    model, looked_at = trained(3)
    looked_at.averaged_parameters()
    saved = looked_at.state_dict()
    resumed = LearnedTeleportOptimizer.for_model(model)
    resumed.load_state_dict(saved)
    train(model, resumed, 1)
    resumed.state_dict()
    LearnedTeleportOptimizer.for_model(network()).state_dict()
