"""What the library safetensors refuses is refused here, on the same damage; what both read is the same."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data.disk.formats.regular import UnreadableError
from data.disk.tensor_file import read_header
from data.disk.weights import StoredWeights

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.zeros(0, 4, dtype=torch.bfloat16),
    "c.weight": torch.arange(4, dtype=torch.int64),
    "d": torch.tensor(2.5, dtype=torch.float16),
}
SOUND = save(TENSORS, {"format": "pt"})
(LENGTH,) = struct.unpack("<Q", SOUND[:8])
HEADER: dict[str, Any] = json.loads(SOUND[8 : 8 + LENGTH])
BODY = SOUND[8 + LENGTH :]


def packed(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + BODY


def by_the_library(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        with safe_open(path, "pt") as stored:
            parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - it is no dict
            return {
                name: (
                    part.get_dtype(),
                    tuple(part.get_shape()),
                    bytes(stored.get_tensor(name).contiguous().flatten().view(torch.uint8).numpy().data),
                )
                for name, part in parts.items()
            }
    except (SafetensorError, OSError, TypeError):  # the last from torch, for a size that 64 bits do not hold
        return None


def by_us(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        tensors = read_header(path)
    except UnreadableError:
        return None
    content = path.read_bytes()
    return {t.name: (t.dtype, t.shape, content[t.begin : t.end]) for t in tensors}


def compare(path: Path, content: bytes) -> bool:
    """Whether it was read; ours may refuse more, as a header that names a field twice."""
    path.write_bytes(content)
    ours, theirs = by_us(path), by_the_library(path)
    if ours is not None:
        assert ours == theirs
    return ours is not None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors") / "model.safetensors"


def test_a_sound_file_is_read_by_both(path: Path) -> None:
    assert compare(path, SOUND)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_same_random_damage(path: Path, random: Random) -> None:
    content = bytearray(SOUND)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.choice((random.randrange(8), random.randrange(len(content))))
        way = random.randrange(4)
        if way == 0:
            content[at] ^= 1 << random.randrange(8)
        elif way == 1:
            content[at] = random.choice(b'0123456789[]{},:"-eE. ntf\\')
        elif way == 2:
            del content[at : at + random.choice((1, 8))]
        else:
            content[at:at] = random.choice((b"0", b"-", b" ", b"[", bytes(8)))
    compare(path, bytes(content))


ODD = (
    None,
    True,
    -1,
    0,
    1,
    8,
    24,
    2**63,
    2**64,
    10**30,
    0.0,
    8.0,
    "8",
    "F32",
    "F8_E4M3",
    "F4",
    "BOOL",
    [],
    [0],
    [[2]],
    {},
)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_same_odd_headers(path: Path, random: Random) -> None:
    header = json.loads(json.dumps(HEADER))
    odd = json.loads(json.dumps(ODD))  # its lists may be changed too
    for _ in range(random.choice((1, 2))):
        name = random.choice(list(header))
        field = random.choice((*(header[name] if isinstance(header[name], dict) else ()), "more"))
        if random.random() < 0.2 or not isinstance(header[name], dict):
            header[name] = random.choice(odd)
        elif isinstance(header[name].get(field), list) and header[name][field] and random.random() < 0.7:
            values = header[name][field]
            values[random.randrange(len(values))] = random.choice(odd)
        else:
            header[name][field] = random.choice(odd)
    compare(path, packed(json.dumps(header)))


def test_what_is_refused_by_name(path: Path) -> None:
    """Negative, swapped, shared and shifted offsets, sizes that don't fit, a name that stands there twice."""

    def changed(name: str, **values: Any) -> bytes:
        return packed(json.dumps({**HEADER, name: {**HEADER[name], **values}}))

    begin, end = HEADER["a"]["data_offsets"]
    refused = {
        "negative": changed("a", data_offsets=[-end, end]),
        "swapped": changed("a", data_offsets=[end, begin]),
        "shared": changed("d", data_offsets=HEADER["c.weight"]["data_offsets"]),
        "fractions": changed("a", data_offsets=[float(begin), float(end)]),
        "truths": changed("a", data_offsets=[True, True]),
        "shape": changed("a", shape=[3, 3]),
        "dtype": changed("a", dtype="F16"),
        "unknown dtype": changed("a", dtype="F7"),
        "text for a shape": changed("a", shape="6"),
        "twice": packed(json.dumps(HEADER)[:-1] + f', "a": {json.dumps(HEADER["a"])}}}'),
        "twice within": packed(json.dumps(HEADER).replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"')),
        "one byte more": SOUND + b"\0",
        "one byte less": SOUND[:-1],
        "huge header": struct.pack("<Q", 2**63) + SOUND[8:],
        "empty": b"",
        "list": packed("[]"),
        "deep": packed("[" * 100_000),
    }
    for name, content in refused.items():
        assert not compare(path, content), name
        with pytest.raises(UnreadableError):
            read_header(path)


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    """Which of the two is meant, one program would decide otherwise than another."""
    for name in ("one.safetensors", "two.safetensors"):
        (tmp_path / name).write_bytes(SOUND)
    index = {"weight_map": {"a": "one.safetensors", "d": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"its tensor a is in one.safetensors and in two.safetensors"):
        StoredWeights(tmp_path, "base")
