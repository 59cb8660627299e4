"""Generating with a model of transformers costs what it costs without the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.regression import NUM_STEPS, Make, everyone


class Operations(TorchDispatchMode):
    """Writes down every operation, also those of hooks and of copies."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.private_torch
@everyone
def test_generating_costs_what_it_costs_without_the_optimizer(make: Make) -> None:
    """Counted and not timed: the same operations, no hooks, nothing written into the parameters."""

    def gpt() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = transformers.GPT2Config(
                vocab_size=17, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
            )
            return transformers.GPT2LMHeadModel(config)

    model, tokens = gpt(), torch.arange(12).view(2, 6)
    optimizer = make(model, NUM_STEPS)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    plain = gpt()
    plain.load_state_dict(model.state_dict())
    versions = [param._version for param in model.parameters()]
    lists, texts = [], []
    for own in (model, plain):
        own.eval()
        with Operations() as operations:
            texts.append(own.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0))
        lists.append(operations.names)
    assert len(lists[0]) > 100
    assert lists[0] == lists[1]
    assert torch.equal(*texts)
    assert [param._version for param in model.parameters()] == versions
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
