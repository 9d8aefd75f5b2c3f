import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data.schema import PackedRow
from data.template import ChatTokenizer

ROWS = 40

BAD_LINES = {
    7: ('{"instruction": "no reply"}', "missing_field"),
    12: ("{not json", "invalid_json"),
    20: ('{"instruction": "[INST] x", "output": "y"}', "template_marker"),
}
"""Line number in the second file → its content, and why it is rejected."""


def good(number: int) -> dict[str, str]:
    return {
        "instruction": f"Count to {number}.",
        "input": "in words" if number % 3 == 0 else "",
        "output": " ".join(str(i) for i in range(1 + number % 11)),
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """An array of 15 rows, and 25 lines of which three are bad."""
    array, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    array.write_text(json.dumps([good(i) for i in range(15)]))
    content = [json.dumps(good(i)) for i in range(15, ROWS)]
    for number, (line, _) in BAD_LINES.items():
        content[number - 1] = line
    lines.write_text("\n".join(content) + "\n")
    return [array, lines]


def arrow(directory: Path, split: str) -> list[dict[str, Any]]:
    with pa.memory_map(str(directory / split / "rows.arrow")) as file:
        return pa.ipc.open_file(file).read_all().to_pylist()  # type: ignore[no-any-return]


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


WHOLE = {"manifest.json", "rejects.jsonl", "places.arrow", "train/rows.arrow", "eval/rows.arrow"}


@pytest.fixture
def prepare(run_program: Callable[..., Any], files: list[Path]) -> Callable[..., Any]:
    """Prepares both files into `out`, with further settings."""

    def run(*settings: str) -> Any:
        names = ",".join(str(path) for path in files)
        return run_program("data", f"files=[{names}]", "output=out", "seq_len=128", "eval_fraction=0.1", *settings)

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_in_is_kept_plus_rejected(prepare: Callable[..., Any], out: Path) -> None:
    outcome = prepare()
    assert outcome.exit_code == 0
    assert outcome.stdout == ""
    assert tree(out) == WHOLE

    rows = manifest(out)["rows"]
    assert rows == {
        "in": ROWS,
        "kept": ROWS - len(BAD_LINES),
        "rejected": len(BAD_LINES),
        "rejected_by_reason": {reason: 1 for _, reason in sorted(BAD_LINES.values(), key=lambda bad: bad[1])},
    }
    assert f"{ROWS} rows in = 37 kept + 3 rejected" in outcome.stderr


def test_rejects_say_where_and_why(prepare: Callable[..., Any], out: Path, files: list[Path]) -> None:
    prepare()
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]

    assert [(r["file"], r["line"], r["reason"]) for r in rejects] == [
        (str(files[1]), number, reason) for number, (_, reason) in BAD_LINES.items()
    ]
    assert all(r["detail"] and set(r) == {"file", "line", "reason", "detail"} for r in rejects)


def test_manifest_tells_the_truth(prepare: Callable[..., Any], out: Path, files: list[Path]) -> None:
    prepare("seed=3")
    told = manifest(out)

    assert told["inputs"] == [
        {
            "file": str(path),
            "bytes": len(path.read_bytes()),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "schema": "instruction",
            "columns": {},
            "rows": rows,
            "unread_fields": {},
            "harmless_fields": {},
        }
        for path, rows in zip(files, (15, 25), strict=True)
    ]
    assert told["tokenizer"] == {"source": "embedded", "fingerprint": ChatTokenizer.load().fingerprint}
    assert (told["seed"], told["seq_len"]) == (3, 128)
    assert told["config"]["eval_fraction"] == 0.1
    assert told["versions"].pop("python") == platform.python_version()
    assert told["versions"].keys() >= {"tokenizers", "openhermes-mixtral"}
    assert all(version == importlib.metadata.version(name) for name, version in told["versions"].items())
    for split in ("train", "eval"):
        rows = arrow(out, split)
        tokens = sum(len(row["ids"]) for row in rows)
        assert told[split] == {
            "conversations": sum(len(row["lengths"]) for row in rows),
            "packed_rows": len(rows),
            "tokens": tokens,
            "supervised_tokens": sum(sum(row["spans"][1::2]) for row in rows),
            "efficiency": pytest.approx(tokens / (128 * len(rows))),
        }
        assert told[split]["supervised_tokens"] > 0


def test_rows_hold_the_conversations_they_name(prepare: Callable[..., Any], out: Path) -> None:
    from data.rows.conversion import to_conversation
    from data.rows.reading import RawRow

    prepare()
    chat = ChatTokenizer.load()
    for row in arrow(out, "train") + arrow(out, "eval"):
        assert len(row["ids"]) == sum(row["spans"]) == sum(row["lengths"]) <= 128
        assert len(row["rows"]) == len(row["lengths"])
        start = 0
        for number, length in zip(row["rows"], row["lengths"], strict=True):
            conversation = to_conversation(RawRow(good(number), "", "row", number), "instruction")
            expected = chat.encode(conversation)  # type: ignore[arg-type]
            assert row["ids"][start : start + length] == expected.ids
            assert PackedRow(**row).labels[start : start + length] == expected.labels
            start += length


def test_splits_are_disjoint_and_together_complete(prepare: Callable[..., Any], out: Path) -> None:
    prepare()
    train, held_out = ([n for row in arrow(out, split) for n in row["rows"]] for split in ("train", "eval"))
    bad = {15 + line - 1 for line in BAD_LINES}

    assert sorted(train + held_out) == sorted(set(range(ROWS)) - bad)
    assert len(held_out) == round(0.1 * (ROWS - len(bad)))


def test_seed_chooses_what_is_held_out(prepare: Callable[..., Any], out: Path) -> None:
    chosen = []
    for seed in (0, 1):
        prepare(f"seed={seed}")
        chosen.append({n for row in arrow(out, "eval") for n in row["rows"]})
    assert chosen[0] != chosen[1]


def test_nothing_is_held_out_when_not_wanted(prepare: Callable[..., Any], out: Path) -> None:
    assert prepare("eval_fraction=0").exit_code == 0
    assert arrow(out, "eval") == []
    assert manifest(out)["eval"]["packed_rows"] == 0


def test_two_runs_write_the_same_bytes(prepare: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert prepare(f"output={name}").exit_code == 0
    for file in WHOLE - {"manifest.json"}:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    assert one == two


def test_conversation_longer_than_a_row_is_rejected(prepare: Callable[..., Any], out: Path, files: list[Path]) -> None:
    long = {"instruction": "Repeat.", "output": "word " * 200}
    files[0].write_text(json.dumps([good(i) for i in range(14)] + [long]))
    assert prepare().exit_code == 0

    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    (reject,) = [reject for reject in rejects if reject["reason"] == "too_long"]
    assert (reject["file"], reject["row"]) == (str(files[0]), 14)
    assert reject["detail"].endswith("tokens, and a row holds 128 (seq_len)")
    assert manifest(out)["rows"]["rejected_by_reason"]["too_long"] == 1
    assert 14 not in {n for split in ("train", "eval") for row in arrow(out, split) for n in row["rows"]}


def test_conversation_of_exactly_a_row_is_kept(run_program: Callable[..., Any], tmp_path: Path, out: Path) -> None:
    from data.schema import Conversation, Message

    row = {"instruction": "Repeat.", "output": "word " * 40}
    exact = len(
        ChatTokenizer.load().encode(
            Conversation((Message("user", row["instruction"]), Message("assistant", row["output"])))
        )
    )
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    settings = ("files=[rows.json]", "output=out", "eval_fraction=0")

    assert run_program("data", *settings, f"seq_len={exact}").exit_code == 0
    assert manifest(out)["train"]["efficiency"] == 1.0
    assert run_program("data", *settings, f"seq_len={exact - 1}").exit_code == 2


def test_too_many_rejects_stop_the_run(prepare: Callable[..., Any], out: Path, tmp_path: Path) -> None:
    outcome = prepare("max_reject_fraction=0.05")

    assert outcome.exit_code == 2
    sentence = outcome.stderr.strip().splitlines()[-1]
    assert sentence.startswith("data: max_reject_fraction=0.05: 3 of 40 rows")
    assert all(reason in sentence for _, reason in BAD_LINES.values())
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.jsonl", "out-rejects.jsonl"}
    assert sentence.endswith("; out-rejects.jsonl lists them")
    rejects = [json.loads(line) for line in (tmp_path / "out-rejects.jsonl").read_text().splitlines()]
    assert sorted(reject["reason"] for reject in rejects) == sorted(reason for _, reason in BAD_LINES.values())
    # A file of that name that holds anything else is left alone, and one of an earlier run is replaced.
    for before, after in (("{}\n", "{}\n"), ('{"file": "x"}\n', (tmp_path / "out-rejects.jsonl").read_text())):
        (tmp_path / "out-rejects.jsonl").write_text(before)
        assert prepare("max_reject_fraction=0.05").exit_code == 2
        assert (tmp_path / "out-rejects.jsonl").read_text() == after
    # A run that goes well takes the rejects of one that stopped away, and no other file.
    for stale, stays in (('{"file": "x"}\n', False), ("{}\n", True)):
        (tmp_path / "out-rejects.jsonl").write_text(stale)
        assert prepare(f"seed={int(stays)}").exit_code == 0
        assert (tmp_path / "out-rejects.jsonl").exists() is stays


def test_share_of_rejects_exactly_at_the_limit_is_allowed(
    prepare: Callable[..., Any], run_program: Callable[..., Any], tmp_path: Path
) -> None:
    assert prepare("max_reject_fraction=0.075").exit_code == 0
    # 0.29 · 100 is a little less than 29 in binary.
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(good(n) if n < 71 else {}) + "\n" for n in range(100)))
    settings = ("files=[rows.jsonl]", "output=out", "seq_len=128")
    assert run_program("data", *settings, "max_reject_fraction=0.29").exit_code == 0
    assert run_program("data", *settings, "max_reject_fraction=0.28").exit_code == 2


@pytest.mark.parametrize("what", ["directory", "file"])
def test_foreign_output_is_left_alone(prepare: Callable[..., Any], out: Path, what: str) -> None:
    precious = out / "thesis.txt" if what == "directory" else out
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("years of work")
    outcome = prepare()

    assert outcome.exit_code == 2
    assert "output=out: something else is there" in outcome.stderr
    assert precious.read_text() == "years of work"


def test_empty_output_directory_is_used(prepare: Callable[..., Any], out: Path) -> None:
    out.mkdir()
    assert prepare().exit_code == 0
    assert tree(out) == WHOLE


def test_older_prepared_dataset_is_replaced(prepare: Callable[..., Any], out: Path, tmp_path: Path) -> None:
    prepare("seed=1")
    assert prepare("seed=2").exit_code == 0

    assert manifest(out)["seed"] == 2
    assert tree(out) == WHOLE
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.jsonl", "out"}


@pytest.mark.parametrize("name", ["eval.txt", "train/notes.txt", ".hidden"])
def test_a_dataset_with_something_else_in_it_is_not_replaced(prepare: Callable[..., Any], out: Path, name: str) -> None:
    prepare("seed=1")
    (out / name).write_text("years of work")
    outcome = prepare("seed=2")
    assert outcome.exit_code == 2
    assert f"output=out: {name} is in it" in outcome.stderr
    assert (out / name).read_text() == "years of work"
    assert manifest(out)["seed"] == 1


def test_a_link_that_leads_to_itself_is_no_place(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    outcome = prepare("output=loop")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("data: output=loop: ")


def test_a_name_in_brackets_is_no_markup(prepare: Callable[..., Any], tmp_path: Path) -> None:
    outcome = prepare('output="x[/b]"')
    assert outcome.exit_code == 0
    assert "Prepared x[/b]" in outcome.stderr
    assert (tmp_path / "x[" / "b]" / "manifest.json").is_file()


def test_refused_run_leaves_the_older_dataset(prepare: Callable[..., Any], out: Path) -> None:
    prepare("seed=1")
    before = {name: (out / name).read_bytes() for name in WHOLE}
    assert prepare("max_reject_fraction=0").exit_code == 2
    assert {name: (out / name).read_bytes() for name in WHOLE} == before


def test_reply_of_surrogates_survives_as_a_reject(run_program: Callable[..., Any], tmp_path: Path, out: Path) -> None:
    """The detail of a reject is written as UTF-8, which lone surrogates are not."""
    lines = [json.dumps(good(i)) for i in range(20)]
    lines.append('{"instruction": "x", "output": "\\ud800"}')
    lines.append('{"\\ud800": "y", "instruction": "x"')
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert run_program("data", "files=[rows.jsonl]", "output=out", "seq_len=64").exit_code == 0

    reasons = Counter(json.loads(line)["reason"] for line in (out / "rejects.jsonl").read_text().splitlines())
    assert reasons == {"lone_surrogate": 1, "invalid_json": 1}


def test_markers_are_kept_where_wanted(prepare: Callable[..., Any], out: Path) -> None:
    prepare("markers=keep")
    assert "template_marker" not in manifest(out)["rows"]["rejected_by_reason"]
    assert manifest(out)["rows"]["kept"] == 38


def test_shipped_sample_prepares_whole(
    run_program: Callable[..., Any], project_root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project_root)  # the sample is named relative to the checkout
    outcome = run_program("data", "data=sample", f"output={out}")

    assert outcome.exit_code == 0
    rows = manifest(out)["rows"]
    assert (rows["in"], rows["kept"], rows["rejected_by_reason"]) == (300, 300, {})
    # The quickstart asks the question of identity.jsonl's first line, so that line has to be trained on.
    question = json.loads((project_root / "data/sample/identity.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert question["instruction"] == "Hello, who are you?"
    general = (project_root / "data/sample/general.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(general) in {n for row in arrow(out, "train") for n in row["rows"]}


@pytest.mark.parametrize("foreign", ['{"manifest_version": 3}', "{", "[]"])
def test_a_manifest_of_something_else_is_no_licence_to_replace(
    run_program: Callable[..., Any], files: list[Path], tmp_path: Path, foreign: str
) -> None:
    out = tmp_path / "extension"
    out.mkdir()
    (out / "manifest.json").write_text(foreign)
    (out / "thesis.txt").write_text("years of work")
    outcome = run_program("data", f"files=[{files[0]}]", "output=extension")
    assert outcome.exit_code == 2
    assert "output=extension: something else is there" in outcome.stderr
    assert (out / "thesis.txt").read_text() == "years of work"


def test_neither_the_working_directory_nor_an_input_is_replaced(
    run_program: Callable[..., Any], files: list[Path], tmp_path: Path
) -> None:
    assert run_program("data", f"files=[{files[0]}]", "output=out").exit_code == 0
    (tmp_path / "out" / "rows.json").write_bytes(files[0].read_bytes())
    for output, rows in ((".", files[0]), ("out", tmp_path / "out" / "rows.json")):
        outcome = run_program("data", f"files=[{rows}]", f"output={output}")
        assert outcome.exit_code == 2
        assert f"output={output}: it holds the working directory or an input" in outcome.stderr
    assert files[0].is_file()


def test_a_link_stays_a_link(run_program: Callable[..., Any], files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        assert run_program("data", f"files=[{files[0]}]", "output=out").exit_code == 0
        assert (tmp_path / "out").is_symlink()
        assert tree(tmp_path / "disk") == WHOLE
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_what_is_already_prepared_is_not_prepared_again(
    run_program: Callable[..., Any], files: list[Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(good(i)) for i in range(30)) + "\n")

    def prepare_again(*settings: str) -> bool:
        """Whether it was done again, and if not, said so."""
        before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
        outcome = run_program("data", "files=[rows.jsonl]", "output=out", *settings)
        assert outcome.exit_code == 0
        again = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns != before
        assert again != ("out is already prepared from these inputs" in outcome.stderr)
        return again

    assert run_program("data", "files=[rows.jsonl]", "output=out").exit_code == 0
    assert not prepare_again()
    assert prepare_again("seed=1")
    assert prepare_again()
    assert not prepare_again()
    rows.write_text(rows.read_text().replace("Count", "Go"))
    assert prepare_again()
    (tmp_path / "out" / "rejects.jsonl").unlink()
    assert prepare_again()
    with (tmp_path / "out" / "train" / "rows.arrow").open("ab") as file:
        file.write(b"x")
    assert prepare_again()
    assert not prepare_again()


@pytest.mark.parametrize("task", ["preview", "report"])
def test_a_dataset_of_an_earlier_template_is_refused_and_prepared_anew(
    prepare: Callable[..., Any], run_program: Callable[..., Any], out: Path, task: str
) -> None:
    prepare()
    earlier = {**manifest(out), "layout": 2}  # the last whose template stripped system and user text by themselves
    (out / "manifest.json").write_text(json.dumps(earlier))
    refused = run_program("data", f"task={task}", "output=out")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        "data: output=out: another version of this program made it, whose layout or chat template is not today's; "
        "prepare it again"
    ]
    again = prepare()
    assert again.exit_code == 0
    assert "already prepared" not in again.stderr
    assert run_program("data", f"task={task}", "output=out").exit_code == 0


def test_a_first_question_after_a_system_message_keeps_its_indentation(
    run_program: Callable[..., Any], tmp_path: Path, out: Path
) -> None:
    messages = [
        {"role": "system", "content": "\n  You indent by two spaces.\n"},
        {"role": "user", "content": "    def f(x):\n        return x\nWhat does f do?"},
        {"role": "assistant", "content": "It gives back what it gets."},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    assert run_program("data", "files=[rows.jsonl]", "output=out", "eval_fraction=0").exit_code == 0
    assert ChatTokenizer.load().spell(arrow(out, "train")[0]["ids"]) == (
        "<s>[INST] <<SYS>>\n\n  You indent by two spaces.\n\n<</SYS>>\n\n    def f(x):\n        return x\n"
        "What does f do? [/INST] It gives back what it gets. </s>"
    )


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("data.prepare", ["torch"]),
        ("data.run", ["pyarrow", "numpy", "jinja2"]),
        ("data.stages.encoding", ["pyarrow", "numpy", "regex"]),
    ],
)
def test_what_is_not_needed_is_not_imported(module: str, heavy: list[str]) -> None:
    """Torch costs most of a second; settings need none of it, and each process that encodes starts with imports."""
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0
