"""A table of an Arrow file, mapped into memory, whose buffers are what its schema says.

Arrow believes what a file says: a list that begins behind the end of its numbers is read there, outside of the file.
`open_table` looks first, at the cost of reading where lists begin, which is little beside what they hold.
"""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from configs.program.errors import one_line
from data.disk.formats.regular import UnreadableError, open_regular


def open_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The rows of a file in Arrow's file format, as it was written by this project: without compression.

    Raises:
        UnreadableError: it is no such file, or damaged, or has other columns.
    """
    open_regular(path).close()
    try:
        with pa.memory_map(str(path)) as file:
            stored = pa.ipc.open_file(file)
            if not stored.schema.equals(schema):
                raise UnreadableError("it has other columns")
            before = pa.total_allocated_bytes()
            table = stored.read_all()
            if pa.total_allocated_bytes() > before:
                raise UnreadableError("its columns are compressed")
        check_buffers(table)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise UnreadableError(one_line(error)) from error
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        if chunk.null_count or (pa.types.is_list(chunk.type) and chunk.flatten().null_count):
            raise UnreadableError("it holds nulls")
    return table


def as_array(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """[values], read-only: numbers, none of which is null; without a copy if they are in one piece.

    Arrow's own `to_numpy` imports pandas first, which takes time and memory of each process.
    """
    return np.from_dlpack(values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values)


def from_array(values: np.ndarray) -> pa.Array:
    """[values]: the same numbers, without a copy; `pa.array` imports pandas first, too."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def check_buffers(table: pa.Table) -> None:
    """Raises `pa.ArrowInvalid` if a value lies outside of its buffers; texts need not be UTF-8."""
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        chunk.validate()  # first, as even another view of it would look at what this compares
        plain = chunk
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            plain = chunk.view(_as_bytes(chunk.type))  # what has no such view, such as a dictionary, has to hold UTF-8
        plain.validate(full=True)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in the place of texts, at any depth of lists and structs."""
    of_text = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    if pa.types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_bytes(field.type)) for field in kind])
    return of_text.get(kind, kind)
