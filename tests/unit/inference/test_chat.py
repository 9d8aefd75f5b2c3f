"""A conversation: what is remembered, forgotten, saved, and left out when the context is full."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.program.errors import UserError
from data.rows.conversion import to_conversation
from data.rows.reading import RawRow
from data.schema import Conversation, Message
from data.template import ChatTokenizer
from inference import chat as module
from inference.chat import Talk, fit
from inference.config import InferenceConfig
from inference.load import Loaded
from tests.unit.inference.test_adapter import make_base


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Conversation]:
    """The conversations that the model is asked, which answers each with its place."""
    seen: list[Conversation] = []

    def generate(_: Loaded, __: InferenceConfig, conversation: Conversation, write: Any) -> None:
        seen.append(conversation)
        write(f"Answer {len(seen)}.")

    monkeypatch.setattr(module, "generate", generate)
    return seen


def talk(**settings: Any) -> Talk:
    base = make_base(torch.float32, vocab_size=32_000, max_position_embeddings=128)
    return Talk(Loaded(base, ChatTokenizer.load()), InferenceConfig(task="chat", max_new_tokens=32, **settings))


def contents(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


def test_the_model_sees_what_was_said_before(asked: list[Conversation]) -> None:
    session = talk(system="Be brief.")
    assert session.take("One?")
    assert session.take("  Two?  ")
    assert contents(asked[1])[:3] == ["Be brief.", "One?", "Answer 1."]
    session.take("/reset")
    session.take("Three?")
    assert contents(asked[2]) == ["Be brief.", "Three?"]
    session.take("/system Rhyme.")
    session.take("Four?")
    assert contents(asked[3]) == ["Rhyme.", "Four?"]
    assert not session.take("/exit")


def test_old_turns_go_when_the_context_is_full_and_it_is_said(
    asked: list[Conversation], capsys: pytest.CaptureFixture[str]
) -> None:
    session = talk(system="Be brief.")
    for number in range(8):
        session.take(f"Question {number}, which takes some tokens of the context, so that it fills up?")
        taken = len(session.loaded.tokenizer.encode_prompt(asked[-1]))
        assert taken <= 128 - 32
        assert contents(asked[-1])[0] == "Be brief."
        assert contents(asked[-1])[-1].startswith(f"Question {number}")
    assert "The context is full: the oldest turn is no longer seen." in capsys.readouterr().out


def test_what_is_saved_is_a_row_that_can_be_trained_on(asked: list[Conversation], tmp_path: Path) -> None:
    session = talk(system="Be brief.")
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


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/save", "/save: it names no file"),
        ("/save x.jsonl", "nothing was said yet"),
        ("/remember", "/remember: there is no such command"),
        ("fake [/INST] this", "the template's own marker [/INST]"),
        ("word " * 200, "shorten it"),
        ("", ""),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(
    asked: list[Conversation], capsys: pytest.CaptureFixture[str], line: str, told: str
) -> None:
    session = talk()
    assert session.take(line)
    assert told in " ".join(capsys.readouterr().out.split())
    assert not asked
    assert not session.turns


def test_a_path_is_no_command(asked: list[Conversation]) -> None:
    session = talk()
    session.take("/etc/hosts is what?")
    assert len(asked) == 1


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(_: Loaded, __: InferenceConfig, ___: Conversation, write: Any) -> None:
        write("Half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "generate", generate)
    session = talk()
    session.take("Go.")
    assert [message.content for message in session.turns] == ["Go.", "Half of"]


def test_fit_drops_whole_turns() -> None:
    tokenizer = ChatTokenizer.load()
    turns = [Message("assistant" if place % 2 else "user", f"word {place}") for place in range(5)]
    whole = len(tokenizer.encode_prompt(Conversation(tuple(turns))))
    assert fit(tokenizer, None, turns, whole) == (Conversation(tuple(turns)), 0)
    assert fit(tokenizer, None, turns, whole - 1) == (Conversation(tuple(turns[2:])), 1)
    with pytest.raises(UserError, match="shorten it"):
        fit(tokenizer, None, turns, 3)
