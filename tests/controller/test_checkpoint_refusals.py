"""Checkpoints that are damaged are refused, whatever it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from teleport_optim import CheckpointError, MetaOptimizer, load_checkpoint, save_checkpoint
from teleport_optim.controller.checkpoints import read_card
from tests.helpers.checkpoint_files import MISTAKES, WEIGHTS, load_or_refuse, rewrite, write_card, written


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.values(), ids=MISTAKES)
def test_damaged_checkpoints_are_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    path = written(tmp_path)
    assert load_or_refuse(path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
    assert not load_or_refuse(path)


@pytest.mark.parametrize("version", [0, -1, 1.0, True, None, "", "one", math.nan, math.inf, -(10**4000), [1], {}])
def test_no_version_is_refused(tmp_path: Path, version: object) -> None:
    path = written(tmp_path)
    write_card(path, read_card(path) | {"format_version": version})
    with pytest.raises(CheckpointError, match="fetch it again"):
        load_checkpoint(path)
    assert not load_or_refuse(path)


def test_no_version_in_the_weights_is_the_first(tmp_path: Path) -> None:
    path = written(tmp_path)
    rewrite(path, WEIGHTS)
    assert load_or_refuse(path)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = written(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*json \(Permission denied\): make it readable"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "weights.safetensors/x", "", "/dev/zero", "\ud800"])
def test_names_of_no_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    written(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(name)


def test_the_name_must_say_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.safetensors, got 'weights\.pt'"):
        save_checkpoint(MetaOptimizer(4), tmp_path / "weights.pt")


def test_a_card_must_be_small_enough_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="262144: shorten it"):
        save_checkpoint(MetaOptimizer(4), tmp_path / "weights.safetensors", {"note": "x" * 2**18})
    assert not list(tmp_path.iterdir())
