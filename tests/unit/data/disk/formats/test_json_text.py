"""JSON is of the shape that is asked for, or one sentence says what is not."""

import json
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from configs.program.errors import UserError
from data.disk.formats.json_text import DEEPEST, parse_json, read_json
from data.disk.formats.regular import UnreadableError


class Part(TypedDict):
    bytes: Annotated[int, Meta(ge=0)]
    name: NotRequired[str | None]


class Whole(TypedDict):
    files: dict[str, Part]
    share: Annotated[float, Meta(le=1)]


SOUND = {"files": {"a": {"bytes": 3, "more": [1]}}, "share": 0.5, "other": {"x": None}}

WRONG: dict[str, tuple[str, str]] = {
    "no object": ("[]", "expected object, got array"),
    "field missing": ('{"share": 1}', "missing required field files"),
    "inner type": ('{"share": 1, "files": {"a": {"bytes": "3"}}}', r"files\[...\].bytes: expected int, got str"),
    "truth": ('{"share": 1, "files": {"a": {"bytes": true}}}', r"files\[...\].bytes: expected int, got bool"),
    "fraction": ('{"share": 1, "files": {"a": {"bytes": 3.5}}}', r"files\[...\].bytes: expected int, got float"),
    "bound": ('{"share": 1, "files": {"a": {"bytes": -1}}}', r"files\[...\].bytes: expected int >= 0"),
    "upper bound": ('{"share": 1e4, "files": {}}', "share: expected float <= 1"),
    "no float": ('{"share": -1e400, "files": {}}', "-1e400, which is too large"),
    "no float unread": ('{"share": 1, "files": {}, "x": [1e999]}', "1e999, which is too large"),
    "hundreds of digits": (f'{{"share": 1, "files": {{}}, "x": -{"1" * 400}}}', "a whole number of 401 digits"),
    "twice": ('{"share": 1, "files": {}, "share": 0.5}', "names 'share' twice"),
    "twice within": ('{"share": 1, "files": {}, "x": {"a": 1, "a": 1}}', "names 'a' twice"),
    "no number": ('{"share": NaN, "files": {}}', "NaN, which is not a number"),
    "infinite": ('{"share": -Infinity, "files": {}}', "-Infinity, which is not a number"),
    "half a pair": ('{"share": 1, "files": {}, "x": "\\ud800"}', "half of a surrogate pair"),
    "half a pair in a key": ('{"share": 1, "files": {}, "\\uDC00": 1}', "half of a surrogate pair"),
    "cut": ('{"share": 1, ', "it is not JSON"),
    "empty": ("", "it is not JSON"),
    "two": ("{} {}", "it is not JSON"),
    "digits": (f'{{"share": {"1" * 5000}}}', "a whole number of 5000 digits"),
    "deep": ("[" * 100_000, f"nested more than {DEEPEST} deep"),
    "deep and closed": (f'{{"share": 1, "files": {{}}, "x": {"[" * 60}{"]" * 60}}}', f"more than {DEEPEST} deep"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_the_field(case: str) -> None:
    text, told = WRONG[case]
    with pytest.raises(UnreadableError, match=told) as refused:
        parse_json(text.encode(), Whole)
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(UnreadableError, match="not UTF-8 text"):
        parse_json(json.dumps({"ä": "ö"}, ensure_ascii=False).encode(encoding), dict[str, Any])


def test_what_fits_is_returned_as_it_stands() -> None:
    """With the fields that the shape does not name; a byte order mark and a whole surrogate pair are fine."""
    assert parse_json(json.dumps(SOUND).encode("utf-8-sig"), Whole) == SOUND
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', dict[str, str]) == {"a": "\N{GRINNING FACE}"}
    nested: Any = 1
    for _ in range(DEEPEST):
        nested = [nested]
    assert parse_json(json.dumps(nested).encode(), list[Any]) == nested


def test_a_field_that_stands_there_a_million_times_costs_no_square_of_them() -> None:
    text = "{" + ",".join(f'"{number % 999_999}": 1' for number in range(1_000_000)) + "}"
    with pytest.raises(UnreadableError, match="names '0' twice"):
        parse_json(text.encode(), dict[str, Any])


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(content: bytes) -> None:
    try:
        parse_json(content, dict[str, Any])
    except UnreadableError as refused:
        assert str(refused)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)
def test_all_json_is_read_as_json_reads_it(value: Any) -> None:
    content = json.dumps({"value": value}).encode()
    try:
        assert parse_json(content, dict[str, Any]) == json.loads(content)
    except UnreadableError as refused:
        assert "surrogate" in str(refused) or "not JSON" in str(refused)  # numbers of thousands of digits


def test_the_sentence_names_setting_file_field_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"share": "x", "files": {}}')
    with pytest.raises(UserError) as refused:
        read_json(tmp_path / "index.json", Whole, "base=x", "name another", largest=1000)
    assert str(refused.value) == "base=x: its index.json can't be read (share: expected float, got str); name another"


def test_a_file_of_more_than_its_kind_can_have_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(" " * 2000 + "{}")
    with pytest.raises(UserError, match="larger than 1,000 bytes"):
        read_json(tmp_path / "index.json", dict[str, Any], "base=x", "name another", largest=1000)
