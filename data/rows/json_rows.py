"""JSON in whatever way people lay rows out → the JSON text of each row, from a file of any size.

    {…}⏎{…}⏎                  lines, counted from 1; a broken one spoils itself alone
    [{…}, {…}]                an array, counted from 0
    {…}{…}   {…},⏎{…},⏎       objects end to end, over several lines, or with commas between them: as an array
    {"data": [{…}, {…}]}      an array below one of a few usual names, the only list there

The first block tells which of them it is. Memory holds no more than a block, or as much as the longest row takes.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from configs.program.errors import UserError
from data.rows.containers import BLOCK
from data.schema import SPEAKERS

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"

LONGEST_ROW = 1 << 26
"""Bytes of the longest line, and characters of the longest item of an array: what is longer is not a row, but something
that never closes."""

WRAPPERS = ("data", "instances", "rows", "examples", "records", "samples", "items", "train")
"""Names below which files keep the list of their rows."""

SPACES = re.compile(r"[ \t\r\n]*")
"""What JSON allows between values."""

CLOSED = {*'{["'}
AFTER_ITEM = {*" \t\r\n,]"}

GIVE = "give a JSON array of rows, or one JSON object a line (JSONL)"

Texts = Iterator[tuple[int, str | bytes | None]]
"""The number of each row and its JSON; None if it is longer than a row may be."""


def row_texts(name: str, file: io.BufferedReader, *, known_lines: bool) -> tuple[str, Texts]:
    """The rows' unit, `line` or `row`, and their texts; `known_lines` says that the file's name promises lines.

    Raises:
        UserError: it is not JSON, or what its beginning promises doesn't hold.
    """
    beginning, line = _after_blanks(file)
    beginning += file.read(max(0, BLOCK - len(beginning)))
    layout, offset = _layout(beginning, known_lines=known_lines)
    if layout == "none":
        raise UserError(
            f"files={name}: it is not JSON; give a JSON array of rows, one JSON object per line (JSONL), or Parquet"
        )
    if layout == "lines":
        return "line", _lines(beginning, file, line)
    rows = JsonRows(name, beginning, file)
    texts = rows.array() if layout == "array" else rows.objects() if layout == "objects" else rows.below(offset)
    return "row", enumerate(texts)


def _after_blanks(file: io.BufferedReader) -> tuple[bytes, int]:
    """The first bytes that are not blank, and the number of the line in which they stand."""
    line = 1
    while block := file.read(BLOCK):
        text = block.lstrip(BYTE_ORDER_MARK + BLANK)
        line += block.count(b"\n", 0, len(block) - len(text))
        if text:
            return text, line
    return b"", line


# Layout


def _layout(beginning: bytes, *, known_lines: bool) -> tuple[str, int]:
    """How rows are laid out: lines, array, objects, below (a name, at this offset), or none."""
    text = beginning.decode("utf-8", errors="replace")
    if not text:
        return "lines", 0
    if text[0] not in "{[":
        return ("lines" if known_lines else "none"), 0
    first, _, more = text.partition("\n")
    end = _end_of_value(text, 0)
    if end is not None and not first[end:].strip() and end <= len(first) and more.strip():
        return "lines", 0
    if text[0] == "[":
        return ("array" if _is_array(text, end, known_lines=known_lines) else "lines"), 0
    if (below := _list_below(text)) is not None:
        return "below", below
    return ("lines" if end is None or end == len(text.rstrip()) == len(first.rstrip()) else "objects"), 0


def _is_array(text: str, end: int | None, *, known_lines: bool) -> bool:
    """Whether a file that begins with `[` is an array of rows, and not one line that is a list of turns."""
    start = _spaces(text, 1)
    first_ends = _end_of_value(text, start)
    if first_ends is None:  # empty, broken, or an item that is longer than the block
        return end is not None or not known_lines or "\n" not in text
    follows = _spaces(text, first_ends)
    if known_lines and text[follows : follows + 1] not in ",]":
        return False
    return not (known_lines and _is_turn(json.loads(text[start:first_ends], parse_int=len, parse_float=len)))


def _list_below(text: str) -> int | None:
    """Where the list of rows stands in an object that holds them below one of the usual names, None if it does not."""
    offset = 0
    while (key_starts := _spaces(text, offset + 1)) < len(text) and text[key_starts] == '"':
        if (key_ends := _end_of_value(text, key_starts)) is None:
            return None
        colon = _spaces(text, key_ends)
        value = _spaces(text, colon + 1)
        if text[colon : colon + 1] != ":":
            return None
        if text[value : value + 1] == "[" and text[key_starts + 1 : key_ends - 1] in WRAPPERS:
            item = _spaces(text, value + 1)
            end = _end_of_value(text, item) if text[item : item + 1] == "{" else None
            if end is not None and not _is_turn(json.loads(text[item:end], parse_int=len, parse_float=len)):
                return value
        if (value_ends := _end_of_value(text, value)) is None:
            return None
        offset = _spaces(text, value_ends)
        if text[offset : offset + 1] != ",":
            return None
    return None


def _is_turn(item: Any) -> bool:
    """Whether an item of a list is a turn of a conversation, and the list a conversation."""
    return isinstance(item, dict) and not item.keys().isdisjoint(SPEAKERS)


_scan = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode
"""Only the ends of values matter here; numbers stay unread, as some are too long to be read."""


def _end_of_value(text: str, offset: int) -> int | None:
    try:
        return _scan(text, offset)[1]
    except (ValueError, RecursionError):
        return None


def _spaces(text: str, offset: int) -> int:
    spaces = SPACES.match(text, offset)
    assert spaces is not None  # it matches nothing as well
    return spaces.end()


# Rows


def _lines(beginning: bytes, file: io.BufferedReader, number: int) -> Texts:
    """The lines that aren't blank, of a file of which the beginning was read already; `number` is that of the first."""
    *whole, cut = beginning.split(b"\n")
    is_cut = False

    def read() -> Iterator[bytes]:
        nonlocal number
        while line := file.readline(LONGEST_ROW):
            yield line
            if line.isspace():  # many may follow
                number += _skip_blank_lines(file)

    for line in chain(whole, [cut + file.readline(LONGEST_ROW)] if cut else [], read()):
        if len(line) >= LONGEST_ROW and not line.endswith(b"\n"):  # a part of a line; the rest of it comes next
            is_cut = True
            continue
        if is_cut:
            yield number, None
        elif line.strip(BYTE_ORDER_MARK + BLANK):
            yield number, line
        number, is_cut = number + 1, False
    if is_cut:
        yield number, None


def _skip_blank_lines(file: io.BufferedReader) -> int:
    """Goes to the next line that isn't blank, or into it; returns how many lines that were."""
    skipped = 0
    while block := file.peek(BLOCK):
        end = block.rfind(b"\n", 0, len(block) - len(block.lstrip(BLANK))) + 1
        if not end:
            break
        skipped += block.count(b"\n", 0, end)
        file.read(end)
    return skipped


class JsonRows:
    """The JSON text of each row of a file that isn't laid out in lines.

    The text grows until json's own parser finds the end of a row in it.
    """

    def __init__(self, name: str, beginning: bytes, file: io.BufferedReader):
        """`beginning` was read already; the rest is in `file`."""
        self._name, self._file = name, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._offset, self._at_end = "", 0, False
        self._item = 0
        self._grow(beginning)

    def array(self) -> Iterator[str]:
        """The items of an array.

        Raises:
            UserError: it is not an array of JSON values and nothing else.
        """
        yield from self._items()
        if self._next_character():
            raise self._broken("something follows the array")

    def objects(self) -> Iterator[str]:
        """Objects that follow each other, with or without commas between them.

        Raises:
            UserError: something else is there.
        """
        while (sign := self._next_character()) == "{":
            yield self._text_of_item()
            self._item += 1
            if self._next_character() == ",":
                self._offset += 1
        if sign:
            raise self._broken("no object follows")

    def below(self, offset: int) -> Iterator[str]:
        """The items of the array that begins at this offset of the text, in an object that has no other list.

        Raises:
            UserError: the object is not whole, or has another list of objects.
        """
        head = self._text[:offset]
        self._offset = offset
        yield from self._items()
        self._grow(self._file.read(LONGEST_ROW))
        try:
            others = json.loads(f"{head} null {self._text}", parse_int=len, parse_float=len)
        except (ValueError, RecursionError) as error:
            raise self._broken("it can't be parsed after the list of rows") from error
        lists = [
            key
            for key, value in others.items()
            if isinstance(value, list) and any(isinstance(item, dict) for item in value[:1])
        ]
        if lists:
            raise UserError(
                f"files={self._name}: it is one object with several lists, {lists[0]} among them; give each list a file"
            )

    def _items(self) -> Iterator[str]:
        opening = self._next_character()
        assert opening == "["
        self._offset += 1
        separator = "]" if self._next_character() == "]" else ","
        if separator == "]":
            self._offset += 1
        while separator == ",":
            self._next_character()
            yield self._text_of_item()
            separator = self._next_character()
            if separator not in (",", "]"):
                raise self._broken("no comma follows")
            self._offset += 1
            self._item += 1

    def _text_of_item(self) -> str:
        while True:
            try:
                _, end = _scan(self._text, self._offset)
            except RecursionError as error:
                raise self._broken("it is nested too deeply") from error
            except ValueError as error:
                if self._at_end:
                    raise self._broken("it can't be parsed") from error
                if len(self._text) - self._offset > LONGEST_ROW:
                    why = f"is longer than {LONGEST_ROW >> 20} MiB, or has no end, or is not JSON"
                    raise UserError(f"files={self._name}: item {self._item} {why}; {GIVE}") from error
            else:
                # What closes itself is whole. A number is whole if something follows: it may go on, as 0 does in 0.5.
                if self._at_end or self._text[self._offset] in CLOSED or self._text[end : end + 1] in AFTER_ITEM:
                    start, self._offset = self._offset, end
                    return self._text[start:end]
                if len(self._text) - self._offset > LONGEST_ROW:
                    raise self._broken("no comma follows")
            # Twice as much each time, so that a long item is parsed in vain a few times and no more.
            self._grow(self._file.read(max(BLOCK, len(self._text) - self._offset)))

    def _next_character(self) -> str:
        """The next character that is not a space, not consumed; empty at the end of the file."""
        while True:
            self._offset = _spaces(self._text, self._offset)
            if self._offset < len(self._text) or self._at_end:
                return self._text[self._offset : self._offset + 1]
            self._grow(self._file.read(BLOCK))

    def _grow(self, data: bytes) -> None:
        try:
            self._text, self._offset = self._text[self._offset :] + self._decode(data, not data), 0
        except UnicodeDecodeError as error:
            raise self._broken("it is not UTF-8 text") from error
        self._at_end = not data

    def _broken(self, why: str) -> UserError:
        return UserError(f"files={self._name}: it is not JSON, {why} at item {self._item}; {GIVE}")
