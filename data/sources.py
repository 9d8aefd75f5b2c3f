"""Files or a hub dataset → raw rows → `Conversation`, or a `Reject` that says why not."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data.config import PrepareConfig
from data.schema import Conversation, Message
from data.template import MARKERS

REPLY_FIELDS = ("output", "response")
"""The names under which instruction rows carry their reply, first match first."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read, and where it stands: a line of a JSONL file (from 1), or an item of a list (from 0)."""

    value: Any
    file: str
    unit: str
    number: int


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that can't be used: a reason code to count by, and a sentence for the person who looks it up."""

    row: RawRow
    reason: str
    detail: str

    def record(self) -> dict[str, Any]:
        """The line of `rejects.jsonl`."""
        where = {"file": self.row.file, self.row.unit: self.row.number}
        return {**where, "reason": self.reason, "detail": self.detail}

    def __str__(self) -> str:
        return f"{self.row.file}, {self.row.unit} {self.row.number}: {self.detail}"


class _UnusableError(Exception):
    """Raised while converting one row; becomes its Reject."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail


# Reading


def read_rows(config: PrepareConfig) -> Iterator[RawRow | Reject]:
    """All rows of all sources in their order; a line that is not JSON comes as a Reject.

    Raises:
        UserError: a file is missing or is no JSON at all, or the hub dataset can't be had.
    """
    for name in config.files:
        yield from _read_file(name)
    if config.dataset:
        yield from _read_hub(config)


def describe_inputs(config: PrepareConfig) -> list[dict[str, Any]]:
    """What the manifest says of each input: path, bytes and SHA-256, or the hub dataset's id and revision."""
    inputs: list[dict[str, Any]] = []
    for name in config.files:
        with _existing(name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        inputs.append({"file": name, "bytes": Path(name).stat().st_size, "sha256": digest})
    if config.dataset:
        inputs.append({"dataset": config.dataset, "revision": config.revision, "split": config.split})
    return inputs


def _existing(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        raise UserError(f"files={name}: it is a directory; name the files in it")
    if not path.is_file():
        raise UserError(f"files={name}: there is no such file; check the path, relative to {Path.cwd()}")
    if not os.access(path, os.R_OK):
        raise UserError(f"files={name}: it can't be read; check its permissions")
    return path


def _read_file(name: str) -> Iterator[RawRow | Reject]:
    """A JSON array, or one JSON object a line; told apart by the first character that is not space."""
    not_json = UserError(
        f"files={name}: it is not JSON; give a JSON array of rows, or one JSON object per line (JSONL)"
    )
    with _existing(name).open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        file.seek(0)
        if head == b"[":
            try:
                rows = json.loads(file.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise not_json from error
            for number, value in enumerate(rows):
                yield RawRow(value, name, "row", number)
        elif not head:
            return
        elif head == b"{":
            for number, line in enumerate(file, start=1):
                if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                    continue
                row = RawRow(None, name, "line", number)
                try:
                    yield RawRow(json.loads(line.decode("utf-8-sig")), name, "line", number)
                except UnicodeDecodeError:
                    yield Reject(row, "invalid_utf8", "the line is not UTF-8 text")
                except (ValueError, RecursionError) as error:
                    yield Reject(row, "invalid_json", f"the line is not JSON ({error})")
        else:
            raise not_json


def _read_hub(config: PrepareConfig) -> Iterator[RawRow]:
    """A dataset of the hub, or of a local directory in the same layout."""
    import datasets

    assert config.dataset is not None
    try:
        rows = datasets.load_dataset(config.dataset, revision=config.revision, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset={config.dataset}: it can't be loaded ({_first_line(error)}); check the id, revision and split, "
            f"and that the hub can be reached, or name downloaded files with files=[…]"
        ) from error
    for number, value in enumerate(rows):
        yield RawRow(value, config.dataset, "row", number)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# Converting


def to_conversation(row: RawRow, *, keep_markers: bool) -> Conversation | Reject:
    """An instruction/input/output row as a conversation of one turn; `response` stands for `output` as well."""
    try:
        if not isinstance(row.value, dict):
            raise _UnusableError("not_an_object", f"expected an object, found {type(row.value).__name__}")
        instruction = _text(row.value, "instruction")
        context = _text(row.value, "input", required=False)
        reply_field = next((name for name in REPLY_FIELDS if row.value.get(name) is not None), REPLY_FIELDS[0])
        reply = _text(row.value, reply_field)
        if not keep_markers:
            for text in (instruction, context, reply):
                for marker in MARKERS:
                    if marker in text:
                        raise _UnusableError("template_marker", f"the text holds the template's own marker {marker}")
    except _UnusableError as unusable:
        return Reject(row, unusable.reason, unusable.detail)
    # The field joins instruction and input with a blank line, as Alpaca's and OpenHermes's own rows read best.
    user = f"{instruction}\n\n{context}" if context else instruction
    return Conversation((Message("user", user), Message("assistant", reply)))


def _text(value: dict[str, Any], name: str, *, required: bool = True) -> str:
    """The stripped text of a field, fit to be encoded."""
    text = value.get(name)
    if text is None or (isinstance(text, str) and not text.strip()):
        if not required:
            return ""
        if text is None:
            raise _UnusableError("missing_field", f"there is no field {name}")
        raise _UnusableError("empty_field", f"the field {name} is empty")
    if not isinstance(text, str):
        raise _UnusableError("not_text", f"the field {name} is {type(text).__name__}, not text")
    if "\0" in text:
        raise _UnusableError("nul_character", f"the field {name} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _UnusableError("lone_surrogate", f"the field {name} holds half of a surrogate pair") from None
    return text.strip()
