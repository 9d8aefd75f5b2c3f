"""Lines that a thread appends: a disk that takes nothing holds up nobody, and they are all there in the end."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.reporting.lines import Lines

FULL = 1 << 16
"""Bytes that a pipe holds by default."""


def stuck() -> tuple[int, Lines, list[str]]:
    """The other end of a full pipe, whose writers wait; lines that go into it; the threads that have written some."""
    reading, writing = os.pipe()
    os.write(writing, b"." * FULL)
    by: list[str] = []

    @contextmanager
    def watched() -> Iterator[None]:
        by.append(threading.current_thread().name)
        yield

    return reading, Lines(writing, Path("metrics.jsonl"), watched), by


def drained(reading: int, size: int) -> bytes:
    content = b""
    while len(content) < FULL + size:
        content += os.read(reading, FULL)
    return content[FULL:]


def test_a_disk_that_takes_nothing_holds_up_nobody_who_adds_a_line() -> None:
    reading, lines, by = stuck()
    added = threading.Thread(target=lambda: [lines.add(b"%d\n" % number) for number in range(9)], daemon=True)
    added.start()
    added.join(20)
    assert not added.is_alive()
    assert drained(reading, 18) == b"0\n1\n2\n3\n4\n5\n6\n7\n8\n"
    lines.close()
    assert set(by) == {"lines"}


def test_nor_does_somebody_who_waits_until_the_disk_has_all() -> None:
    """As the thread that writes a checkpoint does."""
    reading, lines, _ = stuck()
    lines.add(b"1\n")
    synced = threading.Thread(target=lines.sync, daemon=True)
    synced.start()
    synced.join(0.2)
    assert synced.is_alive()
    added = threading.Thread(target=lines.add, args=(b"2\n",), daemon=True)
    added.start()
    added.join(20)
    assert not added.is_alive()
    assert drained(reading, 4) == b"1\n2\n"
    synced.join(20)
    assert not synced.is_alive()


def test_what_is_to_be_done_after_them_is_done_once_and_by_the_same_thread() -> None:
    reading, lines, _ = stuck()
    lines.add(b"1\n")
    seen: list[str] = []

    def job() -> None:
        seen.append(threading.current_thread().name)

    for _ in range(3):
        lines.then(job)
    assert seen == []
    assert drained(reading, 2) == b"1\n"
    lines.close()
    assert 1 <= len(seen) <= 2  # twice if the thread had begun with the first
    assert set(seen) == {"lines"}
