"""The one error type that is the user's to mend, and how errors are written."""

import contextlib
import os

from configs.program.secrets import redact

LONGEST_SENTENCE = 4000
"""Characters of a sentence that are written."""


class UserError(ValueError):
    """The input or the configuration is wrong. Its text is one sentence: field, value, remedy. Exit code 2."""


class VerificationError(RuntimeError):
    """What was computed is not what it has to be. Its text is one sentence: what, and both numbers. Exit code 1."""


def one_line(error: Exception, line: int = 0) -> str:
    """One line of a library's error, the first unless given, to stand in a sentence; its type if it is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[line].strip().rstrip(".")


def shown(sentence: str) -> str:
    """A sentence as it is written to a terminal: what it quotes may hold line ends and the codes that move a cursor."""
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in sentence)
    return text if len(text) <= LONGEST_SENTENCE else f"{text[:LONGEST_SENTENCE]}…"


def say(program: str, sentence: str) -> None:
    """Writes a line to stderr, without secrets, if anyone still reads there; fit for threads and for the very end.

    Not by sys.stderr, whose lock another thread may hold, and which raises if the terminal is gone.
    """
    start = "\n" if os.isatty(2) else ""  # a progress bar may stand in the line
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{program}: {shown(redact(sentence))}\n".encode())
