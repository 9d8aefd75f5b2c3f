"""A task's rows: from the hub at a fixed commit, or from files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.program.errors import UserError
from data.disk import hub
from data.disk.files import sha256
from data.rows.reading import Chunk, RawRow, read_file
from data.rows.repository import Wanted, fetched
from inference.evaluation.leaderboard.questions import Question, Row, questions_of
from inference.evaluation.leaderboard.tasks import TASKS, Task


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The rows of a task, and what the result says of where they are from."""

    questions: list[Question]
    """All of them, in the order in which a limited run takes them."""
    source: dict[str, Any]
    drawn_from: str
    """The split of the examples; the scored one if the other is not at hand."""


def read_task(name: str, data: str | None) -> TaskRows:
    """The questions of a task.

    Args:
        name: of `TASKS`.
        data: a directory with a folder for each task, or None for the hub.

    Raises:
        UserError: the rows can't be had, or are not the task's.
    """
    task = TASKS[name]
    read = _from_hub(name, task) if data is None else _from_files(name, task, Path(data))
    documents, source = read(task.hub.split, task.file)
    if not documents:
        raise UserError(f"{_named(name, data)}: the split {task.hub.split} holds no rows; give the task's own")
    examples, drawn_from = documents, task.hub.split
    if task.examples is not None:
        found, more = read(task.examples, task.examples)
        if found:
            examples, drawn_from, source = found, task.examples, source | more
        elif name == "mmlu" or len(documents) <= task.shots:
            raise UserError(
                f"{_named(name, data)}: there are no rows of {task.examples}, from which {task.title} draws its "
                f"examples; add {task.folder}/{task.examples}.jsonl"
            )
    try:
        questions = questions_of(name, documents, examples, task.shots)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{_named(name, data)}: its rows are not {task.title}'s ({_said(error)}); give rows with the fields of "
            f"{task.hub.dataset}"
        ) from error
    return TaskRows(questions, source, drawn_from)


def _said(error: Exception) -> str:
    return f"a row has no field {error.args[0]}" if isinstance(error, KeyError) else str(error)


def _named(name: str, data: str | None) -> str:
    return f"tasks={name}" if data is None else f"data={data}: {TASKS[name].folder}"


Reader = Callable[[str, str], tuple[list[Row], dict[str, Any]]]
"""A split, and how its file's name begins → its rows, and where they are from."""


def _from_hub(name: str, task: Task) -> Reader:
    named = _named(name, None)
    repository = hub.find("dataset", task.hub.dataset, task.commit, named)

    def read(split: str, _: str) -> tuple[list[Row], dict[str, Any]]:
        wanted = Wanted(config=task.hub.config, split=split, named=named)
        files = fetched(repository, wanted)
        rows = [row for file in files for row in _rows(file.chunks(task.hub.dataset, named), named)]
        return rows, {"dataset": task.hub.dataset, "config": task.hub.config, "commit": task.commit}

    return read


def _from_files(name: str, task: Task, directory: Path) -> Reader:
    named = _named(name, str(directory))
    folder = directory / task.folder
    if not folder.is_dir():
        raise UserError(
            f"data={directory}: it has no folder {task.folder}, in which {task.title}'s rows are expected; add it, or "
            f"leave {name} out of tasks"
        )

    def read(_: str, begins: str) -> tuple[list[Row], dict[str, Any]]:
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.startswith(begins))
        try:
            rows = [row for path in files for row in _rows(read_file(str(path)), named)]
        except UserError as error:  # data calls the setting by another name
            raise UserError(str(error).replace("files=", "data=", 1)) from error
        return rows, {str(path.relative_to(directory)): sha256(path) for path in files}

    return read


def _rows(chunks: Iterator[Chunk], named: str) -> Iterator[Row]:
    for chunk in chunks:
        for row in chunk.rows():
            if not isinstance(row, RawRow) or not isinstance(row.value, dict):
                raise UserError(f"{named}: {row.file}, {row.unit} {row.number} can't be read; give whole rows")
            yield row.value
