"""Who speaks, in which order, and what a run says and does if that is not the template's."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.rows.columns import Names
from data.rows.conversion import Converter
from data.rows.order import Said, in_order
from data.rows.reading import RawRow, Reject, as_arguments
from data.rows.texts import ROLES, TOOLS, UnusableError
from data.schema import REPAIRS, Conversation

Prepare = Callable[..., tuple[Any, dict[str, Any]]]


@pytest.fixture
def prepare(run_program: Callable[..., Any], tmp_path: Path) -> Prepare:
    """Prepares rows into `out`; returns the outcome, and the manifest if there is one."""

    def run(rows: list[Any], *settings: str) -> tuple[Any, dict[str, Any]]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        outcome = run_program("data", "files=[rows.jsonl]", "output=out", "eval_fraction=0", *settings)
        path = tmp_path / "out" / "manifest.json"
        return outcome, json.loads(path.read_text()) if path.is_file() else {}

    return run


def row(*speakers: str, **beside: Any) -> dict[str, Any]:
    return {"messages": [{"role": name, "content": f"{name} {n}"} for n, name in enumerate(speakers)], **beside}


def convert(value: Any, **settings: Any) -> Conversation | Reject:
    return Converter(Names.of("messages", {}), **settings).convert(RawRow(value, "rows.jsonl", "line", 1))


# Repairs

LETTERS: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant"}
orders = st.text("sua", max_size=9)


def to_say(order: str) -> list[Said]:
    return [(LETTERS[letter], f"{letter}{n}", False) for n, letter in enumerate(order)]


def by_pattern(order: str) -> list[str] | None:
    """What all three repairs leave of an order, another way: each message as the texts that were joined in it."""
    parts = re.fullmatch(r"(s*)a*(.*?)u*", order)
    assert parts is not None
    kept = [n for group in (1, 2) for n in range(*parts.span(group))]
    joined = [[f"{order[n]}{n}" for n in run] for _, run in itertools.groupby(kept, lambda n: order[n])]
    in_turn = re.fullmatch(r"s?(ua)+", "".join(texts[0][0] for texts in joined))
    return ["\n\n".join(texts) for texts in joined] if in_turn else None


@given(orders, st.permutations(REPAIRS))
def test_repairs_leave_what_they_say(order: str, repairs: list[str]) -> None:
    """Whatever order they are given in, as `Converter` takes them in theirs."""
    expected = by_pattern(order)
    row = {"messages": [{"role": role, "content": text} for role, text, _ in to_say(order)]}
    outcome = convert(row, repair=tuple(repairs))
    found = [m.content for m in outcome.messages] if isinstance(outcome, Conversation) else None
    assert found == expected


@given(orders)
def test_what_is_in_order_is_left_alone(order: str) -> None:
    said = to_say(order)
    try:
        conversation, done = in_order(said, (), reply_needed=True)
    except UnusableError as unusable:
        helpful = unusable.settings["repair"]
        assert bool(helpful) == (by_pattern(order) is not None)
        if helpful:  # all that is proposed is needed, and enough
            assert in_order(said, helpful, reply_needed=True)[1] == helpful
        return
    assert done == ()
    assert in_order(said, REPAIRS, reply_needed=True) == (conversation, ())


def test_two_replies_are_not_joined_if_one_of_them_is_masked() -> None:
    value = row("user", "assistant", "assistant")
    value["messages"][1]["weight"] = 0
    outcome = convert(value, repair=("merge_same_role",))
    assert isinstance(outcome, Reject)
    assert outcome.reason == "unsupported_weight"
    value["messages"][2]["weight"] = 0
    value["messages"] += row("user", "assistant")["messages"]
    outcome = convert(value, repair=("merge_same_role",))
    assert isinstance(outcome, Conversation)
    assert [m.masked for m in outcome.messages] == [False, True, False, False]


@pytest.mark.parametrize("workers", [1, 2])
def test_repairs_are_counted_for_the_rows_that_are_kept(prepare: Prepare, workers: int) -> None:
    ended, begun = row("user", "assistant", "user"), row("assistant", "user", "assistant")
    both = row("system", "assistant", "user", "assistant", "user", "user")
    long = {"messages": both["messages"][:4] + both["messages"][2:4] * 40 + both["messages"][-1:]}
    rows = [ended, ended, begun, both, long, row("user", "user"), row("user", "user", "assistant")]
    settings = ("repair=[drop_last_user,drop_leading_assistant]", "duplicates=drop", "seq_len=64", f"workers={workers}")
    outcome, manifest = prepare(rows, *settings, "max_reject_fraction=0.5")
    assert outcome.exit_code == 0
    assert manifest["rows"]["rejected_by_reason"] == {"duplicate": 1, "too_long": 1, "turns_out_of_order": 2}
    assert manifest["repaired"] == {"drop_last_user": 2, "drop_leading_assistant": 2}
    assert "Repaired rows: drop_last_user 2, drop_leading_assistant 2" in outcome.stderr
    assert "Repaired" in prepare(rows, *settings, "max_reject_fraction=0.5")[0].stderr  # also if nothing is done again


def test_nothing_is_repaired_unless_asked_for(prepare: Prepare) -> None:
    rows = [row("user", "assistant")] * 3 + [row("user", "assistant", "user")]
    outcome, manifest = prepare(rows, "max_reject_fraction=0.25")
    assert manifest["rows"]["rejected_by_reason"] == {"no_reply": 1}
    assert manifest["repaired"] == {}
    assert "Repaired" not in outcome.stderr


def test_a_run_that_stops_proposes_the_repairs_of_all_its_rows(
    prepare: Prepare, run_program: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [row("user", "assistant", "user"), row("user", "user", "assistant"), row("assistant", "user", "assistant")]
    outcome, _ = prepare([*rows, row("user", "assistant")])
    assert outcome.exit_code == 2
    proposed = re.search(r"give '(repair=\[[^']*\])', or ", outcome.stderr)
    assert proposed is not None
    assert set(REPAIRS) == set(proposed[1].removeprefix("repair=[").removesuffix("]").split(","))
    lines = (tmp_path / "out-rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"] for line in lines] == [
        f"'repair=[{name}]'" for name in ("drop_last_user", "merge_same_role", "drop_leading_assistant")
    ]
    assert prepare([*rows, row("user", "assistant")], proposed[1])[0].exit_code == 0


# Roles


@pytest.mark.parametrize("name", ROLES)
def test_usual_names_are_known_however_they_are_written(name: str) -> None:
    expected = {"system": ["system", "user"], "user": ["user"], "assistant": ["user", "assistant"]}[ROLES[name]]
    for written in (name, name.upper(), name.title(), f" {name}"):
        before = [] if expected[0] == ROLES[name] else ["user"]
        after = ["user", "assistant"] if ROLES[name] == "system" else ["assistant"] * (ROLES[name] == "user")
        outcome = convert(row(*before, written, *after))
        assert isinstance(outcome, Conversation), outcome
        assert outcome.messages[len(before)].role == ROLES[name]


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_tools_stay_out(name: str) -> None:
    outcome = convert(row("user", name, "assistant"), repair=REPAIRS)
    assert isinstance(outcome, Reject)
    assert (outcome.reason, outcome.settings) == ("unknown_role", {})
    assert f"said by {name!r}, a tool, for which the LLaMA-2 template has no place" in outcome.detail


def test_roles_by_a_map(prepare: Prepare) -> None:
    rows = [row("Customer", "agent", "Customer", "agent"), row("bot", "customer", "agent", "customer", "AGENT")]
    outcome, _ = prepare(rows)
    assert outcome.exit_code == 2
    assert "said by 'Customer', for whom no role is known" in outcome.stderr
    proposed = "roles={customer: user, agent: assistant}"
    assert f"give '{proposed}', or mend" in outcome.stderr
    outcome, manifest = prepare(rows, "roles={customer: user, agent: assistant, bot: system}")
    assert outcome.exit_code == 0
    assert manifest["config"]["roles"] == {"customer": "user", "agent": "assistant", "bot": "system"}
    assert prepare(rows[:1], proposed)[0].exit_code == 0
    for known, expected in (("user", {"agent": "assistant"}), ("assistant", {"agent": "user"})):
        rejected = convert(row(known, "agent"))
        assert isinstance(rejected, Reject)
        assert rejected.settings == {"roles": expected}
    refused = prepare(rows, "roles={customer: client}")[0]
    assert refused.exit_code == 2
    assert "roles.customer=client: there is no such choice; choose one of system, user, assistant" in refused.stderr
    refused = prepare(rows, "repair=[drop_first_user]")[0]
    assert "repair=drop_first_user: there is no such choice; choose one of" in refused.stderr


def test_names_that_need_quotes_are_proposed_in_quotes(prepare: Prepare) -> None:
    rows = [{"the question, asked": "Hi", 'what "it" says': "Hello."}]
    outcome, _ = prepare(rows)
    proposed = re.search(r"give '(columns=[^']*)', or ", outcome.stderr)
    assert proposed is not None
    assert prepare(rows, proposed[1])[0].exit_code == 0
    assert as_arguments({"overlong": ("truncate",)}) == ["overlong=truncate"]


def test_names_of_any_length_are_cut(prepare: Prepare) -> None:
    for rows in ([row("x" * 100_000, "y" * 100_000)], [{"q" * 100_000: "Hi", "a" * 100_000: "Hello."}]):
        outcome, _ = prepare(rows)
        assert outcome.exit_code == 2
        assert len(outcome.stderr) < 1500


# Names and schemas


def test_what_was_found_is_told(prepare: Prepare) -> None:
    rows = [{"prompt": "Hi", "completion": "Hello."}] * 2
    outcome, manifest = prepare(rows)
    told = "rows.jsonl: read as instruction rows, by looking: 'columns={instruction: prompt, output: completion}'"
    assert told in outcome.stderr.splitlines()
    assert manifest["inputs"][0]["columns"] == {"instruction": "prompt", "output": "completion"}
    assert manifest["inputs"][0]["unread_fields"] == {}
    assert told in prepare(rows)[0].stderr.splitlines()  # also if nothing is done again
    assert "by looking" not in prepare(rows, "columns={instruction: prompt, output: completion}")[0].stderr


def test_fields_that_the_first_rows_lack_are_found_in_those_after_them(prepare: Prepare) -> None:
    rows = [{"question": "Hi", "answer": "Hello."}, {"question": "Hi", "context": "Below.", "answer": "Hello."}]
    assert prepare(rows)[1]["inputs"][0]["columns"] == {
        "instruction": "question",
        "output": "answer",
        "input": "context",
    }


def test_rows_of_another_schema_are_told(prepare: Prepare) -> None:
    stray = row("user", "assistant")
    others = [{"instruction": f"Say {n}.", "output": "x"} for n in range(10)]
    outcome, _ = prepare([stray, *others])
    assert outcome.exit_code == 2
    assert "other_schema 10×" in outcome.stderr
    assert "it is a row of the schema instruction, and its source is read as messages" in outcome.stderr
    assert "give schema=instruction, or " in outcome.stderr
    assert prepare([stray, *others], "schema=instruction")[1]["rows"]["kept"] == 10
    assert "give schema" not in prepare([stray, *others[:1]])[0].stderr  # it would take half of them at most


def test_a_missing_field_lists_those_that_are_there(prepare: Prepare) -> None:
    outcome, _ = prepare([{"instruction": "Hi", "reply_text": "Hello.", "score": 3}])
    assert "there is no field output; there are instruction, reply_text, score" in outcome.stderr
    assert "give 'columns={output: reply_text}', or mend the rows; " in outcome.stderr


def test_a_row_that_is_too_long_names_the_settings(prepare: Prepare) -> None:
    outcome, _ = prepare(
        [row("user", "assistant"), *[{"messages": row("user", "assistant")["messages"] * 30}]], "seq_len=64"
    )
    assert "and a row holds 64 (seq_len)" in outcome.stderr
    assert "give overlong=truncate, or mend the rows, or leave them out by max_reject_fraction=0.5; " in outcome.stderr


def test_the_summary_says_what_to_type_next(prepare: Prepare) -> None:
    outcome, _ = prepare([row("user", "assistant")] * 9 + [row("user")])
    assert "(no_reply 1), listed in out/rejects.jsonl" in outcome.stderr
    look, train = outcome.stderr.splitlines()[-2:]
    assert look == "Look at it:  python -m data task=preview output=out"
    assert train.startswith("Train on it: deepspeed --no_local_rank --module train recipe=")
    assert train.endswith(" dataset=out run_dir=runs/out")


# Sources by their names


def test_limits_and_weights_take_any_name(run_program: Callable[..., Any], tmp_path: Path) -> None:
    names = ["two words.jsonl", "a [v1].jsonl", "b (v2).jsonl"]
    for name in names:
        (tmp_path / name).write_text("".join(json.dumps(row("user", "assistant")) + "\n" for _ in range(4)))

    def rows(*settings: str) -> list[int]:
        outcome = run_program("data", "output=out", "eval_fraction=0", *settings)
        assert outcome.exit_code == 0, outcome.stderr
        return [source["rows"] for source in json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]]

    for name in names:
        assert rows(f'files=["{name}"]', f"limits={{{name}: 2}}") == [2]
        assert rows(f'files=["{name}"]', f'limits={{"{name}": 3}}', f"weights={{{name}: 2}}") == [3]
    assert rows("files=[*.jsonl]", "limits={*.jsonl: 2}") == [2, 2, 2]
    assert rows("files=[*.jsonl]", "limits={*.jsonl: 2, two words.jsonl: 1}") == [2, 2, 1]
    assert rows("files=[*.jsonl]", "limits={two words.jsonl: 1}") == [4, 4, 1]
    refused = run_program("data", "files=[*.jsonl]", "output=out", "limits={three.jsonl: 1}")
    assert "limits.three.jsonl: no source has that name; it is one of *.jsonl" in refused.stderr
