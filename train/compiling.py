"""DeepSpeed compiles an operator for CPU processes when it first runs: by one process at a time, whatever became of the
one before."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from configs.errors import UserError

VARIABLE = "TORCH_EXTENSIONS_DIR"
MARK = "lock"
"""The file by which torch knows that an operator is being compiled."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it no other process compiles operators for this environment on this machine.

    torch waits without limit for the end of a build that another process has marked, and a process that is killed
    leaves its mark. So there is a folder of our own, and a lock on it that ends with the process that holds it: a mark
    that is found then was left.

    Raises:
        UserError: nothing can be written there.
    """
    given = os.environ.get(VARIABLE)
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"{VARIABLE}={place.parent}: DeepSpeed's operator can't be compiled there ({error.strerror}); name a "
            f"directory that can be written"
        ) from error
    os.environ[VARIABLE] = str(place)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            for mark in place.glob(f"*/{MARK}"):
                mark.unlink()
        yield
    finally:
        os.close(lock)
        if given is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = given


def folder() -> Path:
    """Where operators are compiled: of this environment, as each builds what another has built anew, and this machine,
    as a home may be on a disk that several share."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get(VARIABLE) or get_default_build_root()
    return Path(root, f"openhermes-{os.uname().nodename}-{xxhash.xxh3_64_hexdigest(sys.prefix.encode())[:8]}")
