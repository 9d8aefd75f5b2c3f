"""What CPU processes need: DeepSpeed's operator, its shared memory, and memory that is kept between steps."""

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash

from configs.program.errors import UserError, say
from data.disk import files

VARIABLE = "TORCH_EXTENSIONS_DIR"
MARK = "lock"
"""The file by which torch knows that an operator is being compiled."""
PATIENCE = 2.0
"""Seconds after which a start says what it waits for."""
LEFT_TO_THE_KERNEL = 16 << 20
"""Bytes from which on memory that is freed goes back to the kernel."""


@contextlib.contextmanager
def alone() -> Iterator[int]:
    """Within it, no other process compiles operators for this environment on this machine; gives the lock's descriptor.

    torch waits without limit for the end of a build that another process has marked, and a process that is killed
    leaves its mark. So there is a folder of our own, and a lock on it that ends with the process that holds it: a mark
    that is there once the lock is held was left by a process that is gone.

    The environment's own ninja comes first. torch takes the first one on PATH, and the system's, if it is of another
    version, would not recognise what the environment's has built and would compile it anew, and so would the next
    start.

    Raises:
        UserError: nothing can be written there.
    """
    operators = folder()
    try:
        operators.mkdir(parents=True, exist_ok=True)
        lock = os.open(operators, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"{VARIABLE}={operators.parent}: DeepSpeed's operator can't be compiled there ({error.strerror}); name a "
            f"directory that can be written"
        ) from error
    first = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH")]))
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            with _said(f"another process compiles DeepSpeed's operator in {operators}; this one waits for it"):
                files.lock(lock, wait=True)
            for mark in operators.glob(f"*/{MARK}"):
                mark.unlink()
        with _variables({VARIABLE: str(operators), "PATH": first}):
            yield lock
    finally:
        os.close(lock)


def compile_apart(operator: str, code: str, lock: int) -> None:
    """Runs Python code that compiles an operator, if it is not there, in a process that goes on if this one is ended.

    Compiling takes a minute or more, and an unfinished build is lost. So it gets a session of its own, which no Ctrl-C
    reaches, and it holds the lock too: the next start waits for it, and finds the operator there. Whether it went well
    shows when the operator is loaded.
    """
    if Path(os.environ[VARIABLE], operator, f"{operator}.so").exists():
        return
    with _said(
        "DeepSpeed's operator is compiled, once for this environment and machine, which takes a minute or more; it "
        "goes on if this is stopped"
    ):
        subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock,),
            start_new_session=True,
            check=False,
        )


def folder() -> Path:
    """Where operators are compiled: one folder for each environment, because each would compile another's anew, and for
    each machine, because several may share a home directory."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get(VARIABLE) or get_default_build_root()
    return Path(root, f"openhermes-{os.uname().nodename}-{xxhash.xxh3_64_hexdigest(sys.prefix.encode())[:8]}")


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Prints what takes time, once for each machine, if it takes longer than `PATIENCE`."""
    timer = threading.Timer(PATIENCE, say, ["train", what])
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _variables(changed: dict[str, str]) -> Iterator[None]:
    """Within it, environment variables have these values."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def forget_shared_memory() -> None:
    """Removes the name of this process's buffer of DeepSpeed's shared-memory collective: it is freed with the process.

    DeepSpeed 0.19 never removes it: 66 MiB of memory stay for each CPU process and port that was ever used, however the
    run ends. Collective, so that every process has opened all buffers by now.
    """
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
        shared_memory().unlink(missing_ok=True)


def shared_memory() -> Path:
    """The name of this process's buffer, if the launch has several processes."""
    owner = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{os.environ['RANK']}"
    return Path("/dev/shm", f"deepspeed_allreduce_buffer_{owner}")


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of giving it back to the kernel.

    Each step frees and asks again for the same large tensors, and by default each time the kernel maps and zeroes the
    pages anew, a good part of a small step. The largest, logits and the like, are left to the kernel: they are few, so
    zeroing them costs little, and the holes that they leave in the heap, where others settle, would make it grow step
    by step. Without glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, LEFT_TO_THE_KERNEL)
        mallopt(trim_threshold, (1 << 31) - 1)
