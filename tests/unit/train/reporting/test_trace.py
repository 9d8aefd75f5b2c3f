"""A trace of a few steps."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.program.errors import UserError
from train.config.train import LoggingConfig
from train.reporting.trace import Trace


def taken(trace: Trace, first: int, last: int) -> None:
    for number in range(first, last + 1):
        with trace.step(number):
            torch.ones(8, 8) @ torch.ones(8, 8)


def events(directory: Path) -> list[dict[str, Any]]:
    """In the format that Perfetto opens: JSON, an object with a list of events."""
    with gzip.open(directory / "trace.json.gz") as file:
        return list(json.load(file)["traceEvents"])


def test_the_steps_that_are_wanted_are_in_it_with_their_operators(tmp_path: Path) -> None:
    trace = Trace(tmp_path, [2, 3])
    taken(trace, 1, 4)
    found = events(tmp_path)
    steps = {event["name"]: event for event in found if event["name"].startswith("step ")}
    assert steps.keys() == {"step 2", "step 3"}
    products = [event for event in found if event["name"] == "aten::mm"]
    assert len(products) == 2
    assert all({"ph", "ts", "dur", "pid", "tid"} <= event.keys() for event in products)
    trace.close()  # has nothing to add


def test_a_run_that_ends_before_leaves_what_was_seen(tmp_path: Path) -> None:
    trace = Trace(tmp_path, [2, 9])
    taken(trace, 1, 2)
    assert not list(tmp_path.iterdir())
    trace.close()
    assert "step 2" in {event["name"] for event in events(tmp_path)}


def test_none_is_written_without_steps(tmp_path: Path) -> None:
    trace = Trace(tmp_path, [])
    taken(trace, 1, 2)
    trace.close()
    assert not list(tmp_path.iterdir())


def test_a_trace_that_can_not_be_written_costs_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.json.gz").mkdir()
    taken(Trace(tmp_path, [1, 1]), 1, 2)
    assert "trace.json.gz can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [[3], [0, 2], [3, 2], [1, 2, 3]])
def test_it_takes_a_first_and_a_last_step(steps: list[int]) -> None:
    with pytest.raises(UserError, match=r"logging.trace_steps=.*the first and the last step"):
        LoggingConfig(trace_steps=steps).check()
    LoggingConfig(trace_steps=[10, 12]).check()
    LoggingConfig().check()
