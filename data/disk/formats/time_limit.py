"""A limit on what a library computes from a file: a pattern can make it try for ever."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TooLongError(Exception):
    """It took more processor time than was allowed."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within it, the process may compute for that many seconds of processor time, however busy the machine is.

    Its signal interrupts Python's own loops and the matching of regular expressions; it comes to the main thread alone,
    so another thread has no limit.

    Raises:
        TooLongError: from within the body, when the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"it takes more than {seconds:.0f} s")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again, if a library swallows the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
