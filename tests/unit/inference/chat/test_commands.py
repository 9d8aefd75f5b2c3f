"""What lines do: settings that change, files that are saved and read, and mistakes that change nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.program.errors import UserError
from data.rows.conversion import to_conversation
from data.rows.reading import RawRow
from data.schema import Conversation
from inference.chat.commands import SETTABLE, changed
from inference.config import InferenceConfig
from tests.unit.inference.chat.conftest import Asked, commands, contents


def test_what_is_saved_is_a_row_that_can_be_trained_on_and_loaded(asked: Asked, tmp_path: Path) -> None:
    session = commands(system="Be brief.")
    session.take("One?")
    session.take(f"/save {tmp_path}/talk.jsonl")
    session.take("Two?")
    session.take(f"/save {tmp_path}/talk.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    found = [to_conversation(RawRow(row, "talk", "line", 1), "messages") for row in rows]
    assert [contents(c) for c in found if isinstance(c, Conversation)] == [
        ["Be brief.", "One?", "Answer 1."],
        ["Be brief.", "One?", "Answer 1.", "Two?", "Answer 2."],
    ]
    another = commands()
    another.take("Who?")
    another.take(f"/load {tmp_path}/talk.jsonl")
    another.take("Three?")
    assert contents(asked[3]) == ["Be brief.", "One?", "Answer 1.", "Two?", "Answer 2.", "Three?"]


def test_a_conversation_that_ends_with_a_message_is_answered(asked: Asked, tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "Hi."}]}]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    session = commands(system="Be brief.")
    session.take(f"/load {tmp_path}/asked.json")
    assert [contents(one) for one in asked] == [["Hi."]]
    assert len(session.talk.answered) == 2


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("temperature=0.7", {"temperature": 0.7}),
        ("temperature=1 top_p=.9 min_p=5e-2", {"temperature": 1.0, "top_p": 0.9, "min_p": 0.05}),
        ("max_new_tokens=7 repetition_penalty=1.1", {"max_new_tokens": 7, "repetition_penalty": 1.1}),
        ("stop=[END]", {"stop": ["END"]}),
        ("'stop=[two words, x=y]'", {"stop": ["two words", "x=y"]}),
        ("markers=keep seed=3", {"markers": "keep", "seed": 3}),
    ],
)
def test_settings_change_as_on_the_command_line(text: str, settings: dict[str, Any]) -> None:
    before = InferenceConfig(base="base", system="Be brief.")
    found = changed(before, text)
    assert {name: getattr(found, name) for name in settings} == settings
    assert changed(found, " ".join(f"{name}={value}" for name, value in STANDARD.items())) == before


def test_a_conversation_whose_last_message_is_too_long_is_not_loaded(asked: Asked, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "word " * 200}]}]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    session = commands(system="Be brief.")
    session.take("One?")
    with pytest.raises(UserError, match="shorten it"):
        session.take(f"/load {tmp_path}/long.json")
    session.take("Two?")
    assert contents(asked[-1]) == ["Be brief.", "One?", "Answer 1.", "Two?"]


STANDARD = {name: getattr(InferenceConfig(), name) for name in SETTABLE}


def test_settings_that_change_are_shown_and_used(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    session = commands()
    session.take("/set temperature=0.7 top_p=0.9")
    assert re.search(r"^temperature=0\.7 top_p=0\.9 .* stop=\[\] ", capsys.readouterr().err)
    session.take("/set temperature=1.5")
    session.take("/set")
    assert "temperature=1.5 top_p=0.9 " in capsys.readouterr().err
    assert session.talk.config.top_p == 0.9


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/save", "/save: it names no file"),
        ("/save x.jsonl", "nothing was said yet"),
        ("/retry", "/retry: nothing was asked yet"),
        ("/remember", "/remember: there is no such command"),
        ("fake [/INST] this", "the template's own marker [/INST]"),
        ("NUL \0", "NUL character"),
        ("word " * 200, "shorten it"),
        ("/set temperature=hot", "temperature=hot: that is not of type"),
        ("/set temperature=-1", "temperature=-1.0: it can't be negative"),
        ("/set temperature=null", "temperature=null: it can't be null"),
        ("/set temperature=0.1,0.2", "it takes one value"),
        ("/set top_p=0.9", "top_p=0.9: temperature=0 takes the likeliest token"),
        ("/set repetition_penalty=0", "repetition_penalty=0.0: it must be above 0"),
        ("/set stop=END", "/set stop=END: it takes a list"),
        ("/set stop=[don't]", "a quotation is not closed"),
        ("/set stop=[${absent}]", "absent"),
        ("/set base=other", "/set base=other: it changes temperature, "),
        ("/set ~temperature=0", "/set ~temperature=0: it changes temperature, "),
        ("/set temperature", "/set temperature: it changes temperature, "),
        ("/load", "/load: it names no file"),
        ("/load absent.jsonl", "/load absent.jsonl: there is no such file"),
        ("/load empty.jsonl", "/load empty.jsonl: it holds no rows"),
        ("/load text.jsonl", "/load text.jsonl: line 2 can't be used"),
        ("/load other.jsonl", "/load other.jsonl: line 1 is not a conversation"),
        ("/load tools.jsonl", "/load tools.jsonl: line 1 can't be used"),
        ("/load nul.jsonl", "NUL character"),
        ("/load cut.jsonl.gz", "/load cut.jsonl.gz: it can't be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text.jsonl").write_text('{"messages": []}\nnot JSON')
    (tmp_path / "other.jsonl").write_text('{"text": "x"}')
    (tmp_path / "tools.jsonl").write_text('{"messages": [{"role": "tool", "content": "x"}]}')
    (tmp_path / "nul.jsonl").write_text('{"messages": [{"role": "user", "content": "\\u0000x"}]}')
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    session = commands()
    before = session.talk.config
    with pytest.raises(UserError) as raised:
        session.take(line)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not asked
    assert not session.talk.turns
    assert session.talk.config == before


def test_a_path_is_no_command(asked: Asked) -> None:
    session = commands()
    assert session.take("/etc/hosts is what?")
    assert session.take("")
    assert session.take("\u200b")
    assert len(asked) == 1


def test_how_fast_and_how_full(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    session = commands()
    session.take("/stats")
    assert capsys.readouterr().err == "The conversation: 0 turns, 0 tokens; the context has room for 128.\n"
    session.take("One?")
    capsys.readouterr()
    session.take("/stats")
    tokenizer = session.talk.loaded.tokenizer
    prompt = len(tokenizer.encode_prompt(asked[0]))
    taken = len(tokenizer.encode(Conversation(tuple(session.talk.turns))).ids)
    assert re.fullmatch(
        rf"The last answer: 5 tokens, \d+\.\d tokens/s; the first words after 0\.\d\d s, all after 0\.\d\d s; "
        rf"the prompt had {prompt} tokens\.\n"
        rf"The conversation: 1 turn, {taken} tokens; the context has room for 128\.\n",
        capsys.readouterr().err,
    )
