"""The six tasks of the model card's table, as the Open LLM Leaderboard (v1) scored them, and what was published.

Where it comes from: the leaderboard's archive page (shots, metrics), lm-evaluation-harness b281b0921 (splits), the
leaderboard's result files (hashes), the card (scores).
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from data.stages.leaderboard import HUB_TASKS, HubTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of the table."""

    metric: str
    """`acc_norm`: the choice with the highest log-likelihood per character; `acc`: with the highest log-likelihood;
    `mc2`: the probability of the true choices; `exact`: the number after ####."""
    shots: int
    folder: str
    """Its folder in `data=DIR`."""
    hub: HubTask
    """Where the hub keeps its rows; `hub.split` is scored."""
    commit: str
    """The commit of the hub's dataset."""
    file: str
    """How the name of the scored split's file begins in `folder`."""
    examples: str | None
    """The split from which examples are drawn, and how the name of its file begins; None if there are none."""
    rows: int
    """Rows of the scored split in the leaderboard's edition."""
    card: float
    """The card's score, in percent."""
    card_error: float
    """Its standard error: of the share of right answers among the rows; of TruthfulQA the author's own run's."""
    name_there: str
    """The leaderboard's name; for MMLU with `{}` for the subject."""

    @property
    def title(self) -> str:
        """How the card calls it."""
        return self.hub.title


TASKS = {
    "arc": Task(
        metric="acc_norm",
        shots=25,
        folder="arc_challenge",
        hub=HUB_TASKS["arc"],
        commit="210d026faf9955653af8916fad021475a3f00453",
        file="test",
        examples="train",
        rows=1172,
        card=63.91,
        card_error=1.40,
        name_there="harness|arc:challenge|25",
    ),
    "hellaswag": Task(
        metric="acc_norm",
        shots=10,
        folder="hellaswag",
        hub=HUB_TASKS["hellaswag"],
        commit="218ec52e09a7e7462a5400043bb9a69a41d06b76",
        file="validation",
        examples="train",
        rows=10_042,
        card=84.14,
        card_error=0.36,
        name_there="harness|hellaswag|10",
    ),
    "mmlu": Task(
        metric="acc",
        shots=5,
        folder="mmlu",
        hub=HUB_TASKS["mmlu"],
        commit="c30699e8356da336a370243923dbaf21066bb9fe",
        file="test",
        examples="dev",
        rows=14_042,
        card=64.29,
        card_error=0.49,
        name_there="harness|hendrycksTest-{}|5",
    ),
    "truthfulqa": Task(
        metric="mc2",
        shots=0,
        folder="truthfulqa",
        hub=HUB_TASKS["truthfulqa"],
        commit="741b8276f2d1982aa3d5b832d3ee81ed3b896490",
        file="multiple_choice",
        examples=None,
        rows=817,
        card=59.53,
        card_error=1.60,
        name_there="harness|truthfulqa:mc|0",
    ),
    "winogrande": Task(
        metric="acc",
        shots=5,
        folder="winogrande",
        hub=HUB_TASKS["winogrande"],
        commit="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        file="validation",
        examples="train",
        rows=1267,
        card=74.03,
        card_error=1.23,
        name_there="harness|winogrande|5",
    ),
    "gsm8k": Task(
        metric="exact",
        shots=5,
        folder="gsm8k",
        hub=HUB_TASKS["gsm8k"],
        commit="e53f048856ff4f594e959d75785d2c2d37b678ee",
        file="test",
        examples="train",
        rows=1319,
        card=45.72,
        card_error=1.37,
        name_there="harness|gsm8k|5",
    ),
}

GSM8K_STOPS = (":", "Question:", "Question")
GSM8K_TOKENS = 256
"""Where the leaderboard's version ended an answer of GSM8K."""


@dataclass(frozen=True, slots=True)
class Published:
    """A score that stands beside ours."""

    task: str
    """Of `TASKS`, or `average`."""
    score: float
    """In percent, as its error."""
    error: float | None
    """Standard error; None if it is not known."""
    whose: str
    source: str


_CARD = ("the card", "OpenHermes-Mixtral-8x7B on the Open LLM Leaderboard, 2023-12-23")
_AUTHOR = ("the author's own run of the card's model", "the card's first version, before the leaderboard had run it")
_BASE = ("the base, Mixtral-8x7B-Instruct-v0.1", "the same leaderboard, as the card of mera-mix-4x7B quotes it")

PUBLISHED = (
    *(Published(name, task.card, task.card_error, *_CARD) for name, task in TASKS.items()),
    Published("average", 65.27, 0.48, *_CARD),
    Published("arc", 64.93, 1.39, *_AUTHOR),
    Published("truthfulqa", 58.65, 1.60, *_AUTHOR),
    Published("average", 72.7, None, *_BASE),
)
"""The rows of the table, the card's first."""


@cache
def published_hashes() -> dict[str, dict[str, Any]]:
    """By the leaderboard's names: `documents`, `hash_examples`, `hash_full_prompts` and where they were seen."""
    content = files("inference.evaluation.leaderboard").joinpath("hashes.json").read_text(encoding="utf-8")
    tasks: dict[str, dict[str, Any]] = json.loads(content)["tasks"]
    return tasks
