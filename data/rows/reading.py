"""A file's bytes → chunks of rows that are not parsed yet → raw rows, or a `Reject` if a line can't be parsed.

Finding where a row ends is done by one process, so that memory stays bounded whatever the file's size; parsing is done
by whoever encodes. Items of an array are parsed twice by that, which costs less than handing over what was parsed.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from lzma import LZMAError
from typing import TYPE_CHECKING, Any, ClassVar

from configs.program.errors import UserError, one_line
from data.rows.containers import BLOCK, LARGE, opened
from data.rows.json_rows import LONGEST_ROW, row_texts

if TYPE_CHECKING:  # Arrow is imported where it is used: a process that encodes rows of JSON does without
    import pyarrow as pa

LONGEST_DETAIL = 500
"""Characters of what a reject says; what it quotes may be a whole book."""

LISTS = ("repair",)
"""Settings that take several choices."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read, and where it stands: a line of a JSONL file (from 1), or an item of a list (from 0)."""

    value: Any
    file: str
    unit: str
    number: int


Settings = dict[str, dict[str, str] | tuple[str, ...]]
"""Settings that a sentence proposes: of `columns` and `roles` the entries, of others the choices."""


def as_arguments(settings: Settings) -> list[str]:
    """The settings as they are typed on the command line."""
    typed = []
    for name, value in settings.items():
        if isinstance(value, dict):
            typed.append(f"'{name}={{{', '.join(f'{_quoted(key)}: {_quoted(of)}' for key, of in value.items())}}}'")
        else:
            typed.append(f"'{name}=[{','.join(value)}]'" if name in LISTS else f"{name}={value[0]}")
    return typed


def _quoted(name: str) -> str:
    escaped = name.replace('"', '\\"')
    return name if re.fullmatch(r"[^\s,:'\"{}\[\]]+( [^\s,:'\"{}\[\]]+)*", name) else f'"{escaped}"'


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that can't be used: where it stands, a reason code to count by, and a sentence for whoever looks it up."""

    file: str
    unit: str
    number: int
    reason: str
    detail: str
    kept: dict[str, Any] | None = None
    """For a duplicate, the file and the line or row of the one that was kept."""
    settings: Settings = field(default_factory=dict)
    """Those with which the row could be used, if there are any."""

    @classmethod
    def of(cls, row: RawRow, reason: str, detail: str, settings: Settings | None = None) -> "Reject":
        """The reject of a row that was read."""
        return cls(row.file, row.unit, row.number, reason, detail, settings=settings or {})

    def record(self) -> dict[str, Any]:
        """The line of `rejects.jsonl`."""
        record = {"file": self.file, self.unit: self.number, "reason": self.reason, "detail": self.sentence}
        if self.settings:
            record["settings"] = " ".join(as_arguments(self.settings))
        return record if self.kept is None else {**record, "kept": self.kept}

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}: {self.sentence}"

    @property
    def sentence(self) -> str:
        """The sentence, cut if it is too long to be read."""
        return self.detail if len(self.detail) <= LONGEST_DETAIL else f"{self.detail[:LONGEST_DETAIL]}…"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one source that follow each other."""

    ROWS: ClassVar[int] = 1000
    """Rows of a chunk, fewer if they are long."""

    file: str
    unit: str
    numbers: list[int]
    """Line of each row, or its position in the list."""
    content: "list[str | bytes | None] | pa.Table | bytes"
    """For each row its JSON, None if that is longer than a row may be; or for all of them an Arrow table, as a stream
    if it was handed over."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def is_large(self) -> bool:
        """Whether it is one row that is so large that it had better stay where it was read."""
        if len(self) != 1 or isinstance(self.content, bytes):
            return False
        return (len(self.content[0] or ()) if isinstance(self.content, list) else self.content.nbytes) > LARGE

    def handed_over(self) -> "Chunk":
        """The chunk as another process gets it: of a table only the chunk's own rows."""
        if isinstance(self.content, list | bytes):
            return self
        import pyarrow as pa

        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, self.content.schema) as stream:
            stream.write(self.content)
        return replace(self, content=buffer.getvalue())

    def first(self, rows: int) -> "Chunk":
        """The chunk without what comes after its first rows."""
        return replace(self, numbers=self.numbers[:rows])

    def rows(self) -> Iterator[RawRow | Reject]:
        """The rows, parsed; a line that is not JSON comes as a Reject."""
        if not isinstance(self.content, list):
            table = self.content
            if isinstance(table, bytes):
                import pyarrow as pa

                with pa.ipc.open_stream(table) as stream:
                    table = stream.read_all()
            table = table.slice(0, len(self.numbers))
            columns = {name: _values(table[number]) for number, name in enumerate(table.column_names)}
            for index, number in enumerate(self.numbers):
                yield RawRow({name: values[index] for name, values in columns.items()}, self.file, self.unit, number)
            return
        for number, text in zip(self.numbers, self.content, strict=False):
            if text is None:
                detail = f"the {self.unit} is longer than {LONGEST_ROW >> 20} MiB, or has no end"
                yield Reject(self.file, self.unit, number, "row_too_long", detail)
                continue
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


def _values(column: "pa.ChunkedArray") -> list[Any]:
    """A column's values; an `Unreadable` spoils its own row, and only if the column is needed."""
    try:
        return column.to_pylist()
    except Exception:  # Arrow raises errors of many kinds here
        return [_value(scalar) for scalar in column]


def _value(scalar: "pa.Scalar") -> Any:
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
    """The rows of a file: JSON in any layout, Parquet, Arrow, CSV or TSV, plain or compressed, by what is in it.

    Raises:
        UserError: the file has another format, or is damaged.
    """
    try:
        file, kind = opened(name)
        if kind in ("Parquet", "Arrow", "CSV"):
            from data.rows.tables import arrow_tables, csv_texts, parquet_tables
        with file:
            if kind == "Parquet":
                yield from read_arrow(name, parquet_tables(name, file, Chunk.ROWS))
            elif kind == "Arrow":
                yield from read_arrow(name, arrow_tables(name, file, Chunk.ROWS))
            elif kind == "CSV":
                yield from _chunks(name, "row", csv_texts(name, file))
            else:
                yield from _chunks(name, *row_texts(name, file, known_lines=kind == "lines"))
    except (EOFError, OSError, LZMAError) as error:  # what is raised for a compressed stream that is cut or is none
        raise UserError(f"files={name}: it can't be read ({one_line(error)}); check that the file is whole") from error


def read_arrow(name: str, tables: "Iterable[pa.Table]") -> Iterator[Chunk]:
    """Rows that come as Arrow tables of at most `Chunk.ROWS` rows."""
    first = 0
    for table in tables:
        for part in _parts(table):
            yield Chunk(name, "row", list(range(first, first + part.num_rows)), part)
            first += part.num_rows


def _parts(table: "pa.Table") -> "Iterator[pa.Table]":
    """The table in parts of at most `LARGE` bytes, or of one row."""
    if table.num_rows <= 1 or table.nbytes <= LARGE:
        yield table
        return
    half = table.num_rows // 2
    yield from _parts(table.slice(0, half))
    yield from _parts(table.slice(half))


def _chunks(name: str, unit: str, rows: Iterable[tuple[int, str | bytes | None]]) -> Iterator[Chunk]:
    numbers: list[int] = []
    content: list[str | bytes | None] = []
    size = 0
    for number, text in rows:
        numbers.append(number)
        content.append(text)
        size += len(text or ())
        if len(numbers) == Chunk.ROWS or size >= BLOCK:
            yield Chunk(name, unit, numbers, content)
            numbers, content, size = [], [], 0
    if numbers:
        yield Chunk(name, unit, numbers, content)
