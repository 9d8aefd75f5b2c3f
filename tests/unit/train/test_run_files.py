"""What a run leaves in lines of JSON, as the report and a sweep's table read it."""

import json
from pathlib import Path

from train.run_files import METRICS, read_metrics
from train.sweep import Losses

LINES = [
    {"step": 0, "evaluation_loss": 3.5},
    {"step": 1, "loss": 3.25, "auxiliary_loss": 1.5},
    {"step": 2, "loss": "nan", "load_balancing_loss": 1.25},
    {"step": 2, "evaluation_loss": 3.0},
]


def test_a_line_that_a_kill_cut_costs_itself_alone(tmp_path: Path) -> None:
    """The table of a sweep had nothing to say of such a run."""
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 3, "lo')
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert [line["load_balancing_loss"] for line in lines if "loss" in line] == [1.5, 1.25]
    assert Losses.of(str(tmp_path)) == Losses(2, "nan", 3.5, 3.0)


def test_a_run_that_recorded_nothing_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "gone") == []
    assert Losses.of(None) == Losses()
