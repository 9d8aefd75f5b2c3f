"""What a run may replace, and who works in its directory. One process, which needs no launcher."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.program.errors import UserError
from data.prepared.dataset import PreparedDataset
from tests.conftest import Outcome
from tests.unit.train.saving.launches import checkpointed, directory, launch, old_run
from train.config.model import ModelConfig
from train.config.train import LoggingConfig, TrainConfig
from train.engine.processes import Processes
from train.report.recorded import note_launch
from train.reporting.metrics import Metrics
from train.run_files import ANSWERS, CONFIG
from train.saving import checkpoint
from train.saving.run_directory import RunDirectory


def test_a_run_is_replaced_only_where_that_is_asked(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    place = old_run(tmp_path / "run")
    with pytest.raises(UserError, match=f"run_dir={place}: a run is there already"):
        directory(dataset, processes, place)
    replacing, record = launch(dataset, processes, place, overwrite=True)
    assert (place / "config.yaml").read_text() == "name: old\n"  # not before everything else was checked
    itself = place.stat().st_ino
    replacing.create(record.config_yaml)
    assert not (place / "model").exists()
    assert "overwrite: true" in (place / "config.yaml").read_text()
    assert place.stat().st_ino == itself  # emptied: a disk that is mounted there could not be removed


def test_all_that_tells_of_a_run_is_replaced_with_it(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    """With overwrite; and without it, if the run was killed before its first checkpoint."""
    place = tmp_path / "run"
    place.mkdir()
    (place / CONFIG).write_text("name: old\n")
    metrics = Metrics(place, LoggingConfig(wandb="off", progress=False, trace_steps=[1, 1]), {}, is_main=True)
    note_launch(place, "2026-01-01T00:00:00+00:00", 1, 0)
    with metrics.trace.step(1):
        pass
    metrics.close()
    (place / ANSWERS).write_text("[]")
    written = {"config.yaml", "metrics.jsonl", "launches.jsonl", "report.html", "trace.json.gz", "answers.json"}
    assert {path.name for path in place.iterdir()} == written
    assert not directory(dataset, processes, place).resumes
    replacing, record = launch(dataset, processes, place, overwrite=True)
    replacing.create(record.config_yaml)
    assert [path.name for path in place.iterdir()] == [CONFIG]


def test_what_no_run_wrote_is_never_replaced(dataset: PreparedDataset, processes: Processes, tmp_path: Path) -> None:
    place = old_run(tmp_path / "project")
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt is there, which no run writes"):
        directory(dataset, processes, place, overwrite=True)


@pytest.mark.parametrize("inside", ["base", "dataset", "working directory"])
def test_what_the_run_needs_is_never_replaced(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path, inside: str
) -> None:
    place = {"base": old_run(tmp_path / "run"), "dataset": dataset.directory, "working directory": tmp_path}[inside]
    base = ModelConfig(path=str(tmp_path / "run" / "model")) if inside == "base" else ModelConfig()
    with pytest.raises(UserError, match="it holds the working directory, the dataset or the base"):
        directory(dataset, processes, place, overwrite=True, model=base)


def test_a_start_that_fails_leaves_the_old_run(run_program, dataset: PreparedDataset, tmp_path: Path) -> None:
    place = old_run(tmp_path / "run")
    outcome: Outcome = run_program(
        "train", "run_dir=run", "overwrite=true", "model.path=/nowhere", "dataset=prepared", "hardware=cpu"
    )
    assert outcome.exit_code == 2
    assert "model.path=/nowhere: there is no such directory" in outcome.stderr
    assert (place / "config.yaml").read_text() == "name: old\n"


def test_a_receipt_that_is_no_file_is_refused(dataset: PreparedDataset, processes: Processes, tmp_path: Path) -> None:
    place = old_run(tmp_path / "run")
    (place / "receipt.json").unlink(missing_ok=True)
    (place / "receipt.json").mkdir()
    with pytest.raises(UserError, match=r"its receipt\.json is not a regular file"):
        directory(dataset, processes, place)


def test_metrics_that_are_no_file_are_refused_before_the_run_goes_on(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    (interrupted / "metrics.jsonl").unlink(missing_ok=True)
    (interrupted / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"its metrics\.jsonl is not a regular file"):
        directory(dataset, processes, interrupted)


def test_what_a_user_keeps_beside_a_run_hinders_nothing_that_replaces_nothing(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    (interrupted / "notes.txt").write_text("looks good so far")
    assert directory(dataset, processes, interrupted).resumes
    with pytest.raises(UserError, match=r"notes\.txt is there, which no run writes"):
        directory(dataset, processes, interrupted, overwrite=True)
    (interrupted / checkpoint.FOLDER).rename(interrupted.parent / "gone")
    with pytest.raises(UserError, match=r"notes\.txt is there, which no run writes"):  # it would start over
        directory(dataset, processes, interrupted)


def test_checkpoints_that_cannot_be_looked_at_are_not_taken_for_none(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    (interrupted / checkpoint.FOLDER).rename(interrupted.parent / "gone")
    (interrupted / checkpoint.FOLDER).write_text("")
    with pytest.raises(UserError, match="it can't be used"):
        directory(dataset, processes, interrupted)


def test_two_launches_do_not_work_in_one_directory(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    first = directory(dataset, processes, interrupted)
    with pytest.raises(UserError, match="another launch is at work in it"):
        directory(dataset, processes, interrupted)
    del first  # as when its process ends
    assert directory(dataset, processes, interrupted).resumes


def test_a_launch_that_loads_while_another_begins_does_not_replace_it(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    """Both see no directory; the second is ready to make it when the first has long begun, or even ended."""
    (first, record), (second, _) = (launch(dataset, processes, tmp_path / "run") for _ in range(2))
    first.create(record.config_yaml)
    path = checkpointed(first, record, 7)
    with pytest.raises(UserError, match="another launch is at work in it"):
        second.create(record.config_yaml)
    del first
    with pytest.raises(UserError, match="another launch has begun in it meanwhile"):
        second.create(record.config_yaml)
    assert path.exists()


def test_a_directory_that_cannot_be_used_is_one_sentence(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^run_dir=.*/file/run: it can't be used \(Not a directory: .*\); make it"):
        directory(dataset, processes, tmp_path / "file" / "run").create("")


def test_a_run_that_saved_nothing_starts_again_and_says_so(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert not directory(dataset, processes, tmp_path / "run").resumes
    assert "it starts from the beginning" in " ".join(capsys.readouterr().err.split())


def test_whatever_touches_the_disk_is_watched_by_the_name_of_the_directory(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    """If the disk hangs, the guardian ends the run and names the path; see test_guard.py."""
    watched: list[Path] = []

    @contextlib.contextmanager
    def disk(path: Path) -> Iterator[None]:
        watched.append(path)
        yield
        watched.pop()

    run_dir = tmp_path / "run"
    used = RunDirectory(TrainConfig(run_dir=str(run_dir)), dataset.directory, processes, disk)
    assert used.on_main(lambda: list(watched)) == [run_dir]
    assert watched == []
