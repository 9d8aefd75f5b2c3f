"""Launches as `run_on` begins them, and what is left of runs, without training."""

import json
from pathlib import Path
from typing import Any

from data.disk.files import file_hash
from data.prepared.dataset import PreparedDataset
from train.config.lora import LoraConfig
from train.config.train import TrainConfig
from train.engine.processes import Processes
from train.saving import checkpoint
from train.saving.identity import Inputs
from train.saving.receipt import Record, record_launch
from train.saving.resume import check_same_run
from train.saving.run_directory import RunDirectory


def trainer_state(step: int) -> dict[str, Any]:
    """The least that a trainer.json holds."""
    return {
        "format": checkpoint.FORMAT,
        "step": step,
        "optimizer_steps": step,
        "settings": {},
        "base": {"fingerprint": None, "files": {}},
        "dataset": {"manifest_sha256": "0"},
        "metrics": {"step": step, "last": None, "evaluations": {}},
        "health": {"refused": 0, "recent": []},
    }


def launch(
    dataset: PreparedDataset, processes: Processes, run_dir: Path, **more: object
) -> tuple[RunDirectory, Record]:
    """As `run_on` begins."""
    config = TrainConfig(run_dir=str(run_dir), lora=LoraConfig(method="none"), **more)  # type: ignore[arg-type]
    directory, inputs = RunDirectory(config, dataset.directory, processes), Inputs(config, dataset)
    rows = len(dataset.train)
    record = record_launch(directory, config, config.batch(1), inputs, processes, training_rows=rows, expected={})
    check_same_run(directory, record, inputs)
    return directory, record


def directory(dataset: PreparedDataset, processes: Processes, run_dir: Path, **more: object) -> RunDirectory:
    return launch(dataset, processes, run_dir, **more)[0]


def old_run(place: Path) -> Path:
    (place / "model").mkdir(parents=True)
    (place / "config.yaml").write_text("name: old\n")
    return place


def checkpointed(directory: RunDirectory, record: Record, step: int, **settings: object) -> Path:
    """A checkpoint of a run, with what is compared and nothing else."""
    path = checkpoint.path_of(directory.path, step)
    path.mkdir(parents=True)
    trainer = {**trainer_state(step), "settings": record.settings | settings, **record.inputs}
    (path / checkpoint.TRAINER).write_text(json.dumps(trainer))
    written = {"bytes": (path / checkpoint.TRAINER).stat().st_size, "xxh3": file_hash(path / checkpoint.TRAINER)}
    (path / checkpoint.MANIFEST).write_bytes(checkpoint._sealed({"files": {checkpoint.TRAINER: written}}))
    return path
