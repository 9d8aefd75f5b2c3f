"""A conversation: what is remembered, forgotten, asked again, taken back, and left out when the context is full."""

import pytest

from configs.program.errors import UserError
from data.schema import Conversation, Message
from data.template import ChatTokenizer
from inference.chat.talk import fit
from tests.unit.inference.chat.conftest import Asked, commands, contents


def test_the_model_sees_what_was_said_before(asked: Asked) -> None:
    session = commands(system="Be brief.")
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


def test_each_answer_has_a_seed_of_its_own(asked: Asked) -> None:
    """Also the answer to the same words after /reset; the first has the seed that `prompt=` would have."""
    session = commands(seed=2**32 - 2, temperature=0.9)
    for line in ("Hello", "/reset", "Hello", "/retry", "/set seed=7", "Hello"):
        session.take(line)
    assert asked.seeds == [2**32 - 2, 2**32 - 1, 0, 7]


def test_retry_replaces_the_last_answer(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    session = commands()
    for line in ("One?", "Two?", "/retry"):
        session.take(line)
    assert asked[2] == asked[1]
    session.take("Three?")
    assert contents(asked[3]) == ["One?", "Answer 1.", "Two?", "Answer 3.", "Three?"]
    assert "temperature=0: the same words are to be expected" in capsys.readouterr().err


def test_undo_takes_back_a_turn_at_a_time(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    session = commands()
    for line in ("One?", "Two?", "Three?", "/undo", "/undo", "Four?"):
        session.take(line)
    assert contents(asked[3]) == ["One?", "Answer 1.", "Four?"]
    assert "Taken back: Three?\nTaken back: Two?\n" in capsys.readouterr().err
    for line in ("/undo", "/undo"):
        session.take(line)
    with pytest.raises(UserError, match="/undo: nothing was said yet"):
        session.take("/undo")


def test_an_empty_answer_is_said_and_can_be_asked_for_again(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    session = commands()
    session.take("One?")
    asked.say = lambda _: ""
    session.take("Two?")
    assert "The answer is empty, and not kept; /retry asks again." in capsys.readouterr().err
    session.take("Three?")  # in place of the message that has no answer
    assert contents(asked[2]) == ["One?", "Answer 1.", "Three?"]
    asked.say = lambda number: f"Answer {number}."
    session.take("/retry")
    assert contents(asked[3]) == ["One?", "Answer 1.", "Three?"]
    asked.say = lambda _: " \n"
    session.take("/retry")  # finds no words: those of before stay
    asked.say = lambda number: f"Answer {number}."
    session.take("Four?")
    assert contents(asked[5]) == ["One?", "Answer 1.", "Three?", "Answer 4.", "Four?"]
    asked.say = lambda _: ""
    session.take("Five?")
    session.take("/undo")
    asked.say = lambda number: f"Answer {number}."
    session.take("/retry")
    assert contents(asked[7])[-1] == "Four?"


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"max_new_tokens": 5}, "by max_new_tokens=5."), ({"max_new_tokens": 32}, "by the context.")],
)
def test_an_answer_that_is_cut_off_is_said(
    asked: Asked, capsys: pytest.CaptureFixture[str], settings: dict[str, int], told: str
) -> None:
    session = commands(**settings)
    session.take("One?")
    assert "cut off" not in capsys.readouterr().err
    asked.reason = "length"
    session.take("Two?")
    assert f"The answer is cut off {told}" in capsys.readouterr().err


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*given: object) -> None:
        given[-1]("Half of")  # type: ignore[operator]
        raise KeyboardInterrupt

    monkeypatch.setattr("inference.chat.talk.generate", generate)
    session = commands()
    session.take("Go.")
    assert [message.content for message in session.talk.turns] == ["Go.", "Half of"]
    session.take("/stats")
    assert "The last answer: stopped; the first words after" in capsys.readouterr().err
    session = commands()
    session.talk.may_be_stopped = False  # in a pipe, the program ends
    with pytest.raises(KeyboardInterrupt):
        session.take("Go.")


def test_old_turns_go_when_the_context_is_full_and_it_is_said_once(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    session = commands(system="Be brief.")
    for number in range(8):
        session.take(f"Question {number}, which takes some tokens of the context, so that it fills up?")
        taken = len(session.talk.loaded.tokenizer.encode_prompt(asked[-1]))
        assert taken <= 128 - 32
        assert contents(asked[-1])[0] == "Be brief."
        assert contents(asked[-1])[-1].startswith(f"Question {number}")
    seen = len(asked[-1].turns) // 2
    said = capsys.readouterr().err
    assert said.count("The context is full: the oldest turn is no longer seen.") == 1
    assert said.count(f"The context is full: the oldest {7 - seen} turns are no longer seen.") == 1
    assert len(session.talk.turns) == 16  # nothing is lost: they come back if later ones are taken back
    for _ in range(7):
        session.take("/undo")
    session.take("Short?")
    assert contents(asked[-1])[1].startswith("Question 0")


def test_fit_drops_whole_turns() -> None:
    tokenizer = ChatTokenizer.load()
    turns = [Message("assistant" if place % 2 else "user", f"word {place}") for place in range(9)]
    for dropped in range(5):
        kept = Conversation(tuple(turns[2 * dropped :]))
        needed = len(tokenizer.encode_prompt(kept))
        assert fit(tokenizer, None, turns, needed) == (kept, dropped)
        if dropped < 4:
            assert fit(tokenizer, None, turns, needed - 1)[1] == dropped + 1
    with pytest.raises(UserError, match="shorten it"):
        fit(tokenizer, None, turns, 3)
