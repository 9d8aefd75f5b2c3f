"""The three schemas, and every way in which a row can fail to be one."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.rows.columns import names_of
from data.rows.conversion import CONVERSIONS, to_conversation
from data.rows.reading import RawRow, Reject
from data.schema import ROW_FIELDS, Conversation, Message

HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": " Hello. "}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}


def schema_of(value: Any, columns: dict[str, str]) -> str | None:
    names = names_of(value, columns)
    return None if names is None else names.schema


def convert(value: Any, schema: str, **options: Any) -> Conversation | Reject:
    return to_conversation(RawRow(value, "rows.json", "row", 0), schema, **options)


def said(value: Any, schema: str, **options: Any) -> list[tuple[str, str]]:
    conversation = convert(value, schema, **options)
    assert isinstance(conversation, Conversation), conversation
    return [(message.role, message.content) for message in conversation.messages]


def test_sharegpt() -> None:
    assert said({"conversations": [HUMAN, GPT]}, "sharegpt") == [("user", "Hi"), ("assistant", "Hello.")]
    system = {"from": "system", "value": "Be kind."}
    assert said({"conversations": [system, HUMAN, GPT]}, "sharegpt")[0] == ("system", "Be kind.")


def test_the_system_prompt_of_openhermes_25_stands_in_a_column() -> None:
    row = {"conversations": [HUMAN, GPT], "system_prompt": "Be brief."}
    assert said(row, "sharegpt")[0] == ("system", "Be brief.")
    inside = {"from": "system", "value": "Be kind."}
    assert said(row | {"conversations": [inside, HUMAN, GPT]}, "sharegpt")[0] == ("system", "Be kind.")
    for empty in (None, "", "  "):
        assert said(row | {"system_prompt": empty}, "sharegpt")[0] == ("user", "Hi")


def test_edges_stay_between_a_system_message_and_the_text_after_it() -> None:
    """As in Meta's template, which strips the two joined; all other edges go."""
    system, user = {"from": "system", "value": "\n  Indent.\n"}, {"from": "human", "value": "\n    def f(x):\n"}
    kept = [("system", "\n  Indent.\n"), ("user", "\n    def f(x):")]
    after = [("assistant", "Hello."), ("user", "def f(x):"), ("assistant", "Hello.")]
    assert said({"conversations": [system, user, GPT, user, GPT]}, "sharegpt") == kept + after
    assert said({"conversations": [user, GPT, user, GPT], "system_prompt": "\n  Indent.\n"}, "sharegpt") == kept + after
    assert said({"conversations": [user, GPT]}, "sharegpt")[0] == ("user", "def f(x):")
    row = {"instruction": "\n  Do it.\n", "input": "\n  x\n", "output": " y "}
    assert said(row, "instruction") == [("user", "Do it.\n\nx"), ("assistant", "y")]


def test_messages() -> None:
    system = {"role": "system", "content": ""}  # an empty one is none
    row = {"messages": [system, USER, ASSISTANT, USER, ASSISTANT]}
    assert [role for role, _ in said(row, "messages")] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("value", "schema", "reason"),
    [
        ({"conversations": None}, "sharegpt", "missing_field"),
        ({"messages": [USER, ASSISTANT]}, "sharegpt", "other_schema"),
        ({"turns": [USER, ASSISTANT]}, "sharegpt", "missing_field"),
        ({"conversations": "Hi"}, "sharegpt", "not_a_list"),
        ({"conversations": ["Hi"]}, "sharegpt", "not_an_object"),
        ({"conversations": []}, "sharegpt", "turns_out_of_order"),
        ({"conversations": [{"value": "Hi"}, GPT]}, "sharegpt", "missing_field"),
        ({"conversations": [{"from": "human"}, GPT]}, "sharegpt", "missing_field"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]}, "sharegpt", "unknown_role"),
        ({"conversations": [HUMAN, GPT, {"from": "observation", "value": "1"}, GPT]}, "sharegpt", "unknown_role"),
        ({"conversations": [{"from": 3, "value": "Hi"}, GPT]}, "sharegpt", "unknown_role"),
        ({"conversations": [GPT, HUMAN]}, "sharegpt", "turns_out_of_order"),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "sharegpt", "turns_out_of_order"),
        ({"conversations": [HUMAN, GPT, {"from": "system", "value": "x"}]}, "sharegpt", "turns_out_of_order"),
        ({"conversations": [HUMAN]}, "sharegpt", "no_reply"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "sharegpt", "no_reply"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": " "}]}, "sharegpt", "empty_field"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": ["Hi"]}]}, "sharegpt", "not_text"),
        ({"conversations": [HUMAN, GPT], "system_prompt": "<<SYS>>"}, "sharegpt", "template_marker"),
        ({"messages": [USER, {"role": "tool", "content": "1"}]}, "messages", "unknown_role"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "messages", "lone_surrogate"),
        ({"messages": [USER, {"role": "assistant", "content": "a\0"}]}, "messages", "nul_character"),
    ],
)
def test_reasons(value: Any, schema: str, reason: str) -> None:
    reject = convert(value, schema)
    assert isinstance(reject, Reject)
    assert reject.reason == reason


def test_a_detail_says_which_turn() -> None:
    reject = convert({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "sharegpt")
    assert isinstance(reject, Reject)
    assert reject.detail == "the field conversations[1].value is empty"


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"instruction": "x", "output": "y"}, "instruction"),
        ({"conversations": [], "instruction": "x"}, "sharegpt"),
        ({"messages": []}, "messages"),
        ({"question": "x"}, "instruction"),
        ({"says": "x"}, None),
        ([1], None),
    ],
)
def test_detection(value: Any, schema: str | None) -> None:
    assert schema_of(value, {}) == schema


def test_columns_may_have_other_names() -> None:
    columns = {"instruction": "question", "output": "answer"}
    row = {"question": "Hi", "answer": "Hello.", "context": "ignored"}
    assert schema_of(row, columns) == "instruction"
    assert said(row, "instruction", columns=columns) == [("user", "Hi"), ("assistant", "Hello.")]


def test_conversations_of_tool_users_are_accounted_for(run_program, shared: Path, tmp_path: Path) -> None:
    """Real ShareGPT rows with roles that the template does not have."""
    file = shared / "data" / "glaive_toolcall_en_demo.json"
    if not file.is_file():
        pytest.skip(f"the real rows are not here: {file}")
    rows = json.loads(file.read_text())
    outcome = run_program("data", f"files=[{file}]", "output=out", "seq_len=4096", "max_reject_fraction=1")
    assert outcome.exit_code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["inputs"][0]["schema"] == "sharegpt"
    tools = sum(any(turn["from"] not in ("human", "gpt", "system") for turn in row["conversations"]) for row in rows)
    counts = manifest["rows"]
    assert counts["in"] == len(rows) == counts["kept"] + counts["rejected"]
    assert counts["rejected_by_reason"]["unknown_role"] == tools
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert Counter(reject["reason"] for reject in rejects) == counts["rejected_by_reason"]
    assert [reject["row"] for reject in rejects] == sorted(reject["row"] for reject in rejects)


def test_each_source_has_its_own_schema(run_program, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Hi", "output": "Hello."}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": [HUMAN, GPT]}, {"conversations": [HUMAN, GPT]}]))
    assert run_program("data", "files=[a.jsonl,b.json]", "output=out", "eval_fraction=0").exit_code == 0
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert [(source["schema"], source["rows"]) for source in inputs] == [("instruction", 1), ("sharegpt", 2)]
    forced = run_program("data", "files=[b.json]", "output=out", "schema=messages", "eval_fraction=0")
    assert forced.exit_code == 2
    assert "other_schema 2×" in forced.stderr


def test_the_same_conversation_in_three_schemas_is_one_conversation() -> None:
    expected = Conversation((Message("user", "Hi"), Message("assistant", "Hello.")))
    assert convert({"instruction": "Hi", "output": "Hello."}, "instruction") == expected
    assert convert({"conversations": [HUMAN, GPT]}, "sharegpt") == expected
    assert convert({"messages": [USER, ASSISTANT]}, "messages") == expected


def test_every_schema_can_be_asked_for() -> None:
    assert set(ROW_FIELDS) == set(CONVERSIONS)


def test_columns_of_turns_are_renamed() -> None:
    columns = {"messages": "dialogue", "role": "speaker", "content": "text"}
    value = {"dialogue": [{"speaker": "user", "text": "Hi"}, {"speaker": "assistant", "text": "Hello."}]}
    assert schema_of(value, columns) == "messages"
    assert said(value, "messages", columns=columns) == [("user", "Hi"), ("assistant", "Hello.")]
    reject = convert({"dialogue": ["Hi"]}, "messages", columns=columns)
    assert isinstance(reject, Reject)
    assert reject.reason == "not_an_object"


def test_a_column_without_values_speaks_for_no_schema() -> None:
    assert schema_of({"messages": None, "instruction": "Say it.", "output": "It."}, {}) == "instruction"
