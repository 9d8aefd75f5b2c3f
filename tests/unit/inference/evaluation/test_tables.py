"""The result on the screen: 80 columns hold it, and every published number has its source."""

import re
from typing import Any

import pytest

from inference.evaluation.leaderboard.tasks import TASKS
from inference.evaluation.results import published
from inference.evaluation.tables import show


def result_of(names: list[str], score: float = 0.6391) -> dict[str, Any]:
    tasks = {name: {"questions": TASKS[name].rows, "score": score, "standard_error": 0.0139} for name in names}
    prompts = {"documents": 1, "documents_of_the_leaderboard": 1, "examples_from": "train", "groups": 1}
    return {
        "tasks": tasks,
        "average": {"score": score, "standard_error": 0.005} if len(names) == 6 else None,
        "prompts": {name: prompts | {"documents": TASKS[name].rows, "hash": "0" * 16, "equal": True} for name in names},
        "published": published(tasks),
        "comparison": None,
        "before": None,
        "others": {},
        "compared_with": None,
    }


def test_what_others_published_are_rows_with_sources(capsys: pytest.CaptureFixture[str]) -> None:
    show(result_of(list(TASKS)))
    shown = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "ARC 1,172 63.91 ± 1.39 63.91 ± 1.40 +0.00 (+0.0 SE)" in rows
    assert "average 63.91 ± 0.50 65.27 ± 0.48 -1.36 (-2.0 SE)" in rows
    assert "ARC [1] 63.91 ± 1.39 64.93 ± 1.39 -1.02 (-0.5 SE)" in rows
    assert "TruthfulQA [1] 63.91 ± 1.39 58.65 ± 1.60 +5.26 (+2.5 SE)" in rows
    assert "average [2] 63.91 ± 0.50 72.70 -8.79" in rows  # its error is not known
    for number, text in (("1", "the author's own run"), ("2", "the base, Mixtral-8x7B-Instruct-v0.1")):
        assert re.search(rf"^\[{number}\] {text}.* \(.+\)\.$", shown, re.MULTILINE)
    table = shown.splitlines()[: shown.splitlines().index(next(x for x in shown.splitlines() if "Prompts" in x))]
    assert max(map(len, table)) <= 80


def test_a_score_without_a_spread_is_no_number_of_standard_errors_away(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(["mmlu"], 0.0)
    result["tasks"]["mmlu"] |= {"questions": 12, "standard_error": 0.0}
    show(result)
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "MMLU 12 of 14,042 0.00 ± 0.00 64.29 ± 0.49 -64.29" in shown


def test_of_tasks_that_were_not_scored_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    show(result_of(["winogrande"]))
    shown = capsys.readouterr().out
    assert "Winogrande" in shown
    assert "the author" not in shown
    assert "72.70" not in shown


def test_of_tasks_of_the_harness_alone_the_card_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"acc": {"value": 0.5, "standard_error": 0.25}, "bleu": {"value": 17.5, "standard_error": None}}
    of_base = {"acc": {"value": 0.25, "standard_error": float("nan")}, "bleu": {"value": None, "standard_error": None}}
    both = [{"ifeval": {"shots": 0, "questions": 1541, "metrics": each}} for each in (metrics, of_base)]
    show(result_of([]) | {"others": both[0], "before": {"others": both[1]}, "comparison": {"tasks": {}}})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "Of lm-eval",
        "task metric questions before score",
        "ifeval acc 1,541 0.2500 0.5000 ± 0.2500",
        "ifeval bleu 1,541 – 17.5000",
    ]
