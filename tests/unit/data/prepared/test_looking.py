"""`task=preview` and `task=report`: what they show is what is in the dataset."""

import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.disk.files import sha256
from data.prepared.dataset import PreparedDataset
from data.prepared.layout import SPLITS, open_split
from data.prepared.report import BARS, Histogram
from data.schema import IGNORE_INDEX, Conversation, Message
from data.template import ChatTokenizer

TOKENIZER = ChatTokenizer.load()
REPLIES = ["Bonjour, <b>monde</b> & \"co\"! 'x'", "日本語 🧿\n  indented\ttab", "</script><script>alert(1)</script>"]


@pytest.fixture
def prepared(run_program: Callable[..., Any], tmp_path: Path) -> Path:
    """Conversations of one to three turns, two bad rows."""
    rows: list[Any] = []
    for n in range(60):
        turns = []
        for turn in range(1 + n % 3):
            turns += [{"from": "human", "value": f"Q{n}.{turn}"}, {"from": "gpt", "value": REPLIES[n % len(REPLIES)]}]
        rows.append({"conversations": turns})
    rows += [{"conversations": [{"from": "tool", "value": "<img src=x>"}]}, {"conversations": []}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert run_program("data", "files=[rows.json]", "output=out", "seq_len=128").exit_code == 0
    return tmp_path / "out"


# Text of ids


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁")), min_size=1, max_size=4))
def test_spelling_is_rendering(texts: list[str]) -> None:
    conversation = Conversation(tuple(Message("assistant" if i % 2 else "user", t) for i, t in enumerate(texts)))
    assert TOKENIZER.spell(TOKENIZER.encode(conversation).ids) == TOKENIZER.render(conversation)


def test_a_cut_character_is_shown_as_one() -> None:
    ids = TOKENIZER.encode(Conversation((Message("user", "go"), Message("assistant", "🧿")))).ids
    assert TOKENIZER.spell(ids[:-4]).endswith("\ufffd")


# Preview


def test_preview_shows_every_token_once(run_program: Callable[..., Any], prepared: Path) -> None:
    outcome = run_program("data", "task=preview", "output=out", "rows=2")
    assert outcome.exit_code == 0
    table = PreparedDataset(prepared).train
    headings = [line for line in outcome.stdout.splitlines() if line.startswith("row ")]
    assert len(headings) == 2

    shown: list[tuple[str, bool]] = []
    starts: list[int] = []
    lines = outcome.stdout.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if not re.match(r" *\d+  ", line):
            continue
        starts.append(int(line[:8]))
        marks = below if re.fullmatch(r"[ ^]+", below) else ""
        place = 8
        for piece in line[8:].rstrip(" ").split(" "):
            shown.append((piece, marks[place : place + 1] == "^"))
            place += len(piece) + sum(ord(character) > 0x2E80 for character in piece) + 1
    expected = []
    for row in (table[0], table[1]):
        expected += [(TOKENIZER.pieces[i], label != IGNORE_INDEX) for i, label in zip(row.ids, row.labels, strict=True)]
    assert shown == expected
    conversations = len(table[0].lengths) + len(table[1].lengths)
    assert starts.count(0) == conversations  # positions begin anew at each boundary
    assert sum(line.startswith("conversation ") for line in lines) == conversations


def test_preview_in_colour_needs_no_marks(
    run_program: Callable[..., Any], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = run_program("data", "task=preview", "output=out", "rows=1").stdout
    assert "trained tokens are green" in out
    assert not re.search(r"^[ ^]*\^[ ^]*$", out, re.MULTILINE)
    first = PreparedDataset(prepared).train[0]
    assert len(re.findall(r"\x1b\[1;32m", out)) == sum(first.spans[1::2])

    monkeypatch.setenv("NO_COLOR", "1")
    out = run_program("data", "task=preview", "output=out", "rows=1").stdout
    assert "\x1b[1;32m" not in out
    assert re.search(r"^[ ^]*\^[ ^]*$", out, re.MULTILINE)


def headings(text: str) -> list[str]:
    """The lines that name rows and conversations, without the line that is drawn behind."""
    return [line.rstrip("─ ") for line in text.splitlines() if line.startswith(("row ", "conversation "))]


def test_preview_names_file_and_line_as_rejects_do(run_program: Callable[..., Any], tmp_path: Path) -> None:
    """Blank lines count, items of a list count from 0; what is printed can be pasted behind where=."""
    (tmp_path / "rows").mkdir()
    lines = [json.dumps({"instruction": f"Say {n}.", "output": str(n)}) for n in range(3)]
    (tmp_path / "rows" / "a.jsonl").write_text(f"\n\n{lines[0]}\nnonsense\n\n{lines[1]}\n")
    (tmp_path / "b.json").write_text(f"[{lines[2]}, {lines[0]}]")
    settings = ("output=out", "eval_fraction=0", "packing=false", "max_reject_fraction=0.5")
    assert run_program("data", "files=[rows/a.jsonl,b.json]", *settings).exit_code == 0
    shown = headings(run_program("data", "task=preview", "output=out", "rows=9").stdout)
    places = [line.split(", ")[1].split(": ")[0] for line in shown if line.startswith("conversation")]
    assert sorted(places) == ["b.json:0", "b.json:1", "rows/a.jsonl:3", "rows/a.jsonl:6"]

    for place, text in (("rows/a.jsonl:6", "▁Say ▁ 1 ."), ("a.jsonl:3", "▁Say ▁ 0 ."), ("b.json:0", "▁Say ▁ 2 .")):
        out = run_program("data", "task=preview", "output=out", f"where={place}").stdout
        assert len(headings(out)) == 2
        assert f"{place}: " in out
        assert text in out
        assert run_program("data", "task=report", "output=out", f"where={place}").exit_code == 0
        page = Page((tmp_path / "out-report.html").read_text(encoding="utf-8"))
        pre = "".join(data for tag, data in page.texts if tag in ("pre", "mark"))
        assert f"Say {text[-3]}." in pre
        assert any(f"{place}, " in data for tag, data in page.texts if tag == "small")


def test_where_that_names_nothing(run_program: Callable[..., Any], prepared: Path) -> None:
    for where, told in (
        ("rows.json:60", "was rejected (unknown_role): conversations[0] is said by 'tool'"),
        ("rows.json:62", "no row is there; rows.json has them from row 0 to 61"),
        ("other.json:1", "no file has that name; give rows.json"),
        (f"rows.json:{'9' * 300}", "it doesn't name a row; give FILE:NUMBER"),
        ("rows.json", "it doesn't name a row; give FILE:NUMBER, for example rows.json:0"),
    ):
        outcome = run_program("data", "task=preview", "output=out", f"where={where}")
        assert outcome.exit_code == 2
        assert outcome.stderr.startswith(f"data: where={where[:60]}")  # of a longer one the beginning
        assert told in outcome.stderr
        assert outcome.stdout == ""
    outcome = run_program("data", "task=preview", "output=out", "train_rows=[0,1000]")
    assert (outcome.exit_code, outcome.stderr[:30]) == (2, "data: train_rows=[1000]: the t")
    outcome = run_program("data", "task=preview", "output=out", "where=rows.json:1", "train_rows=[0]")
    assert (outcome.exit_code, outcome.stderr[:30]) == (2, "data: where=rows.json:1: train")
    (prepared / "places.arrow").write_bytes(bytes((prepared / "places.arrow").stat().st_size))
    outcome = run_program("data", "task=preview", "output=out")
    why = "places.arrow is not whole (it has changed since it was prepared)"
    assert outcome.stderr == f"data: output=out: {why}; prepare it again\n"


def test_held_out_split_and_repeated_rows_are_found(run_program: Callable[..., Any], tmp_path: Path) -> None:
    rows = []
    for n in range(20):
        turns = [{"role": ("user", "assistant")[k % 2], "content": f"Text {n} {k} " * 5} for k in range(6)]
        rows.append({"messages": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = ("seq_len=64", "overlong=split_turns", "eval_fraction=0.2", "weights={rows.json: 2}")
    assert run_program("data", "files=[rows.json]", "output=out", *settings).exit_code == 0
    dataset = PreparedDataset(tmp_path / "out")
    held_out = {row for n in range(len(dataset.eval)) for row in dataset.eval[n].rows}
    for row in range(20):
        out = run_program("data", "task=preview", "output=out", f"where=rows.json:{row}").stdout
        shown = [line for line in out.splitlines() if line.startswith("conversation ")]
        assert len(shown) == 3  # its parts, each once though an epoch trains on it twice
        assert all(f", rows.json:{row}: " in line for line in shown)
        assert ("row of eval" in out) == (row in held_out)

    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "Say it.", "output": str(n)} for n in range(5)]))
    settings = ("output=out", "eval_fraction=0", "weights={rows.json: 3}")
    assert run_program("data", "files=[rows.json]", *settings).exit_code == 0
    assert len(PreparedDataset(tmp_path / "out").train) == 1  # copies of a row in one packed row
    out = run_program("data", "task=preview", "output=out", "where=rows.json:2").stdout
    assert len(headings(out)) == 2


def test_rows_of_a_step_and_a_number_of_conversations(run_program: Callable[..., Any], prepared: Path) -> None:
    train = PreparedDataset(prepared).train

    def shown(*settings: str) -> list[str]:
        outcome = run_program("data", "task=preview", "output=out", *settings)
        assert outcome.exit_code == 0, outcome.stderr
        return headings(outcome.stdout)

    rows = [line for line in shown("train_rows=[4,0]") if line.startswith("row")]
    assert [line.split(":")[0] for line in rows] == ["row 4", "row 0"]
    for number in (1, 3, 10):
        assert sum(line.startswith("conversation") for line in shown(f"conversations={number}")) == number
    few = sum(len(train[n].lengths) for n in (2, 3))
    both = shown("train_rows=[2,3]", "conversations=1000")
    assert sum(line.startswith("conversation") for line in both) == few

    assert run_program("data", "task=report", "output=out", "conversations=7").exit_code == 0
    page = (prepared.parent / "out-report.html").read_text(encoding="utf-8")
    assert page.count('class="conversation"') == 7
    assert page.count("<details") > 1


# Report


def test_masked_replies_are_shown_as_not_trained(run_program: Callable[..., Any], tmp_path: Path) -> None:
    """By preview, report and the counts, also if nothing is trained at the end of a conversation."""
    replies = [
        {"role": "assistant", "content": text, "weight": weight} for text, weight in (("Wrong.", 0), ("Right.", 1))
    ]
    asked = {"role": "user", "content": "Go on."}
    orders = ((0, 1), (1, 0), (1, 1), (0, 1, 0))
    rows = [{"messages": [message for n in order for message in (asked, replies[n])]} for order in orders]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert run_program("data", "files=[rows.json]", "output=out", "eval_fraction=0").exit_code == 0
    trained = [TOKENIZER.encode(Conversation((Message("user", "Go on."), Message("assistant", "Right."))))] * 5
    assert PreparedDataset(tmp_path / "out").manifest["train"]["supervised_tokens"] == sum(
        t.supervised for t in trained
    )

    shown = run_program("data", "task=preview", "output=out", "rows=1").stdout.splitlines()
    marked = []
    for line, below in itertools.pairwise(shown):
        if re.fullmatch(r"[ ^]*\^[ ^]*", below):
            marked.append("".join(a for a, b in zip(line, below.ljust(len(line)), strict=False) if b == "^"))
    assert "".join(marked) == "▁Right.▁</s>" * 5

    assert run_program("data", "task=report", "output=out", "rows=1").exit_code == 0
    page = Page((tmp_path / "out-report.html").read_text(encoding="utf-8"))
    _, *shown_as_trained = [data for tag, data in page.texts if tag == "mark"]  # the first says what a mark means
    assert shown_as_trained == [" Right. </s>"] * 5
    assert "".join(data for tag, data in page.texts if tag == "pre").count("Wrong. </s>") == 4


class Page(HTMLParser):
    """The texts of a page by tag, and every address in it."""

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.tags.add(tag)
        if tag not in ("meta", "link", "img", "br", "input"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.stack[-1] if self.stack else "", data))


def test_report_is_one_page_that_tells_the_truth(run_program: Callable[..., Any], prepared: Path) -> None:
    before = (prepared / "manifest.json").read_bytes()
    assert run_program("data", "task=report", "output=out", "rows=2").exit_code == 0
    text = (prepared.parent / "out-report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (prepared / "manifest.json").read_bytes() == before
    assert page.addresses == []
    assert "://" not in text
    assert not page.tags & {"script", "img"}

    dataset = PreparedDataset(prepared)
    row = dataset.train[0]
    shown = "".join(data for tag, data in page.texts if tag in ("pre", "mark"))
    assert TOKENIZER.spell(row.ids[: row.lengths[0]]) in shown
    marked = [data for tag, data in page.texts if tag == "mark"]
    assert any(reply in "".join(marked) for reply in REPLIES)
    assert not any("[INST]" in data for data in marked)
    manifest = dataset.manifest
    visible = " ".join(data for _, data in page.texts)
    for number in (manifest["rows"]["in"], manifest["train"]["tokens"], manifest["eval"]["supervised_tokens"]):
        assert f"{number:,}" in visible
    assert "unknown_role" in visible
    assert "rows.json, row 60: conversations[0] is said by 'tool'" in visible
    assert manifest["inputs"][0]["sha256"] in visible


def test_report_counts_lengths_turns_and_rows(run_program: Callable[..., Any], prepared: Path) -> None:
    from data.prepared.report import _histograms

    tables = {split: open_split(prepared, split) for split in SPLITS}
    lengths, turns, used = _histograms(tables, 128)
    dataset = PreparedDataset(prepared)
    rows = [table[i] for table in (dataset.train, dataset.eval) for i in range(len(table))]
    assert sorted(np.repeat(np.arange(129), lengths.counts)) == sorted(n for row in rows for n in row.lengths)
    assert sorted(np.repeat(np.arange(129), used.counts)) == sorted(len(row.ids) for row in rows)
    assert turns.counts[1:4].tolist() == [20, 20, 20]


def test_report_of_a_directory_and_without_packing(run_program: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    rows = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(20)]
    (tmp_path / "hub" / "train.json").write_text(json.dumps(rows))
    settings = ("dataset=hub", "output=out", "packing=false", "eval_fraction=0")
    assert run_program("data", *settings).exit_code == 0
    assert run_program("data", "task=report", "output=out").exit_code == 0
    page = (tmp_path / "out-report.html").read_text()
    assert f"train.json {sha256(tmp_path / 'hub' / 'train.json')}" in page
    assert "None." in page


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=50))
def test_histogram(values: list[int]) -> None:
    histogram = Histogram(np.bincount(values, minlength=3001))
    bars = histogram.bars
    assert len(bars) <= BARS
    assert [bar.count for bar in bars] == [sum(bar.first <= value <= bar.last for value in values) for bar in bars]
    assert sum(bar.count for bar in bars) == len(values)
    assert max(bar.height for bar in bars) == 1
    assert histogram.mean == pytest.approx(np.mean(values))
    assert histogram.quantile(0.5) == sorted(values)[(len(values) - 1) // 2]
