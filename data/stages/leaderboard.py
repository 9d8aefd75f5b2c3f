"""The six tasks of the Open LLM Leaderboard (v1): where the hub keeps their rows, and which columns hold their texts.

`data` keeps them out of training, and `inference` scores them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HubTask:
    """A task, and its dataset on the hub."""

    title: str
    dataset: str
    config: str | None
    split: str
    """The one that the leaderboard scores."""
    columns: tuple[str, ...]
    """Question and answers."""


ENOUGH = 400
"""With fewer questions of a task, its score is not compared with what was published: the standard error is above 2.4
points then."""

HUB_TASKS = {
    "arc": HubTask("ARC", "allenai/ai2_arc", "ARC-Challenge", "test", ("question",)),
    "hellaswag": HubTask("HellaSwag", "Rowan/hellaswag", None, "validation", ("ctx", "endings")),
    "mmlu": HubTask("MMLU", "cais/mmlu", "all", "test", ("question", "choices")),
    "truthfulqa": HubTask(
        "TruthfulQA", "truthfulqa/truthful_qa", "multiple_choice", "validation", ("question", "mc2_targets")
    ),
    "winogrande": HubTask("Winogrande", "allenai/winogrande", "winogrande_xl", "validation", ("sentence",)),
    "gsm8k": HubTask("GSM8K", "openai/gsm8k", "main", "test", ("question", "answer")),
}
