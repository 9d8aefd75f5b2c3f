"""Which rows a profile takes, and what it leaves."""

import json
from pathlib import Path

import pytest

from data.prepared.dataset import PreparedDataset
from tests.support.prepared import prepared
from train.config.train import BatchArithmetic, TrainConfig
from train.expert_load import rows_to_profile, save


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


def test_a_picture_that_can_not_be_drawn_costs_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"expert_load": [[0.25, 0.75]]}
    (tmp_path / "expert_load.png").mkdir()
    save(record, tmp_path)
    assert json.loads((tmp_path / "expert_load.json").read_text()) == record
    assert f"{tmp_path}/expert_load.json; expert_load.png can't be drawn (" in capsys.readouterr().err
    (tmp_path / "expert_load.png").rmdir()
    save(record, tmp_path)
    assert (tmp_path / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    assert f"{tmp_path}/expert_load.json and expert_load.png\n" in capsys.readouterr().err
