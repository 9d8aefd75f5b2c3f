"""What a row says besides its turns: masks, context, other names, and fields that nobody reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.prepared.dataset import PreparedDataset
from data.rows.columns import names_of
from data.rows.conversion import CONVERSIONS, to_conversation
from data.rows.reading import RawRow, Reject
from data.schema import Conversation, Message
from data.template import ChatTokenizer

TOKENIZER = ChatTokenizer.load()
FLAGS = ("weight", "train", "loss", "loss_weight")
SHAPES = {
    "messages": ("messages", "role", "content", ("user", "assistant", "system")),
    "sharegpt": ("conversations", "from", "value", ("human", "gpt", "system")),
}


def turns(schema: str, *said: tuple[str, str, dict[str, Any]], **beside: Any) -> dict[str, Any]:
    """A row of either schema: for each turn `user`, `assistant` or `system`, the text, and what stands beside it."""
    field, speaker, text, names = SHAPES[schema]
    called = dict(zip(("user", "assistant", "system"), names, strict=True))
    return {field: [{speaker: called[role], text: content, **more} for role, content, more in said], **beside}


def asked(schema: str, flags: dict[str, Any], *, of_user: dict[str, Any] | None = None) -> dict[str, Any]:
    """Two turns; the first reply has flags."""
    user = ("user", "Where is Oslo?", of_user or {})
    return turns(schema, user, ("assistant", "On the moon.", flags), user, ("assistant", "In Norway.", {}))


def schema_of(value: Any, columns: dict[str, str]) -> str | None:
    names = names_of(value, columns)
    return None if names is None else names.schema


def convert(value: Any, schema: str, **options: Any) -> Conversation | Reject:
    return to_conversation(RawRow(value, "rows.json", "row", 0), schema, **options)


def messages(value: Any, schema: str, **options: Any) -> list[Message]:
    conversation = convert(value, schema, **options)
    assert isinstance(conversation, Conversation), conversation
    return list(conversation.messages)


def reject(value: Any, schema: str, **options: Any) -> tuple[str, str]:
    rejected = convert(value, schema, **options)
    assert isinstance(rejected, Reject), rejected
    return rejected.reason, rejected.detail


@pytest.fixture
def prepare(run_program: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Prepares rows into `out`; returns the outcome, and the manifest if there is one."""

    def run(rows: list[Any], *settings: str) -> tuple[Any, dict[str, Any]]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        outcome = run_program("data", "files=[rows.jsonl]", "output=out", "eval_fraction=0", *settings)
        path = tmp_path / "out" / "manifest.json"
        return outcome, json.loads(path.read_text()) if path.is_file() else {}

    return run


def texts(directory: Path) -> list[str]:
    """The conversations of the training split, by their rows."""
    table = PreparedDataset(directory).train
    found: dict[int, str] = {}
    for row in (table[i] for i in range(len(table))):
        place = 0
        for number, length in zip(row.rows, row.lengths, strict=True):
            found[number] = TOKENIZER.spell(row.ids[place : place + length])
            place += length
    return [found[number] for number in sorted(found)]


# The author's own masks


@pytest.mark.parametrize("schema", SHAPES)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (0.0, 1.0), (False, True)])
def test_a_reply_that_is_flagged_is_context(schema: str, flag: str, no: Any, yes: Any) -> None:
    assert [m.masked for m in messages(asked(schema, {flag: no}), schema)] == [False, True, False, False]
    for told in (yes, None):
        assert not any(m.masked for m in messages(asked(schema, {flag: told}), schema))
    assert [m.masked for m in messages(asked(schema, {flag: no}, of_user={flag: no}), schema)].count(True) == 1


@pytest.mark.parametrize("schema", SHAPES)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("told", [0.5, 2, -1, 1.5, float("nan"), float("inf"), "0", "false", [], [0], {"a": 0}])
def test_a_flag_that_is_neither_yes_nor_no_is_rejected(schema: str, flag: str, told: Any) -> None:
    reason, detail = reject(asked(schema, {flag: told}), schema)
    assert reason == "unsupported_weight"
    assert f"{SHAPES[schema][0]}[1].{flag} is {told!r}" in detail


@pytest.mark.parametrize("schema", SHAPES)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_asks_to_train_a_prompt_is_rejected(schema: str, flag: str) -> None:
    reason, detail = reject(asked(schema, {}, of_user={flag: True}), schema)
    assert (reason, f"[0].{flag} asks to train what is said by user" in detail) == ("prompt_trained", True)
    system = turns(schema, ("system", "Be kind.", {flag: 1}), ("user", "Hi", {}), ("assistant", "Hello.", {}))
    assert reject(system, schema)[0] == "prompt_trained"


@pytest.mark.parametrize("schema", SHAPES)
def test_flags_that_contradict_each_other_and_parts_of_replies_are_rejected(schema: str) -> None:
    reason, detail = reject(asked(schema, {"weight": 0, "train": True}), schema)
    assert (reason, "weight and train contradict each other" in detail) == ("unsupported_weight", True)
    assert messages(asked(schema, {"weight": 0, "train": False}), schema)[1].masked
    parts = [{"begin_offset": 0, "end_offset": 3, "train": False}]
    reason, detail = reject(asked(schema, {"train_detail": parts}), schema)
    assert (reason, "[1].train_detail" in detail) == ("unsupported_weight", True)
    assert not messages(asked(schema, {"train_detail": []}), schema)[1].masked


@pytest.mark.parametrize("schema", SHAPES)
def test_a_row_that_leaves_nothing_to_train_is_rejected(schema: str) -> None:
    row = turns(schema, ("user", "Hi", {}), ("assistant", "Hello.", {"weight": 0}))
    assert reject(row, schema)[0] == "nothing_trained"
    # A prompt to answer is no example: what it says of training is ignored.
    assert [m.masked for m in messages(row, schema, reply_needed=False)] == [False, False]
    assert len(messages(asked(schema, {"weight": 0.5}), schema, reply_needed=False)) == 4


def test_flags_may_have_other_names() -> None:
    row = asked("messages", {"learn": False})
    assert messages(row, "messages", columns={"train": "learn"})[1].masked
    assert not messages(row, "messages")[1].masked


def test_masks_reach_the_dataset_and_its_counts(prepare: Callable[..., Any], tmp_path: Path) -> None:
    rows = [asked("messages", {}), asked("messages", {"weight": 0}), asked("messages", {"weight": 0.3})]
    rows.append(turns("messages", ("user", "Hi", {}), ("assistant", "Hello.", {"train": False})))
    outcome, manifest = prepare(rows, "max_reject_fraction=0.6")
    assert outcome.exit_code == 0
    assert manifest["rows"]["rejected_by_reason"] == {"nothing_trained": 1, "unsupported_weight": 1}
    row = PreparedDataset(tmp_path / "out").train[0]
    trained = [label for label in row.labels if label >= 0]
    reply = [
        TOKENIZER.encode(Conversation((Message("user", "x"), Message("assistant", t))))
        for t in ("On the moon.", "In Norway.")
    ]
    wrong, right = ([label for label in t.labels if label >= 0] for t in reply)
    assert manifest["train"]["supervised_tokens"] == len(trained) == len(wrong) + 2 * len(right)
    assert sorted(trained) == sorted(wrong + right + right)


def test_the_same_conversation_with_another_mask_is_no_duplicate(prepare: Callable[..., Any]) -> None:
    rows = [asked("messages", {"weight": weight}) for weight in (0, 1, 0, 1)]
    _, manifest = prepare(rows, "duplicates=drop")
    assert manifest["rows"]["rejected_by_reason"] == {"duplicate": 2}


# Context


def test_history_and_system_of_instruction_rows_are_context() -> None:
    row = {"instruction": "And three?", "output": "45 cm.", "system": "Be brief.", "history": [["Leeks?", " 15 cm. "]]}
    assert messages(row, "instruction") == [
        Message("system", "Be brief."),
        Message("user", "Leeks?"),
        Message("assistant", "15 cm.", masked=True),
        Message("user", "And three?"),
        Message("assistant", "45 cm."),
    ]
    for empty in (None, [], ""):
        assert len(messages({**row, "history": empty, "system": empty}, "instruction")) == 2
    del row["output"]
    assert messages(row, "instruction", reply_needed=False)[-1] == Message("user", "And three?")


@pytest.mark.parametrize(
    ("history", "reason", "told"),
    [
        ("before", "not_a_list", "the field history is str"),
        (["before"], "not_a_pair", "history[0]"),
        ([["a", "b"], ["c"]], "not_a_pair", "history[1]"),
        ([["a", "b", "c"]], "not_a_pair", "history[0]"),
        ([["a", ""]], "empty_field", "history[0][1] is empty"),
        ([["a", None]], "empty_field", "history[0][1] is empty"),
        ([["a", 0.5]], "not_text", "history[0][1] is float"),
        ([["[INST]", "b"]], "template_marker", "[INST]"),
    ],
)
def test_a_history_that_is_none_is_rejected(history: Any, reason: str, told: str) -> None:
    found = reject({"instruction": "x", "output": "y", "history": history}, "instruction")
    assert found[0] == reason
    assert told in found[1]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
@pytest.mark.parametrize("schema", CONVERSIONS)
def test_a_system_message_beside_the_turns_is_rendered(schema: str, field: str) -> None:
    plain = (
        {"instruction": "Hi", "output": "Hello."}
        if schema == "instruction"
        else turns(schema, ("user", "Hi", {}), ("assistant", "Hello.", {}))
    )
    assert messages({**plain, field: " Be brief. "}, schema)[0] == Message("system", " Be brief. ")
    for empty in (None, "", " \n"):
        assert messages({**plain, field: empty}, schema)[0].role == "user"
    assert reject({**plain, field: ["Be brief."]}, schema) == ("not_text", f"the field {field} is list, not text")


@pytest.mark.parametrize("schema", SHAPES)
def test_of_two_system_messages_the_other_is_told(schema: str, prepare: Callable[..., Any]) -> None:
    said = (("system", "Inside.", {}), ("user", "Hi", {}), ("assistant", "Hello.", {}))
    rows = [turns(schema, *said, system="Inside."), turns(schema, *said, system="Beside.")]
    rows.append(turns(schema, *said[1:], system="One.", system_prompt="Two."))
    assert [messages(row, schema)[0].content for row in rows] == ["Inside.", "Inside.", "Two."]
    assert prepare(rows)[1]["inputs"][0]["unread_fields"] == {"system": 2}


# Columns


def test_a_renamed_field_is_not_read_again_under_its_old_name() -> None:
    row = {"input": "Name a fruit.", "output": "Pear."}
    assert messages(row, "instruction", columns={"instruction": "input"})[0].content == "Name a fruit."
    row = {"instruction": "One word.", "input": "Name a fruit.", "output": "Pear."}
    columns = {"system_prompt": "instruction", "instruction": "input"}
    said = [(m.role, m.content) for m in messages(row, "instruction", columns=columns)]
    assert said == [("system", "One word."), ("user", "Name a fruit."), ("assistant", "Pear.")]
    swapped = {"instruction": "input", "input": "instruction"}
    assert messages(row, "instruction", columns=swapped)[0].content == "Name a fruit.\n\nOne word."
    reason, detail = reject(row, "instruction", columns={"instruction": "output"})
    assert (reason, "columns reads the one of that name as another" in detail) == ("missing_field", True)
    turned = {"conversations": [{"value": "user", "from": "Hi"}, {"value": "assistant", "from": "Hello."}]}
    assert len(messages(turned, "sharegpt", columns={"from": "value", "value": "from"})) == 2


def test_a_renamed_field_decides_the_schema_under_its_new_name(prepare: Callable[..., Any], tmp_path: Path) -> None:
    row = {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    assert schema_of(row, {"conversations": "messages"}) == "sharegpt"
    assert schema_of(row, {"instruction": "messages"}) == "instruction"
    both = {**row, "chat": row["messages"]}
    assert schema_of(both, {}) == "sharegpt"
    assert schema_of({**both, "messages": []}, {}) == "messages"
    refused, _ = prepare([row], "columns={conversations: mesages}")
    assert "there is no field mesages, which columns.conversations names; there is messages" in refused.stderr
    assert schema_of(both, {"conversations": "chat"}) == "sharegpt"
    outcome, manifest = prepare([row], "columns={conversations: messages}")
    assert outcome.exit_code == 0
    assert manifest["inputs"][0]["schema"] == "sharegpt"
    assert texts(tmp_path / "out") == ["<s>[INST] Hi [/INST] Hello. </s>"]


@pytest.mark.parametrize(
    ("row", "columns", "told"),
    [
        (
            {"instruction": "x", "output": "y"},
            "{output: answre}",
            "there is no field answre, which columns.output names",
        ),
        ({"chat": []}, "{conversations: caht}", "there is no field caht, which columns.conversations names"),
        (
            {"conversations": [{"from": "human", "value": "x"}]},
            "{from: role}",
            "conversations[0] has no field role, which columns.from names",
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}]},
            "{value: content}",
            "there is no field conversations[0].content, which columns.value names",
        ),
        ({"instruction": "x", "output": "y", "answer": 0.5}, "{output: answer}", "the field answer is float, not text"),
        ({"dialogue": "x"}, "{messages: dialogue}", "the field dialogue is a text, not a list"),
        ({"dialogue": [5]}, "{messages: dialogue}", "dialogue[0] is int, not an object"),
    ],
)
def test_sentences_name_the_column_of_the_rows(prepare: Callable[..., Any], row: Any, columns: str, told: str) -> None:
    schema = "schema=sharegpt" if "caht" in columns else "schema=auto"
    outcome, _ = prepare([row], f"columns={columns}", schema)
    assert outcome.exit_code == 2
    assert told in outcome.stderr


def test_a_column_that_the_schema_has_no_use_for_is_refused(
    prepare: Callable[..., Any], run_program: Callable[..., Any], tmp_path: Path
) -> None:
    row = {"instruction": "x", "output": "y", "text": "z"}
    outcome, _ = prepare([row], "columns={value: text}")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("data: columns.value: the rows are read as instruction, which has no such field; ")
    outcome, _ = prepare([row], "columns={value: text}", "schema=instruction")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("data: columns.value: schema=instruction does not have such a field; ")
    # Of several sources one that has a use for it is enough, wherever it stands.
    (tmp_path / "turns.jsonl").write_text(
        json.dumps({"conversations": [{"from": "human", "text": "a"}, {"from": "gpt", "text": "b"}]})
    )
    for files in ("turns.jsonl,rows.jsonl", "rows.jsonl,turns.jsonl"):
        settings = ("output=out", "eval_fraction=0", "columns={value: text}")
        assert run_program("data", f"files=[{files}]", *settings).exit_code == 0


def test_a_column_that_no_row_has_is_refused(prepare: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"instruction": "x", "output": "y", "context": "z"}] * 3
    outcome, _ = prepare(rows, "columns={input: contxt}")
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1] == (
        "data: columns.input=contxt: no row has such a field (not read are context); correct the name, or drop it"
    )
    assert not (tmp_path / "out").exists()
    rows[1] = {"instruction": "x", "output": "y", "contxt": "z"}
    assert prepare(rows, "columns={input: contxt}")[0].exit_code == 0
    row = turns("messages", ("user", "Hi", {}), ("assistant", "Hello.", {"learn": True}))
    assert prepare([row], "columns={train: learn}")[0].exit_code == 0
    assert prepare([row], "columns={train: lern}")[0].exit_code == 2


# Fields that are not read


def test_unread_fields_are_told(prepare: Callable[..., Any], run_program: Callable[..., Any], tmp_path: Path) -> None:
    call = {"id": "c1", "function": {"name": "f"}}
    said = (("user", "Hi", {"name": ""}), ("assistant", "Hello.", {"tool_calls": [call]}))
    nothing = {"tools": None, "images": [], "note": " ", "record": {"a": None, "b": []}}
    rows = [turns("messages", *said, tools=[call], id=n, source="s") for n in range(3)]
    rows += [turns("messages", ("user", "Hi", {}), ("assistant", "Hello.", {"id": "m1"}), **nothing) for _ in range(2)]
    rows.append({"messages": [], "tools": "x"})  # rejected, and its fields are not read either
    outcome, manifest = prepare(rows, "max_reject_fraction=1")
    assert outcome.exit_code == 0
    assert manifest["inputs"][0]["unread_fields"] == {"tools": 4, "messages[].tool_calls": 3}
    assert manifest["inputs"][0]["harmless_fields"] == {"id": 3, "source": 3, "messages[].id": 2}
    told = (
        "Fields that were not read: rows.jsonl: tools 4×, messages[].tool_calls 3×, "
        "describing the rows id, source, messages[].id"
    )
    assert told in outcome.stderr.splitlines()
    assert told in prepare(rows, "max_reject_fraction=1")[0].stderr.splitlines()  # also if nothing was done again

    assert run_program("data", "task=report", "output=out").exit_code == 0
    page = (tmp_path / "out-report.html").read_text(encoding="utf-8")
    assert "tools: 4, messages[].tool_calls: 3" in page
    assert "describing the rows: id: 3, source: 3" in page


def test_rows_whose_fields_are_all_read_need_no_line(prepare: Callable[..., Any]) -> None:
    row = {"instruction": "x", "input": "", "output": "y", "system": "s", "history": []}
    outcome, manifest = prepare([row])
    assert "not read" not in outcome.stderr
    assert manifest["inputs"][0]["unread_fields"] == manifest["inputs"][0]["harmless_fields"] == {}


def test_what_is_read_instead_of_another_field_leaves_that_one_unread(prepare: Callable[..., Any]) -> None:
    row = {"instruction": "x", "output": "y", "response": "z"}
    assert prepare([row])[1]["inputs"][0]["unread_fields"] == {"response": 1}
    settings = "columns={output: answer}"
    assert prepare([{**row, "answer": "a"}], settings)[1]["inputs"][0]["unread_fields"] == {"output": 1, "response": 1}


def test_what_stands_beside_a_text_in_a_list_is_not_lost_in_silence(prepare: Callable[..., Any]) -> None:
    part = {"type": "text", "text": "Hi", "citations": [{"url": "a"}], "annotations": []}
    asked = {"role": "user", "content": [part]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Hello.", "citations": None}]}
    assert prepare([{"messages": [asked, reply]}])[1]["inputs"][0]["unread_fields"] == {
        "messages[].content[].citations": 1
    }
    history = [{"question": "Leeks?", "answer": "15 cm.", "evidence": "p. 3"}]
    row = {"instruction": "And three?", "output": "45 cm.", "history": history}
    assert prepare([row])[1]["inputs"][0]["unread_fields"] == {"history[].evidence": 1}


def test_unread_fields_can_be_refused(prepare: Callable[..., Any], tmp_path: Path) -> None:
    said = (("user", "Hi", {}), ("assistant", "Hello.", {}))
    rows = [turns("messages", *said, id=n) for n in range(3)] + [turns("messages", *said, tools=["f"])]
    outcome, manifest = prepare(rows, "unread=reject", "max_reject_fraction=0.25")
    assert outcome.exit_code == 0
    assert manifest["rows"]["rejected_by_reason"] == {"unread_field": 1}
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["detail"] == "the field tools is not read"
    assert manifest["inputs"][0]["unread_fields"] == {"tools": 1}


def test_columns_of_parquet_that_are_null_are_not_unread(run_program: Callable[..., Any], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = turns("messages", ("user", "Hi", {"weight": None}), ("assistant", "Hello.", {"weight": 1.0}))
    more = turns("messages", ("user", "Hi", {"weight": None}), ("assistant", "No.", {"weight": 0.0}), tools="f")
    rows = [{**said, "tools": None}, {"messages": more["messages"] + said["messages"], "tools": "f"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert run_program("data", "files=[rows.parquet]", "output=out", "eval_fraction=0").exit_code == 0
    manifest = PreparedDataset(tmp_path / "out").manifest
    assert manifest["inputs"][0]["unread_fields"] == {"tools": 1}
    right = TOKENIZER.encode(Conversation((Message("user", "Hi"), Message("assistant", "Hello."))))
    assert manifest["train"]["supervised_tokens"] == 2 * right.supervised


def test_every_process_counts_what_it_does_not_read(prepare: Callable[..., Any]) -> None:
    rows = [{"instruction": f"Say {n}.", "output": str(n), "text": "t", "id": n} for n in range(3500)]
    for workers in (1, 2):
        _, manifest = prepare(rows, f"workers={workers}", f"seed={workers}")
        assert manifest["inputs"][0]["unread_fields"] == {"text": 3500}
        assert manifest["inputs"][0]["harmless_fields"] == {"id": 3500}
