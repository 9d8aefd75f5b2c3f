"""The layout of a prepared dataset on disk: names, columns, manifest. Light: reading it needs no torch.

{output}/
  train/rows.arrow   packed rows, memory-mapped when training reads them
  eval/rows.arrow
  rejects.jsonl      what could not be used, and why
  manifest.json      what it was made from, by what, and what came out; written last
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_KIND = "openhermes-mixtral prepared dataset"
"""What a manifest says that it is, so that no other file of that name is taken for one."""
SPLITS = ("train", "eval")

ROW_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("rows", pa.list_(pa.int64())),
    ]
)
"""The columns of `rows.arrow`; see `PackedRow`."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared dataset.

    Raises:
        UserError: there is none, or it is something else.
    """
    remedy = "make one with `python -m data`, whose setting output names the directory"
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"dataset={directory}: there is no prepared dataset there; {remedy}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"dataset={directory}: its {MANIFEST} can't be read ({error}); {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != MANIFEST_KIND:
        raise UserError(f"dataset={directory}: its {MANIFEST} is not that of a prepared dataset; {remedy}")
    return manifest


def file_sizes(directory: Path) -> dict[str, int]:
    """The bytes of each file of a prepared dataset but the manifest, by its path in it."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}
