"""The strategies for inputs and for models: they shrink, have every ingredient, and depend on the draws alone."""

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import nn

from teleport_optim.testing import Sample, example_inputs, modules, sequential_models
from tests.helpers.written_specs import INPUTS

quick = settings(max_examples=15, deadline=None, database=None, derandomize=True)
searching = settings(max_examples=2000, deadline=None, database=None, derandomize=True)


@given(st.data())
@quick
def test_inputs_are_like_their_template(data: st.DataObject) -> None:
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    template = {
        "x": torch.randn(3, 2),
        "tokens": torch.tensor([[0], [7], [2]]),
        "mask": mask,
        "size": torch.ones(1),
        "n": 5,
    }
    random_state = torch.get_rng_state()
    inputs = data.draw(example_inputs(template))
    assert torch.equal(torch.get_rng_state(), random_state)
    batch = len(inputs["x"])
    assert 2 <= batch <= 5
    assert inputs["x"].shape == (batch, 2)
    assert inputs["tokens"].shape == (batch, 1)
    assert 0 <= inputs["tokens"].min() <= inputs["tokens"].max() <= 7
    assert torch.equal(inputs["mask"], mask.repeat(2, 1)[:batch])
    assert inputs["size"].shape == (1,)
    assert inputs["n"] == 5


def test_inputs_shrink_and_take_tuples_and_other_axes() -> None:
    first, second = find(example_inputs((torch.randn(5, 4), 3), batch_axis=1), lambda inputs: True, settings=searching)
    assert (first.shape, second) == ((5, 2), 3)
    wide = find(example_inputs(torch.randn(4, 3)), lambda inputs: len(inputs) > 3, settings=searching)
    assert len(wide) == 4
    for template, message in (((1, 2), "no input is a tensor"), (torch.tensor(1.0), "no input is a tensor")):
        with pytest.raises(ValueError, match=message):
            example_inputs(template)
    with pytest.raises(ValueError, match="at least 2"):
        example_inputs(INPUTS, max_batch=1)
    with pytest.raises(TypeError, match="got list"):
        example_inputs([INPUTS])  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", [sequential_models(), modules()])
def test_models_shrink(strategy: st.SearchStrategy[Sample]) -> None:
    smallest = find(strategy, lambda sample: True, settings=searching)
    assert len(smallest.model) <= 4
    hidden = find(
        strategy,
        lambda sample: any(isinstance(module, nn.GELU) for module in sample.model.modules()),
        settings=searching,
    )
    assert len(hidden.model) <= 4
    assert sum(parameter.numel() for parameter in hidden.model.parameters()) <= 30


@pytest.mark.parametrize(
    "kind",
    [
        *(nn.LSTM, nn.GRU, nn.TransformerEncoderLayer, nn.MultiheadAttention, nn.Embedding),
        *("Residual", "Concatenation", "Split", "Gated", "Excitation", "Recurrent"),
        *("DerivedKernel", "TransposedKernel", "Positions", "Prompt", "Cast", "MaskedLinear", "Replaced"),
        *("OwnBackward", "Branch"),
    ],
)
def test_modules_have_every_ingredient(kind: type | str) -> None:
    def has(sample: Sample) -> bool:
        parts = list(sample.model.modules())
        return any(type(part).__name__ == kind if isinstance(kind, str) else isinstance(part, kind) for part in parts)

    sample = find(modules(), has, settings=searching)
    is_tied = sample.model[0].weight is sample.model[-1].weight if kind is nn.Embedding else True
    assert is_tied
    assert len(sample.model) <= 4


@given(st.one_of(sequential_models(), modules()))
@settings(quick, max_examples=40)
def test_models_are_float64_and_take_their_inputs(sample: Sample) -> None:
    assert all(parameter.dtype == torch.float64 for parameter in sample.model.parameters())
    assert len(sample.model(sample.inputs)) == 3
    assert "inputs of shape (3" in repr(sample)


@pytest.mark.parametrize("strategy", [sequential_models(), modules()])
def test_what_is_drawn_depends_on_the_draws_alone(strategy: st.SearchStrategy[Sample]) -> None:
    """Neither on the global random state, which stays as it is."""
    runs: list[list[Sample]] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random_state = torch.get_rng_state()
        runs.append([])

        @settings(quick)
        @given(strategy)
        def collect(sample: Sample) -> None:
            runs[-1].append(sample)

        collect()
        assert torch.equal(torch.get_rng_state(), random_state)
    first, second = runs
    assert len(first) == len(second) > 0
    for one, other in zip(first, second):
        assert repr(one) == repr(other)
        assert torch.equal(one.inputs, other.inputs)
        state = other.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.model.state_dict().items())
