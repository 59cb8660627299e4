"""Checkpoints that are sound: saved and loaded, and those that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer, load_checkpoint, save_checkpoint
from teleport_optim.controller.checkpoints import list_checkpoints, read_card
from tests.helpers.checkpoint_files import WEIGHTS, written


def test_round_trip(tmp_path: Path) -> None:
    path = written(tmp_path)
    loaded = load_checkpoint(str(path))
    for name, value in MetaOptimizer(4).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert read_card(path)["note"] == "a test"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["weights.json", "weights.safetensors"]


def test_the_default_is_shipped_trained_and_says_how() -> None:
    assert "default" in list_checkpoints()
    assert bool(load_checkpoint("default").readout_weight.any())
    card = read_card(list_checkpoints()["default"])
    assert {"sha256", "meta_training", "meta_training_minutes", "command", "scores"} <= set(card)


def test_the_card_of_another_checkpoint_will_do(tmp_path: Path) -> None:
    card = read_card(written(tmp_path))
    other = save_checkpoint(MetaOptimizer(3), tmp_path / "other.safetensors", card | {"format_version": 99})
    assert load_checkpoint(other).hidden_size == 3
    assert read_card(other)["note"] == "a test"


@pytest.mark.filterwarnings("ignore:an optimizer of a single matrix")
@pytest.mark.parametrize("block_rows", [1, 3, 32, 1024])
def test_how_many_rows_make_a_block_is_kept(tmp_path: Path, block_rows: int) -> None:
    """First steps of rows in blocks of their own are the gradient's; others depend on the rows of their block, and on no others."""
    saved = MetaOptimizer(4, block_rows=block_rows)
    path = save_checkpoint(saved, tmp_path / "weights.safetensors")
    assert load_checkpoint(path).block_rows == saved.block_rows == block_rows
    assert read_card(path)["num_parameters"] == sum(param.numel() for param in saved.parameters())
    assert len(list(saved.parameters())) == len(WEIGHTS) - 1
    grad = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    turned = torch.cat([grad[:3], grad[3:].flip(1)])
    steps = []
    for checkpoint, own in ((path, grad), (saved, grad), (saved, turned)):
        param = nn.Parameter(torch.zeros(5, 8))
        optimizer = LearnedTeleportOptimizer([param], total_steps=10, checkpoint=checkpoint)
        param.grad = own.clone()
        optimizer.step()
        steps.append(param.detach())
    assert torch.equal(steps[0], steps[1])
    lengths = steps[0].norm(dim=1)
    torch.testing.assert_close(lengths, lengths.mean().expand(5))
    cosines = -torch.nn.functional.cosine_similarity(steps[0], grad, dim=1)
    assert (cosines.min() > 1 - 1e-5) == (block_rows == 1)
    assert cosines.min() > 0.5
    assert torch.allclose(steps[2][:3], steps[0][:3], rtol=1e-5) == (block_rows < 5)


@pytest.mark.parametrize("block_rows", [0, -1])
def test_blocks_have_a_row(block_rows: int) -> None:
    with pytest.raises(ValueError, match=f"block_rows must be at least 1, got {block_rows}"):
        MetaOptimizer(4, block_rows=block_rows)


def test_the_shipped_checkpoints_have_the_blocks_that_are_documented() -> None:
    blocks = {name: load_checkpoint(name).block_rows for name in list_checkpoints()}
    assert blocks == {"default": 64, "light": 8}
