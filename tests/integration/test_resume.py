"""A run that was interrupted goes on as if it had not been. The long forms are `python scripts/torture.py`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts.tortures import damage, kill
from scripts.tortures.harness.outcome import first_difference
from scripts.tortures.harness.workplace import Workplace
from train.saving import checkpoint

pytestmark = pytest.mark.slow

STOPPED: dict[str, Any] = {"step": 13, "keep_last": "3"}


@pytest.fixture
def stopped(runs: Workplace) -> Path:
    """A run on one process that was asked to stop, with three checkpoints."""
    return runs.interrupted("asked-to-stop", **STOPPED)


def test_killed_anywhere_it_ends_as_if_it_had_not_been(runs: Workplace) -> None:
    """On two processes; on one it is the short form of the torture, in test_scripts.py."""
    points, finished, failed = kill.torment(runs, 2, count=4, seed=1)
    assert (failed, len(points)) == ([], 4)
    assert finished >= 1
    assert any(point.inside for point in points)


def test_the_checkpoint_before_one_with_other_tensors_is_used(runs: Workplace, stopped: Path) -> None:
    newest = checkpoint.paths(stopped)[0]
    every = damage.of_tensors(newest)
    way = next(way for kind, what, way in every if (kind, what) == ("tensor renamed", "exp_avg_sq.safetensors"))
    damage.resumed(runs, stopped, runs.reference(1), "damaged-tensor", [way])


def test_training_in_full_resumes_exactly(runs: Workplace) -> None:
    full = {"lora": "none", "max_steps": "6", "lora.dropout": "0"}
    run = runs.interrupted("stopped-in-full", 3, 2, **full)
    runs.finish(run, 2, **full)
    assert first_difference(run, runs.reference(2, **full)) is None


def test_a_finished_run_is_left_alone(runs: Workplace) -> None:
    run = runs.reference(1)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    launch = runs.finish(run, 1)
    assert "the run is finished" in launch.said()
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
def test_what_differs_is_refused_by_name(runs: Workplace, stopped: Path, tmp_path: Path, finished: bool) -> None:
    """Every kind of difference is in tests/unit/train/saving/test_run_directory.py."""
    run, changed = stopped, {"optim.lr": "2e-3"}
    if finished:
        other = shutil.copytree(runs.rows, tmp_path / "rows")
        manifest = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps(manifest | {"seed": 1}))
        run, changed = runs.reference(1), {"dataset": str(other)}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    launch = runs.launch(run, 1, **changed)
    assert launch.wait() == [2], launch.said()
    (sentence,) = [line for line in launch.said().splitlines() if line.startswith("train: ")]
    assert sentence.startswith(tuple(f"train: {field}=" for field in changed))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
