"""The learning-rate schedule and the batch arithmetic."""

import pytest

from configs.program.errors import UserError
from train.config.engine import OptimConfig
from train.config.train import TrainConfig
from train.loop import learning_rate


def test_the_rate_rises_linearly_to_the_peak_and_falls_to_its_share() -> None:
    config = OptimConfig(lr=1.0, warmup_fraction=0.1, final_fraction=0.2)
    rates = [learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[54] == pytest.approx(0.6)  # halfway down the cosine
    assert rates[-1] == pytest.approx(0.2)


def test_a_run_of_one_step_has_a_rate() -> None:
    assert learning_rate(1, 1, OptimConfig(lr=1.0)) == pytest.approx(1.0)
    assert learning_rate(1, 1, OptimConfig(lr=1.0, warmup_fraction=0.0, final_fraction=0.5)) == pytest.approx(0.5)


def test_accumulation_follows_from_the_global_batch() -> None:
    config = TrainConfig(global_batch=32, micro_batch=2)
    assert [config.batch(processes).accumulation for processes in (1, 2, 4, 8)] == [16, 8, 4, 2]
    assert {config.batch(processes).rows for processes in (1, 2, 4, 8)} == {32}


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"global_batch=32: .*global_batch=30"):
        TrainConfig(global_batch=32, micro_batch=2).batch(3)
