"""Tables that hubs keep beside JSON and Parquet: CSV, TSV and Arrow files → chunks of rows."""

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from configs.program.errors import UserError, one_line
from data.disk.formats.arrow_file import check_buffers
from data.rows.reading import COMPRESSIONS, LONGEST_ROW, Chunk, read_arrow


def read_csv(name: str) -> Iterator[Chunk]:
    """The rows below a line of names, every value a text; named `.tsv`, the file has tabs between them.

    Raises:
        UserError: it is no such table.
    """
    compression = COMPRESSIONS.get(Path(name).suffix)
    plain = Path(name).with_suffix("") if compression else Path(name)
    csv.field_size_limit(LONGEST_ROW)
    try:
        with (
            pa.input_stream(name, compression=compression) as stream,
            io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig", newline="") as text,
        ):
            rows = csv.DictReader(_lines(text), delimiter="\t" if plain.suffix.lower() == ".tsv" else ",", strict=True)
            numbers: list[int] = []
            content: list[str | bytes] = []
            for number, row in enumerate(rows):
                if None in row:
                    raise csv.Error(f"row {number} has more values than the first line has names")
                numbers.append(number)
                content.append(json.dumps(row))
                if len(numbers) == Chunk.ROWS:
                    yield Chunk(name, "row", numbers, content)
                    numbers, content = [], []
            if numbers:
                yield Chunk(name, "row", numbers, content)
    except (csv.Error, UnicodeDecodeError, OSError, EOFError) as error:
        raise UserError(f"files={name}: it can't be read as CSV ({one_line(error)}); check the file") from error


def read_arrow_file(name: str) -> Iterator[Chunk]:
    """The rows of an Arrow file or stream, as the library `datasets` writes them.

    Raises:
        UserError: it is neither.
    """
    try:
        with pa.memory_map(name) as file:
            try:
                stored = pa.ipc.open_file(file)
                batches: Iterator[pa.RecordBatch] = (stored.get_batch(i) for i in range(stored.num_record_batches))
            except pa.ArrowInvalid:
                file.seek(0)
                batches = iter(pa.ipc.open_stream(file))
            tables = (
                table.slice(start, Chunk.ROWS)
                for table in map(_checked, batches)
                for start in range(0, table.num_rows, Chunk.ROWS)
            )
            yield from read_arrow(name, tables)
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise UserError(f"files={name}: it can't be read as Arrow ({one_line(error)}); check the file") from error


def _checked(batch: pa.RecordBatch) -> pa.Table:
    table = pa.Table.from_batches([batch])
    check_buffers(table)
    return table


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(iter(partial(text.readline, LONGEST_ROW), ""), start=1):
        if len(line) == LONGEST_ROW:
            raise EOFError(f"line {number} is longer than {LONGEST_ROW >> 20} MiB")
        yield line
