"""From what a run goes on. One process, which needs no launcher."""

import json
from pathlib import Path

import pytest

from configs.program.errors import UserError
from data.prepared.dataset import PreparedDataset
from tests.unit.train.saving.launches import checkpointed, directory, launch, old_run
from train.engine.processes import Processes
from train.saving import checkpoint
from train.saving.resume import find_checkpoint


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_fresh_run_refuses_rows_that_are_not_those_of_the_manifest(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path, split: str
) -> None:
    """One bit, which changes no size."""
    rows = dataset.directory / split / "rows.arrow"
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"^dataset=.*: {split}/rows\.arrow is not whole \(it has changed since it was prepared"
    ):
        directory(dataset, processes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_alone_where_the_same_is_asked(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    run, record = launch(dataset, processes, tmp_path / "run")
    old_run(run.path)
    (run.path / "receipt.json").write_text(json.dumps({"settings": record.settings, **record.inputs}))
    assert directory(dataset, processes, run.path).finished
    with pytest.raises(UserError, match=r"^seed=5: the run that is there was started with 0"):
        directory(dataset, processes, run.path, seed=5)
    for other in ("{}", "[]", "not JSON"):
        (run.path / "receipt.json").write_text(other)
        with pytest.raises(UserError, match=r"its receipt\.json can't be read"):
            directory(dataset, processes, run.path)


def test_a_run_with_a_checkpoint_goes_on_unless_told_otherwise(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    assert directory(dataset, processes, interrupted).resumes
    assert not directory(dataset, processes, interrupted, overwrite=True).resumes
    with pytest.raises(UserError, match="a run is there already"):
        directory(dataset, processes, interrupted, resume="never")


def test_a_checkpoint_of_another_version_is_refused_by_name(
    interrupted: Path, dataset: PreparedDataset, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    run = launch(dataset, processes, interrupted)
    with pytest.raises(UserError, match=r"step-000007: trainer\.json is of another version of this program"):
        find_checkpoint(*run, {})


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    interrupted: Path,
    dataset: PreparedDataset,
    processes: Processes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newer = checkpointed(*launch(dataset, processes, interrupted), 8)
    (newer / checkpoint.TRAINER).write_text((newer / checkpoint.TRAINER).read_text().replace("8", "9"))
    run = launch(dataset, processes, interrupted)
    with pytest.raises(
        UserError, match=r"none of them is whole \(step-000008: trainer\.json is not as it was written\)"
    ):
        find_checkpoint(*run, {"w": (1,)})  # the older one holds no tensors either
    told = " ".join(capsys.readouterr().err.split())
    assert "step-000008 is damaged (trainer.json is not as it was written); the one before is used" in told
    assert "step-000007 is damaged (master.safetensors is missing)" in told
