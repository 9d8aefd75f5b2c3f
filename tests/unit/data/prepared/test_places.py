"""Where rows stood is read back, or the file is refused in a sentence."""

from pathlib import Path

import pyarrow as pa
import pytest

from configs.program.errors import UserError
from data.prepared.places import PLACES, SCHEMA, Places


def test_what_was_written_is_read(tmp_path: Path) -> None:
    places = Places()
    places.add("a.jsonl", "line", [1, 3])
    places.add("b.json", "row", [0])
    places.write(tmp_path)
    assert [str(Places.read(tmp_path, 3).of(row)) for row in range(3)] == ["a.jsonl:1", "a.jsonl:3", "b.json:0"]


@pytest.mark.parametrize(
    "runs",
    [
        "",
        "5",
        "[]",
        "[5]",
        '[[0, "a"]]',
        '[["x", "a", "line"]]',
        '[[NaN, "a", "line"]]',
        '[[Infinity, "a", "line"]]',
        '[[1, "a", "line"]]',
        '[[0, "a", "line"], [0, "b", "line"]]',
        "[" * 100_000,
    ],
)
def test_files_that_can_be_none_are_refused(tmp_path: Path, runs: str) -> None:
    schema = SCHEMA.with_metadata({"runs": runs})
    with pa.OSFile(str(tmp_path / PLACES), "wb") as file, pa.ipc.new_file(file, schema) as arrow:
        arrow.write_batch(pa.RecordBatch.from_arrays([pa.array([1], pa.int64())], schema=schema))
    with pytest.raises(UserError, match=f"its {PLACES} is not whole; prepare it again"):
        Places.read(tmp_path, 1)
