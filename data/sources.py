"""Files or a hub dataset → raw rows, in the order in which they stand."""

import glob
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from configs.errors import UserError, one_line
from data.config import PrepareConfig

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""File endings of compressed files, and what pyarrow calls the compression."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read, and where it stands: a line of a JSONL file (from 1), or an item of a list (from 0)."""

    value: Any
    file: str
    unit: str
    number: int


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that can't be used: a reason code to count by, and a sentence for the person who looks it up."""

    row: RawRow
    reason: str
    detail: str

    def record(self) -> dict[str, Any]:
        """The line of `rejects.jsonl`."""
        where = {"file": self.row.file, self.row.unit: self.row.number}
        return {**where, "reason": self.reason, "detail": self.detail}

    def __str__(self) -> str:
        return f"{self.row.file}, {self.row.unit} {self.row.number}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or the hub dataset: what the manifest says of it, and its rows."""

    name: str
    description: dict[str, Any]
    config: PrepareConfig

    def rows(self) -> Iterator[RawRow | Reject]:
        """Its rows in their order; a line that is not JSON comes as a Reject.

        Raises:
            UserError: the file is of no known kind, or the hub dataset can't be had.
        """
        return _read_hub(self.config) if "dataset" in self.description else _read_file(self.name)


def find_sources(config: PrepareConfig) -> list[Source]:
    """The files, patterns resolved and each hashed, or the hub dataset.

    Raises:
        UserError: a file is missing or can't be read, or a pattern matches nothing.
    """
    sources = []
    for pattern in config.files:
        # Path.glob takes no absolute patterns.
        names = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207
        if not names:
            raise UserError(f"files={pattern}: no file matches; check the pattern, relative to {Path.cwd()}")
        for name in names:
            with _existing(name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sources.append(Source(name, {"file": name, "bytes": Path(name).stat().st_size, "sha256": digest}, config))
    if config.dataset:
        description = {"dataset": config.dataset, "revision": config.revision, "split": config.split}
        sources.append(Source(config.dataset, description, config))
    return sources


def _existing(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        raise UserError(f"files={name}: it is a directory; name the files in it, for example {name}/*.jsonl")
    if not path.is_file():
        raise UserError(f"files={name}: there is no such file; check the path, relative to {Path.cwd()}")
    if not os.access(path, os.R_OK):
        raise UserError(f"files={name}: it can't be read; check its permissions")
    return path


def _read_file(name: str) -> Iterator[RawRow | Reject]:
    """Parquet by the file's name; else JSON, an array or an object a line by the first character that is not space."""
    plain = Path(name).with_suffix("") if Path(name).suffix in COMPRESSIONS else Path(name)
    try:
        with _open(name) as file:
            yield from _read_parquet(name, file) if plain.suffix == ".parquet" else _read_json(name, file)
    except (EOFError, OSError) as error:  # what pyarrow raises for a compressed stream that is cut or is none
        raise UserError(f"files={name}: it can't be read ({one_line(error)}); check that the file is whole") from error


def _open(name: str) -> BinaryIO:
    compression = COMPRESSIONS.get(Path(name).suffix)
    if compression is None:
        return Path(name).open("rb")
    # pyarrow's stream is a file in all but type
    return io.BufferedReader(pa.input_stream(name, compression=compression))


def _read_json(name: str, file: BinaryIO) -> Iterator[RawRow | Reject]:
    not_json = UserError(
        f"files={name}: it is not JSON; give a JSON array of rows, one JSON object per line (JSONL), or Parquet"
    )
    lines = iter(file)
    # blank lines before the first row
    number, line = 0, b""
    for number, line in enumerate(lines, start=1):  # noqa: B007 - both are read after the loop
        if line.strip(BYTE_ORDER_MARK + b" \t\r\n"):
            break
    else:
        return
    head = line.lstrip(BYTE_ORDER_MARK + b" \t\r\n")[:1]
    if head == b"[":
        try:
            rows = json.loads((line + b"".join(lines)).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise not_json from error
        for place, value in enumerate(rows):
            yield RawRow(value, name, "row", place)
    elif head == b"{":
        yield _parse_line(name, number, line)
        for following, text in enumerate(lines, start=number + 1):
            if text.strip():
                yield _parse_line(name, following, text)
    else:
        raise not_json


def _parse_line(name: str, number: int, line: bytes) -> RawRow | Reject:
    row = RawRow(None, name, "line", number)
    try:
        return RawRow(json.loads(line.decode("utf-8-sig")), name, "line", number)
    except UnicodeDecodeError:
        return Reject(row, "invalid_utf8", "the line is not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return Reject(row, "invalid_json", f"the line is not JSON ({error})")


def _read_parquet(name: str, file: BinaryIO) -> Iterator[RawRow]:
    """Parquet is read from its end, so a compressed file is unpacked into memory first."""
    import pyarrow.parquet as pq

    compressed = Path(name).suffix in COMPRESSIONS
    try:
        table = pq.ParquetFile(pa.BufferReader(file.read()) if compressed else file)
    except pa.ArrowInvalid as error:
        raise UserError(f"files={name}: it is not Parquet ({one_line(error)}); check the file") from error
    number = 0
    for batch in table.iter_batches(batch_size=1000):
        for value in batch.to_pylist():
            yield RawRow(value, name, "row", number)
            number += 1


def _read_hub(config: PrepareConfig) -> Iterator[RawRow]:
    """A dataset of the hub, or of a local directory in the same layout."""
    import datasets

    assert config.dataset is not None
    try:
        rows = datasets.load_dataset(config.dataset, revision=config.revision, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset={config.dataset}: it can't be loaded ({one_line(error)}); check the id, revision and split, "
            f"and that the hub can be reached, or name downloaded files with files=[…]"
        ) from error
    for number, value in enumerate(rows):
        yield RawRow(value, config.dataset, "row", number)
