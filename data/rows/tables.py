"""Tables of files, row by row or as Arrow: CSV and TSV, Parquet, Arrow."""

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import pyarrow as pa

from configs.program.errors import UserError, one_line
from data.disk.formats.arrow_file import check_buffers
from data.disk.formats.regular import UnreadableError, read_at_most
from data.rows.containers import LARGE, plain_name

LONGEST_VALUE = 1 << 26
"""Characters of the longest line of a CSV file."""

LARGEST_UNPACKED = 1 << 32
"""Bytes of the largest packed table that is unpacked into memory."""

UNREADABLE = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError, UnreadableError)
"""What Arrow raises for files that are damaged, early or late."""


def csv_texts(name: str, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """The rows below a line of names, as JSON whose values are all text; named `.tsv`, a file has tabs between them.

    Raises:
        UserError: it is no such table.
    """
    csv.field_size_limit(LONGEST_VALUE)
    tabs = plain_name(name).suffix.lower() == ".tsv"
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            rows = csv.DictReader(_lines(text), delimiter="\t" if tabs else ",", strict=True)
            for number, row in enumerate(rows):
                if None in row:
                    raise csv.Error(f"row {number} has more values than the first line has names")
                yield number, json.dumps(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"files={name}: it can't be read as CSV ({one_line(error)}); check the file") from error


def parquet_tables(name: str, file: BinaryIO, rows: int) -> Iterator[pa.Table]:
    """Tables of at most that many rows. Parquet is read from its end, so what is packed is unpacked into memory first.

    Raises:
        UserError: it is not Parquet.
    """
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(_in_reach(name, file)).iter_batches(batch_size=rows)
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)  # now: after the last one, the pages that were unpacked for it are gone
            if batch.nbytes > LARGE:
                pa.default_memory_pool().release_unused()
            yield _table(batch)
            batch = following
    except UNREADABLE as error:
        raise UserError(f"files={name}: it can't be read as Parquet ({one_line(error)}); check the file") from error


def arrow_tables(name: str, file: BinaryIO, rows: int) -> Iterator[pa.Table]:
    """Tables of at most that many rows, of an Arrow file or stream, as the library `datasets` writes them.

    Raises:
        UserError: it is neither.
    """
    try:
        source = _in_reach(name, file)
        try:
            stored = pa.ipc.open_file(source)
            batches: Iterator[pa.RecordBatch] = (stored.get_batch(i) for i in range(stored.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        for table in map(_table, batches):
            check_buffers(table)
            for start in range(0, table.num_rows, rows):
                yield table.slice(start, rows)
    except UNREADABLE as error:
        raise UserError(f"files={name}: it can't be read as Arrow ({one_line(error)}); check the file") from error


def _in_reach(name: str, file: BinaryIO) -> pa.NativeFile:
    """The file so that any part of it can be read: mapped, or in memory if it is packed."""
    if isinstance(getattr(file, "raw", None), io.FileIO):
        return pa.memory_map(name)
    if len(content := read_at_most(file, LARGEST_UNPACKED + 1)) > LARGEST_UNPACKED:
        raise OSError(f"unpacked it is larger than {LARGEST_UNPACKED >> 30} GiB; unpack it")
    return pa.BufferReader(content)


def _table(batch: pa.RecordBatch) -> pa.Table:
    table = pa.Table.from_batches([batch])
    _ = table.column_names  # one that is not text is refused here
    return table


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(iter(partial(text.readline, LONGEST_VALUE), ""), start=1):
        if len(line) == LONGEST_VALUE:
            raise csv.Error(f"line {number} is longer than {LONGEST_VALUE >> 20} MiB")
        yield line
