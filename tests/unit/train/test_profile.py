"""Which rows a profile takes."""

from pathlib import Path

import pytest

from data.dataset import PreparedDataset
from tests.unit.data.test_dataset import prepared
from train.config import BatchArithmetic, TrainConfig
from train.profile import rows_to_profile


@pytest.mark.parametrize("packing", [True, False])
def test_the_rows_of_a_profile_are_the_first_that_training_would_take(tmp_path: Path, packing: bool) -> None:
    dataset = PreparedDataset(prepared(tmp_path, packing=packing))
    batch = BatchArithmetic(micro_batch=1, accumulation=2, processes=1)
    for seed in range(20):
        schedule = dataset.schedule(epochs=3, rows_per_step=batch.rows, seed=seed)
        cut = rows_to_profile(dataset, TrainConfig(max_steps=1, seed=seed), batch)
        assert cut == schedule.rows_of(0)
        assert sorted(rows_to_profile(dataset, TrainConfig(seed=seed), batch)) == [0, 1, 2]
        assert len(rows_to_profile(dataset, TrainConfig(max_steps=99, seed=seed), batch)) == 3
