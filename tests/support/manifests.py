"""Manifests of prepared datasets, as `python -m data` writes them, for directories that a test makes by hand."""

from pathlib import Path
from typing import Any

from data.disk.files import sha256
from data.prepared.layout import LAYOUT, MANIFEST_KIND, REJECTS, SPLITS
from data.prepared.places import Places


def manifest_of(directory: Path, *, seq_len: int, packing: bool = True) -> dict[str, Any]:
    """The manifest of a directory that holds the rows of both splits; adds the files that are missing."""
    (directory / REJECTS).touch()
    Places().write(directory)
    counts = {"conversations": 0, "packed_rows": 0, "tokens": 0, "supervised_tokens": 0, "efficiency": None}
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        "kind": MANIFEST_KIND,
        "layout": LAYOUT,
        "inputs": [],
        "contamination": [],
        "config": {},
        "versions": {},
        "tokenizer": {"source": "embedded", "fingerprint": "0"},
        "rows": {"in": 0, "kept": 0, "rejected": 0, "rejected_by_reason": {}},
        "shortened": {"rows": 0, "turns_left_out": 0, "replies_cut": 0},
        **dict.fromkeys(SPLITS, counts),
        "seq_len": seq_len,
        "packing": packing,
        "seed": 0,
        "files": {
            str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
        },
    }
