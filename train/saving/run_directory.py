"""The run directory: whether it can be used, and from where the run in it goes on.

runs/{name}-{date}-{time}/
  config.yaml               the resolved configuration
  metrics.jsonl
  checkpoints/step-000123/  all that the run needs to go on from there; see checkpoint.py
  adapter/                  the result, in PEFT's format, per_expert/ in it where asked; model/ after training in full
  receipt.json              what was run, on what, from what, with what outcome; written last
  expert_load.json, .png    of task=profile: which experts the routers choose
"""

import contextlib
import datetime
import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf

from configs.program.console import console
from configs.program.errors import UserError, one_line
from configs.program.launch import local_rank
from configs.program.provenance import provenance
from data.disk.files import lock, occupied, replace_file, sync
from data.prepared.dataset import PreparedDataset
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.engine import Engine
from train.engine.processes import Processes, agree, gathered
from train.health import Health
from train.saving import checkpoint, identity
from train.saving.checkpoint import Checkpoint, DamagedError
from train.saving.receipt import PACKAGES, hardware

CONFIG, RECEIPT = "config.yaml", "receipt.json"
RESULTS = {"adapter", "model", RECEIPT, "expert_load.json", "expert_load.png"}
"""What only a run that came to its end has written."""
RUN_ENTRIES = {CONFIG, "metrics.jsonl", checkpoint.FOLDER, "wandb"} | RESULTS
"""All that a run directory holds; a directory with anything else in it is not replaced."""

T = TypeVar("T")


class RunDirectory:
    """The place of a run. Only the main process touches the disk."""

    def __init__(self, config: TrainConfig, dataset: PreparedDataset, batch: BatchArithmetic, processes: Processes):
        """Decides the directory, and whether the run goes on in it, the same on every process; collective.

        Changes nothing yet.

        Raises:
            UserError: it can't be used, something is there that must not be replaced, or the run that is there was
                another one.
        """
        self.config = config
        self.dataset = dataset
        self.batch = batch
        self.processes = processes
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.path = Path(agree(config.run_dir or f"runs/{config.name}-{stamp}"))  # clocks differ between processes
        self.launch: dict[str, Any] = {}
        """When, of which code and on what the run was launched, on the main process."""
        self.fed: dict[str, Any] = {}
        """What it is fed, by hash, on the main process; see resume.py."""
        if processes.is_main:
            self.launch["started"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            # Not when it is saved: by then the checkout may be another one.
            self.launch |= provenance(PACKAGES) | {"hardware": hardware(processes)}
        self._unlock: weakref.finalize[Any, Any] | None = None
        self.resumed_step = 0
        """The step of the checkpoint that the run goes on from."""
        self.finished = False
        """Whether the run that is asked for came to its end before."""
        self._resumes = False
        self._was_there = False
        try:
            self._on_main(self._examine)
            self.finished, self._resumes = agree((self.finished, self._resumes))
            if not self.finished:
                self._check_rows()
        except UserError:
            if self._unlock is not None:
                self._unlock()
            raise

    def _on_main(self, action: Callable[[], T]) -> T | None:
        """What an action gives on the main process, there; the `UserError` that it raises, everywhere; collective."""
        given, problem = None, None
        if self.processes.is_main:
            try:
                given = action()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                told = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
                problem = f"run_dir={self.path}: it can't be used ({told}); make it writable, or name another directory"
        if problem := agree(problem):
            raise UserError(problem)
        return given

    def _check_rows(self) -> None:
        """Raises `UserError` if the rows on any machine are not those that the manifest tells; collective.

        One process of each machine reads them: at 1.4 GB/s on one core of an AMD EPYC, less than a second for a million
        conversations.
        """
        problem = None
        if local_rank() == 0:
            try:
                identity.check_rows(self.dataset)
            except UserError as error:
                problem = str(error)
        if problem := next(filter(None, gathered(problem)), None):
            raise UserError(problem)

    def _examine(self) -> None:
        """Decides whether the run goes on, or is finished; raises `UserError` for what speaks against the directory."""
        self._was_there = self.path.exists()
        if problem := self._problem():
            raise UserError(f"run_dir={self.path}: {problem}")
        if self._was_there:
            self._lock()
        if self.config.task != "train":
            return
        self.fed = identity.fed(self.config, self.dataset)
        if self.config.overwrite or not self._was_there:
            return
        places = checkpoint.places(self.path)
        if (self.path / RECEIPT).is_file():
            self.finished = True
            try:
                identity.check(json.loads((self.path / RECEIPT).read_text(encoding="utf-8")), self.config, self.fed)
            except UserError:
                raise
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"run_dir={self.path}: its {RECEIPT} can't be read ({one_line(error)}); restore it, or give "
                    f"overwrite=true to do the run again"
                ) from error
        elif places:
            self._resumes = True
            for place in places:
                with contextlib.suppress(DamagedError):  # told when all of it is read
                    identity.check(Checkpoint(place).trainer, self.config, self.fed)
                    return
        else:
            told = f"{self.path}: the run that is there left no checkpoint; it starts from the beginning"
            console.print(told, soft_wrap=True)

    def _lock(self) -> None:
        """Keeps other launches out of the directory for as long as this process lives.

        One that was told to stop may still be saving when the next is launched.
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

    def _problem(self) -> str | None:
        """What speaks against the directory itself, as the rest of a sentence."""
        found = occupied(self.path, [self.dataset.directory, Path(self.config.model.path or ".")])
        if found.needed:
            return "it holds the working directory, the dataset or the base; name a directory of its own"
        if found.is_file:
            return "it is a file; name another directory"
        there = {name for name in found.names if not _half_written(Path(name))}
        goes_on = self.config.resume == "auto" and self.config.task == "train" and not self.config.overwrite
        if goes_on and (RECEIPT in there or checkpoint.places(self.path)):
            return None  # nothing is replaced, whatever else the user keeps there
        if foreign := there - RUN_ENTRIES:
            return f"{min(foreign)} is there, which no run writes; name another directory"
        if self.config.overwrite or (goes_on and not RESULTS & there) or not there:
            return None
        return "a run is there already; name another directory, or give overwrite=true to replace it"

    def find_checkpoint(self, shapes: dict[str, tuple[int, ...]]) -> Checkpoint | None:
        """The newest checkpoint that is whole, on the main process; sets `resumed_step` on all; collective.

        Args:
            shapes: of the parameters that train, whole.

        Raises:
            UserError: there are checkpoints, and none can be used.
        """
        if not self._resumes:
            return None
        found = self._on_main(lambda: self._newest_whole(shapes))
        self.resumed_step = agree(found.step if found is not None else 0)
        return found

    def _newest_whole(self, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
        first = ""
        for place in checkpoint.places(self.path):
            try:
                found = Checkpoint(place)
                found.check(shapes)
            except DamagedError as error:
                first = first or f"{place.name}: {error}"
                told = f"{place} is damaged ({error}); the one before is used"
                console.print(told, style="bold red", soft_wrap=True)
                continue
            identity.check(found.trainer, self.config, self.fed)
            console.print(f"Resuming {self.path} after step {found.step}", soft_wrap=True)
            return found
        raise UserError(
            f"run_dir={self.path}: it has checkpoints, and none of them is whole ({first}); restore one, or give "
            f"overwrite=true to start over"
        )

    def restore(self, engine: Engine, found: Checkpoint | None, health: Health) -> dict[str, Any] | None:
        """Puts the engine and `health` where the checkpoint was made; what metrics were then; collective.

        Args:
            engine: as it starts.
            found: what `find_checkpoint` found, on the main process.
            health: of the run.

        Returns:
            None where the run starts from the beginning.
        """
        if not self._resumes:
            return None
        trainer = agree(found.trainer if found is not None else None)
        blank = self.dataset.train.batch([None] * self.batch.micro_batch)
        try:
            engine.restore(found.read if found is not None else _no_files, trainer["optimizer_steps"], blank)
        except DamagedError as error:
            raise UserError(
                f"run_dir={self.path}: a checkpoint that was whole a moment ago is damaged ({error}); give the same "
                f"command again, and the one before is used"
            ) from error
        health.restore(trainer["health"])
        metrics: dict[str, Any] = trainer["metrics"]
        return metrics

    def create(self) -> None:
        """Makes the directory, in the place of an older run unless that goes on, and writes config.yaml; collective.

        Raises:
            UserError: it can't be written, or another launch has made it meanwhile.
        """
        self._on_main(self._create)

    def _create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._was_there:
            sync(self.path.resolve().parent)
        self._lock()
        if not self._was_there and any(self.path.iterdir()):  # loading took its time
            raise UserError(
                f"run_dir={self.path}: another launch has begun in it meanwhile; give the same command again to go on "
                f"with that, or name another directory"
            )
        if not self._resumes:
            # The receipt first, which says that the run is finished; not the directory itself, on which a disk may be
            # mounted.
            for old in sorted(self.path.iterdir(), key=lambda path: path.name != RECEIPT):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        checkpoint.clean(self.path)
        self.replace(CONFIG, self.settings)

    @property
    def settings(self) -> str:
        """The content of config.yaml."""
        return OmegaConf.to_yaml(OmegaConf.create(identity.stored_settings(self.config)))

    def replace(self, name: str, text: str) -> None:
        """Writes a file that is the old one or the new one whenever the process is killed, or the power fails."""
        replace_file(self.path / name, [text.encode()])


def _no_files(name: str, kind: str) -> torch.Tensor:
    """Only the main process reads."""
    raise AssertionError(name, kind)


def _half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in (".tmp", ".old")
