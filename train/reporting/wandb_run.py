"""The run as wandb keeps it. Whatever becomes of wandb, training goes on."""

import logging
import os
import queue
import secrets
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from configs.program.console import console
from configs.program.errors import one_line
from configs.program.secrets import redact, redacted
from train.config.train import LoggingConfig

WAITING = 10_000
"""Records that wait for wandb at most; with more of them it counts as stuck."""


class Wandb:
    """One run of wandb's. Its methods never raise and never wait, but for `close`, whose wait has an end.

    wandb's library talks with a helper process of its own and raises in whoever calls it, or waits, when that process
    was killed or hangs. So a thread calls it, and takes from a queue what is to be told. The first failure is told in
    one line, and from then on nothing is done any more.
    """

    def __init__(self, directory: Path, config: LoggingConfig, settings: dict[str, Any], resumed: str | None):
        """Begins, in the background.

        Args:
            directory: the run directory, in which wandb keeps its files.
            config: mode and project.
            settings: of the whole run.
            resumed: the id of the run that this one goes on with.
        """
        self.id = resumed or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        """By which wandb knows the run."""
        self._directory, self._config, self._settings, self._resumed = directory, config, settings, resumed is not None
        self._records: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(WAITING)
        self._stopped = False
        self._lock = threading.Lock()
        self._excepthook = threading.excepthook
        threading.excepthook = self._error_in_thread
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Tells the values of a step."""
        self._put((step, values))

    def close(self, within: float) -> None:
        """Ends the run, or gives up after so many seconds."""
        self._put(None)
        if not self._stopped:
            self._thread.join(within)
        if self._stopped:
            with self._lock:  # the line may be on its way
                return
        if self._thread.is_alive():
            self._stop(f"it has not ended within {within:g} s")
        else:
            threading.excepthook = self._excepthook

    def _put(self, record: tuple[int, dict[str, Any]] | None) -> None:
        if self._stopped:
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._stop("it has taken nothing for too long")

    def _stop(self, why: str) -> None:
        """Nothing more goes to wandb; says so, the first time."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                console.print(f"wandb stopped: {redact(why)}; metrics.jsonl goes on", soft_wrap=True)

    def _work(self) -> None:
        """The thread that calls wandb."""
        try:
            run = self._begin()
            while (record := self._records.get()) is not None and not self._stopped:
                step, values = record
                run.log(values, step=step)
            if not self._stopped:
                _end(run)
        except BaseException as error:  # whatever it is, it is not the run's
            self._stop(one_line(error) if isinstance(error, Exception) else type(error).__name__)

    def _begin(self) -> Any:
        """A wandb run: online if that is asked for or the user is logged in, else offline."""
        os.environ.setdefault("WANDB_SILENT", "true")
        quiet = logging.getLogger("wandb")  # it has a file of its own, and would write errors to the terminal too
        quiet.addHandler(logging.NullHandler())
        quiet.propagate = False
        import wandb

        mode: Any = self._config.wandb
        if mode == "auto":
            logged_in = wandb.login(prompt=False, verify=False)
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
        run: dict[str, Any] = redacted({"project": self._config.project, "name": self._directory.name})
        run |= {"id": self.id, "dir": str(self._directory), "config": self._settings}
        # The terminal stays ours: what it captures goes through wandb's process before it returns to whoever prints.
        run["settings"] = wandb.Settings(console="off")
        if self._resumed:
            run["resume"] = "allow"
        ending = sys.exit, sys.excepthook
        try:
            return wandb.init(mode=mode, **run)
        except wandb.errors.Error as error:
            console.print(
                f"wandb can't be reached ({redact(str(error))}); it logs offline, into {self._directory}/wandb",
                soft_wrap=True,
            )
            return wandb.init(mode="offline", **run)
        finally:
            sys.exit, sys.excepthook = ending  # wandb's print tracebacks, with the keys that are in them

    def _error_in_thread(self, told: threading.ExceptHookArgs) -> None:
        """Takes the place of threading.excepthook: what ends a thread of wandb's ends wandb alone."""
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(told.exc_traceback)]
        if not any(name.partition(".")[0] == "wandb" for name in modules):
            self._excepthook(told)
        else:
            self._stop(one_line(told.exc_value) if isinstance(told.exc_value, Exception) else told.exc_type.__name__)


def _end(run: Any) -> None:
    import wandb

    run.finish()
    wandb.teardown()  # its process too
