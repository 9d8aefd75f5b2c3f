"""What is in a file says how it is read, whatever its name says."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.program.errors import UserError
from data.rows import json_rows
from data.rows.json_rows import row_texts
from data.rows.reading import RawRow, Reject, read_file

ROWS = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two\n", "thrée", "{[")]


def rows_of(path: Path) -> list[RawRow | Reject]:
    return [row for chunk in read_file(str(path)) for row in chunk.rows()]


def values(path: Path) -> list[Any]:
    return [row.value if isinstance(row, RawRow) else row.reason for row in rows_of(path)]


def table(rows: list[Any]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def stored(write: Callable[[io.BytesIO, pa.Table], None]) -> Callable[[list[Any]], bytes]:
    def content(rows: list[Any]) -> bytes:
        buffer = io.BytesIO()
        write(buffer, table(rows))
        return buffer.getvalue()

    return content


def arrow(buffer: io.BytesIO, rows: pa.Table) -> None:
    with pa.ipc.new_file(buffer, rows.schema) as file:
        file.write_table(rows)


def dumped(rows: list[Any], between: str, **options: Any) -> str:
    return between.join(json.dumps(row, **options) for row in rows)


# JSON

LAYOUTS: dict[str, Callable[[list[Any]], str]] = {
    "lines": lambda rows: dumped(rows, "\n"),
    "lines with blank ones": lambda rows: "\n \n" + dumped(rows, "\n\n") + "\n\n",
    "lines of Windows": lambda rows: dumped(rows, "\r\n") + "\r\n",
    "lines of the old Mac": lambda rows: dumped(rows, "\r"),
    "end to end": lambda rows: dumped(rows, ""),
    "commas": lambda rows: dumped(rows, ",\n") + ",\n",
    "several lines each": lambda rows: dumped(rows, "\n", indent=2),
    "array": json.dumps,
    "array of lines": lambda rows: f"[\n{dumped(rows, chr(44) + chr(10))}\n]\n",
    "array of several lines": lambda rows: json.dumps(rows, indent=1),
    "below data": lambda rows: json.dumps({"data": rows}),
    "below instances": lambda rows: json.dumps({"type": "text2text", "instances": rows}, indent=2),
    "below rows, with more behind": lambda rows: json.dumps({"version": [1, 2], "rows": rows, "n": {"of": 1}}),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.JSON", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(tmp_path: Path, layout: str, name: str, mark: str) -> None:
    (tmp_path / name).write_text(mark + LAYOUTS[layout](ROWS), encoding="utf-8", newline="")
    assert values(tmp_path / name) == ROWS
    (tmp_path / name).write_text(mark + LAYOUTS[layout](ROWS[:1]), encoding="utf-8", newline="")
    assert values(tmp_path / name) == ROWS[:1]


texts = st.text(st.characters(codec="utf-8"), max_size=6)
rows_of_texts = st.lists(
    st.dictionaries(st.sampled_from(["a", "data", "x y"]), texts, min_size=1), min_size=1, max_size=5
)


@given(rows_of_texts, st.sampled_from([*LAYOUTS]), st.integers(200, 400))
def test_rows_come_in_pieces_of_any_size(rows: list[Any], layout: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "BLOCK", block)
        _, found = row_texts(
            "rows.json", io.BufferedReader(io.BytesIO(LAYOUTS[layout](rows).encode()), block), known_lines=True
        )
        assert [json.loads(text or b"") for _, text in found] == rows


def test_lists_of_turns_are_rows_in_lines_and_one_array_in_a_list(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for rows in ([turns], [turns, turns]):
        (tmp_path / "rows.jsonl").write_text(dumped(rows, "\n"))
        assert values(tmp_path / "rows.jsonl") == rows
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        assert values(tmp_path / "rows.json") == rows
    (tmp_path / "rows.json").write_text(json.dumps({"data": turns}))  # one row, of which `data` is the list of turns
    assert values(tmp_path / "rows.json") == [{"data": turns}]


def test_a_broken_line_spoils_itself_alone(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    for first in ("nonsense", '{"instruction": "cut', '{"a": [1', '["x"'):
        (tmp_path / "rows.jsonl").write_text(f"{first}\n{good}\n{good[:-2]}\n{good}\n")
        assert values(tmp_path / "rows.jsonl") == ["invalid_json", ROWS[0], "invalid_json", ROWS[0]]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"data": [{"a": 1}], "test": [{"a": 2}]}', "several lists, test among them"),
        ('{"test": [{"a": 2}], "data": [{"a": 1}]}', "several lists, test among them"),
        ('{"data": [{"a": 1}], "x": ', "can't be parsed after the list of rows"),
        ('{"data": [{"a": 1}]} {"b": 2}', "can't be parsed after the list of rows"),
        ('{\n"data": [{"a": 1}, {"a": 2', "can't be parsed at item 1"),
        ('{"a": 1}, nonsense', "no object follows at item 1"),
    ],
)
def test_what_a_beginning_promises_has_to_hold(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=told):
        rows_of(tmp_path / "rows.json")


def test_leading_blank_lines_cost_little(tmp_path: Path) -> None:
    """Four MiB of them took minutes when each piece was looked at again with all those before it."""
    blank = b"\n" * (1 << 22)
    (tmp_path / "rows.jsonl").write_bytes(blank + json.dumps(ROWS[0]).encode() + b"\n\n" + json.dumps(ROWS[1]).encode())
    assert [(row.number, row.value) for row in rows_of(tmp_path / "rows.jsonl") if isinstance(row, RawRow)] == [
        (len(blank) + 1, ROWS[0]),
        (len(blank) + 3, ROWS[1]),
    ]


@given(
    content=st.lists(
        st.sampled_from([b"\n", b"\r\n", b" \n", b"\n" * 40, b"\xef\xbb\xbf\n", b"{}\n", b"{} \n", b"  {}\n"])
    ),
    beginning=st.integers(0, 50),
    buffer=st.integers(1, 30),
)
def test_blank_lines_are_counted_wherever_they_stand(content: list[bytes], beginning: int, buffer: int) -> None:
    """Many at once, whatever part of them the beginning and the buffer hold, as if each were looked at."""
    text = b"".join(content)
    lines = enumerate(text.split(b"\n"), 1)
    expected = [(number, line.strip()) for number, line in lines if line.strip(b"\xef\xbb\xbf \r\n")]
    file = io.BufferedReader(io.BytesIO(text), buffer)  # type: ignore[arg-type]
    found = json_rows._lines(file.read(beginning), file, 1)
    assert [(number, (line or b"").strip()) for number, line in found] == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_longer_than_a_row_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, end: bytes
) -> None:
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 1000)
    monkeypatch.setattr(json_rows, "BLOCK", 300)
    lines = [json.dumps(row).encode() for row in ROWS[:2]]
    lines.insert(place, b'{"instruction": "' + b"x" * 5000 + b'"}')
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + end)
    found = rows_of(tmp_path / "rows.jsonl")
    assert [row.number for row in found] == [1, 2, 3]
    assert [row.reason for row in found if isinstance(row, Reject)] == ["row_too_long"]
    assert isinstance(found[place], Reject)


def test_a_line_without_end_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 1000)
    asked: list[int] = []

    class Endless(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            asked.append(size or -1)
            return super().readline(size)

    _, texts = row_texts("rows.jsonl", Endless(b"x" * (3 << 20)), known_lines=True)
    assert list(texts) == [(1, None)]
    assert set(asked) == {1000}


# Other containers

KINDS: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": lambda rows: dumped(rows, "\n").encode(),
    "json": lambda rows: json.dumps(rows).encode(),
    "parquet": stored(lambda buffer, rows: pq.write_table(rows, buffer)),
    "arrow": stored(arrow),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    "gz": gzip.compress,
    "zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "members": lambda content: gzip.compress(content[:20]) + gzip.compress(content[20:]),
}


@pytest.mark.parametrize("name", ["{kind}.{packing}", "{kind}", "ROWS.{kind}.{packing}", "{packing}.bin"])
@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_content_says_what_a_file_is(tmp_path: Path, kind: str, packing: str, name: str) -> None:
    path = tmp_path / name.format(kind=kind, packing=packing).upper()
    path.write_bytes(PACKED[packing](KINDS[kind](ROWS)))
    assert values(path) == ROWS


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.arrow", "rows.txt"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_is_read_under_the_name_of_a_table(tmp_path: Path, kind: str, mark: str, name: str) -> None:
    (tmp_path / name).write_bytes(mark.encode() + KINDS[kind](ROWS))
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.csv.gz"])
def test_tables_of_text_are_known_by_name(tmp_path: Path, name: str) -> None:
    separator = "\t" if "TSV" in name else ","
    text = "\n".join(separator.join(line) for line in (["question", "answer"], ["Two?", '"2\n"'])).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert values(tmp_path / name) == [{"question": "Two?", "answer": "2\n"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "rows.jsonl.gz", "rows"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer, .*`git lfs pull`"),
        (json.dumps(ROWS).encode("utf-16"), "UTF-16 text; .*iconv"),
        (json.dumps(ROWS).encode("utf-16-le"), "UTF-16 text"),
        (json.dumps(ROWS).encode("utf-16-be"), "UTF-16 text"),
        (json.dumps(ROWS).encode("utf-32"), "UTF-32 text; .*iconv"),
        (json.dumps(ROWS).encode("utf-32-le"), "UTF-32 text"),
        (json.dumps(ROWS).encode("utf-32-be"), "UTF-32 text"),
        (b"PK\x03\x04" + bytes(40), "a zip archive; unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(40), "a 7z archive; unpack it"),
        (b"rows.jsonl".ljust(257, b"\0") + b"ustar\0" + bytes(300), "a tar archive; unpack it"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page; download the file itself"),
    ],
)
def test_what_holds_no_rows_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    for written in (content, gzip.compress(content)):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(UserError, match=f"files={tmp_path / name}: it is {told}"):
            rows_of(tmp_path / name)


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_a_packed_file_that_is_cut_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "rows.jsonl").write_bytes(pack(KINDS["jsonl"](ROWS * 1000))[:-30])
    with pytest.raises(UserError, match="it can't be read"):
        rows_of(tmp_path / "rows.jsonl")


# What `datasets` saved to disk


def saved(rows: list[Any], directory: Path, shards: int = 1) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(directory, num_shards=shards)


def test_a_dataset_that_was_saved_to_disk(run_program: Callable[..., Any], tmp_path: Path) -> None:
    saved(ROWS, tmp_path / "saved", shards=2)
    with (tmp_path / "saved" / "cache-0123456789abcdef.arrow").open("wb") as cache:  # as `map` leaves it there
        arrow(cache, table([{"instruction": "Cached?", "output": "Yes."}]))  # type: ignore[arg-type]
    assert run_program("data", "dataset=saved", "output=out", "eval_fraction=0").exit_code == 0
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["rows"]["kept"] == len(ROWS)
    assert [file["file"] for file in told["inputs"][0]["files"]] == [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for settings, sentence in (
        (
            ("split=train[:10]",),
            "split=train[:10]: dataset=saved has no such split; whole splits are read, and limits ",
        ),
        (("dataset_config=x",), "dataset_config=x: dataset=saved has no configs"),
    ):
        refused = run_program("data", "dataset=saved", "output=out", *settings)
        assert (refused.exit_code, sentence in refused.stderr) == (2, True)
    refused = run_program("data", "files=[saved]", "output=out")
    assert "files=saved: `datasets` saved it to disk; give dataset=saved without files" in refused.stderr
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    refused = run_program("data", "dataset=saved", "output=out")
    assert "data-00001-of-00002.arrow, which state.json names, is missing" in refused.stderr
    for content in ("{", "{}", '{"_data_files": 5}', '{"_data_files": [5]}', "[]"):
        (tmp_path / "saved" / "state.json").write_text(content)
        assert run_program("data", "dataset=saved", "output=out").exit_code == 2


def test_the_splits_of_a_dataset_that_was_saved_to_disk(run_program: Callable[..., Any], tmp_path: Path) -> None:
    for split, rows in (("train_sft", ROWS), ("train_gen", ROWS[:1])):
        saved(rows, tmp_path / "saved" / split)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train_sft", "train_gen"]}')
    refused = run_program("data", "dataset=saved", "output=out", "eval_fraction=0")
    assert "split=train: dataset=saved has no such split; it is one of train_sft, train_gen" in refused.stderr
    assert run_program("data", "dataset=saved", "split=train_sft", "output=out", "eval_fraction=0").exit_code == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rows"]["kept"] == len(ROWS)
