"""Weights of the meta-optimizer on disk: safetensors with a JSON card beside it, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from teleport_optim.features import NUM_FEATURES
from teleport_optim.meta_optimizer import MetaOptimizer

__all__ = ["CheckpointError", "list_checkpoints", "load_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 1
_MAX_BYTES = 64 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of a newer format, or not of a meta-optimizer of this version."""


def save_checkpoint(meta_optimizer: MetaOptimizer, path: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write the weights to ``path`` and their card beside it, as ``path`` with the suffix ``.json``.

    The card holds what is given in ``card`` and the format version, the number of parameters and the sha256 of the
    weights. Both files are written atomically.

    Args:
        meta_optimizer: What to save.
        path: Must end in ``.safetensors``.
        card: How the weights were made; must be plain JSON.

    Raises:
        ValueError: if the path has another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a checkpoint's name ends in .safetensors, got {path.name!r}")
    tensors = {name: value.detach().cpu().contiguous() for name, value in meta_optimizer.state_dict().items()}
    metadata = {"format_version": str(FORMAT_VERSION), "hidden_size": str(meta_optimizer.hidden_size)}
    data = safetensors.torch.save(tensors, metadata)
    full_card = {
        "format_version": FORMAT_VERSION,
        "sha256": hashlib.sha256(data).hexdigest(),
        "num_parameters": sum(value.numel() for value in tensors.values()),
        **(card or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    write_atomically(path.with_suffix(".json"), json.dumps(full_card, indent=1).encode() + b"\n")
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at every moment, even if the power fails, it is there whole, as it was or as it is to be."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(checkpoint: str | Path) -> MetaOptimizer:
    """The meta-optimizer of a shipped checkpoint (by name, such as ``"default"``) or of a file (by path).

    Everything is checked before it is used: size, sha256 against the card, format version, names, shapes, dtypes and that
    all weights are finite.

    Raises:
        CheckpointError: saying what is wrong with which file, and what to do.

    Example:
        >>> load_checkpoint("default").hidden_size > 0
        True
    """
    path = _find(checkpoint)
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {_MAX_BYTES} bytes: it is not a meta-optimizer checkpoint")
    data = path.read_bytes()
    card = read_card(path)
    digest = hashlib.sha256(data).hexdigest()
    if card.get("sha256") != digest:
        raise CheckpointError(f"{path} has sha256 {digest}, its card says {card.get('sha256')}: fetch both files again")
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}): fetch it again") from error
    bias = tensors.get("bias")
    if bias is None or bias.dim() != 1 or bias.numel() == 0 or bias.numel() % 4:
        raise CheckpointError(
            f"{path} holds no LSTM bias of 4 * hidden_size entries: it is not a meta-optimizer checkpoint"
        )
    meta_optimizer = MetaOptimizer(bias.numel() // 4)
    expected = meta_optimizer.state_dict()
    if set(tensors) != set(expected):
        raise CheckpointError(f"{path} holds the tensors {sorted(tensors)}, a meta-optimizer has {sorted(expected)}")
    for name, value in tensors.items():
        if value.shape != expected[name].shape or value.dtype != torch.float32:
            raise CheckpointError(
                f"{name} in {path} is {value.dtype} {tuple(value.shape)}, expected torch.float32 "
                f"{tuple(expected[name].shape)} (with {NUM_FEATURES} features): it was made by another version"
            )
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} in {path} holds values that are not finite: fetch the checkpoint again")
    meta_optimizer.load_state_dict(tensors)
    return meta_optimizer.requires_grad_(False)


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of the checkpoint at ``path``.

    Raises:
        CheckpointError: if the card is missing, is not JSON, or is of a newer format.
    """
    card_path = Path(path).with_suffix(".json")
    try:
        card = json.loads(card_path.read_text())
        version = int(card["format_version"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no card: {card_path.name} must lie beside it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{card_path} is not the card of a checkpoint ({error!r}): fetch it again") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this version of teleport_optim reads up to {FORMAT_VERSION}: update it"
        )
    return dict(card)


def list_checkpoints() -> dict[str, Path]:
    """The shipped checkpoints by name."""
    return {path.stem: path for path in sorted(_shipped_folder().glob("*.safetensors"))}


@cache
def _shipped_folder() -> Path:
    """``pretrained/``: inside the installed package, or beside it in a source tree."""
    package = Path(str(resources.files("teleport_optim")))
    installed = package / "pretrained"
    return installed if installed.is_dir() else package.parent / "pretrained"


def _find(checkpoint: str | Path) -> Path:
    shipped = list_checkpoints()
    if isinstance(checkpoint, str) and checkpoint in shipped:
        return shipped[checkpoint]
    path = Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint {str(checkpoint)!r}: give a path, or one of the shipped {sorted(shipped)}"
        )
    return path
