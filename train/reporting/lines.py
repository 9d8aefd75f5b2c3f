"""Lines that are appended to a file by a thread: a disk that is slow, full or gone holds up nobody who adds one."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from configs.program.console import console
from configs.program.errors import one_line

UNWRITTEN = 16 << 20
"""The most bytes of lines that wait for the disk: those of some ten thousand steps."""


class Lines:
    """Appends lines to a file. Those that can't be written wait until they can be, which is reported once."""

    def __init__(
        self, descriptor: int, path: Path, watched: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        """`descriptor` is the open file, `path` its path; the thread works within `watched()`."""
        self._file, self._path, self._watched = descriptor, path, watched
        self._changed = threading.Condition()
        self._unwritten = b""
        self._jobs: list[Callable[[], None]] = []
        self._asked = self._done = 0
        self._failing = False
        threading.Thread(target=self._work, name="lines", daemon=True).start()

    def add(self, line: bytes) -> None:
        """Appends a whole line, as soon as the disk takes it."""
        with self._changed:
            if len(self._unwritten) + len(line) <= UNWRITTEN:
                self._unwritten += line
            self._wake()

    def then(self, job: Callable[[], None]) -> None:
        """Has the thread do something once the lines so far are written; once, if it is asked for again before that."""
        with self._changed:
            if job not in self._jobs:
                self._jobs.append(job)
            self._wake()

    def sync(self) -> None:
        """Forces the lines to the disk, if it takes them, and waits for that."""
        self.then(self._force)
        self._wait()

    def close(self) -> None:
        """Closes the file, when all that was asked for is done."""
        self._wait()
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _wake(self) -> int:
        self._asked += 1
        self._changed.notify_all()
        return self._asked

    def _wait(self) -> None:
        with self._changed:
            asked = self._wake()
            self._changed.wait_for(lambda: self._done >= asked)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._done < self._asked)
                asked, content, jobs, self._jobs = self._asked, self._unwritten, self._jobs, []
            with self._watched():
                written = self._write(content)
                for job in jobs:
                    job()
            with self._changed:
                self._unwritten, self._done = self._unwritten[written:], asked
                self._changed.notify_all()

    def _write(self, content: bytes) -> int:
        """How many bytes of it are written."""
        written = 0
        try:
            while written < len(content):
                written += os.write(self._file, content[written:])
            self._failing = False
        except OSError as error:
            self._tell(error)
        return written

    def _force(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._failing:
            reason = error.strerror or one_line(error)
            sentence = f"{self._path} can't be written ({reason}); its lines wait, and training goes on"
            console.print(sentence, soft_wrap=True)
        self._failing = True
