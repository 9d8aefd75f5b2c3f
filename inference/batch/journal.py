"""Answers as they are written to disk, so that a killed run goes on from where it was."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from configs.program.errors import UserError
from data.disk.adapter_directory import WEIGHTS
from data.disk.files import locked, replace_file, sha256, sync
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError
from inference.batch.rows import encoded
from inference.config import InferenceConfig
from inference.load import adapter_directory

SETTINGS = (
    "adapter",
    "base",
    "revision",
    "fold",
    "dtype",
    "system",
    "markers",
    "max_new_tokens",
    "stop",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "batch_size",
    "batching",
)
"""What a run must have in common with the one that it continues."""

FIRST_BYTES = b'{"input": "'
"""How every journal begins."""


class Line(TypedDict):
    """What is read of an answer, one of the two."""

    line: NotRequired[int]
    row: NotRequired[int]


# Files


class Journal:
    """`{output}.part`: a first line that says what the run is, then whole units of answers."""

    def __init__(self, path: Path, descriptor: int, offset: int):
        self.path = path
        self._descriptor = descriptor
        self._start = offset

    def keep(self, units: list[list[int]]) -> set[int]:
        """Cuts off what a kill left of an incomplete unit; returns the lines that are answered."""
        offset, wanted = self._start, {unit[0]: unit for unit in units}
        content = self.path.read_bytes()
        done: set[int] = set()
        while offset < len(content):
            lines: list[int] = []
            unit: list[int] = []
            end = offset
            while not lines or len(lines) < len(unit):
                newline = content.find(b"\n", end)
                if newline < 0:
                    break
                lines.append(_line_of(content[end:newline]))
                unit = wanted.get(lines[0], [])
                end = newline + 1
            if lines != unit or not unit:
                break
            done |= set(lines)
            offset = end
        os.ftruncate(self._descriptor, offset)
        return done

    def append(self, answers: list[dict[str, Any]]) -> None:
        """Adds a unit in one write, and waits until the disk has it."""
        view = memoryview(b"".join(map(encoded, answers)))
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fsync(self._descriptor)

    def answers(self) -> list[dict[str, Any]]:
        """All answers so far."""
        return [json.loads(line) for line in self.path.read_bytes()[self._start :].splitlines()]


@contextmanager
def open_journal(path: Path, identity: dict[str, Any]) -> Iterator[Journal]:
    """The journal of this run, begun or continued; held by one process at a time.

    Raises:
        UserError: it can't be written, another process writes it, or it belongs to another run.
    """
    descriptor = locked(path)
    try:
        if not _begins_as_ours(path.read_bytes()):
            raise UserError(
                f"output: {path} is there, and no batch wrote it; move it elsewhere, or name another output"
            )
        head, _, answers = path.read_bytes().partition(b"\n")
        try:
            before = parse_json(head, dict[str, Any]) if answers else identity
        except UnreadableError as error:
            raise UserError(f"output: {path} is damaged ({error}); remove it to start over") from error
        for field, value in identity.items():
            if before.get(field) != value:
                raise UserError(
                    f"{field}={value}: the run that {path} belongs to had {field}={before.get(field)}; "
                    f"give the same again, or remove the file to start over"
                )
        if not answers:
            os.ftruncate(descriptor, 0)
            head = json.dumps(identity).encode()
            os.write(descriptor, head + b"\n")
            os.fsync(descriptor)
            sync(path.parent)
        yield Journal(path, descriptor, len(head) + 1)
    finally:
        content = path.read_bytes() if path.exists() else b"-"
        if _begins_as_ours(content) and content.count(b"\n") < 2:  # nothing was answered: nothing to go on from
            path.unlink()
        os.close(descriptor)


def _begins_as_ours(content: bytes) -> bool:
    """Whether a journal may begin like this; an empty file and a torn head are beginnings too."""
    return content[: len(FIRST_BYTES)] == FIRST_BYTES[: len(content)]


def _line_of(answer: bytes) -> int:
    """The line that an answer belongs to; -1, which no row has, if a torn write or a damaged disk left no answer."""
    try:
        return position(dict(parse_json(answer, Line)))
    except (UnreadableError, KeyError):
        return -1


def position(answer: dict[str, Any]) -> int:
    """The line, or the row, that an answer belongs to."""
    return int(answer["line"] if "line" in answer else answer["row"])


def identity(config: InferenceConfig, source: Path) -> dict[str, Any]:
    """What tells this run from another: the input's and the adapter's bytes, and all that decides the answers."""
    weights = (adapter_directory(config) or Path()) / WEIGHTS
    return {
        "input": sha256(source),
        "adapter_weights": sha256(weights) if weights.is_file() else None,
        **{name: getattr(config, name) for name in SETTINGS},
    }


def finish(output: Path, answers: list[dict[str, Any]]) -> None:
    """Writes all lines in the input's order, and lets them appear at once."""
    replace_file(output, map(encoded, sorted(answers, key=position)))
