"""How far reading many gigabytes is, for those who wait for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from configs.program.console import console

WORTH_A_LINE = 1_000_000_000
"""Bytes of a read that a log tells of; terminals show its progress."""
EVERY = 60.0
"""Seconds between the lines of a log that tell how far a read is."""


@contextmanager
def progress(what: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar for that many bytes: what it yields is told, by any thread, of those that were read.

    If stderr is no terminal, a line says how many they are, if they take a while, and one a minute how many of them
    were read.
    """
    if not (shown and console.is_terminal):
        yield _lines(what, total) if shown and total >= WORTH_A_LINE else lambda size: None
        return
    columns = (
        TextColumn(what),
        BarColumn(bar_width=10),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=console) as bar:
        task, started = bar.add_task("read", total=total, rate=""), time.perf_counter()

        def advance(size: int) -> None:
            bar.advance(task, size)
            rate = bar.tasks[0].completed / max(time.perf_counter() - started, 1e-9) / 1e9
            bar.update(task, rate=f"{rate:.2f} GB/s")

        yield advance


def _lines(what: str, total: int) -> Callable[[int], None]:
    """Prints a line now, and later ones as it is told of bytes."""
    console.print(f"{what}: {total / 1e9:.1f} GB", soft_wrap=True)
    lock, done, told = threading.Lock(), 0, time.monotonic()

    def advance(size: int) -> None:
        nonlocal done, told
        with lock:
            done += size
            if time.monotonic() - told < EVERY:
                return
            told = time.monotonic()
        console.print(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", soft_wrap=True)

    return advance
