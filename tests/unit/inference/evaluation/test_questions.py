"""The leaderboard's prompts: its own hashes where its rows are at hand, and rows written for these tests."""

from pathlib import Path

import pytest

from configs.program.errors import UserError
from inference.evaluation.leaderboard.questions import PRIMER, Row, hash_of, plain_steps, questions_of
from inference.evaluation.leaderboard.rows import read_task
from inference.evaluation.leaderboard.tasks import TASKS, published_hashes
from inference.evaluation.results import describe_prompts, said_of_prompts
from tests.support.leaderboard import needs_eval, rows_of


def arc(question: str, answer: str = "B") -> Row:
    choices = {"text": ["one", "two"], "label": ["A", "B"]}
    return {"id": question, "question": question, "choices": choices, "answerKey": answer}


@needs_eval
@pytest.mark.parametrize("name", ["arc", "mmlu", "truthfulqa", "winogrande", "gsm8k"])
def test_prompts_have_the_hashes_that_the_leaderboard_published(name: str) -> None:
    rows = rows_of(name)
    assert len(rows.questions) == TASKS[name].rows
    of_group: dict[str, list[str]] = {}
    queries: dict[str, list[str]] = {}
    for question in rows.questions:
        of_group.setdefault(question.group, []).append(question.prompt)
        queries.setdefault(question.group, []).append(question.query)
    known = {group: published_hashes().get(TASKS[name].name_there.format(group)) for group in of_group}
    assert sum(entry is not None for entry in known.values()) == (32 if name == "mmlu" else 1)
    for group, entry in known.items():
        if entry is not None:
            assert entry["documents"] == len(of_group[group])
            assert entry["hash_full_prompts"] == hash_of(of_group[group]), group
            if name != "truthfulqa":
                assert entry["hash_examples"] == hash_of(queries[group]), group
    prompts = describe_prompts(name, rows)
    assert prompts["equal"] is True
    assert said_of_prompts(prompts).startswith("the leaderboard's, hash equal")


@needs_eval
def test_hellaswag_without_its_training_rows_says_that_its_examples_are_not_checked() -> None:
    rows = rows_of("hellaswag")
    assert rows.drawn_from == "validation"
    assert all(question.query not in question.prompt[: -len(question.query)] for question in rows.questions)
    prompts = describe_prompts("hellaswag", rows)
    assert prompts["equal"] is None
    assert "not checked" in said_of_prompts(prompts)


def test_a_changed_letter_in_an_example_changes_the_hash() -> None:
    documents = [arc(f"Q{number}") for number in range(4)]
    examples = [arc(f"E{number}") for number in range(30)]
    before = hash_of(question.prompt for question in questions_of("arc", documents, examples, 25))
    changed = [arc(f"E{number}", "A" if number == 7 else "B") for number in range(30)]
    assert hash_of(question.prompt for question in questions_of("arc", documents, changed, 25)) != before


def test_examples_are_the_documents_own_whatever_else_is_scored() -> None:
    """The first documents of the shuffled order get the same examples, as a limited run takes them."""
    documents = [arc(f"Q{number}") for number in range(8)]
    examples = [arc(f"E{number}") for number in range(40)]
    questions = questions_of("arc", documents, examples, 3)
    assert sorted(question.number for question in questions) == list(range(8))
    assert [question.number for question in questions] != list(range(8))
    assert questions == questions_of("arc", documents, examples, 3)
    assert all(question.prompt.count("\n\n") == 3 for question in questions)


def test_without_other_rows_a_document_is_never_its_own_example() -> None:
    documents = [arc(f"Q{number}") for number in range(6)]
    for question in questions_of("arc", documents, documents, 5):
        assert question.prompt.count(f"Q{question.number}\n") == 1
        assert question.prompt.count("Question:") == 6


def test_each_task_is_asked_in_its_own_words() -> None:
    (question,) = questions_of("arc", [arc("How many?")], [], 0)
    assert (question.prompt, question.choices, question.gold) == ("Question: How many?\nAnswer:", (" one", " two"), 1)

    row = {"question": " Who? ", "subject": "high_school_physics", "choices": list("wxyz"), "answer": 2}
    (question,) = questions_of("mmlu", [row], [row | {"question": "E"}], 1)
    head = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    listed = "A. w\nB. x\nC. y\nD. z\nAnswer:"
    assert question.prompt == f"{head}E\n{listed} C\n\nWho?\n{listed}"
    assert (question.choices, question.gold, question.group) == ((" A", " B", " C", " D"), 2, "high_school_physics")

    row = {"sentence": "The cat sat by the _ and purred .", "option1": "fire", "option2": "lake", "answer": "1"}
    (question,) = questions_of("winogrande", [row], [], 0)
    assert question.contexts == ("The cat sat by the fire", "The cat sat by the lake")
    assert (question.choices, question.gold) == ((" and purred .",) * 2, 0)

    row = {"question": "Sky?", "mc2_targets": {"choices": ["blue", "azure", "green"], "labels": [1, 1, 0]}}
    (question,) = questions_of("truthfulqa", [row], [], 0)
    assert question.prompt == f"{PRIMER}\n\nQ: Sky?\nA:"
    assert (question.choices, question.gold) == ((" blue", " azure", " green"), (1, 1, 0))

    row = {"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 1,004"}
    (question,) = questions_of("gsm8k", [row], [row], 1)
    assert question.prompt == f"Question: 2+2?\nAnswer: {row['answer']}\n\nQuestion: 2+2?\nAnswer:"
    assert (question.choices, question.gold) == ((), "1004")

    row = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix.",
        "ctx_b": "then STIR",
        "endings": ["[step] Eat.", "Wait  long."],
        "label": "1",
    }
    (question,) = questions_of("hellaswag", [row], [], 0)
    assert question.query == "Baking: How to bake. Mix. Then stir"
    assert (question.choices, question.gold) == ((" Eat.".replace(" Eat", "  Eat"), " Wait long."), 1)


def test_headings_of_wikihow_leave_its_steps() -> None:
    assert plain_steps("  How to [title] do it. [substeps] Now.") == "How to. do it. Now."


def test_subjects_take_turns() -> None:
    rows = [{"question": f"{s}{n}", "subject": s, "choices": list("wxyz"), "answer": 0} for s in "ab" for n in range(3)]
    assert [question.group for question in questions_of("mmlu", rows, rows, 1)] == list("ababab")


def test_rows_of_another_task_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"question": "Why?"}\n')
    (folder / "train.jsonl").write_text('{"question": "Why?", "answer": "#### 1"}\n' * 6)
    with pytest.raises(UserError, match=r"its rows are not GSM8K's \(a row has no field answer\)"):
        read_task("gsm8k", str(tmp_path))
    with pytest.raises(UserError, match="it has no folder arc_challenge"):
        read_task("arc", str(tmp_path))
    (folder / "train.jsonl").write_text('{"question": "Why?", "answer": "#### 1"}\n' * 4)
    with pytest.raises(UserError, match=r"\(examples are drawn from 5 rows or more, and there are 4\)"):
        read_task("gsm8k", str(tmp_path))
    (folder / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        read_task("gsm8k", str(tmp_path))


@pytest.mark.parametrize("answer", [4, -1, "7"])
def test_an_answer_that_is_none_of_the_choices_is_refused(answer: object) -> None:
    row = {"question": "Who?", "subject": "anatomy", "choices": list("wxyz"), "answer": 0}
    questions_of("mmlu", [row], [row], 1)
    for documents, examples in (([row | {"answer": answer}], [row]), ([row], [row | {"answer": answer}])):
        with pytest.raises(ValueError, match="is none of 4 choices"):
            questions_of("mmlu", documents, examples, 1)
    ending = {"query": "A man", "choices": list("wxyz"), "label": answer}
    with pytest.raises(ValueError, match="is none of 4 choices"):
        questions_of("hellaswag", [ending], [], 0)


def test_a_subject_without_examples_is_named() -> None:
    row = {"question": "Who?", "subject": "anatomy", "choices": list("wxyz"), "answer": 0}
    with pytest.raises(ValueError, match="there are no examples of anatomy"):
        questions_of("mmlu", [row], [row | {"subject": "astronomy"}], 1)
