"""Files are read in pieces: wherever a piece ends, the rows are the same."""

import io
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.program.errors import UserError
from data.rows import json_rows, reading
from data.rows.conversion import to_conversation
from data.rows.json_rows import JsonRows
from data.rows.reading import DEEPEST, Chunk, RawRow, Reject, read_arrow, read_file

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


class Dribble(io.BytesIO):
    """Gives a few bytes at a time, whatever is asked for."""

    def __init__(self, content: bytes, piece: int):
        super().__init__(content)
        self.piece = piece

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self.piece)


def items(content: bytes, piece: int) -> list[Any]:
    return [json.loads(text) for text in JsonRows("rows.json", content[:1], Dribble(content[1:], piece)).array()]


@given(st.lists(values, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_an_array_is_read_in_any_pieces(array: list[Any], indent: int | None, ascii_only: bool, piece: int) -> None:
    content = json.dumps(array, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    assert items(content + b" \n", piece) == array


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'[{"a": 1}', "no comma follows at item 0"),
        (b'[{"a": 1}, {"b": 2', "can't be parsed at item 1"),
        (b"[1, 2,]", "can't be parsed at item 2"),
        (b"[1 2]", "no comma follows at item 0"),
        (b"[1] [2]", "something follows the array at item 1"),
        (b"[1, nope]", "can't be parsed at item 1"),
        (b'["\xff"]', "not UTF-8 text at item 0"),
        (b'["\xe2\x82', "not UTF-8 text at item 0"),
        (b"[", "can't be parsed at item 0"),
        (b"[" * 100_000, "nested too deeply at item 0"),
    ],
)
def test_what_is_no_array_is_refused_with_the_place(content: bytes, why: str, piece: int) -> None:
    with pytest.raises(UserError, match=f"files=rows.json: it is not JSON, .*{why}; give"):
        items(content, max(piece, len(content) // 10))


def test_an_item_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 1 << 20)
    monkeypatch.setattr(json_rows, "BLOCK", 1 << 16)
    endless = io.BytesIO(b'"' + b"x" * (8 << 20))  # long, and not broken as far as one can see
    with pytest.raises(UserError, match="item 0 is longer than 1 MiB, or has no end, or is not JSON"):
        list(JsonRows("rows.json", b"[", endless).array())
    assert endless.tell() < 4 << 20


def test_memory_does_not_hold_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 100)
    file = io.BytesIO(json.dumps([{"n": n, "text": "x" * 50} for n in range(1000)]).encode())
    array = JsonRows("rows.json", file.read(1), file)
    for read, _ in enumerate(array.array(), start=1):
        assert len(array._text) < 400
        assert file.tell() < 80 * read + 400


def test_a_chunk_cut_short() -> None:
    lines = Chunk("rows.jsonl", "line", [1, 3, 4], [b'{"a": 1}', b"nope", b"\xff"])
    assert [row.number for row in lines.first(2).rows()] == [1, 3]
    reasons = [row.reason if isinstance(row, Reject) else row.value for row in lines.rows()]
    assert reasons == [{"a": 1}, "invalid_json", "invalid_utf8"]

    table = pa.table({"a": range(5), "b": [[{"c": "x"}]] * 5})
    (first, second) = read_arrow("rows.parquet", [table.slice(0, 3), table.slice(3)])
    assert [(row.number, row.value) for row in second.first(1).rows() if isinstance(row, RawRow)] == [
        (3, {"a": 3, "b": [{"c": "x"}]})
    ]
    assert len(first) == 3
    for chunk in (first, second):
        other = pickle.loads(pickle.dumps(chunk.handed_over()))
        assert [row.value for row in other.rows() if isinstance(row, RawRow)] == [
            row.value for row in chunk.rows() if isinstance(row, RawRow)
        ]


def test_large_rows_of_tables_come_alone_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside 999 others a row of 70 MB was handed over, and copied on the way, with all of them."""
    monkeypatch.setattr(reading, "LARGE", 1000)
    texts = ["x" * size for size in (10, 2000, 10, 10, 5000, 300, 300)]
    chunks = list(read_arrow("rows.parquet", [pa.table({"a": texts}), pa.table({"a": ["y"]})]))
    assert [number for chunk in chunks for number in chunk.numbers] == list(range(8))
    assert [row.value["a"] for chunk in chunks for row in chunk.rows() if isinstance(row, RawRow)] == [*texts, "y"]
    assert [chunk.numbers for chunk in chunks if chunk.is_large] == [[1], [4]]
    assert all(chunk.is_large or sum(len(texts[n]) for n in chunk.numbers) <= 1000 for chunk in chunks[:-1])
    small, large = (Chunk("rows.jsonl", "line", [1], [b"x" * size]) for size in (1000, 1001))
    assert (small.is_large, large.is_large) == (False, True)


def rows_of(path: Path) -> list[RawRow | Reject]:
    return [row for chunk in read_file(str(path)) for row in chunk.rows()]


def test_an_array_in_one_line_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"n": n, "text": "x" * 1000} for n in range(20_000)]))
    tracemalloc.start()
    try:
        rows = sum(len(chunk) for chunk in read_file(str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows == 20_000
    assert peak < path.stat().st_size / 2


def test_items_that_python_will_not_read_are_rejects(tmp_path: Path) -> None:
    """A number that is too long, and nesting that is too deep: the same whoever parses."""
    huge, deep = "9" * 5000, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1)
    allowed = "[" * (DEEPEST - 2) + "]" * (DEEPEST - 2)
    braces = json.dumps("{[" * 2000)
    rows = [f'{{"x": {value}}}' for value in (1, huge, deep, allowed, braces)]
    for name, content in (("rows.json", f"[{', '.join(rows)}]"), ("rows.jsonl", "\n".join(rows))):
        (tmp_path / name).write_text(content)
        found = rows_of(tmp_path / name)
        assert [row.reason if isinstance(row, Reject) else "kept" for row in found] == [
            "kept",
            "invalid_json",
            "invalid_json",
            "kept",
            "kept",
        ]


def test_a_jsonl_file_that_begins_with_a_list(tmp_path: Path) -> None:
    (tmp_path / "rows.JSONL").write_text('["x"]\n{"a": 1}\n')
    assert [row.value for row in rows_of(tmp_path / "rows.JSONL") if isinstance(row, RawRow)] == [["x"], {"a": 1}]


@pytest.mark.parametrize("blank", [b"", b"\n", b"\xef\xbb\xbf", b" \n" * 100])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n"])
def test_lines_keep_their_numbers(tmp_path: Path, blank: bytes, last: bytes) -> None:
    lines = [json.dumps({"n": n, "text": "x" * (37 * n)}).encode() for n in range(9)]
    (tmp_path / "rows.jsonl").write_bytes(blank + b"\n".join(lines) + last)
    found = rows_of(tmp_path / "rows.jsonl")
    assert [row.value["n"] for row in found if isinstance(row, RawRow)] == list(range(9))
    assert [row.number for row in found] == list(range(1 + blank.count(b"\n"), 10 + blank.count(b"\n")))


def test_parquet_values_that_cannot_be_read_spoil_only_what_needs_them(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff", b"fine"]).cast(pa.binary()).view(pa.string())
    dates = pa.array([1, 10**7, 2], pa.int32()).view(pa.date32())
    pq.write_table(pa.table({"instruction": text, "output": ["a", "b", "c"], "day": dates}), tmp_path / "rows.parquet")
    outcomes = [to_conversation(row, "instruction") for row in rows_of(tmp_path / "rows.parquet")]  # type: ignore[arg-type]
    assert [outcome.reason if isinstance(outcome, Reject) else "kept" for outcome in outcomes] == [
        "kept",
        "invalid_utf8",
        "kept",
    ]
    assert all(isinstance(row, RawRow) for row in rows_of(tmp_path / "rows.parquet"))


def test_what_a_reject_quotes_is_cut() -> None:
    record = Reject("rows.jsonl", "line", 1, "unknown_role", "x" * 10_000).record()
    assert len(record["detail"]) < 600
