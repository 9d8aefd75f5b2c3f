"""A file's bytes → chunks of rows that are not parsed yet → raw rows, or a `Reject` if a line can't be parsed.

Finding where a row ends is done by one process, so that memory stays bounded whatever the file's size; parsing is done
by whoever encodes. Items of an array are parsed twice by that, which costs less than handing over what was parsed.
"""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa

from configs.program.errors import UserError, one_line
from data.disk.formats.regular import UnreadableError, read_at_most

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""File endings of compressed files, and what pyarrow calls the compression."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"

BLOCK = 1 << 20
"""Bytes that are read at a time."""

LONGEST_DETAIL = 500
"""Characters of what a reject says; what it quotes may be a whole book."""

LONGEST_ROW = 1 << 26
"""Characters or bytes of the longest row; what is longer is no row but an array that never closes, or a few compressed
bytes that stand for any number."""

LARGEST_UNPACKED = 1 << 32
"""Bytes of the largest Parquet file that is unpacked into memory."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read, and where it stands: a line of a JSONL file (from 1), or an item of a list (from 0)."""

    value: Any
    file: str
    unit: str
    number: int


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that can't be used: where it stands, a reason code to count by, and a sentence for who looks it up."""

    file: str
    unit: str
    number: int
    reason: str
    detail: str
    kept: dict[str, Any] | None = None
    """Of a duplicate: the file, and the line or row, of the one that was kept."""

    @classmethod
    def of(cls, row: RawRow, reason: str, detail: str) -> "Reject":
        """The reject of a row that was read."""
        return cls(row.file, row.unit, row.number, reason, detail)

    def record(self) -> dict[str, Any]:
        """The line of `rejects.jsonl`."""
        detail = self.detail if len(self.detail) <= LONGEST_DETAIL else f"{self.detail[:LONGEST_DETAIL]}…"
        record = {"file": self.file, self.unit: self.number, "reason": self.reason, "detail": detail}
        return record if self.kept is None else {**record, "kept": self.kept}

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one source that follow each other."""

    ROWS: ClassVar[int] = 1000
    """Rows of a chunk, fewer if they are long."""

    file: str
    unit: str
    numbers: list[int]
    """Line of each row, or its position in the list."""
    content: list[str | bytes] | bytes
    """For each row its JSON, or for all of them an Arrow stream."""

    def __len__(self) -> int:
        return len(self.numbers)

    def first(self, rows: int) -> "Chunk":
        """The chunk without what comes after its first rows."""
        return replace(self, numbers=self.numbers[:rows])

    def rows(self) -> Iterator[RawRow | Reject]:
        """The rows, parsed; a line that is not JSON comes as a Reject."""
        if isinstance(self.content, bytes):
            with pa.ipc.open_stream(self.content) as stream:
                table = stream.read_all()
            columns = {name: _values(table[number]) for number, name in enumerate(table.column_names)}
            for index, number in enumerate(self.numbers):
                yield RawRow({name: values[index] for name, values in columns.items()}, self.file, self.unit, number)
            return
        for number, text in zip(self.numbers, self.content, strict=False):
            try:
                decoded = _decoded(text)
                if _depth(decoded) > DEEPEST:
                    raise ValueError(f"it is nested more than {DEEPEST} deep")
                yield RawRow(json.loads(decoded), self.file, self.unit, number)
            except UnicodeDecodeError:
                yield Reject(self.file, self.unit, number, "invalid_utf8", f"the {self.unit} is not UTF-8 text")
            except ValueError as error:
                yield Reject(self.file, self.unit, number, "invalid_json", f"the {self.unit} is not JSON ({error})")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that Arrow can't hand over, such as text that is not UTF-8, or a date beyond all calendars."""

    reason: str
    detail: str


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values; an `Unreadable` spoils its own row, and only if the column is needed."""
    try:
        return column.to_pylist()
    except Exception:  # Arrow raises errors of many kinds here
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unreadable("invalid_utf8", "it is not UTF-8 text")
    except Exception as error:  # as above
        return Unreadable("unreadable_value", f"its value can't be read ({one_line(error)})")


DEEPEST = 500
"""Levels of nesting that a row may have. Python's own limit depends on who parses, and would let a row through here
and not there."""

STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
"""Strings, opening and closing signs of JSON."""


def _depth(text: str) -> int:
    """How deep JSON is nested; 0 if it has too few opening signs to matter."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return 0
    depth = deepest = 0
    for found in STRUCTURE.finditer(text):
        sign = found.group()
        depth += (sign in "[{") - (sign in "]}")
        deepest = max(deepest, depth)
    return deepest


def _decoded(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("utf-8-sig")


def read_file(name: str) -> Iterator[Chunk]:
    """Parquet and JSON Lines by the file's name; else JSON, an array or an object a line, by its first character.

    Raises:
        UserError: the file is none of them, or damaged.
    """
    plain = Path(name).with_suffix("") if Path(name).suffix in COMPRESSIONS else Path(name)
    kind = plain.suffix.lower()
    try:
        with _open(name) as file:
            if kind == ".parquet":
                yield from _read_parquet(name, file)
            else:
                yield from _read_json(name, file, known_lines=kind == ".jsonl")
    except (
        EOFError,
        OSError,
        UnreadableError,
    ) as error:  # what pyarrow raises for a compressed stream that is cut or is none
        raise UserError(f"files={name}: it can't be read ({one_line(error)}); check that the file is whole") from error


def read_arrow(name: str, tables: Iterable[pa.Table]) -> Iterator[Chunk]:
    """Rows that come as Arrow tables of at most `Chunk.ROWS` rows."""
    first = 0
    for table in tables:
        _ = table.column_names  # one that is no text is refused here
        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, table.schema) as stream:
            stream.write(table)
        yield Chunk(name, "row", list(range(first, first + table.num_rows)), buffer.getvalue())
        first += table.num_rows


def _open(name: str) -> io.BufferedReader:
    compression = COMPRESSIONS.get(Path(name).suffix)
    if compression is None:
        return Path(name).open("rb", buffering=BLOCK)
    # pyarrow's stream is a file in all but type
    return io.BufferedReader(pa.input_stream(name, compression=compression), BLOCK)


# JSON


def _read_json(name: str, file: io.BufferedReader, *, known_lines: bool) -> Iterator[Chunk]:
    line = 1
    while not (text := (coming := file.peek()).lstrip(BYTE_ORDER_MARK + BLANK)):  # blank lines before the first row
        if not coming:
            return
        line += file.read(len(coming)).count(b"\n")
    if known_lines or text.startswith(b"{"):
        yield from _chunks(name, "line", _lines(file, line))
    elif text.startswith(b"["):
        yield from _chunks(name, "row", enumerate(JsonArray(name, file.read(64), file)))
    else:
        raise UserError(
            f"files={name}: it is not JSON; give a JSON array of rows, one JSON object per line (JSONL), or Parquet"
        )


def _lines(file: io.BufferedReader, number: int) -> Iterator[tuple[int, bytes]]:
    """The lines that follow and are not blank, of which the next has that number."""
    while line := file.readline(LONGEST_ROW):
        if len(line) == LONGEST_ROW:
            raise EOFError(f"line {number} is longer than {LONGEST_ROW >> 20} MiB")
        if line.strip(BYTE_ORDER_MARK + BLANK):
            yield number, line
        else:  # a block at a time, as few compressed bytes may be any number of them
            while blank := len(coming := file.peek()) - len(coming.lstrip(BLANK)):
                number += file.read(blank).count(b"\n")
        number += 1


def _chunks(name: str, unit: str, rows: Iterable[tuple[int, str | bytes]]) -> Iterator[Chunk]:
    numbers: list[int] = []
    content: list[str | bytes] = []
    size = 0
    for number, text in rows:
        numbers.append(number)
        content.append(text)
        size += len(text)
        if len(numbers) == Chunk.ROWS or size >= BLOCK:
            yield Chunk(name, unit, numbers, content)
            numbers, content, size = [], [], 0
    if numbers:
        yield Chunk(name, unit, numbers, content)


SPACES = re.compile(r"[ \t\r\n]*")
"""What JSON allows between values."""


AFTER_ITEM = {*" \t\r\n,]"}


class JsonArray:
    """The JSON text of each item of an array; in memory is a block of the file, or as much as the longest item takes.

    The text grows until json's own parser finds the end of an item in it.
    """

    def __init__(self, name: str, beginning: bytes, file: BinaryIO):
        """`beginning` was read already; the rest is in `file`."""
        self._name, self._file = name, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        # Only the ends of items matter here; numbers stay unread, as some are too long to be read.
        self._scan = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode
        self._text, self._place, self._at_end = "", 0, False
        self._item = 0
        self._grow(beginning)

    def __iter__(self) -> Iterator[str]:
        """The items.

        Raises:
            UserError: it is not an array of JSON values and nothing else.
        """
        opening = self._next_character()
        assert opening == "["
        self._place += 1
        separator = "]" if self._next_character() == "]" else ","
        if separator == "]":
            self._place += 1
        while separator == ",":
            self._next_character()
            yield self._text_of_item()
            separator = self._next_character()
            if separator not in (",", "]"):
                raise self._broken("no comma follows")
            self._place += 1
            self._item += 1
        if self._next_character():
            raise self._broken("something follows the array")

    def _text_of_item(self) -> str:
        while True:
            try:
                _, end = self._scan(self._text, self._place)
            except RecursionError as error:
                raise self._broken("it is nested too deeply") from error
            except ValueError as error:
                if self._at_end or len(self._text) - self._place > LONGEST_ROW:
                    raise self._broken("it can't be parsed") from error
            else:
                # What follows says that the item is whole: a number may go on otherwise, as 0 does in 0.5.
                if self._at_end or self._text[end : end + 1] in AFTER_ITEM:
                    start, self._place = self._place, end
                    return self._text[start:end]
                if len(self._text) - self._place > LONGEST_ROW:
                    raise self._broken("no comma follows")
            # Each time as much again, so that a long item is parsed in vain a few times and no more.
            self._grow(self._file.read(max(BLOCK, len(self._text) - self._place)))

    def _next_character(self) -> str:
        """The next character that is no space, not consumed; empty at the end of the file."""
        while True:
            spaces = SPACES.match(self._text, self._place)
            assert spaces is not None  # it matches nothing as well
            self._place = spaces.end()
            if self._place < len(self._text) or self._at_end:
                return self._text[self._place : self._place + 1]
            self._grow(self._file.read(BLOCK))

    def _grow(self, data: bytes) -> None:
        try:
            self._text, self._place = self._text[self._place :] + self._decode(data, not data), 0
        except UnicodeDecodeError as error:
            raise self._broken("it is not UTF-8 text") from error
        self._at_end = not data

    def _broken(self, why: str) -> UserError:
        where = f"{why} at item {self._item}"
        return UserError(f"files={self._name}: it is not JSON, {where}; give a JSON array of rows, or JSONL")


# Parquet


def _read_parquet(name: str, file: BinaryIO) -> Iterator[Chunk]:
    """Parquet is read from its end, so a compressed file is unpacked into memory first."""
    import pyarrow.parquet as pq

    compressed = Path(name).suffix in COMPRESSIONS
    if compressed and len(content := read_at_most(file, LARGEST_UNPACKED + 1)) > LARGEST_UNPACKED:
        raise EOFError(f"unpacked it is larger than {LARGEST_UNPACKED >> 30} GiB; unpack it")
    try:
        table = pq.ParquetFile(pa.BufferReader(content) if compressed else file)
        yield from read_arrow(name, (pa.Table.from_batches([b]) for b in table.iter_batches(batch_size=Chunk.ROWS)))
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise UserError(f"files={name}: it can't be read as Parquet ({one_line(error)}); check the file") from error
