"""Disks that are small, hang or are slow: file systems in memory or in a file, and what the kernel can do to them.

All of it needs the right to mount.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ENOUGH = 64 << 20
"""Bytes that all runs here fit into."""
THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
GIVING = THROTTLE.with_name("blkio.throttle.read_bps_device")
"""Where the kernel is told how many bytes a second a device may take, and give (cgroup v1)."""


def why_not() -> str | None:
    """Why nothing can be mounted here, or None."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            with mounted(Path(directory), ENOUGH):
                return None
        except (OSError, subprocess.CalledProcessError):
            return "a tmpfs can't be mounted here"


@contextlib.contextmanager
def mounted(directory: Path, size: int) -> Iterator[None]:
    """Within it, a tmpfs of that many bytes is mounted there."""
    directory.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True, capture_output=True)


def why_not_freeze() -> str | None:
    """Why no file system can be frozen here, or None."""
    for program in ("mkfs.ext4", "fsfreeze"):
        if not shutil.which(program):
            return f"there is no {program}"
    with tempfile.TemporaryDirectory() as directory:
        try:
            with file_system(Path(directory, "disk")), freezing(Path(directory, "disk"), at_most=10):
                return None
        except (OSError, subprocess.CalledProcessError):
            return "no file system can be mounted from a file, or none can be frozen"


@contextlib.contextmanager
def file_system(directory: Path) -> Iterator[None]:
    """Within it, a file system of its own, in a file beside it, is mounted there."""
    image = directory.with_suffix(".image")
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(ENOUGH)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-E", "root_owner", str(image)], check=True, capture_output=True)
        mount("-o", "loop", str(image), str(directory))
        try:
            shutil.rmtree(directory / "lost+found")
            yield
        finally:
            subprocess.run(["umount", "-l", str(directory)], check=True, capture_output=True)
    finally:
        image.unlink()
        directory.rmdir()


@contextlib.contextmanager
def freezing(directory: Path, *, at_most: float) -> Iterator[None]:
    """Within it, the file system there is frozen; for so many seconds at most, whatever becomes of this process.

    Whoever waits for a frozen file system can't be killed.
    """
    thaw = 'sleep "$1"; exec fsfreeze --unfreeze "$2"'
    program = ["sh", "-c", thaw, "thaw", f"{at_most:.0f}", str(directory)]
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen(program, start_new_session=True, **nowhere) as later:  # type: ignore[call-overload]
        try:
            subprocess.run(["fsfreeze", "--freeze", str(directory)], check=True, capture_output=True)
            try:
                yield
            finally:  # it may be thawed already
                subprocess.run(["fsfreeze", "--unfreeze", str(directory)], check=False, capture_output=True)
        finally:
            os.killpg(later.pid, signal.SIGKILL)


def why_not_slow() -> str | None:
    """Why no file system can be slowed here, or None."""
    if reason := why_not_freeze():
        return reason
    with tempfile.TemporaryDirectory() as directory:
        try:
            with file_system(Path(directory, "disk")), slowed(Path(directory, "disk")) as limit:
                limit(ENOUGH)
                return None
        except OSError as error:
            return f"{THROTTLE} can't be written ({error.strerror})"


def why_not_silence() -> str | None:
    """Why no file system can be kept from giving anything here, or None."""
    if reason := why_not_freeze():
        return reason
    with tempfile.TemporaryDirectory() as directory:
        try:
            with file_system(Path(directory, "disk")), silenced(Path(directory, "disk")):
                return None
        except OSError as error:
            return f"{GIVING} can't be written ({error.strerror})"


@contextlib.contextmanager
def silenced(directory: Path, begin: int = 0, size: int = 0) -> Iterator[None]:
    """Within it, the device of the file system there gives nothing, and the kernel has forgotten what its files hold,
    from the byte `begin` on, to the end or for so many.

    But for pages that a process has mapped and read: those stay. Who waits for others can be killed.
    """
    files = [path.open("rb") for path in directory.rglob("*") if path.is_file()]
    try:
        for file in files:
            os.fsync(file.fileno())  # what is not on the disk can't be forgotten
        with slowed(directory, GIVING) as limit:
            limit(1)
            for file in files:
                os.posix_fadvise(file.fileno(), begin, size, os.POSIX_FADV_DONTNEED)
            yield
    finally:
        for file in files:
            file.close()


@contextlib.contextmanager
def slowed(directory: Path, throttle: Path = THROTTLE) -> Iterator[Callable[[float], None]]:
    """Within it, what it gives says how many bytes a second the device of the file system there takes at most; or, with
    `GIVING`, gives."""
    device = directory.stat().st_dev

    def limit(rate: float) -> None:
        throttle.write_text(f"{os.major(device)}:{os.minor(device)} {rate:.0f}")

    try:
        yield limit
    finally:
        limit(0)  # none


def mount(*arguments: str) -> None:
    """The system's `mount`."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
