"""Checkpoints: what is written comes back, and nothing damaged is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teleport_optim import CheckpointError, MetaOptimizer, load_checkpoint, save_checkpoint
from teleport_optim.checkpoints import list_checkpoints, read_card


def written(folder: Path) -> Path:
    return save_checkpoint(MetaOptimizer(4), folder / "weights.safetensors", {"note": "a test"})


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights with a card that fits them, as a careful forger would write them."""
    data = safetensors.torch.save(tensors)
    path.write_bytes(data)
    card = read_card(path) | {"sha256": hashlib.sha256(data).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(card))


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


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "give a path, or one of the shipped"),
    "no card": (lambda path: path.with_suffix(".json").unlink(), "has no card"),
    "card is not JSON": (lambda path: path.with_suffix(".json").write_text("{"), "not the card"),
    "card without a version": (lambda path: path.with_suffix(".json").write_text("{}"), "not the card"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "its card says"),
    "empty": (lambda path: path.write_bytes(b""), "its card says"),
    "newer format": (
        lambda path: path.with_suffix(".json").write_text(json.dumps(read_card(path) | {"format_version": 99})),
        "has format 99.*update it",
    ),
    "other tensors": (lambda path: rewrite(path, {"x": torch.zeros(3)}), "no LSTM bias"),
    "tensors left out": (lambda path: rewrite(path, {"bias": torch.zeros(16)}), "holds the tensors"),
    "other shapes": (
        lambda path: rewrite(path, MetaOptimizer(4).state_dict() | {"readout_bias": torch.zeros(9)}),
        r"readout_bias.*\(9,\).*another version",
    ),
    "other dtype": (
        lambda path: rewrite(path, {name: value.double() for name, value in MetaOptimizer(4).state_dict().items()}),
        r"torch\.float64",
    ),
    "not finite": (
        lambda path: rewrite(path, MetaOptimizer(4).state_dict() | {"readout_bias": torch.full((6,), torch.nan)}),
        "not finite",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.values(), ids=MISTAKES)
def test_damaged_checkpoints_are_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    path = written(tmp_path)
    load_checkpoint(path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_byte_with_a_fitting_card_is_loaded_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = written(tmp_path_factory.mktemp("fuzz"))
    content = bytearray(path.read_bytes())
    index = data.draw(st.integers(0, len(content) - 1))
    content[index] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its card says"):
        load_checkpoint(path)
    card = read_card(path) | {"sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(card))
    try:
        loaded = load_checkpoint(path)
    except CheckpointError:
        return
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())


def test_the_name_must_say_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.safetensors, got 'weights\.pt'"):
        save_checkpoint(MetaOptimizer(4), tmp_path / "weights.pt")
