"""Ways to damage a file, by its kind; each draws from a seeded generator and says in a few words what it did."""

import gzip
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from .json_damages import EXECUTED, OF_JSON, Damage, header_length, in_a_line, in_the_header, offsets

EXTREMES = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 0x7FFFFFFF00000001, 7)


def damages_of(path: Path) -> dict[str, Damage]:
    """The ways to damage a file, by name; which there are depends on its name's end."""
    ways = {**OF_FILES, **OF_BYTES}
    name = path.name.removesuffix(".part")
    if name.endswith(".json"):
        ways |= OF_JSON
    elif name.endswith(".jsonl"):
        ways |= {f"line, {kind}": in_a_line(way) for kind, way in OF_JSON.items()}
    elif name.endswith(".safetensors"):
        ways |= {f"header, {kind}": in_the_header(way) for kind, way in OF_JSON.items()}
        ways |= {"header, offsets": offsets, "header, longer or shorter": header_length}
    elif name.endswith((".yaml", ".md")):
        ways |= {"yaml": _yaml}
    elif name.endswith((".gz", ".zst")):
        ways |= {"bomb": _bomb, "two members": _twice}
    return ways


# The file itself


def _removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _instead(what: str, make: Callable[[Path], object]) -> Damage:
    def damage(path: Path, random: Random) -> str:
        _removed(path)
        make(path)
        return what

    return damage


class Planted:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {EXECUTED}",)


OF_FILES: dict[str, Damage] = {
    "deleted": _instead("deleted", lambda path: None),
    "a pipe": _instead("a pipe", os.mkfifo),
    "a directory": _instead("a directory", lambda path: path.mkdir()),
    "endless": _instead("a link to /dev/zero", lambda path: path.symlink_to("/dev/zero")),
    "nothing": _instead("a link to /dev/null", lambda path: path.symlink_to("/dev/null")),
    "a circle": _instead("a link to itself", lambda path: path.symlink_to(path.name)),
    "elsewhere": _instead("a link elsewhere", lambda path: path.symlink_to(Path.cwd() / "outside" / "victim")),
    "a pickle": _instead("a pickle", lambda path: path.write_bytes(pickle.dumps(Planted()))),
}


# Its bytes


def _of_bytes(change: Callable[[bytearray, Random], str]) -> Damage:
    def damage(path: Path, random: Random) -> str:
        content = bytearray(path.read_bytes())
        told = change(content, random)
        path.write_bytes(content)
        return told

    return damage


def _place(content: bytearray, random: Random) -> int:
    """Anywhere, but half of the time near the beginning or the end, where formats keep what matters."""
    size = max(1, len(content))
    at = random.choice(
        (random.randrange(size), random.randrange(size), random.randrange(300), size - 1 - random.randrange(300))
    )
    return min(max(at, 0), size - 1)


def _flip(content: bytearray, random: Random) -> str:
    for _ in range(number := random.choice((1, 1, 1, 4, 100))):
        if content:
            content[_place(content, random)] ^= 1 << random.randrange(8)
    return f"{number} bits flipped"


def _cut(content: bytearray, random: Random) -> str:
    del content[(at := random.choice((0, 1, 7, 8, 9, _place(content, random)))) :]
    return f"cut after {at} bytes"


def _lose(content: bytearray, random: Random) -> str:
    at = _place(content, random)
    del content[at : at + (size := random.choice((1, 8, 64, 4096)))]
    return f"{size} bytes lost at {at}"


def _insert(content: bytearray, random: Random) -> str:
    at, size = _place(content, random), random.choice((1, 8, 64, 4096))
    content[at:at] = random.choice(
        (random.randbytes(size), bytes(size), b"\xff" * size, bytes(content[at : at + size]))
    )
    return f"{size} bytes inserted at {at}"


def _overwrite(content: bytearray, random: Random) -> str:
    at, size = _place(content, random), random.choice((4, 8, 64, 512))
    content[at : at + size] = random.choice((random.randbytes(size), bytes(size), b"\xff" * size))
    return f"{size} bytes overwritten at {at}"


def _extreme(content: bytearray, random: Random) -> str:
    kind = random.choice("iIqQ")
    size = struct.calcsize(f"<{kind}")
    value = random.choice(EXTREMES) % (1 << 8 * size)
    at = _place(content, random) // 4 * 4
    content[at : at + size] = value.to_bytes(size, "little")
    return f"the number {value} at {at}"


def _garbage(content: bytearray, random: Random) -> str:
    content[:] = random.randbytes(random.choice((0, 1, 8, 100, len(content))))
    return "random bytes"


def _encoded(content: bytearray, random: Random) -> str:
    encoding = random.choice(("utf-16", "utf-8-sig", "utf-32", "latin-1"))
    content[:] = content.decode("latin-1").encode(encoding, "replace")
    return f"in {encoding}"


OF_BYTES: dict[str, Damage] = {
    name: _of_bytes(change)
    for name, change in {
        "flip": _flip,
        "cut": _cut,
        "lose": _lose,
        "insert": _insert,
        "overwrite": _overwrite,
        "extreme": _extreme,
        "more extreme": _extreme,
        "garbage": _garbage,
        "encoding": _encoded,
    }.items()
}


# YAML and compressed files

ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
HEADS = (
    f"{ALIASES}license: *a11\n",
    f"license: {'[' * 20_000}\n",
    f"license: !!python/object/apply:os.system ['touch {EXECUTED}']\n",
    "license: [\n",
    "license: 5\nconfigs: 7\n",
    "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../../outside/*\n",
    "configs: [{config_name: [], data_files: {train: {}}}]\n",
    "license: \x07\n\t- x\n",
    "optim: [1]\nepochs: {}\nlr: .nan\n",
)


def _yaml(path: Path, random: Random) -> str:
    head = random.choice(HEADS)
    path.write_text(f"---\n{head}---\n" if path.suffix == ".md" else head)
    return f"yaml {head[:40]!r}"


def _bomb(path: Path, random: Random) -> str:
    start = random.choice((b'{"instruction": "', b"[", b"", b"PAR1"))
    blocks = [start, *[random.choice((b"x", b"\n", b" ", b"[", b"\0")) * (1 << 24)] * 16]
    if path.suffix == ".gz":
        with gzip.open(path, "wb", 1) as file:
            file.writelines(blocks)
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            for block in blocks:
                file.write(block)
    return f"{start!r} and 256 MiB"


def _twice(path: Path, random: Random) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "two members"
