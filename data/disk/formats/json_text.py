"""JSON → plain values of a declared shape.

A shape is a type in Python's own notation, mostly a `TypedDict` beside the code that uses the values; msgspec compares.
A field that the shape doesn't name may be there and have any value.
"""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from configs.program.errors import UserError, one_line
from data.disk.formats.regular import UnreadableError, read_regular

DEEPEST = 40
"""Levels of nesting that are read; our own files have six."""

HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""How JSON may spell half of a surrogate pair, which is not text if the other half is missing."""

MOST_DIGITS = 300
"""Digits of a whole number; with a few more, it would be larger than any float."""

LONGEST_QUOTE = 100
"""Characters of a name that a sentence quotes."""

TOO_MANY_DIGITS = b"0" * (MOST_DIGITS + 1)
DIGITS_AS_ZEROS = bytes(ord("0") if chr(byte).isdecimal() else byte for byte in range(256))
"""Show at once that a text has no such number: looking at each of a vocabulary's ids takes a while."""

CONTAINERS = {dict, list}
"""What JSON nests."""

Shape = TypeVar("Shape")


def read_json(path: Path, shape: type[Shape], setting: str, remedy: str, *, largest: int) -> Shape:
    """The values of a JSON file, as they stand there.

    Args:
        path: of a regular file, not of a link out of its directory.
        shape: what they have to be.
        setting: how the error begins, such as `base=models/mixtral`.
        remedy: how it ends.
        largest: bytes that a file of its kind may have, by the table in `sizes.py`.

    Raises:
        UserError: it can't be read, or is not of this shape; it names file and field.
    """
    try:
        return parse_json(read_regular(path, largest), shape)
    except UnreadableError as error:
        raise UserError(f"{setting}: its {path.name} can't be read ({error}); {remedy}") from error


def parse_json(content: bytes, shape: type[Shape]) -> Shape:
    """The values of JSON in UTF-8.

    Raises:
        UnreadableError: it is not JSON, nested too deeply, names a field twice, holds a number that no float comes
            near, or is not of this shape.
    """
    try:
        value = json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=_distinct,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole if TOO_MANY_DIGITS in content.translate(DIGITS_AS_ZEROS) else None,
        )
        if content.count(b"[") + content.count(b"{") > DEEPEST and not is_shallow(value):
            raise RecursionError
        if HALF_A_PAIR.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UnreadableError(f"it is nested more than {DEEPEST} deep") from None
    except UnicodeDecodeError as error:
        raise UnreadableError("it is not UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise UnreadableError("it holds half of a surrogate pair, which is not text") from error
    except UnreadableError:
        raise
    except ValueError as error:
        raise UnreadableError(f"it is not JSON: {one_line(error)}") from error
    return shaped(value, shape)


def shaped(value: Any, shape: type[Shape]) -> Shape:
    """The value itself.

    Raises:
        UnreadableError: it is not of this shape; it names the field.
    """
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        what, _, position = str(error).replace("`", "").partition(" - at $")
        field = position.lstrip(".")
        raise UnreadableError(f"{field}: {what[:1].lower()}{what[1:]}" if field else what.lower()) from error
    return value


def is_shallow(value: object) -> bool:
    """Whether JSON is nested at most `DEEPEST` deep, so that whoever writes it again can."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        values = (held.values() if isinstance(held, dict) else held for held in level)
        inside = list(itertools.chain.from_iterable(values))
        if CONTAINERS.isdisjoint(map(type, inside)):
            return True
        level = [item for item in inside if type(item) in CONTAINERS]
    return False


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise UnreadableError(f"it names {twice[:LONGEST_QUOTE]!r} twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableError(f"it holds {name}, which is not a number in JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise UnreadableError(f"it holds {text[:LONGEST_QUOTE]}, which is too large for a number")
    return value


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise UnreadableError(f"it holds a whole number of {len(text)} digits")
    return int(text)
