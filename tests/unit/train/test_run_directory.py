"""What a run may replace. One process, which needs no launcher."""

from pathlib import Path

import pytest

from configs.errors import UserError
from data.dataset import PreparedDataset
from tests.conftest import Outcome
from train import engine
from train.checkpoint import RunDirectory
from train.config import HardwareConfig, LoraConfig, ModelConfig, TrainConfig
from train.engine import Processes


@pytest.fixture(scope="module")
def processes() -> Processes:
    return engine.start(HardwareConfig(device="cpu"))


@pytest.fixture
def dataset(run_program, tmp_path: Path, project_root: Path) -> PreparedDataset:
    rows = project_root / "data" / "sample" / "identity.jsonl"
    outcome: Outcome = run_program("data", f"files=[{rows}]", "output=prepared", "seq_len=256")
    assert outcome.exit_code == 0
    return PreparedDataset(tmp_path / "prepared")


def directory(dataset: PreparedDataset, processes: Processes, run_dir: Path, **more: object) -> RunDirectory:
    config = TrainConfig(run_dir=str(run_dir), lora=LoraConfig(method="none"), **more)  # type: ignore[arg-type]
    return RunDirectory(config, dataset, config.batch(1), processes)


def old_run(place: Path) -> Path:
    (place / "model").mkdir(parents=True)
    (place / "config.yaml").write_text("name: old\n")
    return place


def test_a_run_is_replaced_only_where_that_is_asked(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    place = old_run(tmp_path / "run")
    with pytest.raises(UserError, match=f"run_dir={place}: a run is there already"):
        directory(dataset, processes, place)
    replacing = directory(dataset, processes, place, overwrite=True)
    assert (place / "config.yaml").read_text() == "name: old\n"  # not before everything else was checked
    replacing.create()
    assert not (place / "model").exists()
    assert "overwrite: true" in (place / "config.yaml").read_text()


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
