"""The six tasks of the Open LLM Leaderboard (v1): where the hub keeps their rows, and which columns hold their texts.

`data` keeps them out of training, and `inference` scores them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HubTask:
    """A task's dataset on the hub."""

    dataset: str
    config: str | None
    split: str
    """The one that the leaderboard scores."""
    columns: tuple[str, ...]
    """Question and answers."""


HUB_TASKS = {
    "arc": HubTask("allenai/ai2_arc", "ARC-Challenge", "test", ("question",)),
    "hellaswag": HubTask("Rowan/hellaswag", None, "validation", ("ctx", "endings")),
    "mmlu": HubTask("cais/mmlu", "all", "test", ("question", "choices")),
    "truthfulqa": HubTask("truthfulqa/truthful_qa", "multiple_choice", "validation", ("question", "mc2_targets")),
    "winogrande": HubTask("allenai/winogrande", "winogrande_xl", "validation", ("sentence",)),
    "gsm8k": HubTask("openai/gsm8k", "main", "test", ("question", "answer")),
}
