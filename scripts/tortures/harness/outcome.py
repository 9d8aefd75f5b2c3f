"""What a run left on disk, and what must be equal after all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from train.saving import checkpoint
from train.saving.checkpoint import Checkpoint

RATES = {"tokens_per_second", "flops_per_second", "share_of_peak"}
CLOCK = {"seconds", "memory_gib", "checkpoint_paused_seconds", "checkpoint_seconds", *RATES}
"""Fields of metrics.jsonl about time and memory; all others must be equal."""
FOR_THE_RECORD = {"receipt.json", "train_config.yaml"}
"""Files of a result that tell when and where it was made."""


def hidden(run: Path) -> set[tuple[str, int]]:
    """The half-written or half-removed entries of a run, by name and inode."""
    found = set()
    for directory in (run, run / checkpoint.FOLDER):
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith((".tmp", ".old")):
                    found.add((entry.name, entry.inode()))
    return found


def of_a_save(names: set[tuple[str, int]]) -> set[str]:
    """The half-written entries that belong to a checkpoint or to the result."""
    return {name for name, _ in names if name.startswith((".step-", ".adapter.", ".receipt."))}


def last_written(run: Path, name: str) -> str | None:
    """The file of a half-written directory that was written to last, as a path in it."""
    for directory in (run / checkpoint.FOLDER / name, run / name):
        with contextlib.suppress(OSError):
            if directory.is_file():
                return directory.name
            files = [path for path in directory.rglob("*") if path.is_file()]
            if files:
                return str(max(files, key=lambda path: path.stat().st_mtime_ns).relative_to(directory))
    return None


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, or 0."""
    with contextlib.suppress(OSError):
        for line in reversed((run / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):
                step = json.loads(line)
                if "loss" in step:
                    return int(step["step"])
    return 0


def last_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((checkpoint.step_of(path) or 0 for path in checkpoint.paths(run)), default=0)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def record(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or the memory decides."""
    kept = [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(run)]
    return [line for line in kept if line.keys() != {"step"}]


def first_difference(run: Path, whole: Path) -> str | None:
    """The first difference of a finished run from the one that nothing happened to, or None."""
    ours, theirs = record(run), record(whole)
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return f"{run}: metrics.jsonl has {mine}, and {whole} has {other}"
    if len(ours) != len(theirs):
        return f"{run}: metrics.jsonl has {len(ours)} lines, and {whole} has {len(theirs)}"
    for path in [*whole.glob("adapter/adapter_*"), *whole.glob("model/*")]:
        name = path.relative_to(whole)
        if path.name not in FOR_THE_RECORD and (run / name).read_bytes() != path.read_bytes():
            return f"{run}: {name} has other bytes than that of {whole}"
    return None


def check_newest(run: Path) -> int:
    """Reads all of the newest checkpoint; returns its step.

    Raises:
        DamagedError: it is not whole.
    """
    found = Checkpoint(checkpoint.paths(run)[0])
    found.check(stored_shapes(found.path))
    return found.step


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The parameters of a checkpoint that is known to be whole."""
    from data.disk.tensor_file import read_header

    return {tensor.name: tensor.shape for tensor in read_header(directory / "master.safetensors")}
