"""Ways to damage JSON, a line of it, and the head of a safetensors file, which is JSON too."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Damage = Callable[[Path, Random], str]

EXECUTED = "EXECUTED"
"""The file that planted code would leave in the working directory."""

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

NUMBER = re.compile(r"(?<=[ :\[,])-?\d+(\.\d+)?([eE][-+]?\d+)?(?=[,\]}\s])")
NUMBERS = ("1e308", "-1", "1e400", "9" * 350, "true", "0.5", "-0", "4611686018427387904", "null")
"""What is put in the place of a third of a text's numbers."""

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


def _numbers(text: str, random: Random) -> tuple[str, str]:
    odd = random.choice(NUMBERS)
    return NUMBER.sub(lambda found: odd if random.random() < 0.3 else found[0], text), f"many numbers {odd[:20]}"


OF_TEXT: dict[str, Callable[[str, Random], tuple[str, str]]] = {
    "value": _value,
    "another value": _value,
    "a third value": _value,
    "no value": _raw,
    "without": _without,
    "with": _more,
    "doubled": _doubled,
    "many numbers": _numbers,
}


def _in_json(change: Callable[[str, Random], tuple[str, str]]) -> Damage:
    def damage(path: Path, random: Random) -> str:
        text, told = change(path.read_text(), random)
        path.write_text(text)
        return told

    return damage


OF_JSON = {name: _in_json(change) for name, change in OF_TEXT.items()}


def in_a_line(way: Damage) -> Damage:
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


def in_the_header(way: Damage) -> Damage:
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


def offsets(path: Path, random: Random) -> str:
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


def header_length(path: Path, random: Random) -> str:
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    length = random.choice((0, 1, length - 1, length + 1, 2 * length, len(content), 2**27, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    return f"header of {length} bytes"
