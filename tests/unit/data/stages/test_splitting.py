"""No conversation is on both sides of the split."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.program.errors import UserError
from data.prepared.dataset import PreparedDataset
from data.stages.splitting import choose_eval, repetitions
from data.stages.store import Index

# Of each row, the hashes of its conversations: more than one if it was split.
ROWS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=2, max_size=30)


def index_of(rows: list[list[int]]) -> Index:
    conversations = [(row, kind) for row, kinds in enumerate(rows) for kind in kinds]
    numbers, hashes = np.array(conversations).T
    ones = np.ones_like(numbers)
    return Index(numbers, ones, ones, ones, hashes.astype(np.uint64))


def components(rows: list[list[int]]) -> list[set[int]]:
    """The rows that are bound to each other, by growing each group until nothing joins."""
    groups: list[set[int]] = []
    for row in range(len(rows)):
        group, before = {row}, set[int]()
        while group != before:
            before = set(group)
            kinds = {kind for member in group for kind in rows[member]}
            group |= {other for other, own in enumerate(rows) if kinds & set(own)}
        if group not in groups:
            groups.append(group)
    return groups


@given(ROWS)
def test_rows_are_bound_by_what_they_share(rows: list[list[int]]) -> None:
    repeats = repetitions(index_of(rows))
    expected = {row: min(group) for group in components(rows) for row in group if row != min(group)}
    assert repeats == expected


@given(ROWS, st.floats(0.01, 0.9), st.integers(0, 5))
def test_what_is_held_out_is_not_trained_on(rows: list[list[int]], fraction: float, seed: int) -> None:
    repeats = repetitions(index_of(rows))
    numbers = list(range(len(rows)))
    number = max(1, round(len(rows) * fraction))
    groups = components(rows)
    if number >= len(rows) or len(groups) == 1:
        with pytest.raises(UserError, match="eval_fraction="):
            choose_eval(numbers, repeats, fraction, seed)
        return
    held_out = choose_eval(numbers, repeats, fraction, seed)
    assert held_out == choose_eval(numbers, repeats, fraction, seed)
    assert 0 < len(held_out) < len(rows)
    assert all(group <= held_out or not group & held_out for group in groups)
    assert len(held_out) <= max(number, min(map(len, groups)))


def test_without_repetitions_as_many_as_asked_for() -> None:
    rows = list(range(1000))
    for seed in (0, 1):
        assert choose_eval(rows, {}, 0.02, seed) == set(random.Random(seed).sample(rows, 20))
    assert choose_eval(rows, {}, 0, 0) == set()


def test_about_as_many_as_asked_for_where_each_row_stands_twice() -> None:
    repeats = {row: row - 1 for row in range(1, 1000, 2)}
    assert 18 <= len(choose_eval(list(range(1000)), repeats, 0.02, 0)) <= 20


def shown(directory: Path, split: str) -> Counter[bytes]:
    """The conversations of a split, by their ids."""
    table = getattr(PreparedDataset(directory), split)
    found: Counter[bytes] = Counter()
    for row in (table[n] for n in range(len(table))):
        ends = np.cumsum(row.lengths)
        found.update(np.array(ids).tobytes() for ids in np.split(np.array(row.ids), ends[:-1]))
    return found


def test_repeated_rows_of_a_file(run_program: Callable[..., Any], tmp_path: Path) -> None:
    """Forty conversations five times each, and a few of them with other masks or spaces at their ends."""
    pairs = [(f"What is {n} times {n}?", f"{n * n}.") for n in range(40)]
    rows = [{"messages": [said("user", q), said("assistant", a)]} for q, a in pairs for _ in range(5)]
    rows += [{"messages": [said("user", f" {q}\n"), said("assistant", a) | {"weight": 1}]} for q, a in pairs[:5]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = run_program("data", "files=[rows.jsonl]", "output=out", "eval_fraction=0.1", "seq_len=64")
    assert outcome.exit_code == 0, outcome.stderr
    train, held_out = (shown(tmp_path / "out", split) for split in ("train", "eval"))
    assert not train.keys() & held_out.keys()
    assert 10 <= held_out.total() <= 20
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["repeated"] == 165
    assert "165 of the kept rows repeat a conversation" in outcome.stdout + outcome.stderr

    settings = ("files=[rows.jsonl]", "output=out", "eval_fraction=0.1", "seq_len=64", "duplicates=drop")
    outcome = run_program("data", *settings)
    assert shown(tmp_path / "out", "eval").total() == 4
    assert "repeat a conversation" not in outcome.stdout + outcome.stderr


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def test_parts_of_split_rows_stay_on_one_side(run_program: Callable[..., Any], tmp_path: Path) -> None:
    """Two long rows that begin alike are split into parts of which the first is the same."""
    rows = []
    for n in range(40):
        turns = []
        for turn in range(6):
            who = n // 2 if turn < 3 else n
            turns += [said("user", f"Tell me tale {turn} of {who}."), said("assistant", f"Tale {who} {turn} " * 6)]
        rows.append({"messages": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = ("seq_len=64", "overlong=split_turns", "eval_fraction=0.25")
    assert run_program("data", "files=[rows.json]", "output=out", *settings).exit_code == 0
    train, held_out = (shown(tmp_path / "out", split) for split in ("train", "eval"))
    assert held_out
    assert not train.keys() & held_out.keys()


def test_only_equal_rows_can_not_be_split(run_program: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 100)
    outcome = run_program("data", "files=[rows.jsonl]", "output=out")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("data: eval_fraction=0.02: all 100 rows hold the same conversation")
