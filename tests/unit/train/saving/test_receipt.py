"""What receipts say, in which order."""

import json
from dataclasses import replace

from train.config.train import BatchArithmetic, TrainConfig
from train.history import History, StepRecord
from train.saving.identity import stored_settings
from train.saving.receipt import Record

CONFIG = TrainConfig(epochs=2, global_batch=4)
RECORD = Record(
    config=CONFIG,
    settings=stored_settings(CONFIG),
    batch=BatchArithmetic(1, 4, 1),
    training_rows=10,
    launch={"started": "2026-01-01T00:00:00+00:00", "commit": "0"},
    inputs={"base": {}, "dataset": {}, "load": None, "start": None},
)


def history() -> History:
    steps = {"learning_rate": 1e-3, "gradient_norm": 0.5, "load_balancing_loss": 2.0, "seconds": 0.5}
    found = History()
    found.evaluations |= {0: 3.0, 3: 2.5}
    found.last = StepRecord(step=3, loss=2.0, applied=True, tokens=100, supervised_tokens=60, **steps)
    return found


def test_a_receipt_says_what_was_run_on_what_and_how_far_it_came() -> None:
    receipt = RECORD.receipt(history(), {"seconds": 0.5})
    launch, inputs = ["started", "commit"], ["base", "dataset", "load", "start"]
    outcome = ["evaluation_loss", "steps", "loss", "plan", "settings"]
    assert list(receipt) == [*launch, "written", "batch", "resumed_after_step", *inputs, *outcome]
    assert receipt["batch"] == {"micro_batch": 1, "accumulation": 4, "processes": 1}
    assert (receipt["evaluation_loss"], receipt["steps"], receipt["loss"]) == ({"0": 3.0, "3": 2.5}, 3, 2.0)
    assert receipt["settings"]["epochs"] == 2
    assert receipt["resumed_after_step"] is None


def test_a_launch_that_goes_on_says_from_where() -> None:
    resumed = History(json.loads(json.dumps(history().state())))
    assert RECORD.receipt(resumed, {})["resumed_after_step"] == 3


def test_a_receipt_before_the_first_step_knows_no_loss() -> None:
    receipt = RECORD.receipt(History(), {})
    assert (receipt["evaluation_loss"], receipt["steps"], receipt["loss"]) == ({}, 0, None)


def test_the_plan_stands_beside_what_was_measured() -> None:
    planned = replace(RECORD, expected={"memory_gib": 41.5, "seconds": "not planned", "tokens_per_second": 300.0})
    assert planned.receipt(history(), {"memory_gib": 40.0, "seconds": 0.5})["plan"] == {
        "peak memory of process 0, GiB": {"planned": 41.5, "measured": 40.0},
        "seconds a step": {"planned": "not planned", "measured": 0.5},
        "tokens a second": {"planned": 300.0, "measured": None},
    }
    assert RECORD.receipt(history(), {"seconds": 0.5})["plan"] is None  # another task than training has none


def test_rows_are_seen_once_in_each_epoch() -> None:
    assert [RECORD.rows_seen(step) for step in (0, 1, 5, 6)] == [0, 4, 20, 20]
