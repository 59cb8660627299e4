"""The search on models of transformers, whose code keeps masks, tables and settings for all models of a class."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from teleport_optim.symmetry import find_symmetries

pytestmark = pytest.mark.private_torch

SIZES = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=16)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=16)
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


def loss_and_gradients(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def kept(model: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_")
    }


def test_models_of_a_class_behave_as_before_a_search_on_one_of_them(model: nn.Module) -> None:
    tokens = torch.randint(37, (2, 7))
    other = copy.deepcopy(model)
    expected = loss_and_gradients(copy.deepcopy(model), tokens)
    attributes = kept(model)
    for size in (7, 5):  # tables of several lengths
        assert len(find_symmetries(model, {"input_ids": tokens[:, :size]}, groups=["scaling"])) > 0
    assert kept(model) == attributes
    for one in (model, other):
        for before, after in zip(expected, loss_and_gradients(one, tokens), strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_cache_among_the_outputs_refuses_nothing_but_what_it_holds() -> None:
    torch.manual_seed(0)
    model, tokens = FAMILIES["mistral"](), torch.randint(37, (2, 7))
    with_cache = find_symmetries(model, tokens, groups=["scaling"])
    without = find_symmetries(model, {"input_ids": tokens, "use_cache": False}, groups=["scaling"])
    assert with_cache.refusals == without.refusals == ()
    lost = {symmetry.id for symmetry in without} - {symmetry.id for symmetry in with_cache}
    assert len(with_cache) > 0
    assert lost
    assert all("attn" in name for name in lost)
