"""One process, a small dataset, and a run that was interrupted."""

from pathlib import Path

import pytest

from data.prepared.dataset import PreparedDataset
from tests.conftest import Outcome
from tests.unit.train.saving.launches import checkpointed, launch
from train.config.engine import HardwareConfig
from train.engine.processes import Processes, join_processes


@pytest.fixture(scope="module")
def processes() -> Processes:
    return join_processes(HardwareConfig(device="cpu"))


@pytest.fixture
def dataset(run_program, tmp_path: Path, project_root: Path) -> PreparedDataset:
    rows = project_root / "data" / "sample" / "identity.jsonl"
    outcome: Outcome = run_program("data", f"files=[{rows}]", "output=prepared", "seq_len=256")
    assert outcome.exit_code == 0
    return PreparedDataset(tmp_path / "prepared")


@pytest.fixture
def interrupted(dataset: PreparedDataset, processes: Processes, tmp_path: Path) -> Path:
    """The directory of a run of which nothing is left but a checkpoint."""
    checkpointed(*launch(dataset, processes, tmp_path / "run"), 7)
    return tmp_path / "run"
