"""What a model has answered so far, on the disk, so that a killed run goes on and ends with the same numbers.

The first line says which model and which settings; each other line holds the answers of one unit, by the hash of the
ids that the model read. Lines are only ever appended, each in one write that is synced.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from configs.program.errors import UserError
from data.disk.files import locked, sync
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError

FIRST_BYTES = b'{"evaluation": '
"""How every journal begins."""


class Head(TypedDict):
    """The first line."""

    evaluation: dict[str, Any]


class Unit(TypedDict):
    """Each other line."""

    unit: str
    answers: list[Any]


class Journal:
    """The answers of one model."""

    def __init__(self, path: Path, descriptor: int, answers: dict[str, list[Any]]):
        self.path = path
        self._descriptor = descriptor
        self._answers = answers

    def __contains__(self, unit: str) -> bool:
        return unit in self._answers

    def __getitem__(self, unit: str) -> list[Any]:
        return self._answers[unit]

    def append(self, unit: str, answers: list[Any]) -> None:
        """Adds a unit's answers, and waits until the disk has them."""
        _write(self._descriptor, {"unit": unit, "answers": answers})
        self._answers[unit] = answers


@contextmanager
def open_journal(path: Path, identity: dict[str, Any]) -> Iterator[Journal]:
    """The journal of a model, begun or continued; held by one process at a time.

    Raises:
        UserError: it can't be written, another process writes it, or it is of another model or other settings.
    """
    descriptor = locked(path)
    try:
        head, answers, end = _read(path)
        if head is None:
            os.ftruncate(descriptor, 0)
            _write(descriptor, {"evaluation": identity})
            sync(path.parent)
        else:
            _check(path, head, identity)
            os.ftruncate(descriptor, end)  # what a kill left of the last line
        yield Journal(path, descriptor, answers)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, list[Any]], int]:
    """The head, None if there is none yet; the answers by unit; and where the last whole line ends."""
    content = path.read_bytes()
    if content[: len(FIRST_BYTES)] != FIRST_BYTES[: len(content)]:
        raise UserError(f"output: no evaluation wrote {path}; move it elsewhere, or name another output")
    head: dict[str, Any] | None = None
    answers: dict[str, list[Any]] = {}
    end = 0
    for line in content.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            if head is None:
                head = parse_json(line, Head)["evaluation"]
            else:
                unit = parse_json(line, Unit)
                answers[unit["unit"]] = unit["answers"]
        except UnreadableError:
            break
        end += len(line)
    return head, answers, end


def _check(path: Path, head: dict[str, Any], identity: dict[str, Any]) -> None:
    for field, value in identity.items():
        if head.get(field) != value:
            raise UserError(
                f"{field}={value}: the evaluation that {path} belongs to had {field}={head.get(field)}; give the same "
                f"again, name another output, or remove the file to start over"
            )


def _write(descriptor: int, value: dict[str, Any]) -> None:
    view = memoryview(json.dumps(value).encode() + b"\n")
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
