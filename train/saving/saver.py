"""What is learned → checkpoints, the run's result and the receipt, written while training goes on."""

import contextlib
import errno
import time
from collections import deque
from functools import partial
from typing import Any

from configs.program.console import console
from configs.program.errors import UserError
from data.disk.adapter_directory import RECEIPT
from data.disk.files import publish, replace_file
from train.engine.engine import Engine
from train.engine.processes import agree
from train.health import Health
from train.history import History
from train.reporting.metrics import Metrics
from train.saving import checkpoint
from train.saving.background import IN_FLIGHT, SIGN_OF_LIFE, Background
from train.saving.checkpoint import CheckpointWriter
from train.saving.receipt import Record
from train.saving.result import Result, result_name, show_movements
from train.saving.run_directory import RunDirectory

PATIENCE = 30.0
"""Seconds that a checkpoint may take to reach the disk before the next one waits for it. Until then they queue, so that
a disk that keeps up has them after the steps that `save_every` names."""


class Saver:
    """Saves a run. Only the main process writes."""

    def __init__(
        self,
        directory: RunDirectory,
        record: Record,
        engine: Engine,
        history: History,
        metrics: Metrics,
        health: Health,
    ):
        """Saves into `directory` what `engine`, `history`, `metrics` and `health` hold, as the run of `record`."""
        self._directory, self._record, self._engine = directory, record, engine
        self._history, self._metrics, self._health = history, metrics, health
        self._background = Background(partial(engine.disk, directory.path)) if engine.processes.is_main else None
        self._name, self._config_yaml = result_name(record.config), record.config_yaml
        self._under_way: deque[float] = deque()
        """When each checkpoint that is not on the disk yet was begun, by time.perf_counter."""

    def checkpoint(self, step: int) -> None:
        """Copies what checkpoints/step-… will hold; a thread writes it while training goes on; collective."""
        began = time.perf_counter()
        if self._background is None:
            self._gather_only(moments=True)
            return
        self._under_way.append(began)
        path = checkpoint.path_of(self._directory.path, step)
        writer = CheckpointWriter(path, self._engine.shapes, self._background)
        result = Result(writer.directory / self._name, self._record.config, self._engine, self._background)
        for name, state in self._engine.state():
            writer.write(name, state)
            result.write(name, state["master"])
        result.finish(self._record.receipt(self._history, self._metrics.measured()), self._config_yaml)
        self._background.submit(self._metrics.sync)
        writer.finish(self._trainer_state(step))
        self._background.submit(partial(self._prune, step, dict(self._history.evaluations)))
        paused = time.perf_counter() - began
        self._background.submit(partial(self._report_times, step, began, paused))

    def _trainer_state(self, step: int) -> dict[str, Any]:
        """The content of trainer.json but for its format."""
        record = self._record
        return {
            "step": step,
            "optimizer_steps": self._engine.optimizer_steps,
            "rows_seen": record.rows_seen(step),
            "random": {"seed": record.config.seed, "next_step": step + 1},
            "processes": self._engine.processes.count,
            "settings": record.settings,
            **record.inputs,
            "metrics": self._history.state() | self._metrics.state(),
            "health": self._health.state(),
        }

    def _prune(self, newest: int, evaluations: dict[int, float]) -> None:
        """Removes the checkpoints that are not kept, once that of the step `newest` is on the disk."""
        run = self._directory.path
        steps = [step for step in map(checkpoint.step_of, checkpoint.paths(run)) if step is not None and step <= newest]
        best = checkpoint.best(evaluations, steps)
        checkpoint.prune(run, newest=newest, keep_last=self._record.config.keep_last, best=best)

    def _report_times(self, step: int, began: float, paused: float) -> None:
        """Reports a checkpoint that is on the disk; `began` by time.perf_counter, `paused` in seconds."""
        self._under_way.popleft()
        self._metrics.saved(step, paused, time.perf_counter() - began)

    @property
    def failed(self) -> bool:
        """Whether something could not be written; on the main process, else False."""
        return self._background is not None and self._background.failed

    @property
    def behind(self) -> bool:
        """Whether the disk is behind: the next checkpoint would wait long for an earlier one, or training for memory
        for its copy; on the main process, else False."""
        if self._background is None or not self._under_way:
            return False
        waits = time.perf_counter() - self._under_way[0] > PATIENCE
        return waits or self._background.held + checkpoint.state_bytes(self._engine.shapes) > IN_FLIGHT

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
        run = self._directory.path
        with contextlib.suppress(OSError):
            checkpoint.clean(run)
        left = checkpoint.paths(run)
        safe = f"{left[0].name} is the last checkpoint and untouched" if left else "there is no checkpoint yet"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space, or lower keep_last" if full else "make it writable"
        return (
            f"run_dir={run}: what the run has learned can't be written ({error.strerror or error}); {safe}: "
            f"{remedy}, and give the same command again"
        )

    def result(self) -> None:
        """Writes adapter/ (or model/) and receipt.json; collective.

        Raises:
            UserError: it can't be written.
        """
        self.wait()  # so that an error of an earlier checkpoint is not taken for one of this
        if self._background is None:
            self._gather_only(moments=False)
            self.wait()
            return
        run, config = self._directory.path, self._record.config
        path, temporary = run / self._name, run / f".{self._name}.tmp"
        per_expert = config.lora.export_per_expert and bool(config.lora.projections)
        saved = Result(temporary / self._name, config, self._engine, self._background, per_expert=per_expert)
        for name, state in self._engine.state(moments=False):
            saved.write(name, state["master"])
        saved.finish(self._record.receipt(self._history, self._metrics.measured()), self._config_yaml)
        self._background.submit(lambda: publish(temporary / self._name, path))
        self._background.submit(lambda: replace_file(run / RECEIPT, [(path / RECEIPT).read_bytes()]))
        self._background.submit(lambda: checkpoint.clean(run))
        self.wait()
        show_movements(saved.moved)
        console.print(f"Saved {path}", soft_wrap=True)

    def _gather_only(self, *, moments: bool) -> None:
        """The part of a process that writes nothing: gathering is collective."""
        for _ in self._engine.state(moments=moments):
            pass
