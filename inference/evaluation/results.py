"""Answers → what is written of an evaluation: `results.json`, and a line a question in `questions.jsonl`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import xxhash
from msgspec import Meta

from configs.program.errors import UserError
from data.disk.adapter_directory import SCORES
from data.disk.formats import sizes
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError, read_regular
from inference.config import InferenceConfig
from inference.evaluation.answering import Answered
from inference.evaluation.leaderboard.questions import Question, hash_of
from inference.evaluation.leaderboard.rows import TaskRows
from inference.evaluation.leaderboard.tasks import (
    GSM8K_STOPS,
    GSM8K_TOKENS,
    PUBLISHED,
    TASKS,
    published_hashes,
)
from inference.evaluation.statistics import Estimate, Groups, average, estimate, holm, paired

QUESTIONS, QUESTIONS_OF_BASE = "questions.jsonl", "questions_of_base.jsonl"


def prompt_hash(question: Question) -> str:
    """What tells the texts that a question is asked with from others."""
    return xxhash.xxh64("\0".join([*question.contexts, *question.choices]).encode()).hexdigest()


def grouped(answered: Iterable[Answered]) -> dict[str, list[float]]:
    """The scores of a task's questions by subject, in the order in which they come."""
    groups: dict[str, list[float]] = {}
    for each in answered:
        groups.setdefault(each.question.group, []).append(each.score)
    return groups


# Prompts


def describe_prompts(name: str, rows: TaskRows) -> dict[str, Any]:
    """The hashes of a task's prompts, all of them, beside those that the leaderboard published.

    `equal` is None if the leaderboard's are not known, or the examples were drawn from other rows than its.
    """
    of_group: dict[str, list[Question]] = {}
    for question in rows.questions:
        of_group.setdefault(question.group, []).append(question)
    there = published_hashes()
    hashes: dict[str, str] = {}
    verdicts: list[bool | None] = []
    for group, questions in sorted(of_group.items()):
        hashes[group] = hash_of(question.prompt for question in questions)
        known = there.get(TASKS[name].name_there.format(group))
        verdicts.append(None if known is None else known["hash_full_prompts"] == hashes[group])
    checked = [verdict for verdict in verdicts if verdict is not None]
    example_split = TASKS[name].examples
    unlike_rows = example_split is not None and rows.drawn_from != example_split
    return {
        "documents": len(rows.questions),
        "documents_of_the_leaderboard": TASKS[name].rows,
        "examples": TASKS[name].shots,
        "examples_from": rows.drawn_from,
        "hash": next(iter(hashes.values())) if len(hashes) == 1 else hash_of(hashes.values()),
        "hashes": hashes if len(hashes) > 1 else {},
        "groups": len(hashes),
        "groups_checked": len(checked),
        "equal": None if unlike_rows or not checked else all(checked),
        **({"stop": list(GSM8K_STOPS), "max_new_tokens": GSM8K_TOKENS} if name == "gsm8k" else {}),
    }


def said_of_prompts(prompts: dict[str, Any]) -> str:
    """The same in a few words."""
    if prompts["equal"]:
        which = "" if prompts["groups"] == 1 else f" ({prompts['groups_checked']} of {prompts['groups']} are known)"
        return f"the leaderboard's, hash equal{which}"
    if prompts["equal"] is None:
        if prompts["examples_from"] != "train" and prompts["documents"] != prompts["documents_of_the_leaderboard"]:
            return f"{prompts['documents']:,} of {prompts['documents_of_the_leaderboard']:,} documents; not checked"
        return "made in the same way; the examples could not be checked"
    return "not the leaderboard's: the rows differ"


# Scores


def score(answered: Sequence[Answered], clean: dict[int, bool] | None) -> dict[str, Any]:
    """A task's score with its standard error; if it is known which questions were not trained on, of these too.

    `clean` says for the id of each question whether it was not.
    """
    result: dict[str, Any] = {"questions": len(answered), **_shown(estimate(grouped(answered)))}
    if clean is not None:
        kept = [each for each in answered if clean[id(each.question)]]
        result["trained_on"] = len(answered) - len(kept)
        result["clean"] = {"questions": len(kept), **_shown(estimate(grouped(kept)))} if kept else None
    return result


def _shown(value: Estimate) -> dict[str, float]:
    return {"score": value.value, "standard_error": value.error}


def overall(scores: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """The average of the table; None if a task is missing."""
    if set(scores) != set(TASKS):
        return None
    return _shown(average([Estimate(each["score"], each["standard_error"]) for each in scores.values()]))


def published(scores: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was published of the tasks that were scored, and of their average if all were: shares, as ours are."""
    known = set(scores) | ({"average"} if overall(scores) is not None else set())
    return [
        {
            "task": row.task,
            "score": row.score / 100,
            "standard_error": None if row.error is None else row.error / 100,
            "whose": row.whose,
            "source": row.source,
        }
        for row in PUBLISHED
        if row.task in known
    ]


def compare(before: Mapping[str, Groups], after: Mapping[str, Groups]) -> dict[str, Any]:
    """Two models on the same questions, by task, with the average of the differences if all six are there."""
    pairs = {name: paired(before[name], after[name]) for name in after}
    adjusted = holm([pair.p for pair in pairs.values()])
    tasks = {name: {**asdict(pair), "p_holm": p} for (name, pair), p in zip(pairs.items(), adjusted, strict=True)}
    differences = [pair.difference for pair in pairs.values()]
    return {"tasks": tasks, "average": asdict(average(differences)) if set(pairs) == set(TASKS) else None}


def without_nan(value: Any) -> Any:
    """The same for JSON, which knows no NaN: what a single question has no error for becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


# Earlier results


class Results(TypedDict):
    """What is read of `results.json`."""

    settings: dict[str, Any]


class Line(TypedDict):
    """What is read of a line of `questions.jsonl`."""

    task: str
    subject: NotRequired[str]
    row: int
    score: Annotated[float, Meta(ge=0, le=1.001)]
    """A share, which rounding may carry above 1 by a hair."""
    prompt: str


@dataclass(frozen=True, slots=True)
class Earlier:
    """An evaluation that was written before."""

    path: Path
    settings: dict[str, Any]
    questions: dict[tuple[str, str, int], Line]
    """The lines of `questions.jsonl`, by task, subject and row."""

    def check_format(self, config: InferenceConfig) -> None:
        """Raises `UserError` if its contexts stood in another format than these settings ask for."""
        for name in ("chat", "bos"):
            now, then = getattr(config, name), self.settings.get(name)
            if now != then:
                raise UserError(
                    f"{name}={now}: the questions of compare={self.path} were asked with {name}={then}, so the two "
                    f"can't be compared; give the same, or evaluate that model again"
                )

    def scores(self, questions: Sequence[Question]) -> dict[str, dict[str, list[float]]]:
        """The scores of these questions, by task and subject.

        Raises:
            UserError: one was not asked, or asked with another prompt.
        """
        tasks: dict[str, dict[str, list[float]]] = {}
        for question in questions:
            line = self.questions.get((question.task, question.group, question.number))
            if line is None:
                raise UserError(
                    f"compare={self.path}: it has no answer to {TASKS[question.task].title}'s row {question.number}; "
                    f"compare with an evaluation of the same tasks and limit"
                )
            if line["prompt"] != prompt_hash(question):
                raise UserError(
                    f"compare={self.path}: {TASKS[question.task].title}'s row {question.number} was asked with another "
                    f"prompt there, so the two can't be compared; evaluate both with the same data"
                )
            groups = tasks.setdefault(question.task, {})
            groups.setdefault(question.group, []).append(float(line["score"]))
        return tasks


def read_earlier(path: Path) -> Earlier:
    """The evaluation in a directory.

    Raises:
        UserError: there is none, or it is damaged.
    """
    directory = path.parent if path.name == SCORES else path
    for file in (directory / SCORES, directory / QUESTIONS):
        if not file.exists():
            raise UserError(
                f"compare={path}: there is no evaluation ({file} is missing); give base, or the output of another "
                f"task=evaluate"
            )
    try:
        results = parse_json(read_regular(directory / SCORES, sizes.SETTINGS), Results)
        lines = [parse_json(line, Line) for line in read_regular(directory / QUESTIONS, sizes.ANSWERS).splitlines()]
    except UnreadableError as error:
        raise UserError(f"compare={path}: it can't be read ({error}); evaluate again") from error
    questions = {(line["task"], line.get("subject", line["task"]), line["row"]): line for line in lines}
    return Earlier(directory, results["settings"], questions)
