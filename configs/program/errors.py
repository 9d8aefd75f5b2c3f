"""The one error type that is the user's to mend, and how errors are told."""

import contextlib
import os

from configs.program.secrets import redact


class UserError(ValueError):
    """The input or the configuration is wrong. Its text is one sentence: field, value, remedy. Exit code 2."""


def one_line(error: Exception, line: int = 0) -> str:
    """One line of a library's error, the first unless told, to stand in a sentence; its type if it is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[line].strip().rstrip(".")


def say(program: str, sentence: str) -> None:
    """Writes a line to stderr, without secrets, if anyone still reads there; fit for threads and for the very end.

    Not by sys.stderr, whose lock another thread may hold, and which raises if the terminal is gone.
    """
    start = "\n" if os.isatty(2) else ""  # a progress bar may stand in the line
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{program}: {redact(sentence)}\n".encode())
