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
"""The most records that wait for wandb; with more of them it counts as stuck."""


class Wandb:
    """One run of wandb's. Its methods never raise, and none of them waits but `close`, which has a time limit.

    wandb's library talks to a helper process of its own. If that process was killed or hangs, the library raises in its
    caller, or waits. So a thread calls it, and takes from a queue what is to be logged. The first failure is reported
    in one line, and from then on nothing is logged.
    """

    def __init__(self, directory: Path, config: LoggingConfig, settings: dict[str, Any], resumed: str | None):
        """Begins, in the background.

        Args:
            directory: the run directory, in which wandb keeps its files.
            config: mode and project.
            settings: of the whole run.
            resumed: the id of the run that this one continues; None for a new run.
        """
        self.id = resumed or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        """wandb's id of the run."""
        self._directory, self._config, self._settings, self._resumed = directory, config, settings, resumed is not None
        self._records: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(WAITING)
        self._stopped = False
        self._lock = threading.Lock()
        self._excepthook = threading.excepthook
        threading.excepthook = self._error_in_thread
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Logs the values of a step."""
        self._put((step, values))

    def close(self, within: float) -> None:
        """Ends the run, or gives up after `within` seconds."""
        self._put(None)
        if not self._stopped:
            self._thread.join(within)
        if self._stopped:
            with self._lock:  # the line may be about to be printed
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
        """Logs nothing from now on, and reports that, the first time."""
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
        except BaseException as error:  # whatever it is, training goes on
            self._stop(one_line(error) if isinstance(error, Exception) else type(error).__name__)

    def _begin(self) -> Any:
        """A wandb run: online if that is asked for or the user is logged in, else offline."""
        os.environ.setdefault("WANDB_SILENT", "true")
        quiet = logging.getLogger("wandb")  # it logs to a file of its own, and would print errors to the terminal too
        quiet.addHandler(logging.NullHandler())
        quiet.propagate = False
        import wandb

        mode: Any = self._config.wandb
        if mode == "auto":
            logged_in = wandb.login(prompt=False, verify=False)
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
        run: dict[str, Any] = redacted({"project": self._config.project, "name": self._directory.name})
        run |= {"id": self.id, "dir": str(self._directory), "config": self._settings}
        # What wandb captures of the terminal goes through its process before `print` returns, so it captures nothing.
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
            sys.exit, sys.excepthook = ending  # wandb's own print tracebacks, and the keys in them

    def _error_in_thread(self, args: threading.ExceptHookArgs) -> None:
        """Replaces threading.excepthook: an error in one of wandb's threads stops wandb alone."""
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(args.exc_traceback)]
        if not any(name.partition(".")[0] == "wandb" for name in modules):
            self._excepthook(args)
        else:
            self._stop(one_line(args.exc_value) if isinstance(args.exc_value, Exception) else args.exc_type.__name__)


def _end(run: Any) -> None:
    import wandb

    run.finish()
    wandb.teardown()  # its process too
