"""An Arrow file is read if no value in it lies outside of it; a process that reads one that is damaged would end."""

import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data.disk.formats.arrow_file import as_array, check_buffers, open_table
from data.disk.formats.regular import UnreadableError

SCHEMA = pa.schema([("ids", pa.list_(pa.uint16())), ("names", pa.list_(pa.int64()))])
ROWS = {"ids": [[1, 2, 3], [4], [5, 6]], "names": [[7], [], [8, 9]]}


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, **options) as arrow:
        arrow.write_table(table)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.arrow", pa.table(ROWS, schema=SCHEMA))


def test_a_sound_file_is_mapped_and_not_copied(path: Path) -> None:
    before = pa.total_allocated_bytes()
    table = open_table(path, SCHEMA)
    assert table.to_pydict() == ROWS
    assert pa.total_allocated_bytes() - before < 1000


@pytest.mark.parametrize("column", ["ids", "names"])
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("value", [2**31 - 1, -1, -(2**31), 7])
def test_a_list_that_begins_elsewhere_is_refused(path: Path, column: str, place: int, value: int) -> None:
    """Each offset of each column, far outside and just beyond the numbers."""
    lists = open_table(path, SCHEMA)[column].chunk(0)
    offsets = lists.buffers()[1].to_pybytes()[: 4 * (len(lists) + 1)]
    del lists
    content = bytearray(path.read_bytes())
    at = content.find(offsets)
    assert at > 0
    struct.pack_into("<i", content, at + 4 * place, value)
    path.write_bytes(content)
    with pytest.raises(UnreadableError):
        open_table(path, SCHEMA)


def test_every_cut_and_every_byte_of_the_footer(path: Path) -> None:
    """No damage gives more than a refusal, or a table whose values can all be read."""
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UnreadableError):
            open_table(path, SCHEMA)
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            open_table(path, SCHEMA).to_pydict()
        except UnreadableError as refused:
            assert str(refused)


def test_other_columns_nulls_and_compressed_ones_are_refused(tmp_path: Path) -> None:
    other = pa.table({"ids": [[1]]})
    with pytest.raises(UnreadableError, match="it has other columns"):
        open_table(write(tmp_path / "other", other), SCHEMA)
    null = pa.table({"ids": [[1, None]], "names": [[1]]}, schema=SCHEMA)
    with pytest.raises(UnreadableError, match="nulls"):
        open_table(write(tmp_path / "null", null), SCHEMA)
    large = pa.table({"ids": [[0] * 100_000], "names": [[1]]}, schema=SCHEMA)
    packed = write(tmp_path / "packed", large, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(UnreadableError, match="compressed"):
        open_table(packed, SCHEMA)


def test_texts_that_are_not_utf8_are_no_damage_of_the_file() -> None:
    """Their rows are rejected one by one; offsets beyond the bytes are damage."""
    texts = pa.array([b"\xff\xfe", b"x"], pa.binary())
    check_buffers(pa.table({"texts": texts.view(pa.string()), "more": pa.array([[{"a": "x"}], []])}))
    buffers = [None, pa.py_buffer(struct.pack("<3i", 0, 2, 1000)), texts.buffers()[2]]
    with pytest.raises(pa.ArrowInvalid):
        check_buffers(pa.table({"texts": pa.Array.from_buffers(pa.string(), 2, buffers)}))


@pytest.mark.parametrize("kind", [pa.uint16(), pa.int32(), pa.int64()])
def test_numbers_of_several_pieces_none_and_a_slice(kind: pa.DataType) -> None:
    pieces = pa.chunked_array([[1, 2], [], [3]], type=kind)
    for values, expected in (
        (pieces, [1, 2, 3]),
        (pieces.slice(1), [2, 3]),
        (pieces.chunk(0)[1:], [2]),
        (pieces[:0], []),
    ):
        assert as_array(values).tolist() == expected
        assert as_array(values).dtype == kind.to_pandas_dtype()
