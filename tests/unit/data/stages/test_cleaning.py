"""What is left out on purpose: duplicates, evaluation data, and what limits and weights say."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.prepared.dataset import PreparedDataset
from data.schema import Conversation, Message
from data.stages.contamination import GRAM, units_of
from data.stages.duplicates import Seen, likeness
from data.stages.intake import copies_of

QUESTION = (
    "A train leaves the station at nine in the morning and travels at sixty miles an hour towards a town that is "
    "three hundred miles away; at what time does it arrive there?"
)


def row(prompt: str, reply: str) -> dict[str, str]:
    return {"instruction": prompt, "output": reply}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def prepare(run_program: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Prepares files into `out`; returns the manifest with the lines of the rejects."""

    def run(files: str, *settings: str) -> dict[str, Any]:
        outcome = run_program("data", f"files=[{files}]", "output=out", "eval_fraction=0", "seq_len=512", *settings)
        assert outcome.exit_code == 0, outcome.stderr
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
        rejects = [json.loads(line) for line in lines]
        counts = manifest["rows"]
        assert counts["in"] == counts["kept"] + counts["rejected"]
        assert counts["rejected"] == len(rejects)
        assert counts["rejected_by_reason"] == Counter(reject["reason"] for reject in rejects)
        return {**manifest, "rejects": rejects}

    return run


def trained_rows(tmp_path: Path, split: str = "train") -> Counter[int]:
    """How often the conversations of each row are in a split."""
    table = getattr(PreparedDataset(tmp_path / "out"), split)
    return Counter(number for i in range(len(table)) for number in table[i].rows)


# Duplicates


def test_exact_duplicates_name_the_row_that_was_kept(prepare: Callable[..., Any], tmp_path: Path) -> None:
    rows = [row(f"Say {n}.", str(n)) for n in range(20)]
    write(tmp_path / "a.jsonl", [*rows[:10], row(" Say 3.", "3\n")])
    (tmp_path / "b.json").write_text(json.dumps([rows[9], *rows[10:], rows[19], row("Say 3.", "three")]))

    assert prepare("a.jsonl,b.json")["rejects"] == []
    rejects = prepare("a.jsonl,b.json", "duplicates=drop")["rejects"]
    assert [(r["file"], r.get("line", r.get("row")), r["reason"], r["kept"]) for r in rejects] == [
        ("a.jsonl", 11, "duplicate", {"file": "a.jsonl", "line": 4}),
        ("b.json", 0, "duplicate", {"file": "a.jsonl", "line": 10}),
        ("b.json", 11, "duplicate", {"file": "b.json", "row": 10}),
    ]


def test_near_duplicates(prepare: Callable[..., Any], tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(120)]
    other = [f"term{n}" for n in range(120)]
    text, changed = " ".join(words), " ".join([*words[:-2], "quite", "different"])
    half = " ".join(words[:60] + other[:60])
    rows = [row("One?", text), row("Two?", " ".join(other)), row("One?", changed), row("One?", half)]
    write(tmp_path / "rows.jsonl", [*rows, row("ONE", text.upper())])

    assert prepare("rows.jsonl", "duplicates=drop")["rejects"] == []
    rejects = prepare("rows.jsonl", "duplicates=drop_near")["rejects"]
    assert [(r["line"], r["reason"], r["kept"]) for r in rejects] == [
        (3, "near_duplicate", {"file": "rows.jsonl", "line": 1}),
        (5, "near_duplicate", {"file": "rows.jsonl", "line": 1}),
    ]
    assert "similarity 0.9" in rejects[0]["detail"]
    assert len(prepare("rows.jsonl", "duplicates=drop_near", "near_threshold=1")["rejects"]) == 1
    assert len(prepare("rows.jsonl", "duplicates=drop_near", "near_threshold=0.2")["rejects"]) == 3


def conversation(text: str) -> Conversation:
    return Conversation((Message("user", "Go on."), Message("assistant", text)))


def test_estimated_similarity_is_jaccards() -> None:
    """Against the definition, over pairs of texts that share more and more."""
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(400)]
    errors = []
    for shared in range(0, 200, 10):
        one = [words[i] for i in rng.permutation(200)]
        two = [*one[:shared], *(words[i] for i in 200 + rng.permutation(200 - shared))]
        sets = []
        for text in (one, two):
            found = ["go", "on", *text]
            sets.append({tuple(found[i : i + 5]) for i in range(len(found) - 4)})
        truth = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        a, b = (likeness(conversation(" ".join(text)), near=True).signature for text in (one, two))
        errors.append(float(np.mean(a == b)) - truth)
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.05


def test_signs_count_and_texts_of_spaces_have_no_likeness() -> None:
    seen = Seen(near_threshold=0.8)
    sums = [Conversation((Message("user", f"2{sign}3"), Message("assistant", "It is."))) for sign in "+-*/"]
    signs = [Conversation((Message("user", sign), Message("assistant", sign))) for sign in "+-🙂🙃"]
    blank = [Conversation((Message("user", " " * n), Message("assistant", " "))) for n in range(4)]
    found = [seen.earlier(n, likeness(c, near=True)) for n, c in enumerate([*sums, *signs, *blank])]
    assert found == [None] * 12


def test_a_row_that_is_left_out_is_no_duplicate(prepare: Callable[..., Any], tmp_path: Path) -> None:
    rows = [row(f"Say {n}.", str(n)) for n in range(20)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", rows)
    made = prepare("a.jsonl,b.jsonl", "weights={a.jsonl: 0}", "duplicates=drop")
    assert made["rows"]["rejected_by_reason"] == {"left_out": 20}
    assert sorted(trained_rows(tmp_path)) == list(range(20, 40))


def test_nothing_left_is_told(run_program: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [row(f"Say {n}.", str(n)) for n in range(20)])
    outcome = run_program("data", "files=[a.jsonl]", "output=out", "weights={a.jsonl: 0}")
    assert outcome.exit_code == 2
    assert "nothing is left of 20 rows (left_out 20×); change weights" in outcome.stderr
    assert "; out-rejects.jsonl lists them" in outcome.stderr
    assert len((tmp_path / "out-rejects.jsonl").read_text().splitlines()) == 20


def test_short_texts_are_compared_too() -> None:
    seen = Seen(near_threshold=0.8)
    texts = ["Yes.", "No.", "yes.", ""]
    assert [seen.earlier(n, likeness(conversation(text), near=True)) for n, text in enumerate(texts)] == [
        None,
        None,
        (0, 1.0),
        None,
    ]


# Evaluation data


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
def test_rows_with_evaluation_data_are_rejected(prepare: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    words = QUESTION.split()
    rows = [
        row("Please solve: " + " ".join(words[5:19]).upper() + "?!", "Gladly."),  # 14 words of it, otherwise written
        row("Please solve: " + " ".join(words[5:17]), "Gladly."),  # 12 words
        row("What is a train?", "Once, " + QUESTION),
        row(" ".join(reversed(words)), "Backwards."),
        *(row(f"Say {n}.", str(n)) for n in range(20)),
    ]
    write(tmp_path / "rows.jsonl", rows)
    question = {"question": {"stem": QUESTION, "choices": ["two", "three"]}, "answer": 2}
    if kind == "jsonl":
        (tmp_path / "eval.jsonl").write_text(json.dumps({"id": 1}) + "\n" + json.dumps(question) + "\n")
    elif kind == "json":
        (tmp_path / "eval.json").write_text(json.dumps([{"id": 1}, question], indent=1))
    else:
        (tmp_path / "eval.txt").write_text(f"Something short.\n\n{QUESTION}\nAnswer: two.\n")
    made = prepare("rows.jsonl", f"contamination=[eval.{kind}]", "max_reject_fraction=0")

    assert [(r["line"], r["reason"]) for r in made["rejects"]] == [(1, "contaminated"), (3, "contaminated")]
    assert made["rejects"][1]["detail"].endswith(" ".join(units_of(QUESTION)[:GRAM]))
    (told,) = made["contamination"]
    assert (told["file"], len(told["sha256"])) == (f"eval.{kind}", 64)


def test_changed_evaluation_data_is_noticed(
    prepare: Callable[..., Any], run_program: Callable[..., Any], tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl", [row(f"Say {n}.", QUESTION) for n in range(20)])
    (tmp_path / "eval.txt").write_text(" ".join(f"word{n}" for n in range(GRAM)))
    assert prepare("rows.jsonl", "contamination=[eval.txt]")["rows"]["kept"] == 20
    (tmp_path / "eval.txt").write_text(QUESTION)
    arguments = ("files=[rows.jsonl]", "output=out", "eval_fraction=0", "seq_len=512", "contamination=[eval.txt]")
    outcome = run_program("data", *arguments)
    assert outcome.exit_code == 2
    assert "contaminated 20×" in outcome.stderr


# Limits and weights


def test_a_limit_reads_no_further(prepare: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [row(f"Say {n}.", str(n)) for n in range(1500)])
    (tmp_path / "b.json").write_text(json.dumps([row(f"Say b{n}.", str(n)) for n in range(30)]))
    made = prepare("a.jsonl,b.json", "limits={a.jsonl: 1200, b.json: 7}")
    assert [source["rows"] for source in made["inputs"]] == [1200, 7]
    assert sorted(trained_rows(tmp_path)) == list(range(1207))


def test_weights_repeat_and_leave_out(prepare: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write(tmp_path / f"{name}.jsonl", [row(f"Say {name}{n}.", str(n)) for n in range(400)])
    made = prepare("a.jsonl,b.jsonl,c.jsonl,d.jsonl", "weights={a.jsonl: 2, b.jsonl: 0.25, c.jsonl: 1.5}")
    counts = trained_rows(tmp_path)
    per_source = [Counter(counts[number] for number in range(400 * i, 400 * i + 400)) for i in range(4)]

    assert per_source[0] == {2: 400}
    assert set(per_source[1]) == {0, 1}
    assert 70 <= per_source[1][1] <= 130
    assert set(per_source[2]) == {1, 2}
    assert 160 <= per_source[2][2] <= 240
    assert per_source[3] == {1: 400}
    assert made["rows"]["rejected_by_reason"] == {"left_out": per_source[1][0]}


def test_what_is_held_out_is_held_out_once(prepare: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [row(f"Say {n}.", str(n)) for n in range(50)])
    prepare("a.jsonl", "weights={a.jsonl: 3}", "eval_fraction=0.2")
    held_out, trained = trained_rows(tmp_path, "eval"), trained_rows(tmp_path)
    assert set(held_out.values()) == {1}
    assert set(trained.values()) == {3}
    assert len(held_out) == 10
    assert not held_out.keys() & trained.keys()


def test_the_share_is_drawn_by_seed_and_row() -> None:
    drawn = [[copies_of(number, 0.3, seed) for number in range(2000)] for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    assert all(500 <= sum(copies) <= 700 for copies in drawn)
    assert drawn[0] == [copies_of(number, 0.3, 0) for number in range(2000)]
