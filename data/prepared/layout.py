"""The layout of a prepared dataset on disk: names, columns, manifest. Light: reading it needs no torch.

{output}/
  train/rows.arrow   packed rows, memory-mapped when training reads them
  eval/rows.arrow
  places.arrow       file, and line or item, of each row that went in
  rejects.jsonl      what could not be used, and why
  manifest.json      what it was made from, by what, and what came out; written last
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.program.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_KIND = "openhermes-mixtral prepared dataset"
"""What a manifest says that it is, so that no other file of that name is taken for one."""
SPLITS = ("train", "eval")
REJECTS = "rejects.jsonl"

LAYOUT = 4
"""Counts up when what a prepared dataset holds is stored, rendered or masked differently."""

ROW_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.uint16())),
        ("spans", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("rows", pa.list_(pa.int64())),
    ]
)
"""The columns of `rows.arrow`; see `PackedRow`."""


def read_manifest(directory: Path, setting: str = "dataset") -> dict[str, Any]:
    """The manifest of a prepared dataset.

    Raises:
        UserError: there is none, or it is something else; the text begins with `setting`.
    """
    remedy = "make one with `python -m data`, whose setting output names the directory"
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{setting}={directory}: there is no prepared dataset there; {remedy}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={directory}: its {MANIFEST} can't be read ({error}); {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != MANIFEST_KIND:
        raise UserError(f"{setting}={directory}: its {MANIFEST} is not that of a prepared dataset; {remedy}")
    return manifest


def open_whole(directory: Path, setting: str = "dataset") -> dict[str, Any]:
    """The manifest of a prepared dataset whose files are all there.

    Raises:
        UserError: there is none, or a file is missing or damaged; the text begins with `setting`.
    """
    manifest = read_manifest(directory, setting)
    if wrong := damage(directory, manifest):
        raise UserError(f"{setting}={directory}: {wrong}; prepare it again")
    return manifest


def open_split(directory: Path, split: str) -> pa.Table:
    """The packed rows of a split, memory-mapped.

    Raises:
        OSError, pa.ArrowInvalid: the file is missing or damaged.
    """
    return pa.ipc.open_file(pa.memory_map(str(directory / split / "rows.arrow"))).read_all()


def damage(directory: Path, manifest: dict[str, Any]) -> str | None:
    """Why a prepared dataset can't be used, by its version and by the files' names and sizes; None if it can."""
    if manifest.get("layout") != LAYOUT or "files" not in manifest:
        return "another version of this program made it, whose layout or chat template is not today's"
    for name, told in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            return f"it is not whole ({name} is missing)"
        if path.stat().st_size != told["bytes"]:
            return f"it is not whole ({name} has {path.stat().st_size} bytes, not {told['bytes']})"
    return None
