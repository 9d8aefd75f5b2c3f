"""What `dry_run` says: of the machine that is asked about, and of the dataset."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def plan(run_program: Callable[..., Any], project_root: Path) -> Callable[..., Any]:
    """Runs a plan of the sample about the assistant, of a nano Mixtral, and gives its lines by their headings."""
    rows = project_root / "data" / "sample" / "identity.jsonl"
    assert run_program("data", f"files=[{rows}]", "output=rows", "seq_len=256", "eval_fraction=0").exit_code == 0

    def lines(*settings: str) -> dict[str, str]:
        outcome = run_program("train", "lora=none", "dataset=rows", "dry_run=true", *settings)
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        shown = [line.split(maxsplit=1) for line in outcome.stdout.splitlines() if line[:1].isalpha()]
        return dict(shown)

    return lines


def test_steps_epochs_and_tokens_are_those_of_the_dataset(plan: Callable[..., Any], tmp_path: Path) -> None:
    counts = json.loads((tmp_path / "rows" / "manifest.json").read_text())["train"]
    rows, tokens, supervised = counts["packed_rows"], counts["tokens"], counts["supervised_tokens"]
    assert rows > 1
    said = plan("epochs=4", f"global_batch={rows}")
    assert said["dataset"] == f"rows: {rows} rows of 256, {supervised:,} of {tokens:,} tokens supervised"
    assert said["steps"] == "4, 4 epochs of 1 steps"
    assert said["tokens"] == f"{4 * tokens:,} in all, {4 * supervised:,} supervised"
    said = plan("epochs=4", f"global_batch={rows}", "max_steps=2")
    assert said["steps"] == "2, 2 epochs of 1 steps, of 4 for 4 epochs (max_steps=2)"
    assert said["tokens"] == f"about {2 * tokens:,} in all, {2 * supervised:,} supervised"


def test_the_plan_is_for_the_device_that_is_asked_about(plan: Callable[..., Any]) -> None:
    assert plan("hardware.device=cuda")["device"] == "cuda"
    assert plan("hardware.device=cpu")["device"] == "cpu"
    assert "hardware.device=auto finds here" in plan("hardware.device=auto")["device"]
