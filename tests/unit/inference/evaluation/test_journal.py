"""The journal of an evaluation on a disk that others write to as well."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.program.errors import UserError
from inference.evaluation.journal import open_journal

IDENTITY = {"seed": 0}


def test_whole_units_are_kept_and_the_rest_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.part"
    with open_journal(path, IDENTITY) as journal:
        journal.append("a", [float("-inf"), 1.5])
        journal.append("b", ["\ud83d"])
    whole = path.read_bytes()
    for rest in (b'{"unit": "c", "ans', b'{"unit": "c", "answers": 3}\n', b'{"unit": ["c"], "answers": []}\n', b"3\n"):
        path.write_bytes(whole + rest)
        with open_journal(path, IDENTITY) as journal:
            assert journal.answers("a", float, 2) == [float("-inf"), 1.5]
            assert journal.answers("b", str, 1) == ["\ud83d"]
            assert "c" not in journal
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (os.mkfifo, "is not a regular file; remove it"),
        (Path.mkdir, r"can't be written \(Is a directory\)"),
        (lambda path: path.write_text("notes\n"), "no evaluation wrote"),
        (lambda path: path.write_text('{"evaluation": [3]}\n{"unit": "a", "answers": [1]}\n'), "is damaged"),
        (lambda path: path.write_text('{"evaluation": {"se\n{"unit": "a", "answers": [1]}\n'), "is damaged"),
    ],
)
def test_what_is_no_journal_is_left_alone(tmp_path: Path, make: Callable[[Path], object], sentence: str) -> None:
    path = tmp_path / "answers.part"
    make(path)
    before = path.lstat()
    with pytest.raises(UserError, match=f"^output: .*{sentence}"), open_journal(path, IDENTITY):
        pass
    assert (path.lstat().st_mode, path.lstat().st_size) == (before.st_mode, before.st_size)


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path / "answers.part", IDENTITY),
        pytest.raises(UserError, match="another process writes"),
        open_journal(tmp_path / "answers.part", IDENTITY),
    ):
        pass
