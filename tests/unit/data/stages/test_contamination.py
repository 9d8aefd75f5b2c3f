"""Which texts count as shared: words, scripts without spaces, forms of letters; and files of evaluation data."""

import gzip
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.program.errors import UserError
from data.disk.formats import sizes
from data.schema import Conversation, Message
from data.stages import contamination
from data.stages.contamination import Evaluations, grams_of, spelled, units_of
from data.stages.leaderboard import HUB_TASKS

ENGLISH = "Which of these four answers explains best why a rainbow stands in the sky after rain?"
QUESTIONS = {
    "chinese": "请从下列四个选项中选出对雨后天空出现彩虹原因的最恰当的解释并说明理由。",
    "chinese, short": "雨后的天空为什么会出现彩虹？",
    "japanese": "雨上がりの空に虹が見える理由として最も適切なものを、次の四つから一つ選びなさい。",
    "japanese, short": "次のうち、光合成に必要なものはどれですか。",
    "thai": "ข้อใดต่อไปนี้อธิบายได้ดีที่สุดว่าเหตุใดจึงเกิดรุ้งบนท้องฟ้าหลังฝนตก",
    "khmer": "ហេតុអ្វីបានជាមានឥន្ទធនូនៅលើមេឃបន្ទាប់ពីភ្លៀងធ្លាក់",
    "korean": "다음 네 가지 보기 중에서 비가 온 뒤 하늘에 무지개가 뜨는 까닭을 가장 잘 설명한 것은 무엇입니까",
    "hindi": "बारिश के बाद आकाश में इंद्रधनुष क्यों दिखाई देता है सबसे अच्छा कारण कौन सा है बताइए",
    "english in chinese": "下面哪个选项解释了 rainbow 为什么在下雨之后出现在天空中？",
}


def evaluations(*texts: str) -> Evaluations:
    return Evaluations(np.unique(np.concatenate([grams_of(units_of(text))[0] for text in texts])))


def said(text: str) -> Conversation:
    return Conversation((Message("user", text), Message("assistant", "That is so.")))


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_is_found_in_a_longer_text(question: str) -> None:
    known = evaluations(question)
    assert known.shared_with(said(f"Answer 1: {question} (A) one"))
    assert known.shared_with(said(f"“{question[:-1]}”"))
    assert all(
        known.shared_with(said(f"{other} {ENGLISH}")) is None for other in QUESTIONS.values() if other != question
    )


def test_a_phrase_of_a_question_is_not_enough() -> None:
    known = evaluations(*QUESTIONS.values(), ENGLISH)
    for phrase in (
        "请从下列四个选项中选出正确的答案",
        "次の四つから一つ選びなさい。東京は日本の首都です。",
        "ข้อใดต่อไปนี้อธิบายได้ดีที่สุด",
        "Which of these four answers explains best why a rainbow stands high",
        "비가 온 뒤 하늘에 무지개가 뜨는 까닭",
    ):
        assert known.shared_with(said(phrase)) is None, phrase


@pytest.mark.parametrize(
    "written",
    [
        ENGLISH.upper(),
        " ".join(f"_{word}_" for word in ENGLISH.split()),
        "*" + ENGLISH.replace(" ", "** **") + "*",
        ENGLISH.replace("rainbow", "rain\u00adbow"),
        "".join(chr(ord(letter) + 0xFEE0) if letter != " " else "\u3000" for letter in ENGLISH),
    ],
)
def test_the_same_words_otherwise_written(written: str) -> None:
    assert evaluations(ENGLISH).shared_with(said(written)) == " ".join(ENGLISH.lower().split()[:13])


def test_the_same_letters_otherwise_encoded() -> None:
    """Accents as characters of their own, half-width kana, a sharp s, spaces of no width."""
    accents = " ".join(f"élan{n}" for n in range(14))
    assert evaluations(accents).shared_with(said(unicodedata.normalize("NFD", accents)))
    assert evaluations("レインボーハナゼアメノアトノソラニカカルノカ").shared_with(said("ﾚｲﾝﾎﾞｰﾊﾅｾﾞｱﾒﾉｱﾄﾉｿﾗﾆｶｶﾙﾉｶ"))
    street = " ".join(f"STRASSE{n}" for n in range(13))
    assert evaluations(street).shared_with(said(street.replace("SS", "ß").lower()))
    thai = QUESTIONS["thai"]
    assert evaluations(thai).shared_with(said(thai[:20] + "\u200b" + thai[20:]))


def test_what_is_shared_is_quoted_as_text() -> None:
    assert spelled(units_of("下面哪个 option 解释了 Rain-bow？")) == "下面哪个 option 解释了 rain bow"


LATIN = st.lists(st.sampled_from(["a", "b", "a1", "é"]), max_size=40)


@given(LATIN, LATIN)
def test_words_are_compared_thirteen_by_thirteen(one: list[str], two: list[str]) -> None:
    """Against the definition."""
    sets = [{tuple(words[i : i + 13]) for i in range(len(words) - 12)} for words in (one, two)]
    hashes = [set(grams_of(units_of(" ".join(words)))[0].tolist()) for words in (one, two)]
    assert [len(found) for found in hashes] == [len(found) for found in sets]
    assert len(hashes[0] & hashes[1]) == len(sets[0] & sets[1])


@given(st.text(st.sampled_from("ab 虹か橋ไทย"), max_size=80))
def test_a_sequence_ends_when_it_counts_as_thirteen_words(text: str) -> None:
    units = units_of(text)
    counts = [2 if unit in "ไทย" else 3 if unit == "か" else 5 for unit in units]
    ends = []
    for start in range(len(units)):
        end = next((end for end in range(start, len(units) + 1) if sum(counts[start:end]) >= 65), None)
        ends += [] if end is None else [end]
    grams, found = grams_of(units)
    assert found.tolist() == ends
    texts = [tuple(units[start:end]) for start, end in enumerate(ends)]
    assert len(set(grams.tolist())) == len(set(texts))


# Files


def written_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def written_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def written_gzip(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def written_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def written_csv(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("q\n" + "".join(f'"{row["q"]}"\n' for row in rows), encoding="utf-8")


def written_arrow(path: Path, rows: list[dict[str, str]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def written_mark(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())


def written_nested(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps({"name": "a set", "parts": [{"items": rows}]}, indent=1), encoding="utf-8")


def written_paragraphs(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(row["q"] for row in rows).encode())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("eval.json", written_json),
        ("eval.json", written_lines),
        ("eval.json", written_mark),
        ("eval.json", written_nested),
        ("eval.JSONL", written_lines),
        ("eval.jsonl.gz", written_gzip),
        ("eval.parquet", written_parquet),
        ("eval.arrow", written_arrow),
        ("eval.csv", written_csv),
        ("eval.md", written_paragraphs),
    ],
)
def test_evaluation_data_in_any_container(
    run_program: Callable[..., Any], tmp_path: Path, name: str, write: Callable[..., None]
) -> None:
    write(tmp_path / name, [{"q": ENGLISH}, {"q": QUESTIONS["chinese"]}])
    asked = ["Name a colour.", ENGLISH, "Name a number.", QUESTIONS["chinese"]]
    written_lines(tmp_path / "rows.jsonl", [{"instruction": text, "output": "Red."} for text in asked])
    assert run_program("data", "files=[rows.jsonl]", "output=out", f"contamination=[{name}]").exit_code == 0
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [(2, "contaminated"), (4, "contaminated")]


def test_evaluation_data_that_cannot_be_read(run_program: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"q": "one"}\n{"q": \n')
    (tmp_path / "broken.csv").write_text('q\n"one,two\n')
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("pointer.json", "pointer.txt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    for name, told in (
        ("pointer.json", "git lfs pull"),
        ("pointer.txt", "git lfs pull"),
        ("mmul", f"no such task; name a file, or one of {', '.join(HUB_TASKS)}"),
        ("broken.jsonl", "line 2"),
        ("broken.csv", "CSV"),
        ("broken.txt", "can't be read"),
    ):
        outcome = run_program("data", "files=[rows.jsonl]", "output=out", f"contamination=[{name}]")
        assert outcome.exit_code == 2
        assert outcome.stderr.startswith(f"data: contamination={name}: ")
        assert told in outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1


def test_what_a_compressed_file_of_text_may_become_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"x" * (3 << 20)))
    monkeypatch.setattr(sizes, "EVALUATION", 2 << 20)
    with pytest.raises(UserError, match=r"it can't be read \(it is larger than 2 MiB\)"):
        contamination.load_evaluations([{"file": str(tmp_path / "bomb.txt.gz")}])
