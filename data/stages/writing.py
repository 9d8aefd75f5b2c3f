"""A prepared dataset on its way to the disk: complete or not there, whenever the process is killed.

.{name}.{process}.tmp/   beside the target, locked while its process lives
  encoded/               conversations between encoding and packing
  dataset/               the new dataset; exchanged with the old one when it is complete
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.program.errors import UserError, one_line
from data.disk.files import occupied, sha256, take_place
from data.disk.formats.arrow_file import from_array
from data.prepared.layout import MANIFEST, REJECTS, ROW_SCHEMA, SPLITS, read_manifest, rows_of
from data.prepared.places import PLACES
from data.stages.store import ConversationStore, Index

FIRST_BYTES = b'{"file": '
"""How a file of rejects begins."""

ROWS_PER_BATCH = 256
"""Packed rows that are put together in memory at a time."""


def refuse_foreign(output: Path, files: list[str]) -> None:
    """Raises `UserError` rather than replace what is not a prepared dataset, or what the rows are read from."""
    try:
        there = occupied(output, map(Path, files), deep=True)
    except OSError as error:
        raise UserError(f"output={output}: it can't be a directory ({one_line(error)}); choose another") from error
    if there.needed:
        raise UserError(f"output={output}: it holds the working directory or an input; choose a directory of its own")
    if not there:
        return
    try:
        manifest = read_manifest(output)
    except UserError as error:
        raise UserError(
            f"output={output}: something else is there, not a prepared dataset; choose another directory"
        ) from error
    recorded: Any = manifest.get("files")
    ours = {MANIFEST, PLACES, REJECTS, *map(rows_of, SPLITS), *(recorded if isinstance(recorded, dict) else ())}
    if foreign := there.foreign(ours):
        raise UserError(f"output={output}: {foreign} is in it, which is not part of a dataset; move it elsewhere")


def write_rows(path: Path, plan: list[list[int]], store: ConversationStore, index: Index) -> None:
    """Writes one split.

    Args:
        path: the Arrow file.
        plan: for each packed row, the conversations in it, by their positions in `index`.
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
    return pa.ListArray.from_arrays(from_array(np.concatenate([np.zeros(1, np.int32), ends])), from_array(values))


def keep_rejects(rejects: Path, output: Path) -> str:
    """Keeps the rejects of a run that stops, beside its output; returns the end of the sentence that says where."""
    kept = _kept_rejects(output)
    with contextlib.suppress(OSError):
        if not kept.exists() or _is_ours(kept):  # nobody else's file is replaced
            shutil.copyfile(rejects, kept)
            return f"; {kept} lists them"
    return ""


def drop_kept_rejects(output: Path) -> None:
    """Removes what an earlier run that stopped has kept: once the dataset is there, its own rejects are what counts."""
    with contextlib.suppress(OSError):
        if _is_ours(kept := _kept_rejects(output)):
            kept.unlink()


def _kept_rejects(output: Path) -> Path:
    return output.with_name(f"{output.name}-{REJECTS}")


def _is_ours(kept: Path) -> bool:
    if not kept.is_file():
        return False
    with kept.open("rb") as file:
        return file.read(len(FIRST_BYTES)) == FIRST_BYTES


def publish(dataset: Path, output: Path, manifest: dict[str, Any]) -> None:
    """Completes the dataset with its manifest and puts it in the place of what was there, in one step."""
    files = {}
    for path in sorted(path for path in dataset.rglob("*") if path.is_file()):
        files[str(path.relative_to(dataset))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    with (dataset / MANIFEST).open("w", encoding="utf-8") as text:
        text.write(json.dumps({**manifest, "files": files}, indent=2, ensure_ascii=False) + "\n")
    take_place(dataset, output)
