"""A few compressed bytes may stand for any number: what one row may become is bounded, as is what Arrow believes."""

import base64
import gzip
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.program.errors import UserError
from data.rows import tables
from data.rows.reading import read_file

BOUND = 1 << 16


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LONGEST_VALUE", BOUND)


@pytest.mark.parametrize("before", [b"\n" * 2**21, b" " * 2**21 + b"\n", b"\xef\xbb\xbf \n" * 1000])
def test_blank_lines_before_the_first_row_are_counted_once(tmp_path: Path, before: bytes) -> None:
    """Each is looked at once: looking at all of them for each more took minutes."""
    (tmp_path / "rows.json").write_bytes(before + b' {"a": 1}\n\n{"a": 2}')
    numbers = [number for chunk in read_file(str(tmp_path / "rows.json")) for number in chunk.numbers]
    first = before.count(b"\n") + 1
    assert numbers == [first, first + 2]


def test_a_cell_that_does_not_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1," + "x" * BOUND + "\n")
    with pytest.raises(UserError, match="it can't be read as CSV"):
        list(read_file(str(tmp_path / "rows.csv")))


def test_a_parquet_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LARGEST_UNPACKED", BOUND)
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(b"PAR1" + bytes(2 * BOUND)))
    with pytest.raises(UserError, match="unpack it"):
        list(read_file(str(tmp_path / "rows.parquet.gz")))


def test_parquet_that_fails_late_ends_in_a_sentence(tmp_path: Path) -> None:
    """Its footer is sound, and a page is not."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": [f"text {number}" for number in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    for place in range(100, len(content) // 2, 7):
        content[place] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^files={path}: it can't be read as Parquet"):
        for chunk in read_file(str(path)):
            list(chunk.rows())


@pytest.mark.parametrize("value", [2**31 - 1, -1, 1000])
def test_arrow_rows_whose_texts_lie_elsewhere_end_in_a_sentence(tmp_path: Path, value: int) -> None:
    """They ended the process by a signal, or read what is not of the file."""
    path = tmp_path / "rows.arrow"
    table = pa.table({"a": ["one", "two", "three"]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as arrow:
        arrow.write_table(table)
    content = bytearray(path.read_bytes())
    at = content.find(struct.pack("<4i", 0, 3, 6, 11))
    struct.pack_into("<i", content, at + 8, value)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^files={path}: it can't be read as Arrow"):
        list(read_file(str(path)))


PEAK = """
import sys
import pyarrow.parquet
from configs.program.errors import UserError
from data.config import PrepareConfig
from data.prepare import prepare
from data.template import ChatTokenizer

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

ChatTokenizer.load()
before = peak()
try:
    prepare(PrepareConfig(files=[sys.argv[1]], output="out", workers=1))
except UserError as error:
    print(peak() - before, error)
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_row_is_held_less_than_five_times(tmp_path: Path, project_root: Path, kind: str) -> None:
    """So one of 70 MB takes 256 MiB beside it. Of a Parquet file pages were kept, and it was copied to be sent."""
    text = base64.b64encode(random.Random(0).randbytes(18_000_000)).decode()  # which no page is smaller for
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps({"instruction": "a", "output": text}))
    else:
        pq.write_table(pa.table({"instruction": ["a"], "output": [text]}), path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(project_root)},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, _, told = done.stdout.partition(" ")
    assert "too_long 1×" in told
    assert 1 < int(taken) / len(text) < 4.8
