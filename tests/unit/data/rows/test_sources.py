"""Files → rows → conversations of the instruction schema, and what can't be read or used."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.program.errors import UserError
from data.config import PrepareConfig
from data.rows.conversion import to_conversation
from data.rows.reading import RawRow, Reject
from data.rows.sources import find_sources
from data.schema import Conversation
from data.template import MARKERS
from tests.conftest import golden

GOOD = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}


def read(path: Path, content: bytes | str, *, keep_markers: bool = False) -> list[Conversation | Reject]:
    """What becomes of every row of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read_rows(PrepareConfig(files=[str(path)]))
    return [
        row if isinstance(row, Reject) else to_conversation(row, "instruction", keep_markers=keep_markers)
        for row in rows
    ]


def read_rows(config: PrepareConfig) -> list[RawRow | Reject]:
    return [row for source in find_sources(config) for chunk in source.chunks() for row in chunk.rows()]


def convert(value: Any, *, keep_markers: bool = False) -> Conversation | Reject:
    return to_conversation(RawRow(value, "rows.json", "row", 0), "instruction", keep_markers=keep_markers)


def texts(conversation: Conversation | Reject) -> list[str]:
    assert isinstance(conversation, Conversation)
    assert [message.role for message in conversation.messages] == ["user", "assistant"]
    return [message.content for message in conversation.messages]


# Reading


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("space", [b"", b"\n\n  "], ids=["at-once", "after-blank-lines"])
def test_json_array(tmp_path: Path, bom: bytes, space: bytes) -> None:
    found = read(tmp_path / "rows.json", bom + space + json.dumps([GOOD, GOOD], indent=1).encode())
    assert [texts(row) for row in found] == [["Add 1 and 2.", "3"]] * 2


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_json_lines_with_blank_lines(tmp_path: Path, bom: bytes, newline: bytes) -> None:
    line = json.dumps(GOOD).encode()
    found = read(tmp_path / "rows.jsonl", bom + newline.join([line, b"", b"  ", line]))
    assert [texts(row) for row in found] == [["Add 1 and 2.", "3"]] * 2


def test_blank_first_line_after_a_bom(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.jsonl", b"\xef\xbb\xbf\n" + json.dumps(GOOD).encode())
    assert [texts(row) for row in found] == [["Add 1 and 2.", "3"]]


def test_line_separators_inside_text_split_nothing(tmp_path: Path) -> None:
    row = GOOD | {"output": "a\u2028b\u0085c"}
    found = read(tmp_path / "rows.jsonl", json.dumps(row, ensure_ascii=False))
    assert texts(found[0])[1] == "a\u2028b\u0085c"


def test_places_are_lines_from_1_and_items_from_0(tmp_path: Path) -> None:
    bad = {"instruction": "only"}
    lines = read(tmp_path / "rows.jsonl", f"{json.dumps(GOOD)}\n\n{json.dumps(bad)}\n")
    items = read(tmp_path / "rows.json", json.dumps([GOOD, bad]))

    assert isinstance(lines[1], Reject)
    assert isinstance(items[1], Reject)
    where = {"reason": "missing_field", "detail": "there is no field output"}
    assert lines[1].record() == {"file": str(tmp_path / "rows.jsonl"), "line": 3, **where}
    assert items[1].record() == {"file": str(tmp_path / "rows.json"), "row": 1, **where}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"instruction": "cut', "invalid_json"),
        (b"plain words", "invalid_json"),
        (b'{"instruction": "\xff", "output": "x"}', "invalid_utf8"),
        (b'[1, "x"]', "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"instruction": "x", "output": "\\ud800"}', "lone_surrogate"),
        (b'{"instruction": "x\\u0000y", "output": "z"}', "nul_character"),
    ],
)
def test_bad_line_is_rejected_and_its_neighbours_kept(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(GOOD).encode()
    before, between, after = read(tmp_path / "rows.jsonl", b"\n".join([good, line, good]))

    assert texts(before) == texts(after) == ["Add 1 and 2.", "3"]
    assert isinstance(between, Reject)
    assert (between.reason, between.number) == (reason, 2)


@pytest.mark.parametrize("depth", [100_000])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_bottomless_nesting_is_no_fault_of_ours(tmp_path: Path, name: str, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    path = tmp_path / name
    if name == "rows.json":
        with pytest.raises(UserError, match=f"files={path}"):
            read(path, deep)
    else:
        (found,) = read(path, '{"instruction": ' + deep + "}")
        assert isinstance(found, Reject)


@pytest.mark.parametrize("content", [b"name,age\n1,2\n", b'[{"instruction": ', b"[\xff]"])
def test_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(UserError, match=f"files={path}: it is not JSON"):
        read(path, content)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    config = PrepareConfig(files=[str(tmp_path / "absent.jsonl")])
    with pytest.raises(UserError, match=r"absent\.jsonl: there is no such file"):
        find_sources(config)


def test_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a directory"):
        (read_rows(PrepareConfig(files=[str(tmp_path)])))


@pytest.mark.parametrize("content", [b"", b"  \n"])
def test_empty_file_holds_no_rows(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path / "rows.json", content) == []


def test_files_are_read_in_the_order_named(tmp_path: Path) -> None:
    names = []
    for word in ("second", "first"):
        path = tmp_path / f"{word}.jsonl"
        path.write_text(json.dumps(GOOD | {"output": word}))
        names.append(str(path))
    rows = read_rows(PrepareConfig(files=names))
    assert [row.value["output"] for row in rows if isinstance(row, RawRow)] == ["second", "first"]


def test_local_dataset_directory_is_read(tmp_path: Path) -> None:
    """A directory in a hub's layout; rows say which of its files they come from."""
    directory = tmp_path / "dataset"
    directory.mkdir()
    (directory / "train.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"output": "three"}) + "\n")
    rows = list(read_rows(PrepareConfig(dataset=str(directory))))
    assert all(isinstance(row, RawRow) for row in rows)
    assert [texts(convert(row.value))[1] for row in rows if isinstance(row, RawRow)] == ["3", "three"]
    assert [(row.file, row.unit, row.number) for row in rows if isinstance(row, RawRow)] == [
        (f"{directory}/train.jsonl", "line", 1),
        (f"{directory}/train.jsonl", "line", 2),
    ]


# Converting


@pytest.mark.parametrize("name", ["output", "response"])
def test_both_spellings_of_the_reply(name: str) -> None:
    assert texts(convert({"instruction": "q", "input": "", name: "a"})) == ["q", "a"]


@pytest.mark.parametrize(
    ("context", "user"), [("", "q"), ("  \n", "q"), (None, "q"), ("c", "q\n\nc"), (" c\nd ", "q\n\nc\nd")]
)
def test_input_follows_the_instruction(context: str | None, user: str) -> None:
    assert texts(convert({"instruction": " q ", "input": context, "output": "a"})) == [user, "a"]


def test_input_may_be_left_out() -> None:
    assert texts(convert({"instruction": "q", "output": "a"})) == ["q", "a"]


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"instruction": None}, "missing_field", "instruction"),
        ({"output": None}, "missing_field", "output"),
        ({"instruction": ""}, "empty_field", "instruction"),
        ({"output": " \n\t"}, "empty_field", "output"),
        ({"instruction": 0.5}, "not_text", "instruction"),
        ({"input": ["x"]}, "not_text", "input"),
        ({"output": {"text": "x"}}, "not_text", "output"),
        ({"instruction": "a\0b"}, "nul_character", "instruction"),
        ({"input": "a\0"}, "nul_character", "input"),
        ({"output": "a\ud800"}, "lone_surrogate", "output"),
        ({"input": "\udfff"}, "lone_surrogate", "input"),
    ],
)
def test_unusable_field_is_named(change: dict[str, Any], reason: str, field: str) -> None:
    rejected = convert(GOOD | change)
    assert isinstance(rejected, Reject)
    assert rejected.reason == reason
    assert field in rejected.detail.split()


@pytest.mark.parametrize("name", ["instruction", "output"])
def test_absent_field_is_missing(name: str) -> None:
    rejected = convert({key: value for key, value in GOOD.items() if key != name})
    assert isinstance(rejected, Reject)
    assert (rejected.reason, name in rejected.detail) == ("missing_field", True)


@pytest.mark.parametrize("value", [None, 3, "text", ["instruction"], True])
def test_row_that_is_no_object(value: Any) -> None:
    rejected = convert(value)
    assert isinstance(rejected, Reject)
    assert rejected.reason == "not_an_object"


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_marker_is_rejected_or_kept(marker: str, field: str) -> None:
    row = GOOD | {field: f"x{marker}y"}

    rejected = convert(row)
    assert isinstance(rejected, Reject)
    assert rejected.reason == "template_marker"
    assert marker in rejected.detail
    assert f"x{marker}y" in "\n".join(texts(convert(row, keep_markers=True)))


@pytest.mark.parametrize("field", ["instruction", "output"])
@pytest.mark.parametrize("row", golden("markers_in_content"))
def test_golden_markers_are_rejected(row: dict[str, Any], field: str) -> None:
    marked = [m["content"] for m in row["messages"] if any(marker in m["content"] for marker in MARKERS)]
    assert marked
    for content in marked:
        rejected = convert(GOOD | {field: content})
        assert isinstance(rejected, Reject)
        assert rejected.reason == "template_marker"


@pytest.mark.parametrize("text", ["INST", "[inst]", "[INST", "<<SYS", "<SYS>", "</s>", "<s>"])
def test_what_only_resembles_a_marker_is_kept(text: str) -> None:
    assert texts(convert(GOOD | {"instruction": text}))[0] == text


def test_the_first_line_of_a_jsonl_file_may_be_broken(tmp_path: Path) -> None:
    broken, good = read(tmp_path / "rows.jsonl", "nonsense\n" + json.dumps(GOOD))
    assert isinstance(broken, Reject)
    assert (broken.reason, broken.number) == ("invalid_json", 1)
    assert texts(good) == ["Add 1 and 2.", "3"]


# Kinds of files

FOUR = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three", "four")]


def store(path: Path) -> None:
    """Writes FOUR as the file's name says."""
    kind, _, compression = path.name.partition(".")[2].partition(".")
    buffer = io.BytesIO()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(FOUR), buffer)
    elif kind == "json":
        buffer.write(json.dumps(FOUR).encode())
    else:
        buffer.write("".join(json.dumps(row) + "\n" for row in FOUR).encode())
    with pa.output_stream(str(path), compression={"": None, "gz": "gzip", "zst": "zstd"}[compression]) as file:
        file.write(buffer.getvalue())


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, compression: str) -> None:
    path = tmp_path / f"rows.{kind}{compression}"
    store(path)
    rows = read_rows(PrepareConfig(files=[str(path)]))
    assert [row.value for row in rows if isinstance(row, RawRow)] == FOUR
    first = 1 if kind == "jsonl" else 0
    assert [row.number for row in rows if isinstance(row, RawRow)] == list(range(first, first + 4))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.zst", "rows.parquet", "rows.parquet.gz"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    store(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"neither this nor that" * 9)
    with pytest.raises(UserError, match=f"files={path}: it "):
        read_rows(PrepareConfig(files=[str(path)]))


def test_a_pattern_stands_for_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        store(tmp_path / name)
    found = [source.name for source in find_sources(PrepareConfig(files=[f"{tmp_path}/*.jsonl", f"{tmp_path}/c.json"]))]
    assert [Path(name).name for name in found] == ["a.jsonl", "b.jsonl", "c.json"]
    with pytest.raises(UserError, match=r"\*\.txt: no file matches"):
        find_sources(PrepareConfig(files=[f"{tmp_path}/*.txt"]))
