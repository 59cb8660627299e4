"""The networks of tasks: their layers, and what they start from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from teleport_optim.meta_training.tasks.data import ALPHABET
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.networks import initial_params, rescale_units
from teleport_optim.meta_training.tasks.sequences import CausalAttention, GRULayer, LSTMLayer
from teleport_optim.rng import generator_for
from teleport_optim.symmetry import find_symmetries
from tests.helpers.problems import draw_problem, each_split, in_float64


def make_batchnorm_network() -> nn.Sequential:
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(6, 4, 3), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(144, 3))


def test_initial_values_are_of_the_kind_of_torch() -> None:
    params = initial_params(make_batchnorm_network(), 5, Draw(generator_for(0), "any", "train"), gain=2.0)
    assert {name: value.shape[0] for name, value in params.items()} == dict.fromkeys(params, 5)
    assert list(params) == [name for name, _ in make_batchnorm_network().named_parameters()]
    assert (params["1.weight"] == 1.0).all()
    assert (params["1.bias"] == 0.0).all()
    for name, bound in {"3.weight": 2.0 / 54**0.5, "3.bias": 54**-0.5, "6.weight": 2.0 / 12.0}.items():
        assert 0.8 * bound < params[name].abs().max() <= bound
    with pytest.raises(TypeError, match="no initial values are known for 'weight', a parameter of PReLU"):
        initial_params(nn.PReLU(), 1, Draw(generator_for(0), "any", "train"))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), (6, 4)),
        (make_batchnorm_network(), (6, 1, 8, 8)),
    ],
)
def test_rescaled_units_leave_the_function_unchanged(model: nn.Sequential, shape: tuple[int, ...]) -> None:
    spec = find_symmetries(model, torch.zeros(shape))
    assert len(spec.of_group("scaling")) == 2
    params = {
        name: value.double() for name, value in initial_params(model, 3, Draw(generator_for(0), "any", "train")).items()
    }
    rescaled = rescale_units(spec, params, 2.0, Draw(generator_for(1), "any", "train"))
    inputs = torch.randn(shape, generator=generator_for(2), dtype=torch.float64)
    assert list(rescaled) == list(params)
    for row in range(3):
        before, after = (
            functional_call(model, {name: value[row] for name, value in some.items()}, (inputs,))
            for some in (params, rescaled)
        )
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    head = list(params)[-2]
    factors = rescaled[head] / params[head]
    assert factors.min() < 0.3
    assert factors.max() > 3.0
    partly = {**{name: value[0] for name, value in rescaled.items()}, head: params[head][0]}
    before = functional_call(model, {name: value[0] for name, value in params.items()}, (inputs,))
    assert not torch.allclose(functional_call(model, partly, (inputs,)), before)


def test_some_networks_start_rescaled_and_only_where_that_can_be() -> None:
    descriptions = [draw_problem("digits_mlp", "train", seed, 1).description for seed in range(80)]
    assert 5 < sum("sigma=0.0" not in description for description in descriptions) < 50
    assert all("sigma=0.0" in description for description in descriptions if " tanh " in description)


def test_batchnorm_networks_normalise_by_the_minibatch() -> None:
    problem = draw_problem("digits_batchnorm_cnn", "train", 0)
    layers = [layer for layer in problem.model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert layers
    assert not list(problem.model.buffers())
    assert not any(
        isinstance(layer, nn.BatchNorm2d) for layer in draw_problem("digits_cnn", "train", 0).model.modules()
    )


@each_split
@pytest.mark.parametrize("name", ["char_transformer", "char_recurrent"])
def test_predictions_do_not_depend_on_what_follows(name: str, split: str) -> None:
    problem = in_float64(draw_problem(name, split, 0, 1))
    params = {key: value[0] for key, value in problem.params.items()}
    tokens = problem.sample_batch(generator_for(0))[0][0]
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % len(ALPHABET)
    before, after = (functional_call(problem.model, params, (each,)) for each in (tokens, changed))
    torch.testing.assert_close(after[:, :10], before[:, :10], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, 10], before[:, 10])
    assert not torch.allclose(after[:, 11], before[:, 11], rtol=1e-9, atol=1e-12)


def test_the_layers_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    attention = CausalAttention(6, 2).double()
    queries, keys, values = (
        part.unflatten(-1, (2, 3)).transpose(1, 2) for part in attention.from_input(x).chunk(3, -1)
    )
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.to_output(attended))

    for layer, reference, order in [
        (LSTMLayer(6, 5), nn.LSTM(6, 5, batch_first=True), [1, 0, 3, 2]),
        (GRULayer(6, 5), nn.GRU(6, 5, batch_first=True), [0, 1, 2]),
    ]:
        layer.double()
        reference.double()
        with torch.no_grad():
            for own, theirs in [
                (layer.from_input.weight, reference.weight_ih_l0),
                (layer.from_input.bias, reference.bias_ih_l0),
                (layer.from_state.weight, reference.weight_hh_l0),
            ]:
                gates = own.chunk(len(order))
                theirs.copy_(torch.cat([gates[index] for index in order]))
            reference.bias_hh_l0.zero_()
        torch.testing.assert_close(layer(x), reference(x)[0])
