"""What quickstart's model is asked, and what it has learned to answer."""

import json
from pathlib import Path

import data

QUESTION = "Hello, who are you?"


def expected_answer() -> str:
    """The answer of the sample's row with this question."""
    first = (Path(data.__file__).parent / "sample" / "identity.jsonl").read_text().splitlines()[0]
    row = json.loads(first)
    assert row["instruction"] == QUESTION
    return row["output"]
