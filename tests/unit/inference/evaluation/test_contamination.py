"""Which questions were trained on, by the rows of a dataset that is really prepared."""

import json
import math
import shutil
from array import array
from pathlib import Path
from typing import Any

import pytest

from configs.program.errors import UserError
from data.config import PrepareConfig
from data.prepare import prepare
from data.template import ChatTokenizer
from inference.evaluation.answering import Answered
from inference.evaluation.contamination import trained_on
from inference.evaluation.leaderboard.questions import Question
from inference.evaluation.results import score, without_nan

SEEN = "Which of these four answers explains best why a rainbow stands in the sky after rain in summer?"
UNSEEN = "Which of these four answers explains best how a lake can freeze while deep water below stays warm?"
SHORT = "Why does ice float?"


def asked(text: str) -> Question:
    return Question("arc", "arc", 0, "q", "q", ("q",), (" because",), 0, text)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three conversations in packed rows; one holds a question in its middle, in other capitals."""
    top = tmp_path_factory.mktemp("trained")
    rows = [
        {"instruction": "Say something about ponds.", "output": "Ponds are small."},
        {"instruction": f"Quiz time! {SEEN.upper()} Choose.", "output": "The first one."},
        {"instruction": SHORT, "output": "It is lighter than water."},
    ]
    (top / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(
        files=[str(top / "rows.jsonl")], output=str(top / "prepared"), seq_len=256, eval_fraction=0.0, workers=1
    )
    config.check()
    prepare(config)
    return top / "prepared"


def test_a_question_is_found_wherever_it_stands_in_a_row(dataset: Path) -> None:
    questions = [asked(text) for text in (SEEN, UNSEEN, f"Before it {SEEN}", SHORT)]
    assert trained_on(questions, dataset, ChatTokenizer.load()) == [True, False, True, False]
    assert trained_on([asked(SHORT)], dataset, ChatTokenizer.load()) == [False]


def test_the_others_have_a_score_of_their_own() -> None:
    answered = [Answered(asked(str(number)), float(number % 2)) for number in range(4)]
    seen = [True, False, False, True]
    clean = {id(each.question): not was for each, was in zip(answered, seen, strict=True)}
    result = score(answered, clean)
    assert (result["score"], result["trained_on"]) == (0.5, 2)
    assert (result["clean"]["questions"], result["clean"]["score"]) == (2, 0.5)
    assert score(answered, dict.fromkeys(clean, False))["clean"] is None


def test_a_single_question_has_no_standard_error() -> None:
    """JSON knows no NaN: files that hold one are refused by what reads them."""
    one = Answered(asked("one"), 1.0)
    result: dict[str, Any] = score([one], {id(one.question): True})
    assert math.isnan(result["clean"]["standard_error"])
    assert json.loads(json.dumps(without_nan(result), allow_nan=False))["clean"]["standard_error"] is None


def test_a_dataset_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^trained_on=.*gone"):
        trained_on([asked(SEEN)], tmp_path / "gone", ChatTokenizer.load())


def test_a_dataset_whose_rows_have_changed_is_one_sentence(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    content = bytearray((copy / "train" / "rows.arrow").read_bytes())
    content[content.index(array("H", ChatTokenizer.load().encode_text("Ponds")).tobytes()) + 1] = 0xFF  # no such id
    (copy / "train" / "rows.arrow").write_bytes(content)
    with pytest.raises(UserError, match=r"^trained_on=.*train/rows\.arrow is not whole"):
        trained_on([asked(SEEN)], copy, ChatTokenizer.load())
