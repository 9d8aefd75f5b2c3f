"""How far reading many gigabytes is, for those who wait for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from configs.program.console import console

WORTH_A_LINE = 1_000_000_000
"""Bytes from which on a log mentions a read; terminals show its progress."""
EVERY = 60.0
"""Seconds between the lines of a log that say how far a read is."""


@contextmanager
def progress(what: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar for that many bytes; what it yields is called after each read, by any thread, with the bytes read.

    If stderr is not a terminal and there is much to read, a line says how much, and one a minute how much was read.
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
    """Prints a line now; what it returns prints later ones."""
    console.print(f"{what}: {total / 1e9:.1f} GB", soft_wrap=True)
    lock, done, printed = threading.Lock(), 0, time.monotonic()

    def advance(size: int) -> None:
        nonlocal done, printed
        with lock:
            done += size
            if time.monotonic() - printed < EVERY:
                return
            printed = time.monotonic()
        console.print(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", soft_wrap=True)

    return advance
