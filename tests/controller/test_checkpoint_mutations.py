"""Checkpoints that are changed at random are refused, or load as they should."""

from __future__ import annotations

import json
import math
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
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoint_files import joined, load_or_refuse, put, split, written

NUM_MUTATIONS = 20_000


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
