"""Rows of the card's six tasks: the leaderboard's own if they are at hand, and some in the same forms."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from inference.evaluation.leaderboard.rows import TaskRows, read_task

EVAL = Path(__file__).parents[3] / "shared" / "eval"
needs_eval = pytest.mark.skipif(not EVAL.is_dir(), reason="the leaderboard's rows (../shared/eval) are not here")


@cache
def rows_of(name: str) -> TaskRows:
    """The task's rows in ../shared/eval, read once."""
    return read_task(name, str(EVAL))


WORDS = ["sun", "moon", "sea", "hill", "fire", "lake", "bird", "stone", "wind", "leaf", "rain", "salt"]


def write_rows(top: Path, documents: int = 5) -> Path:
    """Rows of all six tasks, in the forms of their datasets."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        path = top / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arc() -> dict[str, Any]:
        choices = {"text": [words(2) for _ in range(4)], "label": list("ABCD")}
        return {"id": words(3), "question": f"{words(4)}?", "choices": choices, "answerKey": draw.choice("ABCD")}

    def hellaswag() -> dict[str, Any]:
        endings = [words(3) for _ in range(4)]
        start = {"activity_label": words(1), "ctx_a": f"{words(4)}.", "ctx_b": words(2)}
        return start | {"endings": endings, "label": draw.choice("0123")}

    def mmlu(subject: str) -> dict[str, Any]:
        choices = [words(1) for _ in range(4)]
        return {"question": words(4), "subject": subject, "choices": choices, "answer": draw.randrange(4)}

    def truthfulqa() -> dict[str, Any]:
        targets = {"choices": [words(3) for _ in range(4)], "labels": [1, 1, 0, 0]}
        return {"question": f"{words(4)}?", "mc1_targets": targets, "mc2_targets": targets}

    def winogrande() -> dict[str, Any]:
        first, second = draw.sample(WORDS, 2)
        options = {"option1": first, "option2": second, "answer": draw.choice("12")}
        return {"sentence": f"{words(3)} _ {words(3)}.", **options}

    def gsm8k() -> dict[str, Any]:
        return {"question": f"{words(4)}?", "answer": f"{words(3)}.\n#### {draw.randrange(9)}"}

    write("arc_challenge/test", [arc() for _ in range(documents)])
    write("arc_challenge/train", [arc() for _ in range(26)])
    write("hellaswag/validation", [hellaswag() for _ in range(documents)])
    write("hellaswag/train", [hellaswag() for _ in range(11)])
    write("mmlu/test", [mmlu(subject) for subject in ("anatomy", "virology") for _ in range(documents)])
    write("mmlu/dev", [mmlu(subject) for subject in ("anatomy", "virology") for _ in range(5)])
    write("truthfulqa/multiple_choice", [truthfulqa() for _ in range(documents)])
    write("winogrande/validation", [winogrande() for _ in range(documents)])
    write("winogrande/train", [winogrande() for _ in range(8)])
    write("gsm8k/test", [gsm8k() for _ in range(2)])
    write("gsm8k/train", [gsm8k() for _ in range(8)])
    return top
