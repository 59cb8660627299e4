"""Weights of the meta-optimizer on disk: safetensors with a JSON card beside it, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from teleport_optim.controller.features import NUM_FEATURES
from teleport_optim.controller.network import MetaOptimizer

__all__ = ["CheckpointError", "list_checkpoints", "load_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 3
_MAX_BLOCK_ROWS = 1024
_MAX_BYTES, _MAX_HEADER_BYTES, _MAX_CARD_BYTES = 2**26, 2**16, 2**18
_ADDRESS = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)@(\w[\w.-]*(?:/\w[\w.-]*)*)", re.ASCII)
_HUB_FILES = {"meta_optimizer.json": _MAX_CARD_BYTES, "meta_optimizer.safetensors": _MAX_BYTES}
"""The card and then the weights in a repository of the Hugging Face Hub, and how large they may be."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of a newer format, or not of a meta-optimizer of this version."""


def save_checkpoint(meta_optimizer: MetaOptimizer, path: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write the weights to ``path`` and their card beside it, as ``path`` with the suffix ``.json``.

    The card holds what is given in ``card`` and the format version, the number of parameters and the sha256 of the
    weights. Both files are written atomically.

    Args:
        meta_optimizer: What to save.
        path: Must end in ``.safetensors``.
        card: How the weights were made; must be plain JSON of less than 256 KiB. The card of another checkpoint will do:
            what it says of its own weights is replaced.

    Raises:
        ValueError: if the path has another suffix, or if the card is larger.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(MetaOptimizer(hidden_size=4), Path(folder) / "mine.safetensors", {"made by": "hand"})
        ...     load_checkpoint(path).hidden_size, read_card(path)["made by"]
        (4, 'hand')
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a checkpoint's name ends in .safetensors, got {path.name!r}")
    tensors = {name: value.detach().cpu().contiguous() for name, value in meta_optimizer.state_dict().items()}
    metadata = {"format_version": str(FORMAT_VERSION), "hidden_size": str(meta_optimizer.hidden_size)}
    data = safetensors.torch.save(tensors, metadata)
    facts = {
        "format_version": FORMAT_VERSION,
        "sha256": hashlib.sha256(data).hexdigest(),
        "num_parameters": sum(param.numel() for param in meta_optimizer.parameters()),
    }
    full_card = json.dumps(facts | (card or {}) | facts, indent=1).encode() + b"\n"
    if len(full_card) > _MAX_CARD_BYTES:
        raise ValueError(
            f"the card has {len(full_card)} bytes, a checkpoint's has at most {_MAX_CARD_BYTES}: shorten it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    write_atomically(path.with_suffix(".json"), full_card)
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
    """The meta-optimizer of a shipped checkpoint, of a file, or of a repository on the Hugging Face Hub.

    Nothing in the files is trusted: at most 64 MiB of weights and 256 KiB of card are read, and before any of it is used
    these are checked: sha256 against the card, the format version in both files, size of the header, names, shapes,
    dtypes and that all weights are finite. The largest file there may be takes 0.6 s and 300 MiB, a shipped one 2 ms.

    A repository is read through ``huggingface_hub``, which keeps what it downloads in its cache; a checkpoint whose
    revision is a commit needs no network after the first time. To publish a checkpoint, upload its two files to a
    repository of models, the weights as ``meta_optimizer.safetensors`` and the card as ``meta_optimizer.json``.

    Args:
        checkpoint: A shipped name such as ``"default"``, the path of a ``.safetensors`` file with its card beside it, or
            ``"hf://owner/name@revision"``. The revision must be given, so that the weights cannot change under a training
            run: a commit, or a tag that nobody moves.

    Raises:
        CheckpointError: saying what is wrong with which file, and what to do.

    Example:
        >>> load_checkpoint("default").hidden_size > 0
        True
        >>> load_checkpoint("hf://owner/name")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        teleport_optim.controller.checkpoints.CheckpointError: 'hf://owner/name' is no address: write hf://owner/name@revision...
    """
    path = find_checkpoint(checkpoint)
    card = read_card(path)
    data = _read(path, _MAX_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    if card["sha256"] != digest:
        raise CheckpointError(
            f"{path} has sha256 {digest}, its card says {_brief(card['sha256'])}: fetch both files again"
        )
    layout = _layout(path, data)
    dtype, shape = layout.get("bias", ("", ()))
    if len(shape) != 1 or shape[0] < 1 or shape[0] % 4:
        raise CheckpointError(
            f"{path} holds no LSTM bias of 4 * hidden_size entries: it is not a meta-optimizer checkpoint"
        )
    if shape[0] ** 2 > len(data):
        raise CheckpointError(
            f"bias in {path} is {_brief((dtype, shape))}, and the weights that belong to it do not fit in the {len(data)} "
            "bytes of the file: fetch it again"
        )
    meta_optimizer = MetaOptimizer(shape[0] // 4)
    expected = meta_optimizer.state_dict()
    if set(layout) != set(expected):
        raise CheckpointError(
            f"{path} holds the tensors {_brief(sorted(layout))}, a meta-optimizer has {sorted(expected)}: it was made by "
            "another version"
        )
    for name, (dtype, shape) in layout.items():
        if (dtype, shape) != ("F32", tuple(expected[name].shape)):
            raise CheckpointError(
                f"{name} in {path} is {_brief((dtype, shape))}, expected {('F32', tuple(expected[name].shape))} "
                f"(with {NUM_FEATURES} features): it was made by another version"
            )
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise _unreadable(path, error) from error
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} in {path} holds values that are not finite: fetch the checkpoint again")
    meta_optimizer.load_state_dict(tensors)
    if tensors["rows_per_block"].item() not in range(1, _MAX_BLOCK_ROWS + 1):
        raise CheckpointError(
            f"rows_per_block in {path} is {tensors['rows_per_block'].item()}, expected a whole number from 1 to "
            f"{_MAX_BLOCK_ROWS}: fetch it again"
        )
    return meta_optimizer.requires_grad_(False)


def _layout(path: Path, data: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor, from the header alone; whether the data fit them is left to safetensors."""
    header_size = int.from_bytes(data[:8], "little")
    if header_size > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError(
            f"{path} has {len(data)} bytes and gives its header {header_size}, of at most {_MAX_HEADER_BYTES}: fetch it again"
        )
    try:
        header = json.loads(data[8 : 8 + header_size].decode())
        version = int(str(header.pop("__metadata__", {}).get("format_version", FORMAT_VERSION)))
        layout = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in header.items()}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error
    _check_version(path, version)
    return layout


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of the checkpoint at ``path``; of what is in it, ``format_version`` and ``sha256`` are checked.

    Raises:
        CheckpointError: if the card is missing, is larger than 256 KiB, is not JSON, or is of a newer format.
    """
    card_path = Path(path).with_suffix(".json")
    if not os.path.isfile(card_path):
        raise CheckpointError(f"{path} has no card: {card_path.name} must lie beside it")
    data = _read(card_path, _MAX_CARD_BYTES)
    try:
        card = json.loads(data.decode())
        version = int(str(card["format_version"]))
        if not isinstance(card["sha256"], str):
            raise ValueError("its sha256 is not text")
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{card_path} is not the card of a checkpoint ({_brief(repr(error))}): fetch it again"
        ) from error
    _check_version(card_path, version)
    return dict(card)


def _check_version(path: Path, version: int) -> None:
    if version < 1:
        raise CheckpointError(f"{path} has format {_brief(version)}, the first is 1: fetch it again")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {_brief(version)}, this version of teleport_optim reads up to {FORMAT_VERSION}: update it"
        )


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CheckpointError(
                    f"{path} has {size} bytes, of at most {limit}: it is not part of a meta-optimizer checkpoint"
                )
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({_brief(error.strerror)}): make it readable") from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a readable safetensors file ({_brief(repr(error))}): fetch it again")


def _brief(value: object) -> str:
    """The beginning of a text that may come from a stranger, in one line that is safe to print."""
    text = " ".join(str(value).split())[:200]
    return "".join(character if character.isprintable() else "?" for character in text)


def list_checkpoints() -> dict[str, Path]:
    """The shipped checkpoints by name."""
    return {path.stem: path for path in sorted(_shipped_folder().glob("*.safetensors"))}


@cache
def _shipped_folder() -> Path:
    """``pretrained/``: inside the installed package, or beside it in a source tree."""
    package = Path(str(resources.files("teleport_optim")))
    installed = package / "pretrained"
    return installed if installed.is_dir() else package.parent / "pretrained"


def find_checkpoint(checkpoint: str | Path) -> Path:
    """Where the weights of a checkpoint lie, downloaded if need be; the card lies beside them.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """
    shipped = list_checkpoints()
    if isinstance(checkpoint, str) and checkpoint in shipped:
        return shipped[checkpoint]
    if isinstance(checkpoint, str) and checkpoint.startswith("hf://"):
        return _download(checkpoint)
    if not os.path.isfile(checkpoint):
        raise CheckpointError(
            f"no checkpoint {str(checkpoint)!r}: give the path of a file, hf://owner/name@revision, or one of the shipped "
            f"{sorted(shipped)}"
        )
    return Path(checkpoint)


def _download(address: str) -> Path:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise CheckpointError(
            f"{address!r} is no address: write hf://owner/name@revision, with the revision (a commit or a tag) so that the "
            "weights cannot change under a training run"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(f"{address} needs huggingface_hub: pip install 'teleport-optim[hub]'") from error
    repository, revision = match.groups()
    for name, limit in _HUB_FILES.items():
        try:
            found = hf_hub_download(repository, name, revision=revision, dry_run=True)
            if (found.file_size or 0) > limit:
                raise ValueError(f"{name} has {found.file_size} bytes, of at most {limit}")
            revision = found.commit_hash
            path = Path(hf_hub_download(repository, name, revision=revision))
        except Exception as error:  # the errors of huggingface_hub have no base of their own
            reason = error.__cause__ if isinstance(error, FileNotFoundError) else None
            raise CheckpointError(
                f"cannot fetch {name} of {address} ({_brief(reason or error)}): check the address and the network, or download "
                f"{' and '.join(_HUB_FILES)} and give the path"
            ) from error
    return path
