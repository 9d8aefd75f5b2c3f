"""What is learned → checkpoints, the run's result, and the receipt, written while training goes on."""

import contextlib
import datetime
import errno
import time
from dataclasses import asdict
from typing import Any

from configs.program.console import console
from configs.program.errors import UserError
from data.disk.files import publish
from train.engine.engine import Engine
from train.engine.processes import agree
from train.health import Health
from train.history import History
from train.reporting.metrics import Metrics
from train.saving import checkpoint, identity
from train.saving.background import Background
from train.saving.checkpoint import CheckpointWriter
from train.saving.result import Result, result_name, show_movements
from train.saving.run_directory import RECEIPT, RunDirectory

SIGN_OF_LIFE = 10.0
"""Seconds after which a process that waits for the disk says that it does."""


class Saver:
    """Saves a run. Only the main process writes."""

    def __init__(self, run: RunDirectory, engine: Engine, history: History, metrics: Metrics, health: Health):
        """`run` is where to; the others are what of."""
        self._run, self._engine, self._history, self._metrics, self._health = run, engine, history, metrics, health
        self._background = Background() if run.processes.is_main else None
        self._name = result_name(run.config)

    def checkpoint(self, step: int) -> None:
        """Copies what checkpoints/step-… will hold; a thread writes it while training goes on; collective."""
        began = time.perf_counter()
        run, metrics = self._run, self._metrics
        if self._background is None:
            self._take_part(moments=True)
            return
        place = checkpoint.place(run.path, step)
        writer = CheckpointWriter(place, self._engine.shapes, self._background)
        result = Result(writer.directory / self._name, run.config, self._engine, self._background)
        for name, state in self._engine.state():
            writer.write(name, state)
            result.write(name, state["master"])
        receipt = self._receipt()
        result.finish(receipt, run.settings)
        trainer = {
            "step": step,
            "optimizer_steps": self._engine.optimizer_steps,
            "rows_seen": min(step * run.batch.rows, len(run.dataset.train) * run.config.epochs),
            "random": {"seed": run.config.seed, "next_step": step + 1},
            "processes": run.processes.count,
            "settings": receipt["settings"],
            **run.fed,
            "metrics": self._history.state() | metrics.state(),
            "health": self._health.state(),
        }
        self._background.submit(metrics.sync)
        writer.finish(trainer)
        evaluations = dict(self._history.evaluations)

        def prune() -> None:
            steps = [n for n in map(checkpoint.number, checkpoint.places(run.path)) if n is not None and n <= step]
            best = checkpoint.best(evaluations, steps)
            checkpoint.prune(run.path, newest=step, keep_last=run.config.keep_last, best=best)

        self._background.submit(prune)
        paused = time.perf_counter() - began
        self._background.submit(lambda: metrics.saved(step, paused, time.perf_counter() - began))

    @property
    def failed(self) -> bool:
        """Whether what was to be written could not be, on this process."""
        return self._background is not None and self._background.failed

    def wait(self) -> None:
        """Waits until all is on the disk; collective.

        Raises:
            UserError: it can't be written, or could not be before.
        """
        while self._engine.any_process(self._background is not None and not self._background.wait(SIGN_OF_LIFE)):
            self._engine.at("saving")  # all of them: none waits for longer than a collective may take
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
        place = self._run.path
        with contextlib.suppress(OSError):
            checkpoint.clean(place)
        whole = checkpoint.places(place)
        safe = f"{whole[0].name} is the last checkpoint and untouched" if whole else "there is no checkpoint yet"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space, or lower keep_last" if full else "make it writable"
        return (
            f"run_dir={place}: what the run has learned can't be written ({error.strerror or error}); {safe}: "
            f"{remedy}, and give the same command again"
        )

    def result(self) -> None:
        """Writes adapter/ (or model/) and receipt.json; collective.

        Raises:
            UserError: it can't be written.
        """
        self.wait()  # so that an error of an earlier checkpoint is not taken for one of this
        if self._background is None:
            self._take_part(moments=False)
            self.wait()
            return
        run = self._run
        place, temporary = run.path / self._name, run.path / f".{self._name}.tmp"
        per_expert = run.config.lora.export_per_expert
        saved = Result(temporary / self._name, run.config, self._engine, self._background, per_expert=per_expert)
        for name, state in self._engine.state(moments=False):
            saved.write(name, state["master"])
        saved.finish(self._receipt(), run.settings)
        self._background.submit(lambda: publish(temporary / self._name, place))
        self._background.submit(lambda: run.replace(RECEIPT, (place / RECEIPT).read_text()))
        self._background.submit(lambda: checkpoint.clean(run.path))
        self.wait()
        show_movements(saved.moved)
        console.print(f"Saved {place}", soft_wrap=True)

    def _take_part(self, *, moments: bool) -> None:
        """What a process does that writes nothing: gathering takes all of them."""
        for _ in self._engine.state(moments=moments):
            pass

    def _receipt(self) -> dict[str, Any]:
        """What was run, on what, from what, and how far it came."""
        run, history = self._run, self._history
        return {
            **run.launch,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "batch": asdict(run.batch),
            "resumed_after_step": run.resumed_step or None,
            **run.fed,
            "evaluation_loss": {str(step): loss for step, loss in history.evaluations.items()},
            "steps": history.last.step if history.last else 0,
            "loss": history.last.loss if history.last else None,
            "settings": identity.stored_settings(run.config),
        }
