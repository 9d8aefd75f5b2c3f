"""Files and directories that are whole or not there, locked, hashed.

There is one way to write: into a hidden sibling, forced to the disk (the files, and the directories that name them),
then renamed. Whoever is killed at any moment, or loses power, leaves the old or the new.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from configs.program.errors import UserError

BLOCK_BYTES = 16 << 20
"""Bytes that are read at once."""

# Hashes


def file_hash(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """The 128-bit XXH3 of a file's bytes: as fast as they can be read. It shows damage and change, not forgery.

    `advance` is called after each read with the number of bytes.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Whole or not there


def sync(path: Path) -> None:
    """Forces a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, blocks: Iterable[bytes]) -> None:
    """Writes a file that is the old one or the new one, whatever happens.

    Raises:
        OSError: it can't be written; the old one is there still.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # whatever it is: it may be a link to elsewhere, or a pipe
    with temporary.open("xb") as file:
        file.writelines(blocks)
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


@contextmanager
def staging(output: Path, *, setting: str) -> Iterator[Path]:
    """A directory beside the target, for as long as the body runs; removes those that killed processes left.

    Raises:
        UserError: it can't be written, now or later; the text begins with `setting`, which names the target.
    """
    target = output.resolve()  # where a link points, so that the link stays
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f".{target.name}.*.tmp"):
            if (descriptor := _locked(left_over)) is not None:
                shutil.rmtree(left_over, ignore_errors=True)
                os.close(descriptor)
        descriptor = None
        while descriptor is None and not temporary.exists():  # again if another process took it for a left-over
            temporary.mkdir()
            descriptor = _locked(temporary)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{setting}={output}: it can't be written ({reason}); choose a writable directory") from error


def take_place(directory: Path, output: Path) -> None:
    """Gives a directory the name `output`, in one step, once all in it is on the disk.

    What had that name, another directory, then has the name of `directory`. Both lie on one file system.
    """
    for path in [*directory.rglob("*"), directory]:
        sync(path)
    target = output.resolve()
    if target.exists():
        _exchange(directory, target)
    else:
        directory.rename(target)
    sync(target.parent)


def publish(directory: Path, output: Path) -> None:
    """`take_place`, and removes what had the name before."""
    take_place(directory, output)
    shutil.rmtree(directory, ignore_errors=True)


def remove(directory: Path) -> None:
    """Removes a directory: its name is gone first, so that half of one is never seen."""
    hidden = directory.parent / f".{directory.name}.old"
    discard(hidden)
    directory.rename(hidden)
    discard(hidden)


def discard(path: Path) -> None:
    """Removes a hidden left-over, as far as that goes: nobody reads it, and the next launch tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _exchange(new: Path, old: Path) -> None:
    """Exchanges two directories in one step, so that there is one at every moment."""
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        done = renameat2(at_working_directory, os.fsencode(new), at_working_directory, os.fsencode(old), exchange)
        if done == 0:
            return
        if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number))
    # A file system that can't (NFS among them): for a moment there is none, but never half of one.
    aside = new.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


# For one process at a time


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Takes the lock on an open file or directory; False if another process holds it, for which it may `wait` instead.

    It goes when the last descriptor of the opened file is closed, at the latest with its processes.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def open_alone(path: Path, *, setting: str) -> int:
    """A descriptor of a file that one process reads and appends to; the file is made if there is none.

    Raises:
        UserError: it can't be written, it is something else, or another process has it; the text begins with `setting`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{setting}: {path} is a link; remove it, or name another") from error
        raise UserError(f"{setting}: {path} can't be written ({error.strerror}); name one that can be") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{setting}: {path} is not a regular file; remove it, or name another")
    with contextlib.suppress(OSError):  # a file system without locks
        if not lock(descriptor):
            os.close(descriptor)
            raise UserError(f"{setting}: another process writes {path}; wait for it, or name another")
    return descriptor


def append(descriptor: int, content: bytes) -> None:
    """Adds to a file, and waits until the disk has it."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _locked(directory: Path) -> int | None:
    """A descriptor of the directory with the lock on it; None if it can't be had, or there is no directory any more."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks, where a left-over can't be told
        if lock(descriptor):
            return descriptor
    os.close(descriptor)
    return None


# What is there already


@dataclass(frozen=True, slots=True)
class Occupied:
    """What stands in the way of writing a directory at a path."""

    needed: bool
    """It is, or holds, a directory or file that the program needs."""
    is_file: bool
    names: list[str]
    """What is in it, in order."""

    def __bool__(self) -> bool:
        return self.is_file or bool(self.names)

    def foreign(self, ours: Container[str]) -> str | None:
        """The first name in it that is not one of ours."""
        return next((name for name in self.names if name not in ours), None)


def occupied(output: Path, needed: Iterable[Path], *, deep: bool = False) -> Occupied:
    """Looks what a path holds before a directory is written there; the caller words the refusal.

    Args:
        output: the directory to be; true of what is returned if something is there.
        needed: what must not be replaced; the working directory always is among it.
        deep: names the files at any depth, by their paths, rather than the entries of the directory itself.

    Raises:
        OSError: there can be no such path, or it can't be read.
    """
    try:
        target = output.resolve()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    if not target.is_dir():
        return Occupied(needed=False, is_file=target.exists(), names=[])
    paths = (path for path in target.rglob("*") if not path.is_dir()) if deep else target.iterdir()
    return Occupied(
        needed=any(path.resolve().is_relative_to(target) for path in (Path.cwd(), *needed)),
        is_file=False,
        names=sorted(str(path.relative_to(target)) for path in paths),
    )
