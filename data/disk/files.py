"""Files and directories that are whole or not there, locked, hashed."""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from configs.program.errors import UserError

BLOCK_BYTES = 16 << 20
"""Bytes that are read at once."""


def file_hash(path: Path) -> str:
    """The 128-bit XXH3 of a file's bytes: as fast as they can be read. It shows damage and change, not forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staging(output: Path, *, setting: str) -> Iterator[Path]:
    """A directory beside the target, gone in the end; what killed processes left there goes too.

    Raises:
        UserError: it can't be written, now or later; the text begins with `setting`, which names the target.
    """
    place = output.resolve()  # where a link points, so that the link stays
    temporary = place.parent / f".{place.name}.{os.getpid()}.tmp"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for left_over in place.parent.glob(f".{place.name}.*.tmp"):
            if (lock := lock_directory(left_over)) is not None:
                shutil.rmtree(left_over, ignore_errors=True)
                os.close(lock)
        lock = None
        while lock is None and not temporary.exists():  # again where another process took it for a left-over
            temporary.mkdir()
            lock = lock_directory(temporary)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{setting}={output}: it can't be written ({reason}); choose a writable place") from error


def lock_directory(directory: Path) -> int | None:
    """A lock on a directory, which goes with the process; None where another process holds it, or took it away."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def take_place(directory: Path, output: Path) -> None:
    """Puts a directory that is in `staging(output, …)` in the place of what was there, in one step.

    What was there goes with the staging.
    """
    for path in [*directory.rglob("*"), directory]:
        sync(path)
    place = output.resolve()
    if place.exists():
        _exchange(directory, place)
    else:
        directory.rename(place)
    sync(place.parent)


def sync(path: Path) -> None:
    """Forces a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Lets two directories change places: at no moment is there none."""
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        done = renameat2(at_working_directory, os.fsencode(new), at_working_directory, os.fsencode(old), exchange)
        if done == 0:
            return
        if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number))
    # A file system that can't (NFS among them): for a moment there is none, and never a half.
    aside = new.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    new.rename(old)
