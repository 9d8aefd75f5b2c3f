"""What the programs say on stderr. Whether that is closed, full or paused, the work goes on."""

import contextlib
import io
import logging
import os
import select
import sys
import threading
from collections import deque
from typing import IO, TextIO, cast

from rich.console import Console

PATIENCE = 2.0
"""Seconds that a writer waits until the text is taken."""


class Stderr(io.TextIOBase):
    """Writes to what sys.stderr is at that time, and never raises.

    A closed terminal answers with errors (EPIPE, EIO), and so does a full disk. A terminal that the user has paused
    (Ctrl-S), or a pipe whose reader sleeps, doesn't answer at all. So a thread writes, and the caller waits for it, at
    most for `PATIENCE` and only once: after that, text is left out until the terminal takes text again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._texts: deque[tuple[TextIO, str]] = deque()
        """Texts still to be written; the first stays until it is."""
        self._stuck = False
        self._thread: threading.Thread | None = None  # started when first needed, as a fork would leave it behind

    def write(self, text: str) -> int:
        """Hands a text to the thread."""
        with self._changed:
            if not (self._stuck and self._texts):
                self._texts.append((_now(), text))
                self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():  # the second in a fork
                self._thread = threading.Thread(target=self._work, name="screen", daemon=True)
                self._thread.start()
        return len(text)

    def flush(self) -> None:
        """Waits until all is written, if that can be expected."""
        with self._changed:
            self._stuck = not self._changed.wait_for(lambda: not self._texts, 0 if self._stuck else PATIENCE)

    def isatty(self) -> bool:
        """Whether stderr is a terminal."""
        try:
            return _now().isatty()
        except ValueError:  # closed
            return False

    @property
    def encoding(self) -> str:  # type: ignore[override]  # rich asks for it
        """The encoding of the bytes that are written."""
        return getattr(_now(), "encoding", None) or "utf-8"

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                stream, text = self._texts[0]
            with contextlib.suppress(OSError, ValueError):
                _write(stream, text)
            with self._changed:
                self._texts.popleft()
                self._changed.notify_all()


def _now() -> TextIO:
    """The real sys.stderr, which a progress bar of rich's replaces while it is shown."""
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return cast(TextIO, stream or io.StringIO())  # Python has none if descriptor 2 was closed


def _write(stream: TextIO, text: str) -> None:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # no file, as in tests
        stream.write(text)
        return
    # Not by the stream itself: this may take for ever, while holding a lock that the end of the program needs.
    data = text.encode(stream.encoding or "utf-8", "backslashreplace")
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another program on the terminal has set it so
            select.select([], [descriptor], [])


# The one console for stderr. What goes to stdout is the result, and has consoles of its own.
console = Console(file=cast(IO[str], Stderr()), markup=False, highlight=False, emoji=False)
"""Prints what it is given as it stands: names of runs and files may look like rich's markup."""


def quiet_libraries() -> None:
    """Keeps libraries from printing and preparing what nobody here needs; to be called before they are imported.

    transformers and PEFT import bitsandbytes wherever it is installed, and it warns about a kernel that nothing here
    uses. DeepSpeed and bitsandbytes hand functions that nothing here calls to `torch.compile`, and only to prepare for
    them torch would import its whole compiler, in each process. A value that is there already stays.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
