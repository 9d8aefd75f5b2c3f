"""What scripts/consumers.py counts as equal, near and failed, and the torch that it lends."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.consumers import table
from scripts.consumers.comparing import Job
from scripts.consumers.environment import _lend_torch


def job() -> Job:
    return Job(model="m", base="b", adapter="a", per_expert=None, cases=[], logits={}, scratch=Path())


def test_what_is_equal() -> None:
    found = job()
    found.same("ids", [([1, 2], [1, 2]), ([1], [2])])
    found.same("answers", [("a", "a")])
    found.same("odd ones", [(1, 2)], needed=False)
    assert [(point["equal"], point["cases"], point["holds"]) for point in found.points] == [
        (1, 2, False),
        (1, 1, True),
        (0, 1, True),
    ]
    assert [table.outcome(point) for point in found.points] == ["1 of 2 equal (!)", "1 of 1 equal", "0 of 1 equal"]


def test_how_far_numbers_are_apart() -> None:
    found = job()
    ours = np.array([[2.0, -4.0], [1.0, 0.0]])
    found.near("logits", ours + np.array([[0, 0.0002], [0, 0]]), ours)
    found.near("logits", ours + np.array([[0.004, 0], [0, 0]]), ours)
    assert [point["holds"] for point in found.points] == [True, False]
    assert found.points[1]["difference"] == pytest.approx(0.001)
    assert table.outcome(found.points[1]) == "1.0e-03 of the largest apart (!)"
    found.near("logits", np.full((1, 2), np.nan), np.ones((1, 2)))
    assert not found.points[2]["holds"]


def test_what_a_library_says_is_a_point_that_fails() -> None:
    found = job()

    def refuse() -> None:
        raise ValueError("no such layer\nand more")

    found.attempt("adapter", refuse)
    assert found.points == [{"what": "adapter", "error": "ValueError: no such layer", "holds": False}]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    versions = {"consumer": "lm-eval", "versions": {"lm_eval": "0.4", "transformers": "5"}}
    ids = {"what": "ids", "equal": 3, "cases": 4, "holds": False}
    table.show([versions | ids, versions | {"what": "logits", "difference": 1e-7, "holds": True}])
    assert capsys.readouterr().out.splitlines() == [
        "| consumer | what is compared | |",
        "|---|---|---|",
        "| lm-eval: lm_eval 0.4, transformers 5 | ids | 3 of 4 equal (!) |",
        "| | logits | 1.0e-07 of the largest apart |",
    ]


def test_another_interpreter_finds_the_torch_that_is_lent(tmp_path: Path) -> None:
    lent = _lend_torch(tmp_path / "lent")
    code = (
        f"import sys; sys.path = [{str(lent)!r}, *(p for p in sys.path if 'site-packages' not in p)]\n"
        "import importlib.metadata as m, importlib.util as u; print(m.version('torch'), u.find_spec('torch').origin)"
    )
    said = subprocess.check_output([sys.executable, "-I", "-c", code], text=True).split()
    assert said == [importlib.metadata.version("torch"), str(lent / "torch" / "__init__.py")]
