"""Work that is killed whenever it has changed something on the disk."""

import itertools
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any


def killed_at_every_change(
    directory: Path, is_traced: Callable[[FrameType], bool], work: Callable[[int], None]
) -> Iterator[bool]:
    """Does the work over and over in forked processes, each killed one change of the directory later than the last.

    A process is killed at the next line of the functions that are traced. Lines between which nothing changes leave the
    same behind, so each of them stands for all. This process should have no threads, as it forks.

    Yields:
        After each process, whether it was killed; the first that was not is the last.
    """
    for number in itertools.count(1):
        child = os.fork()
        if child == 0:
            _kill_at_change(number, directory, is_traced)
            work(number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        yield os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return


def _kill_at_change(number: int, directory: Path, is_traced: Callable[[FrameType], bool]) -> None:
    changes, last = 0, _content(directory)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal changes, last
        if not is_traced(frame):
            return None
        if event == "line" and (now := _content(directory)) != last:
            changes, last = changes + 1, now
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def _content(directory: Path) -> list[tuple[str, int]]:
    """Every path below, with a checksum of each file."""
    paths = sorted(directory.rglob("*"))
    return [(str(path), zlib.crc32(path.read_bytes()) if path.is_file() else 0) for path in paths]
