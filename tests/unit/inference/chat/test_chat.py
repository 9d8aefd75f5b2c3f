"""A conversation through a pipe: answers alone on stdout, everything else on stderr, mistakes with an exit code."""

import io
from collections.abc import Callable

import pytest

from configs.program.errors import UserError
from inference.chat import chat as module
from inference.chat.chat import chat
from inference.config import InferenceConfig
from inference.load import Loaded
from tests.unit.inference.chat.conftest import Asked, commands

Piped = Callable[[bytes], None]


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Piped:
    """Runs the program with these bytes on stdin."""
    loaded: Loaded = commands().talk.loaded
    monkeypatch.setattr(module, "load", lambda _: loaded)

    def run(text: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
        chat(InferenceConfig(task="chat", base="base", max_new_tokens=32))

    return run


def test_answers_alone_go_to_stdout(asked: Asked, piped: Piped, capsys: pytest.CaptureFixture[str]) -> None:
    asked.say = lambda number: "" if number == 2 else f"Answer {number}."
    piped(b"\xef\xbb\xbfOne?\r\n\nTwo?\n/help\n/undo\n/stats\n/reset\nThree?\n/exit\nnever\n")
    captured = capsys.readouterr()
    assert captured.out == "Answer 1.\n\nAnswer 3.\n"
    for said in ("The answer is empty", "Ctrl-C stops", "Taken back: Two?", "The conversation: 1 turn", "Forgotten."):
        assert said in captured.err
    assert asked[0].messages[0].content == "One?"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"/remember", "line 2: /remember: there is no such command; /help lists them"),
        (b"word " * 200, "line 2: prompt: it takes 208 tokens, and the context has room for 96; shorten it"),
        (b"\xff", r"line 2: prompt='\udcff': it is not UTF-8 text"),
        (b"/load absent", "line 2: /load absent: there is no such file"),
    ],
)
def test_a_mistake_ends_it_and_keeps_what_was_answered(
    asked: Asked, piped: Piped, capsys: pytest.CaptureFixture[str], line: bytes, told: str
) -> None:
    with pytest.raises(UserError) as raised:
        piped(b"One?\n" + line + b"\nThree?\n")
    assert str(raised.value).startswith(told)
    assert capsys.readouterr().out == "Answer 1.\n"
    assert len(asked) == 1


def test_ctrl_c_ends_it(asked: Asked, piped: Piped) -> None:
    def interrupt(_: int) -> str:
        raise KeyboardInterrupt

    asked.say = interrupt
    with pytest.raises(KeyboardInterrupt):
        piped(b"One?\nTwo?\n")
