"""From what a run goes on. One process, which needs no launcher."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.program.errors import UserError
from data.prepared.dataset import PreparedDataset
from tests.unit.train.saving.launches import checkpointed, directory, launch, old_run
from train.config.train import TrainConfig
from train.engine.processes import Processes
from train.engine.processes import agree as processes_agree
from train.saving import checkpoint, identity, resume
from train.saving.receipt import Record
from train.saving.resume import find_checkpoint
from train.saving.run_directory import RunDirectory


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


def finished_run(dataset: PreparedDataset, processes: Processes, top: Path) -> tuple[RunDirectory, Record]:
    """A directory with the receipt of a run that came to its end."""
    run, record = launch(dataset, processes, top / "run")
    old_run(run.path)
    (run.path / "receipt.json").write_text(json.dumps({"settings": record.settings, **record.inputs}))
    return run, record


def test_a_finished_run_is_left_alone_where_the_same_is_asked(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    run, _ = finished_run(dataset, processes, tmp_path)
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


def test_nobody_waits_in_one_collective_while_a_checkpoint_is_hashed(
    interrupted: Path, dataset: PreparedDataset, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk goes on when the processes have heard of each other three times."""
    monkeypatch.setattr(resume, "SIGN_OF_LIFE", 0.01)
    heard = threading.Semaphore(0)
    waits = []

    def agree(value: Any) -> Any:
        heard.release()
        return processes_agree(value)

    @contextlib.contextmanager
    def slowly() -> Iterator[None]:
        waits.append([heard.acquire(timeout=20) for _ in range(3)])
        yield

    monkeypatch.setattr(resume, "agree", agree)
    run = launch(dataset, processes, interrupted)
    with pytest.raises(UserError, match=r"step-000007: master\.safetensors is missing"):
        find_checkpoint(*run, {"w": (1,)}, slowly)
    assert waits == [[True] * 3]


EARLY = {
    "seed=5": "seed=5: the run that is there was started with 0; give the same, 'resume_despite=[seed]', or give",
    "resume=never": ": a run is there already; name another directory, or give overwrite=true to replace it",
    "global_batch=3 micro_batch=2": "global_batch=3: it is not a multiple of micro_batch 2",
    "lora=experts lora.start=nowhere": "lora.start=nowhere: it is not an adapter directory",
    "lora=experts lora.experts=[9]": "lora.experts=[9]: there is no expert 9; give 0 to 7",
}


@pytest.mark.parametrize("settings", EARLY)
def test_what_can_be_told_is_told_before_processes_meet(
    settings: str,
    interrupted: Path,
    dataset: PreparedDataset,
    run_program: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Meeting may have to compile an operator, and loading a base takes minutes."""
    monkeypatch.setattr("train.run.Signals", lambda grace: None)
    monkeypatch.setattr("train.run.join_processes", lambda *args, **more: pytest.fail("they met"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "mixtral", "vocab_size": 32_000}))
    run_dir = tmp_path / "new" if settings.startswith("lora=") else interrupted
    given = ["lora=none", "hardware=cpu", f"dataset={dataset.directory}", f"run_dir={run_dir}", *settings.split()]
    outcome = run_program("train", *given, *(["model.path=base"] if settings.startswith("lora=") else []))
    assert outcome.exit_code == 2, outcome.stderr
    assert EARLY[settings] in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_finished_run_that_is_to_train_further_points_to_its_result(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    run, record = finished_run(dataset, processes, tmp_path)
    start = rf"give model\.path={run.path}/model and a new run_dir"
    wanted = rf"^epochs=9: .* started with 3; that run is finished; .*, {start}"
    for despite in ([], ["epochs"]):
        with pytest.raises(UserError, match=wanted) as told:
            directory(dataset, processes, run.path, epochs=9, resume_despite=despite)
        assert "resume_despite" not in str(told.value)
    with pytest.raises(UserError, match=rf"give lora\.start={run.path}/adapter and a new run_dir"):
        identity.check(
            {"settings": identity.stored_settings(TrainConfig())},
            TrainConfig(epochs=9),
            record.inputs,
            finished=run.path,
        )
