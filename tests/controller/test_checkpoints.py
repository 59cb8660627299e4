"""Checkpoints: what is written comes back, and nothing damaged is used."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teleport_optim import (
    CheckpointError,
    LearnedTeleportOptimizer,
    MetaOptimizer,
    load_checkpoint,
    save_checkpoint,
)
from teleport_optim.controller.checkpoints import FORMAT_VERSION, list_checkpoints, read_card
from teleport_optim.optim.controls import Controls

NUM_MUTATIONS = 20_000
COMMIT = "0123456789abcdef" * 2 + "01234567"


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


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


ODD = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    2**31,
    2**62,
    2**64,
    10**30,
    10**4000,
    math.nan,
    math.inf,
    1e308,
    "",
    "1",
    "2",
    "3",
    "x" * 999,
]
ODD += [
    "F64",
    "F16",
    "BF16",
    "F8_E8M0",
    "F4",
    "C64",
    "I32",
    "BOOL",
    "\x1b[31m",
    "\ud800",
    [],
    [0],
    [2**63, 0],
    [-1],
    [0, 64],
]
ODD += [[4, 2**62], [2**62, 4], [4, 4, 4], [2.0], [True], {}, {"dtype": "F32"}, nested(200)]
"""Values that belong nowhere in a header or a card."""


def flipped(data: bytes, random: Random, count: int) -> bytes:
    content = bytearray(data)
    for _ in range(count):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(content)


def with_other_header_size(data: bytes, random: Random) -> bytes:
    sizes = [0, 1, 7, len(data) - 8, len(data) - 7, 2**16, 2**31, 2**63, 2**64 - 1, random.getrandbits(64)]
    return random.choice([*sizes, random.randrange(len(data))]).to_bytes(8, "little") + data[8:]


def with_other_header(data: bytes, random: Random) -> bytes:
    header, numbers = split(data)
    entry = header[random.choice(sorted(header))]
    entry[random.choice(sorted(entry))] = random.choice(ODD)
    return joined(header, numbers)


def with_other_offsets(data: bytes, random: Random) -> bytes:
    header, numbers = split(data)
    entry = header[random.choice(sorted(set(header) - {"__metadata__"}))]
    shift = random.choice([-(2**63), -4, -1, 1, 4, 64, 2**31, 2**63])
    entry["data_offsets"][random.randrange(2)] += shift
    return joined(header, numbers)


def with_other_names(data: bytes, random: Random) -> bytes:
    header, numbers = split(data)
    name = random.choice(sorted(header))
    header[random.choice(["", "x", "\ud800", "__metadata__", "bias", name.upper()])] = header.pop(name)
    return joined(header, numbers)


def with_tensors_exchanged(data: bytes, random: Random) -> bytes:
    header, numbers = split(data)
    one, other = random.sample(sorted(set(header) - {"__metadata__"}), 2)
    header[one], header[other] = header[other], header[one]
    return joined(header, numbers)


def with_numbers_that_are_none(data: bytes, random: Random) -> bytes:
    header, numbers = split(data)
    index = 4 * random.randrange(len(numbers) // 4)
    value = struct.pack("<f", random.choice([math.nan, math.inf, -math.inf]))
    return joined(header, numbers[:index] + value + numbers[index + 4 :])


def with_an_odd_entry(data: bytes, random: Random) -> bytes:
    card = json.loads(data)
    card[random.choice([*sorted(card), "new"])] = random.choice(ODD)
    return json.dumps(card).encode()


def random_bytes(random: Random) -> bytes:
    return random.randbytes(random.randrange(300))


MUTATIONS: dict[str, tuple[Callable[[bytes, Random], bytes], bool]] = {
    "truncated": (lambda data, random: data[: random.randrange(len(data))], False),
    "one bit": (lambda data, random: flipped(data, random, 1), True),
    "some bits": (lambda data, random: flipped(data, random, random.randint(2, 20)), True),
    "one bit of the header": (lambda data, random: flipped(data[:400], random, 1) + data[400:], True),
    "header size": (with_other_header_size, False),
    "header entry": (with_other_header, True),
    "offsets": (with_other_offsets, False),
    "names": (with_other_names, True),
    "tensors exchanged": (with_tensors_exchanged, False),
    "not finite": (with_numbers_that_are_none, False),
    "appended": (lambda data, random: data + b"\0" + random_bytes(random), False),
    "random bytes": (lambda data, random: random_bytes(random), False),
    "random header": (lambda data, random: joined(random_bytes(random), split(data)[1]), False),
    "odd header": (lambda data, random: joined(random.choice(ODD), split(data)[1]), False),
}
"""What may happen to the weights; whether some of it can load where the card fits."""
CARD_MUTATIONS: dict[str, tuple[Callable[[bytes, Random], bytes], bool]] = {
    "truncated": (lambda data, random: data[: random.randrange(len(data) - 2)], False),
    "one bit": (lambda data, random: flipped(data, random, 1), True),
    "some bits": (lambda data, random: flipped(data, random, random.randint(2, 20)), True),
    "entry": (with_an_odd_entry, True),
    "odd": (lambda data, random: json.dumps(random.choice(ODD)).encode(), False),
    "random bytes": (lambda data, random: random_bytes(random), False),
    "many levels": (lambda data, random: random.choice([b"[", b'{"":']) * random.randrange(1, 99_999), False),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A checkpoint and the content of its two files."""
    path = written(tmp_path_factory.mktemp("fuzz"))
    return path, path.read_bytes(), path.with_suffix(".json").read_bytes()


def check_mutation(sound: tuple[Path, bytes, bytes], kind: str, random: Random) -> bool:
    """Whether weights that were changed load with a card that fits; with the card as it was they must not."""
    path, data, card = sound
    mutate, can_load = MUTATIONS[kind]
    content = mutate(data, random)
    path.write_bytes(content)
    path.with_suffix(".json").write_bytes(card)
    assert load_or_refuse(path) == (content == data)
    put(path, content)
    loads = load_or_refuse(path)
    assert can_load or not loads
    return loads


def check_card_mutation(sound: tuple[Path, bytes, bytes], kind: str, random: Random) -> bool:
    """Whether sound weights load with a card that was changed."""
    path, data, card = sound
    mutate, can_load = CARD_MUTATIONS[kind]
    path.write_bytes(data)
    path.with_suffix(".json").write_bytes(mutate(card, random))
    loads = load_or_refuse(path)
    assert can_load or not loads
    return loads


@pytest.mark.parametrize("kind", MUTATIONS)
@settings(max_examples=20, deadline=None)
@given(random=st.randoms())
def test_changed_weights_are_refused_or_sound(sound: tuple[Path, bytes, bytes], kind: str, random: Random) -> None:
    check_mutation(sound, kind, random)


@pytest.mark.parametrize("kind", CARD_MUTATIONS)
@settings(max_examples=20, deadline=None)
@given(random=st.randoms())
def test_weights_with_a_changed_card_are_refused_or_sound(
    sound: tuple[Path, bytes, bytes], kind: str, random: Random
) -> None:
    check_card_mutation(sound, kind, random)


@pytest.fixture
def _little_memory() -> Iterator[None]:
    """The process cannot take more than 256 MiB beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited through /proc")
@pytest.mark.usefixtures("_little_memory")
def test_no_mutation_takes_long_or_much_memory(sound: tuple[Path, bytes, bytes]) -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**28)
    kinds = [(check_mutation, kind) for kind in MUTATIONS] + [(check_card_mutation, kind) for kind in CARD_MUTATIONS]
    loaded: Counter[str] = Counter()
    for seed in range(NUM_MUTATIONS):
        check, kind = kinds[seed % len(kinds)]
        start = time.process_time()
        loaded[f"{check.__name__} {kind}"] += check(sound, kind, Random(seed))
        assert time.process_time() - start < 1.0, (kind, seed)
    can_load = {f"check_mutation {kind}" for kind in MUTATIONS if MUTATIONS[kind][1]}
    can_load |= {f"check_card_mutation {kind}" for kind in CARD_MUTATIONS if CARD_MUTATIONS[kind][1]}
    assert {name for name, count in loaded.items() if count} == can_load


def test_the_name_must_say_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.safetensors, got 'weights\.pt'"):
        save_checkpoint(MetaOptimizer(4), tmp_path / "weights.pt")


def test_a_card_must_be_small_enough_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="262144: shorten it"):
        save_checkpoint(MetaOptimizer(4), tmp_path / "weights.safetensors", {"note": "x" * 2**18})
    assert not list(tmp_path.iterdir())


class TestHub:
    """Repositories that lie in the cache of ``huggingface_hub``, without a network."""

    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The cached weights of ``hf://owner/name@v1``, which is the commit ``COMMIT``."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        repository = tmp_path / "models--owner--name"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "v1").write_text(COMMIT)
        return save_checkpoint(MetaOptimizer(4), repository / "snapshots" / COMMIT / "meta_optimizer.safetensors")

    @pytest.mark.parametrize("revision", ["v1", COMMIT])
    def test_loads_what_a_file_would_give(self, path: Path, revision: str) -> None:
        loaded = load_checkpoint(f"hf://owner/name@{revision}").state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in load_checkpoint(path).state_dict().items())

    @pytest.mark.parametrize(
        "address",
        [
            "hf://",
            "hf://owner/name",
            "hf://owner/name@",
            "hf://name@v1",
            "hf:///name@v1",
            "hf://a/b/c@v1",
            "hf://a/b@v1@v2",
            "hf://a/b@../v1",
            "hf://a/b@v1/..",
            "hf://../b@v1",
            "hf://a/b@v1/",
            "hf://ä/b@v1",
            "hf://a/b@-v",
            "hf://a/b@v1\n",
            "hf://a/b@ v1",
        ],
    )
    def test_what_is_no_address_is_refused(self, address: str) -> None:
        with pytest.raises(CheckpointError, match=r"is no address: write hf://owner/name@revision.*cannot change"):
            load_checkpoint(address)

    @pytest.mark.parametrize("address", ["hf://owner/other@v1", "hf://owner/name@v2", f"hf://owner/name@{'0' * 40}"])
    def test_what_is_not_there_is_refused(self, path: Path, address: str) -> None:
        reason = "cannot fetch meta_optimizer.json of {} \\(.*offline.*\\): check the address and the network"
        with pytest.raises(CheckpointError, match=reason.format(address)) as caught:
            load_checkpoint(address)
        assert str(caught.value).isprintable()

    def test_a_name_that_the_hub_does_not_allow_is_refused(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"cannot fetch .*owner--name"):
            load_checkpoint("hf://owner/owner--name@v1")

    @pytest.mark.parametrize("kind", MISTAKES)
    def test_nothing_is_trusted(self, path: Path, kind: str) -> None:
        spoil, message = MISTAKES[kind]
        messages = {
            "missing": "cannot fetch meta_optimizer.safetensors of hf://owner/name@v1 ",
            "no card": "cannot fetch meta_optimizer.json of hf://owner/name@v1 ",
            "a folder": "cannot read .*Is a directory",
            "of many bytes": "cannot fetch meta_optimizer.safetensors .*has 68719476736 bytes, of at most 67108864",
            "card of many bytes": "cannot fetch meta_optimizer.json .*bytes, of at most 262144",
        }
        assert load_or_refuse(path)
        spoil(path)
        with pytest.raises(CheckpointError, match=messages.get(kind, message)):
            load_checkpoint("hf://owner/name@v1")

    def test_both_files_are_of_one_commit(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        calls = []
        download = huggingface_hub.hf_hub_download

        def record(*arguments: str, **options: Any) -> object:
            calls.append((arguments[1], options["revision"]))
            return download(*arguments, **options)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", record)
        load_checkpoint("hf://owner/name@v1")
        card, weights = "meta_optimizer.json", "meta_optimizer.safetensors"
        assert calls == [(card, "v1"), (card, COMMIT), (weights, COMMIT), (weights, COMMIT)]

    def test_whatever_goes_wrong_is_said_in_one_line(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: str, **options: Any) -> None:
            raise RuntimeError("the wire\nwas cut\x1b" + 999 * "!")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        with pytest.raises(CheckpointError, match=r"\(the wire was cut\?!+\)") as caught:
            load_checkpoint("hf://owner/name@v1")
        assert len(str(caught.value)) < 500

    def test_the_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(CheckpointError, match=r"pip install 'teleport-optim\[hub\]'"):
            load_checkpoint("hf://owner/name@v1")
