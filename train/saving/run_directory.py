"""The run directory: whether it can be used, locked while a launch works in it, and created.

runs/{name}-{date}-{time}/
  config.yaml               the resolved configuration
  metrics.jsonl, launches.jsonl, report.html, wandb/
  answers.json, evaluation/ of task=report and of task=evaluate; trace.json.gz of logging.trace_steps
  checkpoints/step-000123/  all that the run needs to go on from there; see checkpoint.py
  adapter/                  the result, in PEFT's format, with per_expert/ in it; model/ after training in
                            full
  receipt.json              what was run, on what, from what, with what outcome; written last
  expert_load.json, .png    of task=profile: which experts the routers choose
"""

import contextlib
import datetime
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from configs.program.console import console
from configs.program.errors import UserError
from data.disk.adapter_directory import EVALUATION, RECEIPT
from data.disk.files import lock, occupied, replace_file, sync
from train.config.train import TrainConfig
from train.engine.processes import Processes, agree
from train.run_files import (
    ANSWERS,
    CONFIG,
    EXPERT_LOAD,
    EXPERT_LOAD_PICTURE,
    LAUNCHES,
    METRICS,
    REPORT,
    TRACE,
)
from train.saving import checkpoint

RESULTS = {"adapter", "model", RECEIPT, EXPERT_LOAD, EXPERT_LOAD_PICTURE}
"""What only a run that came to its end has written."""
REPORTS = {METRICS, LAUNCHES, REPORT, ANSWERS, TRACE, "wandb", EVALUATION}
"""What describes the run; answers and evaluation come later, from commands of their own."""
RUN_ENTRIES = {CONFIG, checkpoint.FOLDER} | REPORTS | RESULTS
"""All that a run directory holds; a directory with anything else in it is not replaced."""

T = TypeVar("T")


class RunDirectory:
    """Where a run keeps what it leaves. Only the main process touches the disk."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Path,
        processes: Processes,
        watched: Callable[[Path], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ):
        """Chooses the directory, and decides whether a run in it goes on, the same on every process; collective.

        Changes nothing yet.

        Args:
            config: of this launch.
            dataset: the directory of the prepared dataset.
            processes: of this launch.
            watched: within it, the main process waits for the directory's disk; `nullcontext` is that without a guard.

        Raises:
            UserError: the directory can't be used, or something is in it that must not be replaced.
        """
        self.is_main = processes.is_main
        """Whether this process touches the disk."""
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.path = Path(agree(config.run_dir or f"runs/{config.name}-{stamp}"))  # clocks differ between processes
        self._watched = watched
        self._unlock: weakref.finalize[Any, Any] | None = None
        self._was_there = False
        self.finished = False
        """Whether a run is there that came to its end, and is asked for again."""
        self.resumes = False
        """Whether a run is there that has checkpoints and not come to its end, and is asked for again."""
        try:
            self.on_main(lambda: self._examine(config, dataset))
        except UserError:
            if self._unlock is not None:
                self._unlock()
            raise
        self.finished, self.resumes = agree((self.finished, self.resumes))

    def on_main(self, action: Callable[[], T]) -> T | None:
        """What an action returns, on the main process; the `UserError` that it raises, on every process; collective.

        An `OSError` of the action becomes a `UserError` about the directory. The action itself is not collective, as
        the guardian would take a wait for others for a disk that hangs.
        """
        result, problem = None, None
        if self.is_main:
            try:
                with self._watched(self.path):
                    result = action()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
                problem = (
                    f"run_dir={self.path}: it can't be used ({reason}); make it writable, or name another directory"
                )
        if problem := agree(problem):
            raise UserError(problem)
        return result

    def _examine(self, config: TrainConfig, dataset: Path) -> None:
        """Decides whether a run that is there goes on, or is finished."""
        self._was_there = self.path.exists()
        if wrong := problem(self.path, config, dataset):
            raise UserError(f"run_dir={self.path}: {wrong}")
        if not self._was_there:
            return
        self._lock()
        self.finished, self.resumes = state(self.path, config)
        begins = config.task == "train" and not config.overwrite and not self.finished and not self.resumes
        if begins:
            console.print(
                f"{self.path}: the run that is there left no checkpoint; it starts from the beginning", soft_wrap=True
            )

    def _lock(self) -> None:
        """Keeps other launches out of the directory for as long as this process lives.

        A run that was asked to stop may still be saving when the next is launched.
        """
        if self._unlock is not None:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # a file system without locks
            if not lock(descriptor):
                raise UserError(
                    f"run_dir={self.path}: another launch is at work in it; wait until that has ended, or name another "
                    f"directory"
                )

    def create(self, config_yaml: str) -> None:
        """Makes the directory, in the place of an older run unless that goes on, and writes config.yaml; collective.

        Raises:
            UserError: it can't be written, or another launch has made it meanwhile.
        """
        self.on_main(lambda: self._create(config_yaml))

    def _create(self, config_yaml: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._was_there:
            sync(self.path.resolve().parent)
        self._lock()
        if not self._was_there and any(self.path.iterdir()):  # loading took its time
            raise UserError(
                f"run_dir={self.path}: another launch has begun in it meanwhile; give the same command again to go on "
                f"with that, or name another directory"
            )
        if not self.resumes:
            # The receipt first, which says that the run is finished; not the directory itself, on which a disk may be
            # mounted.
            for old in sorted(self.path.iterdir(), key=lambda path: path.name != RECEIPT):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        checkpoint.clean(self.path)
        replace_file(self.path / CONFIG, [config_yaml.encode()])


def problem(path: Path, config: TrainConfig, dataset: Path) -> str | None:
    """Why the directory can't be used, as the end of a sentence; None if it can."""
    found = occupied(path, [dataset, Path(config.model.path or ".")])
    if found.needed:
        return "it holds the working directory, the dataset or the base; name a directory of its own"
    if found.is_file:
        return "it is a file; name another directory"
    entries = {name for name in found.names if not _half_written(Path(name))}
    goes_on = config.resume == "auto" and config.task == "train" and not config.overwrite
    if goes_on and (RECEIPT in entries or checkpoint.paths(path)):
        # Nothing is replaced, whatever else the user keeps there.
        odd = next((name for name in (RECEIPT, METRICS) if name in entries and not (path / name).is_file()), None)
        return f"its {odd} is not a regular file; take it away, or name another directory" if odd else None
    if foreign := entries - RUN_ENTRIES:
        return f"{min(foreign)} is there, which no run writes; name another directory"
    if config.overwrite or (goes_on and not RESULTS & entries) or not entries:
        return None
    return "a run is there already; name another directory, or give overwrite=true to replace it"


def state(path: Path, config: TrainConfig) -> tuple[bool, bool]:
    """Whether a usable directory holds a run that has finished, and whether it holds one that can be resumed."""
    if config.task != "train" or config.overwrite:
        return False, False
    finished = (path / RECEIPT).is_file()
    return finished, not finished and bool(checkpoint.paths(path))


def _half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in (".tmp", ".old")
