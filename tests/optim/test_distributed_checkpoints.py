"""torch.distributed.checkpoint, in one process."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import AdamW

from teleport_optim import LearnedTeleportOptimizer
from tests.helpers.classification import network, train
from tests.helpers.comparing import same
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.runs import Make, adamw, two_groups

pytestmark = OF_OURS
no_group = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")
CHECKPOINTED: dict[str, Make] = {
    "ours": lambda model: LearnedTeleportOptimizer.for_model(model, total_steps=60),
    "ours, two groups": lambda model: LearnedTeleportOptimizer(two_groups(model), model=model, total_steps=60),
    "AdamW": adamw,
}
everyone_checkpointed = pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)


@no_group
@everyone_checkpointed
@pytest.mark.parametrize("is_flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("is_on_disk", [False, True], ids=["in memory", "on disk"])
def test_distributed_checkpoints_restore_everything(
    make: Make, is_flat: bool, is_on_disk: bool, tmp_path: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    model, other = network(), network(seed=9)
    optimizer, resumed = make(model), make(other)
    train(model, optimizer, 33)
    if not isinstance(optimizer, AdamW):
        model[0].weight.grad.fill_(math.nan)  # type: ignore[union-attr]
        with pytest.warns(UserWarning, match="a step is skipped"):
            optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        before = copy.deepcopy(other.state_dict())
        if is_on_disk:
            dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
            template: dict[str, Any] = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
            dcp.load(template, checkpoint_id=tmp_path)
            saved = template["optimizer"]
        set_optimizer_state_dict(other, resumed, saved, options=options)
    assert {str(warning.message)[:20] for warning in caught} <= {"torch.distributed is"}
    assert same(before, other.state_dict())
    expected, restored = optimizer.state_dict(), resumed.state_dict()
    if is_flat:  # Torch keeps of a flat state dict only the options that a fresh optimizer has.
        kept = {*optimizer.defaults, "params", "param_names", "num_steps"}
        for own in (expected, restored):
            own["param_groups"] = [{k: v for k, v in group.items() if k in kept} for group in own["param_groups"]]
    assert same(expected, restored)
    other.load_state_dict(model.state_dict())
    assert train(model, optimizer, 17) == train(other, resumed, 17)
    assert same(model.state_dict(), other.state_dict())
