"""The layout of a prepared dataset on disk: names, columns, manifest. Light: reading it needs no torch.

{output}/
  train/rows.arrow   packed rows, memory-mapped when training reads them
  eval/rows.arrow
  places.arrow       file, and line or item, of each row that went in
  rejects.jsonl      what could not be used, and why
  manifest.json      what it was made from, by what, and what came out; written last
"""

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import pyarrow as pa
from msgspec import Meta

from configs.program.errors import UserError
from data.disk.formats import sizes
from data.disk.formats.arrow_file import open_table
from data.disk.formats.json_text import LONGEST_QUOTE, read_json, shaped
from data.disk.formats.regular import UnreadableError
from data.prepared.places import PLACES

MANIFEST, REJECTS = "manifest.json", "rejects.jsonl"
MANIFEST_KIND = "openhermes-mixtral prepared dataset"
"""What a manifest says that it is, so that no other file of that name is taken for one."""
SPLITS = ("train", "eval")

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


Count = Annotated[int, Meta(ge=0)]


class StoredFile(TypedDict):
    """A file of a prepared dataset."""

    bytes: Count
    sha256: str


class RepositoryFile(TypedDict):
    """A file of a directory, with its hash, or of a repository, whose commit names the content."""

    file: str
    sha256: NotRequired[str]


class Input(TypedDict):
    """Where rows came from: `file` with its hash, or `dataset` with a commit, or with the hashes of its `files`."""

    file: NotRequired[str]
    dataset: NotRequired[str]
    sha256: NotRequired[str]
    commit: NotRequired[str | None]
    files: NotRequired[list[RepositoryFile]]
    schema: str | None
    columns: NotRequired[dict[str, str]]
    rows: Count
    unread_fields: dict[str, Count]
    harmless_fields: dict[str, Count]


class Tokenizer(TypedDict):
    """The vocabulary of the ids."""

    source: str
    fingerprint: str


Rows = TypedDict("Rows", {"in": Count, "kept": Count, "rejected": Count, "rejected_by_reason": dict[str, Count]})


class Shortened(TypedDict):
    """What was cut off of conversations that were too long."""

    rows: Count
    turns_left_out: Count
    replies_cut: Count


class Split(TypedDict):
    """What a split holds."""

    conversations: Count
    packed_rows: Count
    tokens: Count
    supervised_tokens: Count
    efficiency: Annotated[float, Meta(ge=0, le=1)] | None


class Manifest(TypedDict):
    """manifest.json of today's layout; nothing else is read of an older one."""

    kind: str
    layout: int
    inputs: list[Input]
    contamination: list[dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, str]
    tokenizer: Tokenizer
    rows: Rows
    repaired: NotRequired[dict[str, Count]]
    repeated: NotRequired[Count]
    shortened: Shortened
    train: Split
    eval: Split
    seq_len: Annotated[int, Meta(ge=1, le=1 << 20)]
    packing: bool
    seed: int
    files: dict[str, StoredFile]


def read_manifest(directory: Path, setting: str = "dataset") -> dict[str, Any]:
    """The manifest of a prepared dataset, of any version and not compared with anything.

    Raises:
        UserError: there is none, or it is something else; the text begins with `setting`.
    """
    named = f"{setting}={directory}"
    remedy = "make one with `python -m data`, whose setting output names the directory"
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{named}: there is no prepared dataset there; {remedy}")
    manifest = read_json(path, dict[str, Any], named, remedy, largest=sizes.MANIFEST)
    if manifest.get("kind") != MANIFEST_KIND:
        raise UserError(f"{named}: its {MANIFEST} is not that of a prepared dataset; {remedy}")
    return manifest


def read_whole(directory: Path, setting: str = "dataset") -> dict[str, Any]:
    """The manifest of a prepared dataset whose files are all there.

    Raises:
        UserError: there is none, or a file is missing or damaged; the text begins with `setting`.
    """
    manifest = read_manifest(directory, setting)
    if wrong := damage(directory, manifest):
        raise UserError(f"{setting}={directory}: {wrong}; prepare it again")
    return manifest


def rows_of(split: str) -> str:
    """The file of a split's rows, in the directory of the dataset."""
    return f"{split}/rows.arrow"


def open_split(directory: Path, split: str) -> pa.Table:
    """The packed rows of a split, memory-mapped.

    Raises:
        UnreadableError: the file is missing or damaged.
    """
    return open_table(directory / rows_of(split), ROW_SCHEMA)


def _is_named(source: Input) -> bool:
    """Whether it says what was read: a file and its hash, or a dataset and its commit or the hashes of its files."""
    if "file" in source:
        return "sha256" in source
    if "commit" in source:
        return "dataset" in source
    return "dataset" in source and "files" in source and all("sha256" in file for file in source["files"])


def damage(directory: Path, manifest: dict[str, Any]) -> str | None:
    """Why a prepared dataset can't be used, by its manifest and by the files' names and sizes; None if it can."""
    if manifest.get("layout") != LAYOUT:
        return "another version of this program made it, whose layout or chat template is not today's"
    try:
        known = shaped(manifest, Manifest)
        for number, source in enumerate(known["inputs"]):
            if not _is_named(source):
                raise UnreadableError(f"inputs[{number}]: what was read is not named, or has no hash")
        files = known["files"]
        if odd := files.keys() ^ {REJECTS, PLACES, *map(rows_of, SPLITS)}:
            raise UnreadableError(f"files: {min(odd)[:LONGEST_QUOTE]} is missing or unknown")
    except UnreadableError as error:
        return f"its {MANIFEST} is not as it was written ({error})"
    for name, stored in files.items():
        path = directory / name
        if not path.is_file():
            return f"it is not whole ({name} is missing)"
        if path.stat().st_size != stored["bytes"]:
            return f"it is not whole ({name} has {path.stat().st_size} bytes, not {stored['bytes']})"
    return None
