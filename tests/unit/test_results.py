"""What benchmark.py and torture.py write with --json: a point is a line, and nothing gets lost in it."""

import json
from pathlib import Path

import pytest

from scripts._command import in_lines

RESULTS = sorted((Path(__file__).parents[2] / "scripts").glob("*/results/*.json"))


def test_a_point_is_a_line() -> None:
    figures = {
        "seed": 0,
        "failed": [],
        "points": [{"run": "a", "codes": [9, 0]}, {"run": "b"}],
        "none": {},
        "at": {"a": 1},
    }
    assert in_lines(figures).splitlines() == [
        "{",
        '  "seed": 0,',
        '  "failed": [],',
        '  "points": [',
        '    {"run": "a", "codes": [9, 0]},',
        '    {"run": "b"}',
        "  ],",
        '  "none": {},',
        '  "at": {',
        '    "a": 1',
        "  }",
        "}",
    ]
    assert json.loads(in_lines(figures)) == figures


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_are_written_so(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert in_lines(json.loads(text)) + "\n" == text
