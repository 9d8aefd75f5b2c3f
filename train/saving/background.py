"""Work that training does not wait for: one thread does it, in order."""

import contextlib
import queue
import threading
from collections.abc import Callable

IN_FLIGHT = 4 << 30
"""The most bytes that wait to be written. The adapters of the full recipe with their optimizer state take 3 GB, so
training goes on as soon as they are copied; a whole model's 560 GB pass through in parts."""

SIGN_OF_LIFE = 10.0
"""Seconds after which processes that wait for the main one's disk hear that it is at work."""


class Background:
    """Runs jobs one after the other. After one has failed, the others are skipped until the error is taken."""

    def __init__(self, watched: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext) -> None:
        """Starts the thread; each job is done within a `watched()`."""
        self._watched = watched
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], int] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._waiting, self._bytes = 0, 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="background", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], size: int = 0) -> None:
        """Queues a job that holds `size` bytes; waits while more than `IN_FLIGHT` would be held with them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes or self._bytes + size <= IN_FLIGHT)
            self._waiting, self._bytes = self._waiting + 1, self._bytes + size
        self._jobs.put((job, size))

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until all jobs are done, or that many seconds are over; returns whether they are done."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    @property
    def held(self) -> int:
        """Bytes of the jobs that are not done."""
        return self._bytes

    @property
    def failed(self) -> bool:
        """Whether a job has failed and its error was not taken yet."""
        return self._error is not None

    def take_error(self) -> Exception | None:
        """The error of the first job that failed, once all are done; from then on jobs are run again."""
        self.wait()
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Ends the thread, when all jobs are done."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, size = item
            try:
                if self._error is None:
                    with self._watched():
                        job()
            except Exception as error:
                self._error = error
            del job, item  # what it held may be large
            with self._changed:
                self._waiting, self._bytes = self._waiting - 1, self._bytes - size
                self._changed.notify_all()
