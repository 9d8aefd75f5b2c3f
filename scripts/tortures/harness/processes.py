"""What the system tells of a launch's processes."""

import contextlib
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from train.failures.guardian.channel import POSITION


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal to a process of ours, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def variable(process: psutil.Process, name: str) -> str | None:
    """An environment variable that it was started with."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ().get(name)
    return None


def words(process: psutil.Process) -> list[str]:
    """Its command line."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def is_guardian(process: psutil.Process) -> bool:
    """Whether it watches over a training process."""
    return any("train.failures.guardian" in word for word in words(process))


def is_wandb(process: psutil.Process) -> bool:
    """Whether wandb has started it for itself."""
    return any(word.endswith("wandb-core") for word in words(process)[:1])


def position_of(pid: int | None) -> Callable[[], tuple[int, str]] | None:
    """What reads step and phase of a process from the page that it shares with its guardian; None before that."""
    with contextlib.suppress(psutil.Error, OSError):
        for child in psutil.Process(pid).children():
            for descriptor in Path(f"/proc/{child.pid}/fd").iterdir():
                if is_guardian(child) and str(descriptor.readlink()).startswith("/memfd:position"):
                    return _reader(descriptor)
    return None


def _reader(page: Path) -> Callable[[], tuple[int, str]]:
    with page.open("rb") as file:
        shared = mmap.mmap(file.fileno(), POSITION.size, access=mmap.ACCESS_READ)

    def read() -> tuple[int, str]:
        step, _, _, phase = POSITION.unpack_from(shared)
        return step, phase.rstrip(b"\0").decode(errors="replace")

    return read
