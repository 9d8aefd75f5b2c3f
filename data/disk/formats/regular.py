"""Bytes of a regular file, no more than were asked for: no pipe that never ends, no device, no link elsewhere."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from configs.program.errors import one_line

BLOBS = "blobs"
"""Where a hub's cache keeps the bytes of the files that its snapshots link to."""


class UnreadableError(ValueError):
    """A file is not what it has to be. The text goes on after "it can't be read"."""


def open_regular(path: Path, *, linked: bool = False) -> BinaryIO:
    """Opens a regular file to read, unbuffered.

    Args:
        path: of the file, or of a link to it.
        linked: whether a link may lead out of the directory: files that users name, rows and weights may lie elsewhere.
            What others put beside them may not, or a directory could show what it does not hold. Into the blobs of a
            hub's cache a link always may lead.

    Raises:
        UnreadableError: it is something else, it leads elsewhere, there is none, or it may not be read.
    """
    try:
        if not linked and path.is_symlink():
            _refuse_elsewhere(path)
        # Without a reader at the other end, opening a pipe would wait; opening some devices would do something.
        _refuse_special(path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableError(error.strerror or type(error).__name__) from error
    except RuntimeError as error:  # links that lead in a circle
        raise UnreadableError("it is a link to itself") from error
    except UnreadableError:
        raise
    except ValueError as error:
        raise UnreadableError("there is no such path") from error  # it holds a NUL
    try:
        _refuse_special(os.fstat(descriptor).st_mode)
    except UnreadableError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb", buffering=0)


def read_regular(path: Path, largest: int, *, linked: bool = False) -> bytes:
    """All of a regular file; see `open_regular`, and for `largest` the table in `sizes.py`.

    Raises:
        UnreadableError: as there, or it is larger than `largest` bytes.
    """
    with open_regular(path, linked=linked) as file:
        content = read_at_most(file, largest + 1)
    if len(content) > largest:
        raise UnreadableError(f"it is larger than {size_of(largest)}")
    return content


def read_at_most(file: BinaryIO, size: int) -> bytes:
    """The next bytes of an open file, up to `size`.

    Raises:
        UnreadableError: the disk gives them no more.
    """
    parts: list[bytes] = []
    try:
        while size and (part := file.read(min(size, 1 << 24))):
            parts.append(part)
            size -= len(part)
    except (OSError, EOFError) as error:  # what pyarrow raises for a compressed stream that is cut or is none
        raise UnreadableError(one_line(error)) from error
    return b"".join(parts)


def size_of(bytes_: int) -> str:
    """A bound as a sentence names it."""
    return f"{bytes_ >> 20} MiB" if bytes_ >> 20 else f"{bytes_:,} bytes"


def _refuse_special(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UnreadableError("it is not a regular file")


def _refuse_elsewhere(path: Path) -> None:
    """Raises `UnreadableError` for a link that leads out of the file's directory and of its hub's cache."""
    directory, target = path.parent.resolve(), path.resolve()
    snapshot = next((folder for folder in directory.parents if folder.name == "snapshots"), None)
    if target.is_relative_to(directory) or (snapshot and target.is_relative_to(snapshot.parent / BLOBS)):
        return
    raise UnreadableError("it is a link out of its directory")
