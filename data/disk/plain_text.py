"""Text files that others wrote, beside a base or an adapter: read within bounds and as plain values, or not at all.

They describe and decide no number, so what is odd in them is left out and never ends a program.
"""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from data.disk.formats.json_text import DEEPEST, parse_json
from data.disk.formats.regular import UnreadableError, open_regular, read_at_most

LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""Of libyaml, ten times as fast, if PyYAML was built with it."""

LONGEST_TEXT = 300
"""Characters of the longest text that is taken over."""


def json_if_readable(path: Path, largest: int, sha256: str | None = None) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none, or if it is something else or has another hash."""
    content = read_bytes(path, largest)
    if content is None or (sha256 is not None and hashlib.sha256(content).hexdigest() != sha256):
        return {}
    try:
        return parse_json(content, dict[str, Any])
    except UnreadableError:
        return {}


def read_bytes(path: Path, largest: int) -> bytes | None:
    """The content of a regular file of at most that size, and not a link out of its directory; else None."""
    content = read_start(path, largest + 1)
    return content if content is not None and len(content) <= largest else None


def read_start(path: Path, size: int) -> bytes | None:
    """The first bytes of a regular file; None if there is none, if it can't be read, or is a link elsewhere."""
    try:
        with open_regular(path) as file:
            return read_at_most(file, size)
    except UnreadableError:
        return None


def parse_yaml(text: str) -> dict[str, Any] | None:
    """A YAML mapping with every scalar as the text that it is written in; None for anything else, and if there are
    aliases, by which a few lines can stand for any amount of memory."""
    try:
        depth = 0
        for event in yaml.parse(text, LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                return None
        value = yaml.load(text, LOADER)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def plain(value: object) -> str | None:
    """A text or a number as a line of text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        text = " ".join(str(value).split())
    except ValueError:  # a whole number of thousands of digits
        return None
    text = text.encode("utf-8", "replace").decode()
    return text if 0 < len(text) <= LONGEST_TEXT else None


def member(value: object, name: str) -> dict[str, Any]:
    """The object that an object holds under a name; empty if either is something else."""
    held = value.get(name) if isinstance(value, dict) else None
    return held if isinstance(held, dict) else {}
