"""The barrier between two networks is what it says."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_optim.alignment import Barrier, align, interpolation_barrier
from tests.helpers.alignment_models import MODELS, build, every_model, permuted, small, state


def squared_output(inputs: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: model(inputs).square().mean().item()


@every_model
def test_there_is_no_barrier_to_oneself(name: str) -> None:
    model, inputs = build(name, 0), MODELS[name][1]
    line = interpolation_barrier(model, copy.deepcopy(model), squared_output(inputs))
    assert line.barrier == 0.0
    assert len(line.alphas) == len(line.losses) == 11
    assert line.alphas[0] == 0.0
    assert line.alphas[-1] == 1.0


def test_the_barrier_is_the_largest_rise_above_the_chord() -> None:
    line = Barrier((0.0, 0.25, 0.5, 1.0), (1.0, 4.0, 4.0, 3.0))
    assert line.excesses == (0.0, 2.5, 2.0, 0.0)
    assert line.barrier == 2.5
    assert Barrier((0.0, 0.5, 1.0), (1.0, 0.0, 1.0)).barrier == 0.0


def test_a_planted_permutation_makes_a_barrier_that_alignment_removes() -> None:
    inputs = MODELS["residual"][1]
    reference = build("residual", 0)
    model, target = permuted(reference, inputs, 0), reference(inputs).detach()

    def loss(model: nn.Module) -> float:
        return (model(inputs) - target).square().mean().item()

    before = interpolation_barrier(reference, model, loss)
    align(model, reference, inputs)
    after = interpolation_barrier(reference, model, loss)
    assert before.barrier > 1e-3
    assert after.barrier < 1e-12


def test_the_ends_of_the_line_are_the_networks_and_nothing_changes() -> None:
    first, second, inputs = build("residual", 0).train(), build("residual", 1), MODELS["residual"][1]
    states, random_state = [state(first), state(second)], torch.get_rng_state()
    seen: list[dict[str, Tensor]] = []
    draws: list[float] = []

    def evaluate(model: nn.Module) -> float:
        assert not any(module.training for module in model.modules())
        seen.append(state(model))
        draws.append(torch.rand(()).item())
        return squared_output(inputs)(model)

    line = interpolation_barrier(first, second, evaluate, num_points=3)
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in seen[0].items())
    counter = "num_batches_tracked"
    assert all(torch.equal(t, states[1][name]) for name, t in seen[2].items() if counter not in name)
    middle = {name: (states[0][name] + states[1][name]) / 2 for name in seen[1] if counter not in name}
    assert all(torch.allclose(seen[1][name], tensor) for name, tensor in middle.items())
    assert len(set(draws)) == 1
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(
        torch.equal(t, old[name]) for m, old in zip((first, second), states) for name, t in m.state_dict().items()
    )
    assert first.training
    assert interpolation_barrier(first, second, squared_output(inputs), num_points=3) == line


def test_recalibrated_statistics_are_those_of_the_batches() -> None:
    first, second, inputs = build("residual", 0), build("residual", 1), MODELS["residual"][1]
    checked = []

    def evaluate(model: nn.Module) -> float:
        hidden = model.stem(inputs).transpose(0, 1).flatten(1)
        torch.testing.assert_close(model.norm.running_mean, hidden.mean(dim=1))
        torch.testing.assert_close(model.norm.running_var, hidden.var(dim=1))
        assert model.norm.momentum == first.norm.momentum
        checked.append(model)
        return 0.0

    interpolation_barrier(first, second, evaluate, num_points=5, recalibrate=[inputs, inputs])
    assert len(checked) == 5


@pytest.mark.parametrize(
    ("second", "loss", "options", "message"),
    [
        (small(7), 0.0, {}, "'0.weight' has the shapes"),
        (small(), 0.0, {"num_points": 2}, "num_points is 2"),
        (small(), float("nan"), {}, "evaluate gives nan at alpha = 0"),
        (small(), float("inf"), {}, "evaluate gives inf at alpha = 0"),
        (small(), 0.0, {"recalibrate": []}, "there are no batches"),
    ],
)
def test_mistakes_on_the_line_are_named(second: nn.Module, loss: float, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interpolation_barrier(small(), second, lambda model: loss, **options)
