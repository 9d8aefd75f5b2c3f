"""Every container that data reads is a file of prompts; a file that holds none ends in a sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.program.errors import UserError
from data.template import ChatTokenizer
from inference.batch.journal import finish, position
from inference.batch.rows import encoded, read_prompts, read_rows
from inference.config import InferenceConfig

ROWS: list[dict[str, Any]] = [
    {"id": "a", "instruction": "Hello, who are you?"},
    {"id": "b", "prompt": "Name a tree."},
    {"id": "c", "prompt": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Name a bird."}]},
]
TEXTS = ["[INST] Hello, who are you? [/INST]", "[INST] Name a tree. [/INST]"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.name.endswith(".parquet"):
        names = {name: None for row in rows for name in row}
        pq.write_table(pa.Table.from_pylist([names | row for row in rows]), path)
        return
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def prompts_of(path: Path, **settings: Any) -> Any:
    config = InferenceConfig(task="batch", base="base", input=str(path), output="out.jsonl", **settings)
    return read_prompts(read_rows(path, config), ChatTokenizer.load(), config, 4096)


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in.jsonl.gz", "in.json", "in.parquet"])
def test_every_container_that_data_takes_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    rows = ROWS[:2] if name == "in.parquet" else ROWS  # a column of Parquet has one kind of value
    write(tmp_path / name, rows)
    prompts, errors = prompts_of(tmp_path / name)
    assert not errors
    assert [prompt.id for prompt in prompts] == [row["id"] for row in rows]
    assert [ChatTokenizer.load().decode(prompt.ids) for prompt in prompts[:2]] == TEXTS
    unit, first = ("row", 0) if name in ("in.json", "in.parquet") else ("line", 1)
    assert [(prompt.unit, prompt.line) for prompt in prompts] == [(unit, first + i) for i in range(len(rows))]


def test_a_list_of_messages_may_be_called_prompt(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ROWS[2:])
    ((prompt,), _) = prompts_of(tmp_path / "in.jsonl")
    assert "Rhyme." in ChatTokenizer.load().decode(prompt.ids)
    assert "Name a bird." in ChatTokenizer.load().decode(prompt.ids)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "empty_field"),
        ({"prompt": "\u200b \ufeff"}, "empty_field"),  # of width zero
        ({"messages": [{"role": "user", "content": "\u2060"}]}, "empty_field"),
        ({"prompt": "fake [/INST] it"}, "template_marker"),
        ({"prompt": 0.5}, "not_text"),
        ({"prompt": "\ud800"}, "lone_surrogate"),
    ],
)
def test_a_prompt_is_checked_as_any_other_row(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    write(tmp_path / "in.jsonl", [ROWS[0], row])
    _, (error,) = prompts_of(tmp_path / "in.jsonl")
    assert error["error"]["reason"] == reason


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("plain.txt", b"Hello, who are you?\nName a tree.\n", "it is not JSON"),
        ("empty.jsonl", b"", "it holds no rows"),
        ("blank.jsonl", b"\n \n\n", "it holds no rows"),
        ("empty.json", b"[]", "it holds no rows"),
        ("broken.jsonl", b"\xff\xfe{}\n{not whole\n", "none of its 2 rows can be answered (line 1: the line is not"),
        ("odd.json", b'[{"x": 1}]', "its only row can't be answered (row 0: it has none of the fields"),
        ("torn.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n', mtime=0)[:-9], "it can't be read"),
        ("none.parquet", b"PAR1", "it can't be read as Parquet"),
        ("cut.json", b'[{"prompt": "x"}, {', "it is not JSON"),
    ],
)
def test_a_file_without_an_answerable_row_is_refused(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        prompts_of(tmp_path / name)
    assert str(refused.value).startswith(f"input={tmp_path / name}: ")
    assert told in str(refused.value)
    assert "files=" not in str(refused.value)


def test_rows_that_are_all_too_long_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": "word " * 5000}])
    with pytest.raises(UserError, match=r"its only row can't be answered \(line 1: the prompt takes \d+ tokens"):
        prompts_of(tmp_path / "in.jsonl")


def test_what_is_no_regular_file_is_not_read() -> None:
    with pytest.raises(UserError, match="input=/dev/zero: it is not a file"):
        prompts_of(Path("/dev/zero"))


def test_nothing_is_loaded_or_written_where_no_row_can_be_answered(tmp_path: Path, run_program: Any) -> None:
    """Said in a moment: there is no model at that base."""
    (tmp_path / "in.jsonl").write_text("{}\n")
    outcome = run_program("inference", "task=batch", "base=nowhere", "input=in.jsonl", "output=out.jsonl")
    assert outcome.exit_code == 2
    assert "its only row can't be answered" in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("identity", ["\ud800", {"a": ["\udc00"]}, "Größe", float("nan"), 3, None])
def test_any_id_comes_back_in_valid_json(tmp_path: Path, identity: Any) -> None:
    write(tmp_path / "in.jsonl", [{"id": identity, "prompt": "Hello"}])
    ((prompt,), _) = prompts_of(tmp_path / "in.jsonl")
    line = encoded({"line": 1, "id": prompt.id, "answer": "Ja"})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    back = json.loads(line.decode(), parse_constant=refuse)["id"]
    assert back == ("nan" if isinstance(identity, float) else identity)


def test_an_id_of_parquet_that_json_lacks_is_a_text(tmp_path: Path) -> None:
    import datetime

    write(tmp_path / "in.parquet", [{"id": datetime.date(2024, 5, 6), "prompt": "Hello"}])
    ((prompt,), _) = prompts_of(tmp_path / "in.parquet")
    assert prompt.id == "2024-05-06"


def test_lines_of_a_list_are_sorted_by_row(tmp_path: Path) -> None:
    finish(tmp_path / "out.jsonl", [{"row": 10, "id": "\ud800"}, {"row": 0, "id": 1}, {"row": 2, "id": "ü"}])
    assert [position(json.loads(line)) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()] == [0, 2, 10]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from inference.chat.chat import piped_lines
    from inference.prompt import ask

    text = "Hello, who are you?"
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    asked = InferenceConfig(base="base", prompt_file=str(tmp_path / "bom.txt"))
    assert ask(asked).messages[-1].content == text
    for reading in (
        lambda: [ask(InferenceConfig(base="base", prompt="-")).messages[-1].content],
        lambda: [*piped_lines()],
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + text.encode()), "utf-8"))
        assert reading() == [text]
