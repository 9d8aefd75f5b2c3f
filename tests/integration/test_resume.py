"""A run that was interrupted goes on as if it had not been. The long forms are `python scripts/torture.py`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts.tortures import damage, kill
from scripts.tortures.harness.outcome import first_difference
from scripts.tortures.harness.trials import generator
from scripts.tortures.harness.workplace import Workplace
from train.saving import checkpoint

pytestmark = pytest.mark.slow

STOPPED: dict[str, Any] = {"step": 13, "keep_last": "3"}


@pytest.fixture
def stopped(runs: Workplace) -> Path:
    """A run on one process that was asked to stop, with three checkpoints."""
    return runs.interrupted("stopped", **STOPPED)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_anywhere_it_ends_as_if_it_had_not_been(runs: Workplace, processes: int) -> None:
    points, finished, failed = kill.torment(runs, processes, count=4, seed=1)
    assert (failed, len(points)) == ([], 4)
    assert finished >= 1
    assert any(point.inside for point in points)


def test_whatever_is_damaged_is_noticed_by_name(runs: Workplace, stopped: Path) -> None:
    newest = checkpoint.paths(stopped)[0]
    damages = [*damage.of_files(newest, 2, generator("test")), *damage.of_tensors(newest)]
    assert len({what for kind, what, _ in damages if kind == "deleted"}) == 9
    for _, _, way in damages:
        damage.noticed(newest, runs.scratch / "damaged", way)


@pytest.mark.parametrize("kind", ["one byte short", "tensor renamed"])
def test_the_checkpoint_before_a_damaged_one_is_used(runs: Workplace, stopped: Path, kind: str) -> None:
    newest = checkpoint.paths(stopped)[0]
    every = [*damage.of_files(newest, 0, generator("test")), *damage.of_tensors(newest)]
    way = next(way for of_kind, what, way in every if of_kind == kind and what == "exp_avg_sq.safetensors")
    damage.resumed(runs, stopped, runs.reference(1), f"damaged {kind}".replace(" ", "-"), [way])


def test_it_never_starts_over_silently(runs: Workplace, stopped: Path) -> None:
    def empty(place: Path) -> str:
        (place / checkpoint.TRAINER).write_bytes(b"")
        return checkpoint.TRAINER

    damage.refused(runs, stopped, [empty] * 3)


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


def test_a_receipt_that_is_none_is_the_users_to_mend(runs: Workplace) -> None:
    run = runs.copy(runs.reference(1), "finished-without-receipt")
    (run / "receipt.json").write_bytes(b"\x80\x04")
    launch = runs.launch(run, 1)
    assert launch.wait() == [2], launch.said()
    assert "its receipt.json can't be read" in launch.said()


@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
@pytest.mark.parametrize("field", ["optim.lr", "dataset", "model.path", "resume"])
def test_what_differs_is_refused_by_name(
    runs: Workplace, stopped: Path, tmp_path: Path, field: str, finished: bool
) -> None:
    run = runs.reference(1) if finished else stopped
    changed = {"optim.lr": "2e-3", "resume": "never"}.get(field)
    if field in ("dataset", "model.path"):
        place = shutil.copytree(runs.rows if field == "dataset" else runs.base, tmp_path / "other")
        changed = str(place)
        if field == "dataset":
            manifest = json.loads((place / "manifest.json").read_text())
            (place / "manifest.json").write_text(json.dumps(manifest | {"seed": 1}))
        else:
            weights = bytearray((place / "model.safetensors").read_bytes())
            weights[-1] ^= 1
            (place / "model.safetensors").write_bytes(weights)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    launch = runs.launch(run, 1, **{field: changed or ""})
    assert launch.wait() == [2], launch.said()
    (sentence,) = [line for line in launch.said().splitlines() if line.startswith("train: ")]
    assert field in sentence or (field == "resume" and "a run is there already" in sentence)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
