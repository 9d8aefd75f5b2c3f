"""What an evaluation beside the adapter measured → a section of the model card, and what the hub shows of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import EvalResult

from data.disk.adapter_directory import EVALUATION, SCORES, WEIGHTS
from data.disk.files import sha256
from data.disk.formats import sizes
from data.disk.plain_text import json_if_readable, member
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
    """Whether the prompts are known to be others than the leaderboard's."""

    @property
    def stands_alone(self) -> bool:
        """Whether every question was asked, and as the leaderboard asks it."""
        return self.questions == self.task.rows and not self.in_chat and not self.other_rows


def read_scores(adapter: Path, fingerprint: str | None) -> tuple[list[Score], str | None]:
    """The scores of an adapter on a base, and a sentence if there are some that can't be used.

    Args:
        adapter: its directory.
        fingerprint: of the base's weights; None if nobody knows them.
    """
    path = adapter.parent / EVALUATION / SCORES
    if not path.exists():
        return [], None
    content = json_if_readable(path, sizes.SETTINGS)
    tasks, model = member(content, "tasks"), member(content, "model")
    found = [_score(content, name) for name in TASKS if name in tasks]
    scores = [score for score in found if score is not None]
    if not scores or len(scores) < len(found):
        return [], f"{path}: no scores of the card's tasks can be read, so they are left out"
    same_base = fingerprint is None or model.get("fingerprint") == fingerprint
    if not same_base or model.get("adapter_sha256") != sha256(adapter / WEIGHTS):
        return [], f"{path}: its scores are of another base or adapter, so they are left out"
    return scores, None


def _score(content: dict[str, Any], name: str) -> Score | None:
    measured = member(member(content, "tasks"), name)
    value, error, questions = (measured.get(field) for field in ("score", "standard_error", "questions"))
    if not (_is_share(value) and _is_share(error) and type(questions) is int):
        return None
    in_chat = member(content, "settings").get("chat") is True
    other_rows = member(member(content, "prompts"), name).get("equal") is False
    return Score(TASKS[name], value, error, questions, in_chat, other_rows)


def _is_share(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) and 0 <= value <= 1


def describe_scores(scores: list[Score]) -> str:
    """The section on the evaluation."""
    within = ", within the chat template" if scores[0].in_chat else ""
    lines = [
        "Base and adapter, scored by `python -m inference task=evaluate` in the manner of the Open LLM Leaderboard (v1)"
        f"{within}: percent with standard errors.",
        "",
        "| task | shots | score | questions |",
        "|---|---|---|---|",
    ]
    for score in scores:
        task = score.task
        all_ = "" if score.questions == task.rows else f" of {task.rows:,}"
        others = ", other rows than the leaderboard's" if score.other_rows else ""
        questions = f"{score.questions:,}{all_}{others}"
        lines.append(
            f"| {task.title} | {task.shots} | {100 * score.value:.2f} ± {100 * score.error:.2f} | {questions} |"
        )
    return "\n".join(lines) + "\n"


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
