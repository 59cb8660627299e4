"""Files of a checkpoint, and how to write wrong ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from teleport_optim import CheckpointError, MetaOptimizer, load_checkpoint, save_checkpoint
from teleport_optim.controller.checkpoints import FORMAT_VERSION, read_card
from teleport_optim.optim.controls import Controls


def written(folder: Path) -> Path:
    return save_checkpoint(MetaOptimizer(4), folder / "weights.safetensors", {"note": "a test"})


def put(path: Path, data: bytes) -> None:
    """Other content with a card that fits it, as a careful forger would write them."""
    card = read_card(path) | {"sha256": hashlib.sha256(data).hexdigest()}
    path.write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps(card))


def rewrite(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    put(path, safetensors.torch.save(tensors, metadata))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the numbers of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: object, numbers: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def forge(path: Path, name: str = "bias", **entry: object) -> None:
    """Other values in the header for a tensor."""
    header, numbers = split(path.read_bytes())
    put(path, joined(header | {name: header.get(name, {}) | entry}, numbers))


def write_card(path: Path, card: object) -> None:
    path.with_suffix(".json").write_bytes(card if isinstance(card, bytes) else json.dumps(card).encode())


WEIGHTS = MetaOptimizer(4).state_dict()
NUM_OUTPUTS = len(Controls._fields)
NUM_BYTES = 4 * sum(value.numel() for value in WEIGHTS.values())


def of_the_first_format() -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of format 1, which had six outputs and always orthogonalised whole matrices."""
    tensors = {name: value for name, value in WEIGHTS.items() if name != "rows_per_block"}
    readouts = {name: value for name, value in tensors.items() if len(value) == NUM_OUTPUTS}
    assert set(readouts) == {"readout_weight", "skip_weight", "readout_bias"}
    return tensors | {name: torch.cat([value, value[:1]]) for name, value in readouts.items()}


def of_the_second_format() -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of format 2, which orthogonalised whole matrices or none."""
    tensors = {name: value for name, value in WEIGHTS.items() if name != "rows_per_block"}
    return tensors | {"is_orthogonalising": torch.tensor(1.0)}


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "give the path of a file, hf://.* or one of the shipped"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "no checkpoint"),
    "no card": (lambda path: path.with_suffix(".json").unlink(), "has no card"),
    "card is a folder": (
        lambda path: (path.with_suffix(".json").unlink(), path.with_suffix(".json").mkdir()),
        "has no card",
    ),
    "card is not JSON": (lambda path: write_card(path, b"{"), "not the card"),
    "card is not UTF-8": (lambda path: write_card(path, json.dumps(read_card(path)).encode("utf-16")), "not the card"),
    "card is a list": (lambda path: write_card(path, [read_card(path)]), "not the card"),
    "card is a number": (lambda path: write_card(path, 1), "not the card"),
    "card is text": (lambda path: write_card(path, "format_version"), "not the card"),
    "card of many bytes": (
        lambda path: write_card(path, read_card(path) | {"note": "x" * 2**18}),
        r"json has 2\d{5} bytes, of at most 262144",
    ),
    "card of many levels": (
        lambda path: write_card(path, b"[" * 2**18),
        r"not the card of a checkpoint \(RecursionError",
    ),
    "card of many levels of objects": (
        lambda path: write_card(path, b'{"":' * 2**16),
        r"not the card of a checkpoint \(RecursionError",
    ),
    "card without a version": (lambda path: write_card(path, {"sha256": ""}), "not the card.*format_version"),
    "card without sha256": (lambda path: write_card(path, {"format_version": 1}), "not the card.*sha256"),
    "sha256 is not text": (lambda path: write_card(path, read_card(path) | {"sha256": [1]}), "not the card.*sha256"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "its card says"),
    "empty": (lambda path: path.write_bytes(b""), "its card says"),
    "empty with a fitting card": (lambda path: put(path, b""), "has 0 bytes and gives its header 0"),
    "of many bytes": (lambda path: os.truncate(path, 2**36), "has 68719476736 bytes, of at most 67108864"),
    "header longer than the file": (
        lambda path: put(path, (10_000).to_bytes(8, "little") + path.read_bytes()[8:]),
        "gives its header 10000",
    ),
    "header of many bytes": (
        lambda path: put(path, joined(json.dumps(split(path.read_bytes())[0]).encode().ljust(2**16 + 1), bytes(9999))),
        "gives its header 65537, of at most 65536",
    ),
    "header of many levels": (lambda path: put(path, joined(b"[" * 2**16, b"")), "RecursionError"),
    "header is not UTF-8": (lambda path: put(path, joined(b"\xff", b"")), "UnicodeDecodeError"),
    "header is a number": (lambda path: put(path, joined(1, b"")), "not a readable safetensors file"),
    "header without a dtype": (
        lambda path: put(path, joined({"bias": {}}, b"")),
        "not a readable safetensors .*'dtype'",
    ),
    "header is a list": (lambda path: put(path, joined([], b"")), "not a readable safetensors file"),
    "newer format of the card": (
        lambda path: write_card(path, read_card(path) | {"format_version": 99}),
        "json has format 99.*update it",
    ),
    "newer format of the weights": (
        lambda path: rewrite(path, WEIGHTS, {"format_version": str(FORMAT_VERSION + 1)}),
        f"safetensors has format {FORMAT_VERSION + 1}.*update it",
    ),
    "the first format": (
        lambda path: rewrite(path, of_the_first_format(), {"format_version": "1"}),
        "holds the tensors",
    ),
    "the second format": (
        lambda path: rewrite(path, of_the_second_format(), {"format_version": "2"}),
        "holds the tensors.*is_orthogonalising.*another version",
    ),
    "six outputs": (
        lambda path: rewrite(path, WEIGHTS | of_the_first_format(), {"format_version": "1"}),
        r"\(6,.*another version",
    ),
    "rows per block are no scalar": (
        lambda path: rewrite(path, WEIGHTS | {"rows_per_block": torch.ones(1)}),
        r"rows_per_block.*\(1,\).*another version",
    ),
    "rows per block are an integer": (
        lambda path: rewrite(path, WEIGHTS | {"rows_per_block": torch.tensor(8, dtype=torch.int32)}),
        r"rows_per_block.*'I32'.*another version",
    ),
    **{
        f"{value} rows per block": (
            lambda path, value=value: rewrite(path, WEIGHTS | {"rows_per_block": torch.tensor(value)}),
            f"rows_per_block .* {reason}",
        )
        for values, reason in (
            ((math.nan, math.inf, -math.inf), "not finite"),
            ((0.0, -0.0, -1.0, 0.5, 1.5, 31.999, 1025.0, 2.0**24, 3e38), "expected a whole number from 1 to 1024"),
        )
        for value in values
    },
    "format of the weights is no number": (
        lambda path: rewrite(path, WEIGHTS, {"format_version": "new"}),
        "not a readable safetensors file .*'new'",
    ),
    "other tensors": (lambda path: rewrite(path, {"x": torch.zeros(3)}), "no LSTM bias"),
    "tensors left out": (lambda path: rewrite(path, {"bias": torch.zeros(4)}), "holds the tensors"),
    "a tensor too many": (lambda path: rewrite(path, WEIGHTS | {"x": torch.zeros(0)}), "holds the tensors.*'x'"),
    "a large bias alone": (lambda path: rewrite(path, {"bias": torch.zeros(2**22)}), "do not fit in the 1677"),
    "a large bias in the header": (lambda path: forge(path, shape=[2**62]), "do not fit in the"),
    "a larger bias than can be printed": (lambda path: forge(path, shape=[4 * 10**4000]), "do not fit in the"),
    "a bias of two entries": (lambda path: forge(path, shape=[2]), "no LSTM bias of 4"),
    "a bias of half entries": (lambda path: forge(path, shape=[16.5]), "not a readable safetensors file"),
    "a bias of negative size": (lambda path: forge(path, shape=[-16]), "no LSTM bias"),
    "a bias of endless size": (lambda path: forge(path, shape=[math.inf]), "not a readable safetensors file"),
    "other shapes": (
        lambda path: rewrite(path, WEIGHTS | {"readout_bias": torch.zeros(9)}),
        r"readout_bias.*\(9,\).*another version",
    ),
    "other dtype": (
        lambda path: rewrite(path, {name: value.double() for name, value in WEIGHTS.items()}),
        r"\('F64', .*expected \('F32', .*another version",
    ),
    "dtype without a name in torch": (
        lambda path: forge(path, "readout_bias", dtype="F8_E8M0", shape=[4 * NUM_OUTPUTS]),
        "'F8_E8M0'.*expected",
    ),
    "shape that torch cannot hold": (
        lambda path: forge(path, "x", dtype="F32", shape=[2**63, 0], data_offsets=[NUM_BYTES, NUM_BYTES]),
        "holds the tensors.*'x'",
    ),
    "a text that would be obeyed by a terminal": (lambda path: forge(path, dtype="\x1b[31m"), r"bias .*x1b\[31m"),
    "overlapping": (lambda path: forge(path, data_offsets=[4, 68]), "not a readable safetensors file"),
    "not finite": (
        lambda path: rewrite(path, WEIGHTS | {"readout_bias": torch.full((NUM_OUTPUTS,), torch.nan)}),
        "not finite",
    ),
    "endless": (lambda path: rewrite(path, WEIGHTS | {"bias": torch.full((16,), -torch.inf)}), "not finite"),
}


def load_or_refuse(path: Path) -> bool:
    """Whether it loads; if so, the weights must be sound, if not, the reason must be one that can be printed."""
    try:
        loaded = load_checkpoint(path)
    except CheckpointError as error:
        reason = str(error)
        assert reason.isprintable()
        assert len(reason) < 1000
        return False
    expected = MetaOptimizer(loaded.hidden_size).state_dict()
    for name, value in loaded.state_dict().items():
        assert value.shape == expected[name].shape
        assert value.dtype == torch.float32
        assert bool(torch.isfinite(value).all())
    assert loaded.rows_per_block.item() == loaded.block_rows
    assert 1 <= loaded.block_rows <= 1024
    return True
