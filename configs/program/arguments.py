"""What a user typed → what Hydra's grammar reads: names are taken as they stand.

Names of files hold commas, brackets, `=`, parentheses and letters beyond ASCII, which Hydra takes for grammar or can't
read: `run_dir=runs/a=b`, `files=[chats (v2).jsonl]`. A setting's type in the dataclass decides, so there is no list of
settings to keep:

- `str`: what Hydra itself reads as one string stays as it is: plain names, quoted ones, escaped ones, `null`, and in a
  multirun a sweep. Anything else, that it refuses or makes a list, a number or a choice of, is the text as it stands.
- `list[str]`: the same for each element of `[…]`; commas separate elements, and an element that holds one is quoted.
- `dict[str, …]`: `{name: value, …}`; a name ends at the last colon, and one that holds a comma is quoted.

`${…}` is resolved as everywhere in a text and in a list; in a dictionary it is not.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from configs.program.errors import UserError

OPEN = {"[": "]", "{": "}"}
QUOTED = r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'"""
ELEMENT = re.compile(rf"\s*(?:(?P<quoted>{QUOTED})|(?P<plain>(?:\$\{{[^}}]*\}}|[^,])*?))\s*(?:,|$)")
ENTRY = re.compile(
    rf"\s*(?:(?P<quoted_key>{QUOTED})|(?P<key>[^,]+?))\s*:\s*(?:(?P<quoted>{QUOTED})|(?P<plain>[^,:]+?))\s*(?:,|$)"
)


class Readable(NamedTuple):
    """A command line that Hydra can read, and what can't be said in its grammar."""

    arguments: list[str]
    entries: dict[str, dict[str, str]]
    """Dictionaries with names that Hydra can't read: the setting's dotted name → its entries."""


def readable(arguments: Iterable[str], schema: type) -> Readable:
    """The arguments, with every name quoted that Hydra would not take as it stands.

    Raises:
        UserError: a list or dictionary can't be read, or a name begins with `~/`, which would make a directory `~`.
    """
    arguments = list(arguments)
    settings = settings_of_text(schema)
    multirun = not {"-m", "--multirun"}.isdisjoint(arguments)
    result = Readable([], {})
    for position, argument in enumerate(arguments):
        field, equals, value = argument.partition("=")
        name = field.lstrip("+")
        kind = settings.get(name) if equals else None
        if kind is None or _fits(argument, kind, multirun=multirun):
            result.arguments.append(argument)
        elif kind is str:
            result.arguments.append(f"{field}={_quoted(name, value)}")
        elif value.lstrip()[:1] in OPEN and not value.rstrip().endswith(OPEN[value.lstrip()[:1]]):
            raise UserError(_not_closed(argument, arguments[position + 1 :]))
        elif get_origin(kind) is list:
            result.arguments.append(f"{field}={_list(name, value)}")
        else:
            result.entries[name] = _entries(name, value)
    return result


def _not_closed(argument: str, following: list[str]) -> str:
    """The sentence for a list or dictionary that a shell has taken apart at its spaces."""
    closing = OPEN[argument.partition("=")[2].lstrip()[:1]]
    last = next((number for number, word in enumerate(following, 1) if word.endswith(closing)), 0)
    whole = " ".join([argument, *following[:last]]) if last else f"{argument}…{closing}"
    return f"{argument}: it is not closed; write the whole of it in quotes: {shlex.quote(whole)}"


def settings_of_text(schema: type, prefix: str = "") -> dict[str, Any]:
    """The settings of type `str`, `list[str]` and `dict[str, …]`: dotted name → type, without `| None`."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        kind = next((part for part in get_args(hint) if part is not NoneType), hint) if _optional(hint) else hint
        if is_dataclass(kind):
            assert isinstance(kind, type)
            found |= settings_of_text(kind, f"{prefix}{name}.")
        elif kind is str or get_args(kind)[:1] == (str,):
            found[f"{prefix}{name}"] = kind
    return found


def _optional(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _fits(argument: str, kind: Any, *, multirun: bool) -> bool:
    """Whether Hydra reads a value of the setting's type."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    if override.is_sweep_override():
        return multirun
    return _is_of(override.value(), kind)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of the type; what is nothing like it is Hydra's to refuse."""
    if kind is str:
        return value is None or isinstance(value, str)
    if get_origin(kind) is list:
        return not isinstance(value, list) or all(isinstance(item, str | list | dict) for item in value)
    numbers = (int, float) if get_args(kind)[1] is float else get_args(kind)[1]
    return not isinstance(value, dict) or all(
        isinstance(name, str) and isinstance(item, numbers) for name, item in value.items()
    )


def _quoted(name: str, text: str) -> str:
    """A text in quotes, which Hydra takes off again."""
    if re.match("~(/|$)", text):
        raise UserError(
            f"{name}={text}: here ~ is not the home directory, because no shell reads it; write $HOME{text[1:]}"
        )
    return str(QuotedString(text.strip(), Quote.double).with_quotes())


def _list(name: str, value: str) -> str:
    """A list whose elements are all in quotes."""
    inside = re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)
    if not inside:
        raise UserError(f"{name}={value}: it takes a list; write '{name}=[{value}]'")
    elements = _all(ELEMENT, inside.group(1))
    return f"[{','.join(found['quoted'] or _quoted(name, found['plain']) for found in elements)}]"


def _entries(name: str, value: str) -> dict[str, str]:
    """A dictionary's entries."""
    inside = re.fullmatch(r"\s*\{(.*)\}\s*", value, re.DOTALL)
    if not inside or not (entries := _all(ENTRY, inside.group(1))):
        raise UserError(f"{name}={value}: it takes names with their values; write '{name}={{name: value}}'")
    return {
        _unquoted(found["quoted_key"]) or found["key"]: _unquoted(found["quoted"]) or found["plain"]
        for found in entries
    }


def _all(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The matches that follow each other from the beginning to the end of a text; none if that can't be."""
    found: list[re.Match[str]] = []
    end = 0
    while end < len(text):
        match = pattern.match(text, end)
        if match is None or match.end() == end:
            return []
        found.append(match)
        end = match.end()
    return found


def _unquoted(quoted: str | None) -> str:
    return str(OverridesParser.create().parse_override(f"name={quoted}").value()) if quoted else ""
