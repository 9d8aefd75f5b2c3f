"""Ways to damage a file, by its kind; each draws from a seeded generator and says in a few words what it did."""

import gzip
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

Damage = Callable[[Path, Random], str]

EXECUTED = "EXECUTED"
"""The file that planted code would leave in the working directory."""

EXTREMES = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 0x7FFFFFFF00000001, 7)

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        1000,
        10**6,
        10**9,
        2**31,
        2**53 + 1,
        2**63,
        10**30,
        0.5,
        -1.5,
        1e308,
        1e-320,
    ),
    *(
        "",
        "x",
        "\0",
        "\u200b",
        "\x1b[2J\r\n",
        "nan",
        "1",
        "ä" * 3000,
        "../../outside/victim",
        "/dev/zero",
        "/dev/stdin",
    ),
    *("mixtral", "LORA", "(.*.*.*.*)*X$", "([a-z_.0-9]+)+X", "gelu", "x" * 200_000, "model.safetensors", "BF16", "I64"),
    *([], [1], [[]], ["x"], [None], {}, {"": 1}, {"x": {}}, {"_target_": "os.system", "_args_": [f"touch {EXECUTED}"]}),
)
"""Values that are put in the place of others."""

RAW = (
    "NaN",
    "-Infinity",
    "1e400",
    "1" * 5000,
    '"\\ud800"',
    "[" * 100_000,
    '{"a":' * 3000,
    "0x1",
    "'x'",
    "",
    ",",
    "tru",
)
"""Text that is put in the place of a value, most of it no JSON."""

KEYS = (
    *("auto_map", "quantization_config", "attn_implementation", "transformers_weights", "_target_", "__metadata__"),
    *(
        "fusion_config",
        "distributed_config",
        "dtype",
        "rope_scaling",
        "head_dim",
        "experts_implementation",
        "__class__",
    ),
    *(
        "alpha_pattern",
        "rank_pattern",
        "layers_pattern",
        "exclude_modules",
        "use_dora",
        "id",
        "messages",
        "line",
        "row",
    ),
)
"""Fields that are added."""


def damages_of(path: Path) -> dict[str, Damage]:
    """The ways to damage a file, by name; which there are depends on its name's end."""
    ways = {**OF_FILES, **OF_BYTES}
    name = path.name.removesuffix(".part")
    if name.endswith(".json"):
        ways |= OF_JSON
    elif name.endswith(".jsonl"):
        ways |= {f"line, {kind}": _in_a_line(way) for kind, way in OF_JSON.items()}
    elif name.endswith(".safetensors"):
        ways |= {f"header, {kind}": _in_the_header(way) for kind, way in OF_JSON.items()}
        ways |= {"header, offsets": _offsets, "header, longer or shorter": _header_length}
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


# JSON, as text → text


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict | list):
        for key in list(value)[:200] if isinstance(value, dict) else range(min(len(value), 50)):
            found += _places(value[key], (*path, key))
    return found


def _holder(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def _value(text: str, random: Random) -> tuple[str, str]:
    value = json.loads(text)
    path = random.choice(_places(value))
    odd = random.choice(ODD)
    if not path:
        return json.dumps(odd), f"{json.dumps(odd)[:40]} for all of it"
    _holder(value, path)[path[-1]] = odd
    return json.dumps(value), f"{'.'.join(map(str, path))[:60]} = {json.dumps(odd)[:40]}"


def _raw(text: str, random: Random) -> tuple[str, str]:
    value, raw = json.loads(text), random.choice(RAW)
    path = random.choice(_places(value))
    if not path:
        return raw, f"{raw[:20]} for all of it"
    _holder(value, path)[path[-1]] = "RAW"
    return json.dumps(value).replace('"RAW"', raw), f"{'.'.join(map(str, path))[:60]} = {raw[:20]}"


def _without(text: str, random: Random) -> tuple[str, str]:
    value = json.loads(text)
    path = random.choice(_places(value)[1:] or [()])
    if path:
        del _holder(value, path)[path[-1]]
    return json.dumps(value), f"without {'.'.join(map(str, path))[:60]}"


def _more(text: str, random: Random) -> tuple[str, str]:
    value = json.loads(text)
    path = random.choice([path for path in _places(value) if isinstance(_holder(value, (*path, 0)), dict)] or [None])
    name, odd = random.choice(KEYS), random.choice(ODD)
    if path is not None:
        _holder(value, (*path, 0))[name] = odd
    return json.dumps(value), f"with {name} = {json.dumps(odd)[:40]}"


def _doubled(text: str, random: Random) -> tuple[str, str]:
    value, odd = json.loads(text), json.dumps(random.choice(ODD))
    if not isinstance(value, dict) or not value:
        return f"{text} {text}", "twice"
    name = random.choice(list(value))
    return f"{text.rstrip()[:-1]}, {json.dumps(name)}: {odd}}}", f"{name[:60]} twice, then {odd[:40]}"


OF_TEXT: dict[str, Callable[[str, Random], tuple[str, str]]] = {
    "value": _value,
    "another value": _value,
    "a third value": _value,
    "no value": _raw,
    "without": _without,
    "with": _more,
    "doubled": _doubled,
}


def _in_json(change: Callable[[str, Random], tuple[str, str]]) -> Damage:
    def damage(path: Path, random: Random) -> str:
        text, told = change(path.read_text(), random)
        path.write_text(text)
        return told

    return damage


OF_JSON = {name: _in_json(change) for name, change in OF_TEXT.items()}


def _in_a_line(way: Damage) -> Damage:
    """The same in one line of several."""

    def damage(path: Path, random: Random) -> str:
        lines = path.read_text().splitlines() or ["{}"]
        at = random.choice((0, random.randrange(len(lines)), len(lines) - 1))
        part = path.with_name(f"{path.name}.line")
        part.write_text(lines[at])
        told = way(part, random)
        lines[at] = part.read_text()
        part.unlink()
        path.write_text("\n".join(lines) + "\n")
        return f"line {at + 1}: {told}"

    return damage


# Safetensors


def _opened(path: Path) -> tuple[str, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length].decode(), content[8 + length :]


def _in_the_header(way: Damage) -> Damage:
    """The same in a safetensors header, with the length that it then has."""

    def damage(path: Path, random: Random) -> str:
        text, body = _opened(path)
        part = path.with_name(f"{path.name}.header")
        part.write_text(text)
        told = way(part, random)
        header = part.read_bytes()
        part.unlink()
        path.write_bytes(struct.pack("<Q", len(header)) + header + body)
        return told

    return damage


def _offsets(path: Path, random: Random) -> str:
    text, body = _opened(path)
    header = json.loads(text)
    name = random.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    other = header[random.choice([name for name in header if name != "__metadata__"])]
    step = random.choice((-8, -1, 1, 2, 8, 2**40, -(2**40)))
    field = random.choice(("begin", "end", "both", "another's", "shape", "dtype"))
    if field in ("begin", "end", "both"):
        entry["data_offsets"] = [
            at + step * (field in (which, "both"))
            for which, at in zip(("begin", "end"), entry["data_offsets"], strict=True)
        ]
    else:
        key = {"another's": "data_offsets", "shape": "shape", "dtype": "dtype"}[field]
        entry[key] = (
            other[key] if field == "another's" else random.choice(([], [0], [2**62, 4], ["1"], "F8_E4M3", "I8", 5))
        )
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + body)
    return f"{field} of {name[:50]}"


def _header_length(path: Path, random: Random) -> str:
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    length = random.choice((0, 1, length - 1, length + 1, 2 * length, len(content), 2**27, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    return f"header of {length} bytes"


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
