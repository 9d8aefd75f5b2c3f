"""The run directory: what a run writes, and when each piece is whole.

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
import errno
import fcntl
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf

from configs.errors import UserError, one_line
from configs.receipt import machine, provenance
from data.dataset import PreparedDataset
from data.writing import sync
from train import adapter_files, checkpoint, expert_lora, resume
from train.background import Background
from train.checkpoint import Checkpoint, CheckpointWriter, DamagedError
from train.config import BatchArithmetic, TrainConfig
from train.engine import Engine, Processes, agree, gathered
from train.health import Health
from train.learning import Movement, movements
from train.metrics import Metrics, console, finite, show_movements
from train.model_files import ModelFiles

PACKAGES = (
    "openhermes-mixtral",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "tokenizers",
    "safetensors",
)
"""Those whose versions the receipt records."""

SIGN_OF_LIFE = 10.0
"""Seconds after which a process that waits for the disk says that it does."""
RECEIPT = "receipt.json"
RESULTS = {"adapter", "model", RECEIPT, "expert_load.json", "expert_load.png"}
"""What only a run that came to its end has written."""
RUN_ENTRIES = {"config.yaml", "metrics.jsonl", checkpoint.FOLDER, "wandb"} | RESULTS
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
        self._started = datetime.datetime.now(datetime.UTC)
        # Of the code that runs: the checkout may be another one by the time that a checkpoint is made.
        self._provenance = provenance(PACKAGES) | {"hardware": hardware(processes)} if processes.is_main else {}
        self._moved: list[Movement] = []
        self._fed: dict[str, Any] = {}
        self._unlock: weakref.finalize[Any, Any] | None = None
        self._background = Background() if processes.is_main else None
        self.resumed_step = 0
        """The step of the checkpoint that the run goes on from."""
        self.finished = False
        """Whether the run that is asked for came to its end before."""
        self._resumes = False
        self._was_there = False
        try:
            self._on_main(self._examine)
            self.finished, self._resumes = agree((self.finished, self._resumes))
            if self._resumes:
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
        """Raises `UserError` where the rows on any machine are not those that the manifest tells; collective."""
        problem = None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            try:
                resume.check_rows(self.dataset)
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
        self._fed = resume.fed(self.config, self.dataset)
        if self.config.overwrite or not self._was_there:
            return
        places = checkpoint.places(self.path)
        if (self.path / RECEIPT).is_file():
            self.finished = True
            try:
                receipt = json.loads((self.path / RECEIPT).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(
                    f"run_dir={self.path}: its {RECEIPT} can't be read ({one_line(error)}); restore it, or give "
                    f"overwrite=true to do the run again"
                ) from error
            resume.check(receipt, self.config, self._fed)
        elif places:
            self._resumes = True
            for place in places:
                with contextlib.suppress(DamagedError):  # told when all of it is read
                    resume.check(Checkpoint(place).trainer, self.config, self._fed)
                    return
        else:
            console.print(f"{self.path}: the run that is there left no checkpoint; it starts from the beginning")

    def _lock(self) -> None:
        """Keeps other launches out of the directory for as long as this process lives.

        One that was told to stop may still be saving when the next is launched.
        """
        if self._unlock is not None:
            return
        locked = os.open(self.path, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, locked)
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run_dir={self.path}: another launch is at work in it; wait until that has ended, or name another "
                f"directory"
            ) from error
        except OSError:
            pass  # a file system without locks

    def _problem(self) -> str | None:
        """What speaks against the directory itself, as the rest of a sentence."""
        place = self.path.resolve()
        needed = [Path.cwd(), self.dataset.directory, Path(self.config.model.path or ".")]
        if any(path.resolve().is_relative_to(place) for path in needed):
            return "it holds the working directory, the dataset or the base; name a directory of its own"
        if place.exists() and not place.is_dir():
            return "it is a file; name another directory"
        there = {path.name for path in place.iterdir() if not _half_written(path)} if place.exists() else set()
        if there - RUN_ENTRIES:
            return f"{min(there - RUN_ENTRIES)} is there, which no run writes; name another directory"
        if not there or self.config.overwrite:
            return None
        goes_on = self.config.resume == "auto" and self.config.task == "train"
        if not goes_on or (RESULTS & there and not {RECEIPT, checkpoint.FOLDER} & there):
            return "a run is there already; name another directory, or give overwrite=true to replace it"
        return None

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
                console.print(f"{place} is damaged ({error}); the one before is used", style="bold red")
                continue
            resume.check(found.trainer, self.config, self._fed)
            console.print(f"Resuming {self.path} after step {found.step}")
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
        engine.restore(found.read if found is not None else _no_files, trainer["optimizer_steps"], blank)
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
        self._lock()
        if not self._was_there and any(self.path.iterdir()):  # loading took its time
            raise UserError(
                f"run_dir={self.path}: another launch has begun in it meanwhile; give the same command again to go on "
                f"with that, or name another directory"
            )
        if not self._resumes:
            for old in list(self.path.iterdir()):  # not the directory itself, which may be where a disk is mounted
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        checkpoint.clean(self.path)
        settings = OmegaConf.create(resume.settings(self.config))
        self._replace("config.yaml", OmegaConf.to_yaml(settings))

    def _replace(self, name: str, text: str) -> None:
        """Writes a file that is the old one or the new one whenever the process is killed, or the power fails."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.rename(self.path / name)
        sync(self.path)

    def save_checkpoint(self, engine: Engine, metrics: Metrics, health: Health, step: int) -> None:
        """Copies what checkpoints/step-… will hold; a thread writes it while training goes on; collective."""
        began = time.perf_counter()
        writer = None
        if self._background is not None:
            writer = CheckpointWriter(checkpoint.place(self.path, step), engine.shapes, self._background)
        result = _Result(self, engine, writer.directory if writer else None, self._background)
        for name, state in engine.state():
            if writer is not None:
                writer.write(name, state)
                result.write(name, state["master"])
        if writer is None or self._background is None:
            return
        receipt = self._receipt(metrics)
        result.finish(receipt)
        trainer = {
            "step": step,
            "optimizer_steps": engine.optimizer_steps,
            "rows_seen": min(step * self.batch.rows, len(self.dataset.train) * self.config.epochs),
            "random": {"seed": self.config.seed, "next_step": step + 1},
            "processes": self.processes.count,
            "settings": receipt["settings"],
            **self._fed,
            "metrics": metrics.state(),
            "health": health.state(),
        }
        self._background.submit(metrics.sync)
        writer.finish(trainer)
        kept = {"newest": step, "keep_last": self.config.keep_last}
        evaluations = dict(metrics.evaluations)

        def prune() -> None:
            steps = [n for n in map(checkpoint.number, checkpoint.places(self.path)) if n is not None and n <= step]
            checkpoint.prune(self.path, **kept, best=checkpoint.best(evaluations, steps))

        self._background.submit(prune)
        paused = time.perf_counter() - began
        self._background.submit(lambda: metrics.saved(step, paused, time.perf_counter() - began))

    @property
    def saving_failed(self) -> bool:
        """Whether what was to be written could not be, on this process."""
        return self._background is not None and self._background.failed

    def finish_saving(self, engine: Engine) -> None:
        """Waits until all is on the disk; collective.

        Raises:
            UserError: it can't be written, or could not be before.
        """
        while any(engine.any(self._background is not None and not self._background.wait(SIGN_OF_LIFE))):
            engine.at("saving")  # all of them: none waits for longer than a collective may take
        error = self._background.take_error() if self._background is not None else None
        problem = None
        if isinstance(error, OSError):
            problem = self._unwritable(error)
        elif error is not None:
            raise error
        if problem := agree(problem):
            raise UserError(problem)

    def _unwritable(self, error: OSError) -> str:
        """Says what can't be written, what is safe, and what to do."""
        with contextlib.suppress(OSError):
            checkpoint.clean(self.path)
        whole = checkpoint.places(self.path)
        safe = f"{whole[0].name} is the last checkpoint and untouched" if whole else "there is no checkpoint yet"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space, or lower keep_last" if full else "make it writable"
        return (
            f"run_dir={self.path}: what the run has learned can't be written ({error.strerror or error}); {safe}: "
            f"{remedy}, and give the same command again"
        )

    def save_result(self, engine: Engine, metrics: Metrics) -> None:
        """Writes adapter/ (or model/) and receipt.json; collective.

        Raises:
            UserError: it can't be written.
        """
        self.finish_saving(engine)  # so that an error of an earlier checkpoint is not taken for one of this
        name = self._result_name
        temporary = self.path / f".{name}.tmp"
        result = _Result(self, engine, temporary, self._background, is_final=True)
        for parameter, state in engine.state(moments=False):
            if self._background is not None:
                result.write(parameter, state["master"])
        receipt: dict[str, Any] = {}
        if self._background is not None:
            receipt = self._receipt(metrics)
            result.finish(receipt)
            self._background.submit(lambda: checkpoint.publish(temporary / name, self.path / name))
            self._background.submit(lambda: self._replace(RECEIPT, (self.path / name / RECEIPT).read_text()))
            self._background.submit(lambda: checkpoint.clean(self.path))
        self.finish_saving(engine)
        if self.processes.is_main:
            show_movements(self._moved)
            console.print(f"Saved {self.path / name}")

    @property
    def _result_name(self) -> str:
        return "model" if self.config.lora.method == "none" else "adapter"

    def _receipt(self, metrics: Metrics) -> dict[str, Any]:
        """What was run, on what, from what, and how far it came."""
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **self._provenance,
            "batch": asdict(self.batch),
            "resumed_after_step": self.resumed_step or None,
            **self._fed,
            "evaluation_loss": {str(step): loss for step, loss in metrics.evaluations.items()},
            "steps": metrics.last.step if metrics.last else 0,
            "loss": metrics.last.loss if metrics.last else None,
            "settings": resume.settings(self.config),
        }


class _Result:
    """The adapter, or the whole model, of one save: parameters come one after the other."""

    def __init__(
        self,
        run: RunDirectory,
        engine: Engine,
        directory: Path | None,
        background: Background | None,
        *,
        is_final: bool = False,
    ):
        """`directory` is where adapter/ or model/ will stand, on the main process; `is_final` says that it is the run's
        result, which comes with a per-expert export where that is asked."""
        self._run, self._background, self._is_final = run, background, is_final
        self._model = engine.module.causal_lm
        self._dtype = self._model.dtype
        self._tensors: dict[str, torch.Tensor] = {}
        self._files: ModelFiles | None = None
        if directory is None or background is None:
            return
        self._place = directory / run._result_name
        background.submit(lambda: shutil.rmtree(self._place, ignore_errors=True))
        background.submit(lambda: self._place.mkdir(parents=True))
        if run.config.lora.method == "none":
            self._files = ModelFiles(self._place, engine.shapes, self._dtype)

    def write(self, name: str, master: torch.Tensor) -> None:
        """Takes the next parameter, in float32."""
        if self._files is None:
            self._tensors[name] = master.to(self._dtype)  # the rounding by which DeepSpeed makes the model's own
            return
        assert self._background is not None
        files = self._files
        self._background.submit(lambda: files.write(name, master), master.nbytes)

    def finish(self, receipt: dict[str, Any]) -> None:
        """Completes it."""
        assert self._background is not None
        self._background.submit(lambda: self._finish(receipt))

    def _finish(self, receipt: dict[str, Any]) -> None:
        run = self._run
        if self._files is not None:
            self._files.finish(self._model)
        else:
            adapters = expert_lora.adapters(self._model)
            settings = (run.config.model, run.config.lora, self._tensors, adapters)
            adapter_files.write(self._place, *settings)
            if run.config.lora.export_per_expert and self._is_final:
                per_expert = self._place / "per_expert"
                per_expert.mkdir()
                adapter_files.write_per_expert(per_expert, *settings)
            run._moved = movements(self._model, self._tensors)
        shutil.copyfile(run.path / "config.yaml", self._place / "train_config.yaml")
        whole = {**receipt, "experts_moved": [moved.record() for moved in run._moved]}
        (self._place / RECEIPT).write_text(json.dumps(finite(whole), indent=2) + "\n", encoding="utf-8")


def _no_files(name: str, kind: str) -> torch.Tensor:
    """Only the main process reads."""
    raise AssertionError(name, kind)


def _half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in (".tmp", ".old")


def hardware(processes: Processes) -> dict[str, Any]:
    """What the run computes on."""
    on_cuda = processes.device.type == "cuda"
    return {
        **machine(),
        "device": torch.cuda.get_device_name(processes.device) if on_cuda else "cpu",
        "processes": processes.count,
        "threads_per_process": torch.get_num_threads(),
    }
