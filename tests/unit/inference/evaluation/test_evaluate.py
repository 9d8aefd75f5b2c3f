"""The whole task on a small model: what is written, what a kill leaves, what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.program.errors import UserError
from inference.config import SCORED, InferenceConfig
from inference.evaluation import answering
from inference.evaluation.answering import choice_score
from inference.evaluation.evaluate import evaluate
from inference.evaluation.journal import open_journal
from inference.evaluation.leaderboard.questions import Question, final_number
from inference.evaluation.results import read_earlier
from tests.support.adapters import make_adapter, make_base
from tests.support.leaderboard import write_rows


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter and rows."""
    top = tmp_path_factory.mktemp("given")
    base = make_base(vocab_size=32_000, max_position_embeddings=4096)
    base.save_pretrained(str(top / "base"))
    adapted = make_adapter(top / "adapter", base, target_modules=["q_proj", "v_proj"])
    assert adapted is not base
    write_rows(top / "rows")
    return top


def config(given: Path, output: Path, **changes: Any) -> InferenceConfig:
    models = {"base": str(given / "base"), "adapter": str(given / "adapter"), "dtype": "float32"}
    rows = {"data": str(given / "rows"), "output": str(output), "max_tokens": 512}
    asked = InferenceConfig(task="evaluate", **(models | rows | changes))
    asked.check()
    return asked


QUICK = ["arc", "truthfulqa", "winogrande"]


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("tasks", "average", "comparison", "before", "prompts", "model", "settings")}


def test_all_six_tasks_before_and_after(given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = evaluate(config(given, tmp_path / "out", compare="base"))
    assert list(result["tasks"]) == list(SCORED)
    assert result == json.loads((tmp_path / "out" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 + 5 + 10 + 5 + 5 + 2
    of_base = [json.loads(line) for line in (tmp_path / "out" / "questions_of_base.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [line["prompt"] for line in of_base]
    assert lines != of_base  # folding the adapter changed something
    for name in SCORED:
        after, before = ([line["score"] for line in which if line["task"] == name] for which in (lines, of_base))
        assert result["tasks"][name]["score"] == pytest.approx(sum(after) / len(after))
        pair = result["comparison"]["tasks"][name]
        assert pair["difference"]["value"] == pytest.approx(sum(after) / len(after) - sum(before) / len(before))
        assert pair["won"] == sum(new > old for new, old in zip(after, before, strict=True))
    assert result["average"]["score"] == pytest.approx(sum(t["score"] for t in result["tasks"].values()) / 6)
    assert result["prompts"]["arc"]["equal"] is False
    assert result["prompts"]["gsm8k"]["stop"] == [":", "Question:", "Question"]
    assert not list((tmp_path / "out").glob("*.part"))
    shown = capfd.readouterr().out
    for text in ("63.91 ± 1.40", "Fewer than 400 questions", "average", "not the leaderboard's", "Holm"):
        assert text in shown

    with pytest.raises(UserError, match="it holds an evaluation"):
        evaluate(config(given, tmp_path / "out"))


def test_an_earlier_evaluation_is_compared_as_the_base_is(given: Path, tmp_path: Path) -> None:
    together = evaluate(config(given, tmp_path / "together", tasks=QUICK, compare="base"))
    base = config(given, tmp_path / "base", tasks=QUICK)
    base.adapter = None
    evaluate(base)
    apart = evaluate(config(given, tmp_path / "apart", tasks=QUICK, compare=str(tmp_path / "base")))
    assert apart["comparison"] == together["comparison"]
    assert apart["tasks"] == together["tasks"]

    other = write_rows(tmp_path / "rows", documents=6)
    changed = config(given, tmp_path / "changed", tasks=QUICK, compare=str(tmp_path / "base"))
    changed.data = str(other)
    with pytest.raises(UserError, match=r"asked with another prompt|has no answer"):
        evaluate(changed)
    chat = config(given, tmp_path / "chat", tasks=QUICK, compare=str(tmp_path / "base"), chat=True)
    with pytest.raises(UserError, match=r"^chat=True: the questions of compare=.* were asked with chat=False"):
        evaluate(chat)
    with pytest.raises(UserError, match="there is no evaluation"):
        evaluate(config(given, tmp_path / "none", tasks=QUICK, compare=str(tmp_path / "rows")))


@pytest.mark.parametrize("name", ["results.json", "questions.jsonl"])
@pytest.mark.parametrize("content", ["5", "[" * 5000, '{"settings": 5}', '{"task": "arc", "row": "x"}', None])
def test_an_earlier_evaluation_that_is_damaged_is_refused(tmp_path: Path, name: str, content: str | None) -> None:
    """None stands for a pipe into which nobody writes."""
    (tmp_path / "results.json").write_text('{"settings": {}}')
    (tmp_path / "questions.jsonl").write_text('{"task": "arc", "row": 0, "score": 1.0, "prompt": "00"}\n')
    assert read_earlier(tmp_path).questions.keys() == {("arc", "arc", 0)}
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name) if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"it can't be read .*; evaluate again"):
        read_earlier(tmp_path)


@pytest.mark.parametrize("score", ["1e308", "-1", "1e400", "true", "9" + "0" * 350])
def test_a_score_that_is_no_share_is_refused(tmp_path: Path, score: str) -> None:
    (tmp_path / "results.json").write_text('{"model": {}}')
    (tmp_path / "questions.jsonl").write_text(f'{{"task": "arc", "row": 0, "score": {score}, "prompt": "00"}}\n')
    with pytest.raises(UserError, match=r"it can't be read .*; evaluate again"):
        read_earlier(tmp_path)


@pytest.mark.parametrize("answers", ['["x", "y"]', "[1, null]", "[1.0]", "[1.0, 2.0, 3.0]", "[[], {}]"])
def test_answers_that_a_journal_can_not_hold_are_refused(tmp_path: Path, answers: str) -> None:
    path = tmp_path / "answers.part"
    path.write_text(f'{{"evaluation": {{}}}}\n{{"unit": "a", "answers": {answers}}}\n')
    with open_journal(path, {}) as journal:
        assert "a" in journal
        with pytest.raises(UserError, match=r"answers.part is damaged \(.*\); remove it to start over"):
            journal.answers("a", float, 2)


def test_a_journal_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers.part")
    with pytest.raises(UserError, match="is not a regular file"), open_journal(tmp_path / "answers.part", {}):
        pass


def test_a_killed_run_goes_on_and_gives_the_same_numbers(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(config(given, tmp_path / "whole", tasks=QUICK, compare="base"))
    units: list[str] = []
    real: Callable[..., Any] = answering.log_likelihoods

    def counted(model: Any, packed: Any) -> Any:
        units.append("unit")
        if len(units) in (2, 6):
            raise KeyboardInterrupt
        return real(model, packed)

    monkeypatch.setattr(answering, "log_likelihoods", counted)
    output = tmp_path / "killed"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(given, output, tasks=QUICK, compare="base"))
        for journal in output.glob("*.part"):  # a line that was half written
            with journal.open("ab") as file:
                file.write(b'{"unit": "abc", "answers": [1.0, ')
    assert not (output / "results.json").exists()
    again = evaluate(config(given, output, tasks=QUICK, compare="base"))
    assert numbers(again) == numbers(whole)
    asked = len(units) - 2  # two were interrupted
    units[:] = ["unit"] * 6  # no more interruptions
    evaluate(config(given, tmp_path / "count", tasks=QUICK, compare="base"))
    assert asked == len(units) - 6  # nothing was asked twice


def test_a_journal_of_another_model_or_setting_is_refused(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answering, "log_likelihoods", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(given, tmp_path / "out", tasks=QUICK))
    with pytest.raises(UserError, match=r"bos=always: the evaluation that .* belongs to had bos=leaderboard"):
        evaluate(config(given, tmp_path / "out", tasks=QUICK, bos="always"))
    with pytest.raises(UserError, match=r"weights=nf4: the evaluation that .* belongs to had weights=bf16"):
        evaluate(config(given, tmp_path / "out", tasks=QUICK, weights="nf4"))
    other = config(given, tmp_path / "out", tasks=QUICK)
    other.adapter = None
    with pytest.raises(UserError, match="adapter_sha256=None: the evaluation"):
        evaluate(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "answers.part").write_text("my notes\n")
    with pytest.raises(UserError, match="no evaluation wrote"):
        evaluate(config(given, tmp_path / "mine", tasks=QUICK))
    assert (tmp_path / "mine" / "answers.part").read_text() == "my notes\n"


def test_a_base_with_fewer_pieces_than_the_tokenizer_is_refused(given: Path, tmp_path: Path) -> None:
    small = make_base(vocab_size=1000)
    small.save_pretrained(str(tmp_path / "small"))
    with pytest.raises(UserError, match=r"^base=.*: its vocabulary has 1,000 pieces, and the tokenizer's has 32,000"):
        evaluate(config(given, tmp_path / "out", base=str(tmp_path / "small")))
    assert not (tmp_path / "out").exists()


def test_the_penalty_of_other_tasks_changes_no_score(given: Path, tmp_path: Path) -> None:
    plain, penalised = (
        evaluate(config(given, tmp_path / str(penalty), tasks=["gsm8k"], limit=2, repetition_penalty=penalty))
        for penalty in (1.0, 3.0)
    )
    assert plain["tasks"] == penalised["tasks"]
    texts = [(tmp_path / str(penalty) / "questions.jsonl").read_text() for penalty in (1.0, 3.0)]
    assert texts[0] == texts[1]


def test_limit_takes_the_first_of_the_same_questions(given: Path, tmp_path: Path) -> None:
    evaluate(config(given, tmp_path / "all", tasks=QUICK))
    evaluate(config(given, tmp_path / "some", tasks=QUICK, limit=2))

    def prompts(name: str) -> list[str]:
        rows = [json.loads(line) for line in (tmp_path / name / "questions.jsonl").read_text().splitlines()]
        return [row["prompt"] for row in rows if row["task"] == "arc"]

    assert prompts("some") == prompts("all")[:2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": []}, "tasks: there is nothing to score"),
        ({"tasks": ["arc", "arc"]}, "tasks=arc: it is named twice"),
        ({"limit": 1}, "limit=1: one question has no standard error"),
        ({"bos": "maybe"}, "bos=maybe"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_bad_settings_are_one_sentence(given: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config(given, tmp_path / "out", **changes)


def make_question(task: str, choices: tuple[str, ...], gold: Any) -> Question:
    return Question(task, task, 0, "q", "q", ("q",) * len(choices), choices, gold, "q")


def test_what_answers_are_worth() -> None:
    # Per character, without the space; the first of equals.
    question = make_question("arc", (" abcd", " ab"), 0)
    assert choice_score(question, [-3.0, -2.0]) == 1.0
    assert choice_score(make_question("winogrande", (" abcd", " ab"), 0), [-3.0, -2.0]) == 0.0
    assert choice_score(make_question("mmlu", (" A", " B"), 0), [-1.0, -1.0]) == 1.0
    # The probability of what comes before the first false choice, as the leaderboard counted.
    question = make_question("truthfulqa", (" a", " b", " c"), (1, 0, 1))
    assert choice_score(question, [-1000.0, -1000.0, -1000.0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 18", "18"),
        ("#### 18.", "18."),
        ("#### $18", None),
        ("The answer is 18.", None),
        ("#### 18,000 #### 7", "18000"),
        ("#### -5", "-5"),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    """As the leaderboard's version read it: `18.` is not 18 there."""
    assert final_number(text) == number
