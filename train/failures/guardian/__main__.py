"""The guardian as a program: PAGE_FD SOCKET_FD, its setup in the first line of stdin."""

import mmap
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from train.failures.guardian.channel import PAGE_BYTES, Channel
from train.failures.guardian.guardian import Guardian
from train.failures.guardian.judge import Hub
from train.failures.guardian.spoke import Spoke


def main() -> NoReturn:
    """The program; it ends when the run has ended."""
    page_fd, socket_fd = (int(argument) for argument in sys.argv[1:])
    trainer = Channel(sys.stdin.fileno(), sys.stdout.fileno())
    lines: list[dict[str, Any]] | None = []
    while lines == []:
        lines = trainer.receive()
    if lines is None:
        sys.exit()
    page = mmap.mmap(page_fd, PAGE_BYTES, access=mmap.ACCESS_READ)
    role: Callable[..., Guardian] = Hub if lines[0]["rank"] == 0 else Spoke
    setup, *more = lines
    guardian = role(setup, trainer, page, socket.socket(fileno=socket_fd))
    try:
        guardian.take(more)
        guardian.run()
    finally:
        guardian.forget()


if __name__ == "__main__":
    main()
