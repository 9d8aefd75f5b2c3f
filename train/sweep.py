"""`python -m train -m …`: the jobs one after the other, each a process of its own, and a table at the end."""

import ctypes
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from configs.program.console import console
from configs.program.errors import UserError
from configs.program.jobs import Job
from configs.program.secrets import redact
from train.config.train import TrainConfig
from train.failures.signals import ASKING, EXIT_PREEMPTED, PR_SET_PDEATHSIG
from train.run_files import read_metrics


def sweep(jobs: list[Job[TrainConfig]]) -> int:
    """Runs the jobs in their order and shows what came out.

    A job that fails leaves the others to run. A signal is handed on to the job that runs, and no other begins; the same
    command goes on from there.

    Returns:
        The exit code: 75 after a signal, else the first that is not 0.

    Raises:
        UserError: a setting of a job is wrong, two would use the same run directory, or a launcher of several
            processes has started this one. Nothing has begun then.
    """
    check(jobs)
    runner = Runner()
    codes: list[int | None] = []
    for number, job in enumerate(jobs, start=1):
        code = None
        if not runner.asked:
            console.print(redact(f"\n{number}/{len(jobs)}  {_named(job)}"), markup=False, highlight=False)
            code = runner.run(job)
        codes.append(code)
    console.print(_table(jobs, codes))
    failed = next((code for code in codes if code), 0)
    return EXIT_PREEMPTED if runner.asked and failed in (0, -runner.asked) else failed


def check(jobs: list[Job[TrainConfig]]) -> None:
    """Raises `UserError` for what is known to be wrong before the first job begins."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            f"--multirun: a launcher has started {os.environ['WORLD_SIZE']} processes, and each would start all jobs; "
            f"launch each job by itself, or start `python -m train` without a launcher"
        )
    taken: dict[Path, str] = {}
    for job in jobs:
        job.config.check()
        run_dir = job.config.run_dir
        if job.config.dry_run:
            continue
        if run_dir is None:
            raise UserError(
                "run_dir: with --multirun each job needs one of its own; name in it what differs, such as "
                "run_dir='runs/${optim.lr}'"
            )
        path = Path(run_dir).resolve()
        if path in taken:
            raise UserError(
                f"run_dir={run_dir}: two jobs ({taken[path]}; {_named(job)}) would use it; name in it all that "
                f"differs, such as run_dir='runs/${{optim.lr}}'"
            )
        taken[path] = _named(job)


class Runner:
    """Runs jobs and hands on signals to the one that runs."""

    def __init__(self) -> None:
        """Listens from here on."""
        self.asked: int | None = None
        """The signal that came first, or None."""
        self._job: subprocess.Popen[bytes] | None = None
        for number in ASKING:
            signal.signal(number, self._receive)

    def run(self, job: Job[TrainConfig]) -> int:
        """Runs a job to its end; its exit code, negative if a signal ended it."""
        command = [sys.executable, "-m", "train", *job.arguments]
        self._job = subprocess.Popen(command, preexec_fn=_end_with_parent)  # noqa: PLW1509 - no thread has begun
        if self.asked is not None:  # while it started
            self._job.send_signal(self.asked)
        code = self._job.wait()
        self._job = None
        return code

    def _receive(self, number: int, frame: object) -> None:
        self.asked = self.asked or number
        if self._job is not None:
            self._job.send_signal(number)


def _end_with_parent() -> None:
    """A job whose sweep is killed saves and ends too, instead of running on unseen."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _named(job: Job[TrainConfig]) -> str:
    return ", ".join(f"{name}={value}" for name, value in job.swept.items()) or "the only job"


@dataclass(frozen=True, slots=True)
class Losses:
    """What metrics.jsonl says of a run; None if it says nothing."""

    steps: int | None = None
    """The last optimizer step."""
    training: float | str | None = None
    """Nats per supervised token in that step."""
    first_evaluation: float | str | None = None
    last_evaluation: float | str | None = None
    """Nats per supervised token of the held-out split."""

    @classmethod
    def of(cls, run_dir: str | None) -> "Losses":
        """Those of a run directory, which may not be there."""
        lines = read_metrics(Path(run_dir or ""))
        training = [line for line in lines if "loss" in line]
        held_out = [line["evaluation_loss"] for line in lines if "evaluation_loss" in line]
        return cls(
            *(training[-1]["step"], training[-1]["loss"]) if training else (None, None),
            *(held_out[0], held_out[-1]) if held_out else (None, None),
        )


def _table(jobs: list[Job[TrainConfig]], codes: list[int | None]) -> Table:
    differing = list(dict.fromkeys(name for job in jobs for name in job.swept if name != "run_dir"))
    table = Table(box=None, pad_edge=False)
    for heading in ("run", *differing, "steps", "loss", "evaluation loss", "exit code"):
        table.add_column(heading, overflow="fold")
    for job, code in zip(jobs, codes, strict=True):
        found = Losses.of(job.config.run_dir) if code is not None else Losses()
        held_out = f"{_shown(found.first_evaluation)} → {_shown(found.last_evaluation)}"
        ended = "not begun" if code is None else str(code if code >= 0 else 128 - code)
        values = [redact(job.swept.get(name, "")) for name in differing]
        table.add_row(
            redact(job.config.run_dir or "-"), *values, str(found.steps or "-"), _shown(found.training), held_out, ended
        )
    return table


def _shown(loss: float | str | None) -> str:
    return "-" if loss is None else f"{float(loss):.4f}"
