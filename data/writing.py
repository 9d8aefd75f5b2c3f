"""A prepared dataset on its way to the disk: whole or not there, whenever the process is killed.

.{name}.{process}.tmp/   beside the target, locked while its process lives
  encoded/               conversations between encoding and packing
  dataset/               the new dataset; changes places with the old one when it is whole
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import UserError, one_line
from data.layout import MANIFEST, ROW_SCHEMA, SPLITS, read_manifest
from data.store import ConversationStore, Index

ROWS_PER_BATCH = 256
"""Packed rows that are put together in memory at a time."""


def refuse_foreign(output: Path, files: list[str]) -> None:
    """Raises `UserError` rather than replace what is not a prepared dataset, or what the rows are read from."""
    try:
        place = output.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"output={output}: it is no place ({one_line(error)}); choose another directory") from error
    if place.is_dir() and any(Path(path).resolve().is_relative_to(place) for path in [str(Path.cwd()), *files]):
        raise UserError(f"output={output}: it holds the working directory or an input; choose a directory of its own")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        manifest = read_manifest(output)
    except UserError as error:
        raise UserError(
            f"output={output}: something else is there, not a prepared dataset; choose another directory"
        ) from error
    ours = {MANIFEST, "rejects.jsonl", *(f"{split}/rows.arrow" for split in SPLITS), *manifest.get("files", {})}
    there = (str(path.relative_to(output)) for path in sorted(output.rglob("*")) if not path.is_dir())
    if foreign := [name for name in there if name not in ours]:
        raise UserError(f"output={output}: {foreign[0]} is in it, which is not part of a dataset; move it elsewhere")


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
            if (lock := _lock(left_over)) is not None:
                shutil.rmtree(left_over, ignore_errors=True)
                os.close(lock)
        lock = None
        while lock is None and not temporary.exists():  # again where another process took it for a left-over
            temporary.mkdir()
            lock = _lock(temporary)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{setting}={output}: it can't be written ({reason}); choose a writable place") from error


def _lock(directory: Path) -> int | None:
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


def write_rows(path: Path, plan: list[list[int]], store: ConversationStore, index: Index) -> None:
    """Writes one split.

    Args:
        path: the Arrow file.
        plan: for each packed row, the conversations in it, by their places in `index`.
        store: has their tokens.
        index: has their lengths.
    """
    path.parent.mkdir(parents=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, ROW_SCHEMA) as arrow:
        for first in range(0, len(plan), ROWS_PER_BATCH):
            block = plan[first : first + ROWS_PER_BATCH]
            members = [member for row in block for member in row]
            last = np.cumsum([len(row) for row in block])
            ids, spans = store.read(members)
            lengths = index.lengths[members]
            each = np.ones_like(lengths)
            columns = [
                _lists(ids, lengths, last),
                _lists(spans, index.spans[members], last),
                _lists(lengths, each, last),
                _lists(index.rows[members], each, last),
            ]
            arrow.write_batch(pa.RecordBatch.from_arrays(columns, schema=ROW_SCHEMA))


def _lists(values: np.ndarray, sizes: np.ndarray, last: np.ndarray) -> pa.ListArray:
    """Lists, one a packed row, of values of which each member has `sizes`; row i ends with member `last[i]`, from 1."""
    ends = np.cumsum(sizes, dtype=np.int32)[last - 1]
    return pa.ListArray.from_arrays(np.concatenate([np.zeros(1, np.int32), ends]), pa.array(values))


def publish(dataset: Path, output: Path, manifest: dict[str, Any]) -> None:
    """Completes the dataset with its manifest and puts it in the place of what was there, in one step."""
    files = {}
    for path in sorted(path for path in dataset.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[str(path.relative_to(dataset))] = {"bytes": path.stat().st_size, "sha256": digest}
    with (dataset / MANIFEST).open("w", encoding="utf-8") as text:
        text.write(json.dumps({**manifest, "files": files}, indent=2, ensure_ascii=False) + "\n")
    take_place(dataset, output)


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
