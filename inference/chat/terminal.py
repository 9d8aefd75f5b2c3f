"""The terminal: lines that are edited and remembered, and answers whose words are wrapped at the window."""

import contextlib
import os
import shutil
import sys
import unicodedata
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import NestedCompleter, PathCompleter
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import create_output
from rich.cells import cell_len

from configs.program.console import console

TAB = 8


# Typing


def typed_lines(commands: Iterable[str], files: Container[str], *, keep_history: bool) -> Iterator[str]:
    """Lines from the terminal, edited as in a shell; Ctrl-C empties the line, Ctrl-D ends, Tab completes.

    Args:
        commands: the words that a line may begin with.
        files: those of them that a path follows.
        keep_history: whether what is typed is there in the next session.
    """
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    paths = PathCompleter(expanduser=True)
    session: PromptSession[str] = PromptSession(
        key_bindings=keys,
        history=_history() if keep_history else InMemoryHistory(),
        completer=NestedCompleter.from_nested_dict({name: paths if name in files else None for name in commands}),
        complete_while_typing=False,
        # stdout may be a file of answers
        output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
    )
    while True:
        try:
            yield session.prompt(HTML("<b>&gt; </b>"), prompt_continuation="  ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


class KeptHistory(FileHistory):
    """What was typed in earlier sessions and in this one, for its owner's eyes; a full disk stops no conversation."""

    def load_history_strings(self) -> Iterable[str]:
        """The newest first; none if the file can't be read any more."""
        try:
            return super().load_history_strings()
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Adds a line that was typed."""
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history() -> History:
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    path = Path(state) / "openhermes-mixtral" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        console.print(
            f"{path}: it can't be written ({error.strerror}); what is typed is kept for this session alone",
            style="dim",
            soft_wrap=True,
        )
        return InMemoryHistory()
    return KeptHistory(path)


# Answers


class Output:
    """Writes answers as they come: to a terminal word by word, wrapped at its window; to a file or pipe as they are.

    On a terminal a word appears when it is whole, because only then is it known whether the line has room for it.
    Control characters, with which an answer could move the cursor or rename the window, become visible pictures.
    """

    def __init__(self, file: TextIO):
        self._file = file
        self._wraps = file.isatty()
        self._column = 0
        self._space = self._word = ""

    def write(self, text: str) -> None:
        """Takes the next piece of an answer."""
        if not self._wraps:
            self._file.write(text)
        for character in text if self._wraps else "":
            self._take(character)
        self._file.flush()

    def end(self, note: str = "") -> None:
        """Ends the answer's line; after a note, on a terminal, such as that the answer was stopped."""
        self._put_word()
        self._file.write(f"{note if self._wraps else ''}\n")
        self._file.flush()
        self._column, self._space = 0, ""

    def _take(self, character: str) -> None:
        if character == "\n":
            self._put_word()
            self._file.write("\n")
            self._column, self._space = 0, ""
        elif character == "\t":
            self._put_word()
            self._space += " " * (TAB - (self._column + len(self._space)) % TAB)
        elif character == " ":
            self._put_word()
            self._space += " "
        elif unicodedata.category(character) == "Cc":
            self._word += _picture(character)
        else:
            if _may_begin_a_line(character):
                self._put_word()
            self._word += character

    def _put_word(self) -> None:
        """Writes the word that is whole, on a new line if it doesn't fit into this one."""
        if not self._word:
            return
        window = shutil.get_terminal_size().columns
        width = cell_len(self._word)
        if self._column and self._column + len(self._space) + width > window:
            self._file.write("\n")
            self._column, self._space = 0, ""
        self._file.write(self._space + self._word)
        self._column += len(self._space) + width
        if self._column > window:  # the terminal itself has broken it
            self._column = (self._column - 1) % window + 1
        self._space = self._word = ""


def _may_begin_a_line(character: str) -> bool:
    """Whether a line may break before a letter in the middle of a word, as in Chinese, Japanese and Korean."""
    return unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) == "W"


def _picture(character: str) -> str:
    """A visible character for a control character; nothing for the half of a line end that \\r is."""
    if character == "\r":
        return ""
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\ufffd"
