"""What an evaluation beside the adapter measured → a section of the model card, and what the hub shows of it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import EvalResult

from data.disk.adapter_directory import EVALUATION, SCORES, WEIGHTS
from data.disk.files import sha256
from data.disk.formats import sizes
from data.disk.plain_text import json_if_readable, member, plain
from inference.evaluation.leaderboard.tasks import TASKS, Task

METRICS = {
    "acc_norm": ("acc_norm", "normalized accuracy"),
    "acc": ("acc", "accuracy"),
    "mc2": ("mc2", "mc2"),
    "exact": ("exact_match", "exact match"),
}
"""The hub's types and names of the tasks' metrics."""


@dataclass(frozen=True, slots=True)
class Score:
    """A row of the card's table."""

    task: Task
    value: float
    """A share, as its error."""
    error: float
    questions: int
    in_chat: bool
    """Whether the chat template stood around the prompts."""
    other_rows: bool
    """Whether the prompts are known to be others than the leaderboard's, or their examples drawn from another split."""
    before: "Before | None"
    """The base alone on the same questions, if it was asked."""

    @property
    def stands_alone(self) -> bool:
        """Whether every question was asked, and as the leaderboard asks it."""
        return self.questions == self.task.rows and not self.in_chat and not self.other_rows


@dataclass(frozen=True, slots=True)
class Before:
    """The base's score, and the difference that the adapter made: shares."""

    value: float
    error: float
    difference: float
    difference_error: float
    """Of the differences of the single questions."""


@dataclass(frozen=True, slots=True)
class Other:
    """A metric of one of lm-eval's tasks, as it gives it: not all are shares."""

    task: str
    metric: str
    shots: int | None
    questions: int | None
    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Average:
    """The average of the card's table."""

    value: float
    """A share, as its error."""
    error: float
    before: Before | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation measured."""

    scores: list[Score]
    others: list[Other]
    average: Average | None
    """None if a task is missing."""


def read_scores(adapter: Path, fingerprint: str | None) -> tuple[Measured | None, str | None]:
    """The scores of an adapter on a base, None if there are none; and a sentence if there are some that can't be used.

    Args:
        adapter: its directory.
        fingerprint: of the base's weights; None if nobody knows them.
    """
    path = adapter.parent / EVALUATION / SCORES
    if not path.exists():
        return None, None
    content = json_if_readable(path, sizes.SETTINGS)
    tasks, model = member(content, "tasks"), member(content, "model")
    found = [_score(content, name) for name in TASKS if name in tasks]
    others = _others(member(content, "others"))
    scores = [score for score in found if score is not None]
    if not (scores or others) or len(scores) < len(found):
        return None, f"{path}: no scores can be read, so they are left out"
    same_base = fingerprint is None or model.get("fingerprint") == fingerprint
    if not same_base or model.get("adapter_sha256") != sha256(adapter / WEIGHTS):
        return None, f"{path}: its scores are of another base or adapter, so they are left out"
    return Measured(scores, others, _average(content)), None


def _score(content: dict[str, Any], name: str) -> Score | None:
    measured, task = member(member(content, "tasks"), name), TASKS[name]
    value, error, questions = (measured.get(field) for field in ("score", "standard_error", "questions"))
    if not (_is_share(value) and _is_share(error) and type(questions) is int):
        return None
    in_chat = member(content, "settings").get("chat") is True
    prompts = member(member(content, "prompts"), name)
    drawn_from = prompts.get("examples_from", task.examples)
    other_rows = prompts.get("equal") is False or (task.examples is not None and drawn_from != task.examples)
    base = member(member(member(content, "before"), "tasks"), name)
    difference = member(member(member(member(content, "comparison"), "tasks"), name), "difference")
    return Score(task, value, error, questions, in_chat, other_rows, _before(base, difference))


def _average(content: dict[str, Any]) -> Average | None:
    value, error = (member(content, "average").get(field) for field in ("score", "standard_error"))
    if not (_is_share(value) and _is_share(error)):
        return None
    base, difference = (member(member(content, which), "average") for which in ("before", "comparison"))
    return Average(value, error, _before(base, difference))


def _before(base: dict[str, Any], difference: dict[str, Any]) -> Before | None:
    value, error, change, change_error = (
        base.get("score"),
        base.get("standard_error"),
        difference.get("value"),
        difference.get("error"),
    )
    if _is_share(value) and _is_share(error) and _is_finite(change) and abs(change) <= 1 and _is_share(change_error):
        return Before(value, error, change, change_error)
    return None


def _others(tasks: dict[str, Any]) -> list[Other]:
    found = []
    for task in tasks:
        of_task = member(tasks, task)
        shots, questions = (
            count if type(count := of_task.get(what)) is int else None for what in ("shots", "questions")
        )
        metrics = member(of_task, "metrics")
        for metric in metrics:
            value, error = (member(metrics, metric).get(what) for what in ("value", "standard_error"))
            if _is_finite(value):
                found.append(Other(task, metric, shots, questions, value, error if _is_finite(error) else None))
    return found


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) and math.isfinite(value)


def _is_share(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) and 0 <= value <= 1


def describe_scores(measured: Measured) -> str:
    """The section on the evaluation."""
    parts = ([_described(measured.scores, measured.average)] if measured.scores else []) + (
        [_described_others(measured.others)] if measured.others else []
    )
    return "\n\n".join(parts) + "\n"


def _described(scores: list[Score], average: Average | None) -> str:
    within = ", within the chat template" if scores[0].in_chat else ""
    has_before = all(score.before is not None for score in scores)
    heads = ["task", "shots", *(["base"] if has_before else []), "score", *(["difference"] if has_before else [])]
    lines = [
        "Base and adapter, scored by `python -m inference task=evaluate` in the manner of the Open LLM Leaderboard (v1)"
        f"{within}: percent with standard errors{', those of differences paired' if has_before else ''}.",
        "",
        *_table([*heads, "questions"]),
    ]
    for score in scores:
        task = score.task
        all_ = "" if score.questions == task.rows else f" of {task.rows:,}"
        others = ", other rows than the leaderboard's" if score.other_rows else ""
        cells = _percent(score, has_before)
        lines.append(_row([task.title, str(task.shots), *cells, f"{score.questions:,}{all_}{others}"]))
    if average is not None:
        lines.append(_row(["average", "", *_percent(average, has_before), ""]))
    return "\n".join(lines)


def _percent(score: Score | Average, has_before: bool) -> list[str]:
    """The cells of a score, between the base's and the difference if the table has these."""
    own, before = f"{100 * score.value:.2f} ± {100 * score.error:.2f}", score.before
    if not has_before:
        return [own]
    if before is None:
        return ["", own, ""]
    return [
        f"{100 * before.value:.2f} ± {100 * before.error:.2f}",
        own,
        f"{100 * before.difference:+.2f} ± {100 * before.difference_error:.2f}",
    ]


def _described_others(others: list[Other]) -> str:
    lines = [
        "By lm-evaluation-harness, over the same scorer:",
        "",
        *_table(["task", "metric", "shots", "score", "questions"]),
    ]
    for each in others:
        counts = ["" if count is None else f"{count:,}" for count in (each.shots, each.questions)]
        error = "" if each.error is None else f" ± {each.error:.4f}"
        names = [(plain(name) or "").replace("|", "\\|") for name in (each.task, each.metric)]
        lines.append(_row([*names, counts[0], f"{each.value:.4f}{error}", counts[1]]))
    return "\n".join(lines)


def _table(heads: list[str]) -> list[str]:
    return [_row(heads), "|" + "---|" * len(heads)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def on_the_hub(scores: list[Score]) -> list[EvalResult]:
    """The hub's metadata: of what stands alone, because the hub shows a number without what is said beside it."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=score.task.hub.dataset,
            dataset_name=f"{score.task.title} ({score.task.shots}-shot)",
            dataset_config=score.task.hub.config,
            dataset_split=score.task.hub.split,
            dataset_args={"num_few_shot": score.task.shots},
            metric_type=METRICS[score.task.metric][0],
            metric_name=METRICS[score.task.metric][1],
            metric_value=round(100 * score.value, 2),
            metric_args={"standard_error": round(100 * score.error, 2), "questions": score.questions},
        )
        for score in scores
        if score.stands_alone
    ]
