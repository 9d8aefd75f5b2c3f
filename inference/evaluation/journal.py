"""What a model has answered so far, on the disk, so that a killed run goes on and ends with the same numbers.

The first line says which model and which settings; each other line holds the answers of one unit, by the hash of the
ids that the model read. Lines are only ever appended, each in one write that is synced.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from configs.program.errors import UserError, one_line
from data.disk.files import append, open_alone, sync
from data.disk.formats.json_text import shaped
from data.disk.formats.regular import UnreadableError

FIRST_BYTES = b'{"evaluation": '
"""How every journal begins."""

Answer = TypeVar("Answer")


class Head(TypedDict):
    """The first line: what the run is."""

    evaluation: dict[str, Any]


class Line(TypedDict):
    """Any other line."""

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

    def answers(self, unit: str, shape: type[Answer], number: int) -> list[Answer]:
        """The answers of a unit: that many, each of this shape.

        Raises:
            UserError: they are others, so the file is damaged.
        """
        try:
            found = shaped(self._answers[unit], list[shape])  # type: ignore[valid-type]
            if len(found) != number:
                raise UnreadableError(f"unit {unit} has {len(found)} answers, not {number}")
        except UnreadableError as error:
            raise UserError(f"output: {self.path} is damaged ({error}); remove it to start over") from error
        return found

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
    descriptor = open_alone(path, setting="output")
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
            value = json.loads(line)  # with what JSON has no word for, as a model may answer with it
            if head is None:
                head = shaped(value, Head)["evaluation"]
            else:
                of_unit = shaped(value, Line)
                answers[of_unit["unit"]] = of_unit["answers"]
        except (ValueError, RecursionError) as error:
            if head is None:
                raise UserError(f"output: {path} is damaged ({one_line(error)}); remove it to start over") from error
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
    append(descriptor, json.dumps(value).encode() + b"\n")
