"""Tables of files, row by row or as Arrow: CSV and TSV, Parquet, Arrow."""

import csv
import io
import json
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from configs.program.errors import UserError, one_line
from data.rows.containers import plain_name

LONGEST_VALUE = 1 << 26
"""Characters of the longest value of a CSV file."""


def csv_texts(name: str, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """The rows below a line of names, as JSON whose values are all text; named `.tsv`, a file has tabs between them.

    Raises:
        UserError: it is no such table.
    """
    csv.field_size_limit(LONGEST_VALUE)
    tabs = plain_name(name).suffix.lower() == ".tsv"
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            rows = csv.DictReader(text, delimiter="\t" if tabs else ",", strict=True)
            for number, row in enumerate(rows):
                if None in row:
                    raise csv.Error(f"row {number} has more values than the first line has names")
                yield number, json.dumps(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"files={name}: it can't be read as CSV ({one_line(error)}); check the file") from error


def parquet_tables(name: str, file: BinaryIO, rows: int) -> Iterator[pa.Table]:
    """Tables of at most so many rows. Parquet is read from its end, so what is packed is unpacked into memory first.

    Raises:
        UserError: it is not Parquet.
    """
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(_in_reach(name, file))
    except pa.ArrowInvalid as error:
        raise UserError(f"files={name}: it is not Parquet ({one_line(error)}); check the file") from error
    for batch in table.iter_batches(batch_size=rows):
        yield pa.Table.from_batches([batch])


def arrow_tables(name: str, file: BinaryIO, rows: int) -> Iterator[pa.Table]:
    """Tables of at most so many rows, of an Arrow file or stream, as the library `datasets` writes them.

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
        for batch in batches:
            for start in range(0, batch.num_rows, rows):
                yield pa.Table.from_batches([batch.slice(start, rows)])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"files={name}: it can't be read as Arrow ({one_line(error)}); check the file") from error


def _in_reach(name: str, file: BinaryIO) -> pa.NativeFile:
    """The file so that any place of it can be read: mapped, or in memory if it is packed."""
    return pa.memory_map(name) if isinstance(getattr(file, "raw", None), io.FileIO) else pa.BufferReader(file.read())
