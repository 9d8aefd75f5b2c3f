"""Answers on a terminal: no word is torn, nothing is lost, nothing moves the cursor. What is typed is remembered."""

import io
import re
import stat
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from inference.chat import terminal
from inference.chat.terminal import KeptHistory, Output


class Screen(io.StringIO):
    """A terminal as far as Python can tell."""

    def isatty(self) -> bool:
        return True


def shown(pieces: list[str], columns: int) -> str:
    """What is written to a window so wide; it ends with the end of the answer's line."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", str(columns))
        screen = Screen()
        output = Output(screen)
        for piece in pieces:
            output.write(piece)
        output.end()
        return screen.getvalue()


WORDS = st.lists(st.text("abcdefghij.,-", min_size=1, max_size=9), max_size=40)


@given(WORDS, st.integers(9, 40), st.integers(1, 7))
def test_words_are_wrapped_as_the_standard_library_does(words: list[str], columns: int, size: int) -> None:
    text = " ".join(words)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    expected = textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False)
    assert shown(pieces, columns) == "\n".join(expected) + "\n"


@given(st.text("ab \n\t世界，。é🧿", max_size=60), st.integers(4, 20), st.integers(1, 5))
def test_nothing_is_lost_and_lines_fit(text: str, columns: int, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    found = shown(pieces, columns)
    assert re.sub(r"\s", "", found) == re.sub(r"\s", "", text)
    for line in found.splitlines():
        parts = re.split(r"(?<=\S) +", line)  # a word, or an indentation, may be wider than the window
        assert cell_len(line) <= columns or max(map(cell_len, parts)) > columns
    assert len(found.splitlines()) >= len(text.rstrip(" \t").splitlines())


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("def f(x):\n    return x", 40, "def f(x):\n    return x\n"),
        ("x\ty", 40, "x       y\n"),
        ("a  b", 40, "a  b\n"),
        ("a  b", 3, "a\nb\n"),
        ("世界你好，世界", 8, "世界你\n好，世界\n"),
        ("see https://example.org/a/b then", 12, "see\nhttps://example.org/a/b\nthen\n"),
        ("\x1b[2J\x1b]0;name\x07 one\r\ntwo\x7f\x9b", 40, "␛[2J␛]0;name␇ one\ntwo␡\ufffd\n"),
        ("", 40, "\n"),
    ],
)
def test_how_text_is_shown(text: str, columns: int, expected: str) -> None:
    assert shown([text], columns) == shown(list(text), columns) == expected


def test_a_note_stands_after_the_last_word() -> None:
    screen = Screen()
    output = Output(screen)
    output.write("Half a wo")
    output.end(" (stopped)")
    output.write("Next")
    output.end()
    assert screen.getvalue() == "Half a wo (stopped)\nNext\n"


def test_a_pipe_gets_the_answer_as_it_is() -> None:
    file = io.StringIO()
    output = Output(file)
    text = "word " * 40 + "\x1b[0m\ta\r\n"
    output.write(text)
    output.end(" (stopped)")
    assert file.getvalue() == text + "\n"


# History


def test_what_is_typed_is_there_in_the_next_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    first = terminal._history()
    assert isinstance(first, KeptHistory)
    for line in ("One?", "Two\nlines?", "\udcff no UTF-8"):
        first.append_string(line)
    second = terminal._history()
    assert list(second.load_history_strings()) == ["? no UTF-8", "Two\nlines?", "One?"]
    path = tmp_path / "state" / "openhermes-mixtral" / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    path.parent.rmdir()
    first.append_string("its place is gone")  # and the conversation goes on
    assert list(first.load_history_strings()) == []


def test_a_place_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    history = terminal._history()
    history.append_string("One?")
    assert list(history.load_history_strings()) == ["One?"]
    assert (
        "it can't be written (Not a directory); what is typed is kept for this session alone" in capsys.readouterr().err
    )
