"""Refused updates and spikes."""

import math
import re

from train.config.train import FailureConfig
from train.health import Health
from train.history import StepRecord


def record(step: int, loss: float, *, applied: bool = True) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        learning_rate=0.1,
        gradient_norm=1.0 if applied else math.nan,
        applied=applied,
        load_balancing_loss=1.0,
        tokens=10,
        supervised_tokens=5,
        seconds=1.0,
    )


def test_a_run_stops_after_so_many_refused_updates_in_a_row() -> None:
    health = Health(FailureConfig(refused_in_a_row=3))
    for step in (1, 2):
        assert health.judge(record(step, math.inf, applied=False)) == "refused"
    assert health.judge(record(3, 2.0)) is None  # the count starts again
    for step in (4, 5):
        assert health.judge(record(step, math.nan, applied=False)) == "refused"
    assert health.gives_up is None
    assert health.judge(record(6, math.nan, applied=False)) == "refused"
    assert health.gives_up is not None
    assert re.match(r"failures\.refused_in_a_row=3: .* up to step 6, .*loss nan.*lower optim\.lr", health.gives_up)


def test_a_loss_far_above_the_mean_of_the_window_is_a_spike() -> None:
    health = Health(FailureConfig(spike=2.0, spike_window=4))
    assert health.judge(record(1, 9.0)) is None
    assert health.judge(record(2, 90.0)) is None  # the window is not full: the first steps of a run fall fast
    for step in (3, 4, 5, 6):
        assert health.judge(record(step, 1.0)) is None
    assert health.judge(record(7, 2.0)) is None
    assert health.judge(record(8, 2.6)) == "spike"  # above twice (1 + 1 + 1 + 2) / 4
    off = Health(FailureConfig(spike=0, spike_window=1))
    assert [off.judge(record(step, 10.0**step)) for step in range(1, 5)] == [None] * 4


def test_it_goes_on_where_it_was() -> None:
    first = Health(FailureConfig(refused_in_a_row=3, spike=2.0, spike_window=2))
    for step in (1, 2, 3):
        first.judge(record(step, float(step)))
    first.judge(record(4, math.nan, applied=False))
    second = Health(FailureConfig(refused_in_a_row=3, spike=2.0, spike_window=2))
    second.restore(first.state())
    assert second.state() == first.state()
    assert second.judge(record(5, 6.0)) == "spike"
