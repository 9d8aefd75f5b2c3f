"""What a run reports while it trains: a progress bar, metrics.jsonl, wandb.

Nothing here raises into training or holds it up, whatever becomes of the terminal, the disk or wandb; nor does training
depend on anything here.
"""

import contextlib
import json
import os
import resource
import shlex
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from configs.program.console import console
from configs.program.errors import UserError, one_line
from data.disk.files import replace_file
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError
from train.config.train import LoggingConfig
from train.history import StepRecord, finite
from train.model.routing import Routing
from train.report.report import try_report
from train.reporting.lines import Lines
from train.reporting.trace import Trace
from train.reporting.wandb_run import Wandb
from train.run_files import METRICS, MetricsLine

LONGEST_LINE = 1 << 24
"""Bytes of the longest line that is read; a longer one is not ours."""

SPEED_PERIOD = 3600.0
"""Seconds of steps from which the time left is estimated: rich's own 30 hold not even two steps of a large model."""
SMOOTHING = 0.9
"""What a step's tokens and seconds weigh one step later in the speed on the screen."""


class Metrics:
    """Reports on the main process. On the others calls report nothing and keep the state that goes into checkpoints;
    no call is collective, and none returns what a collective decision may rest on."""

    def __init__(
        self,
        directory: Path,
        config: LoggingConfig,
        settings: dict[str, Any],
        *,
        is_main: bool,
        resumed: dict[str, Any] | None = None,
        watched: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        peak: float | None = None,
    ):
        """Opens metrics.jsonl and, if it is wanted, a wandb run that lives in the run directory.

        Args:
            directory: the run directory.
            config: what is wanted.
            settings: of the whole run, for wandb.
            is_main: whether this process reports.
            resumed: what `History.state` and `state` returned when the checkpoint was made from which the run goes on.
                Lines of later steps are dropped: those steps will be taken again.
            watched: what is written is written within it, see `Guard.disk`.
            peak: floating-point operations per second that the devices of all processes can do at most, if known.

        Raises:
            UserError: metrics.jsonl can't be written, before anything was trained.
        """
        self._is_main = is_main
        self._config = config
        self._directory = directory
        self._watched = watched
        self._dataset = settings.get("dataset")
        resumed = resumed or {}
        self._wandb_id: str | None = resumed.get("wandb")
        self._lines: Lines | None = None
        self._wandb: Wandb | None = None
        if is_main:
            with watched():
                descriptor = _opened(directory, resumed)
            self._lines = Lines(descriptor, directory / METRICS, watched)
            if config.wandb != "off":
                self._wandb = Wandb(directory, config, settings, self._wandb_id)
                self._wandb_id = self._wandb.id
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._peak = peak
        self._speed = _Speed(peak)
        self.trace = Trace(directory, config.trace_steps if is_main else [])
        """Of the steps `logging.trace_steps`."""
        self._steps = 0
        self._made: list[StepRecord] = []

    def state(self) -> dict[str, Any]:
        """For a checkpoint, fit for JSON."""
        return {"wandb": self._wandb_id}

    @contextlib.contextmanager
    def progress(self, steps: int, *, done: int) -> Iterator[None]:
        """Shows a progress bar for that many steps while the body runs, if one is wanted."""
        self._steps = steps
        if not (self._is_main and self._config.progress):
            yield
            return
        self._progress = Progress(
            TextColumn("Training"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True)),
            console=console,
            expand=True,
            speed_estimate_period=SPEED_PERIOD,
        )
        with self._progress:
            self._task = self._progress.add_task("train", total=steps, completed=done, status="")
            yield
        self._progress = None

    def stepped(self, record: StepRecord, wrong: str | None, rows: list[int | None]) -> None:
        """Records a step; with its rows if something is `wrong`: `refused`, its update was skipped, or `spike`."""
        if not self._is_main:
            return
        self._made.append(record)
        if wrong is not None:
            sentences = {
                "refused": "loss or gradient not finite, the update was skipped",
                "spike": f"loss {record.loss:.3f} is far above the steps before",
            }
            text = f"step {record.step}: {sentences[wrong]}; {self._look_at(rows)}"
            console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record.step, status=self._speed.status(record))
        if record.step % self._config.every and wrong is None and record.step != self._steps:
            return
        suspects = {} if wrong is None else {"wrong": wrong, "rows": [row for row in rows if row is not None]}
        self._write(
            {
                "step": record.step,
                "epoch": record.epoch,
                "loss": record.loss,
                "learning_rate": record.learning_rate,
                "gradient_norm": record.gradient_norm,
                "applied": record.applied,
                "load_balancing_loss": record.load_balancing_loss,
                "tokens": record.tokens,
                "supervised_tokens": record.supervised_tokens,
                "seconds": record.seconds,
                "tokens_per_second": record.tokens / record.seconds,
                **self._arithmetic(record),
                "memory_gib": memory_gib(),
                **suspects,
            }
        )

    def measured(self) -> dict[str, float]:
        """The peak memory so far, and medians of this launch's steps but the first, by the names of their lines."""
        made = self._made[1:] or self._made
        figures = [(record.seconds, record.tokens / record.seconds) for record in made]
        medians = map(statistics.median, zip(*figures, strict=True))
        return {"memory_gib": memory_gib()} | dict(zip(("seconds", "tokens_per_second"), medians, strict=False))

    def _arithmetic(self, record: StepRecord) -> dict[str, float]:
        """Floating-point operations per second, of those that the step had to do, over all processes; and as a share
        of what their devices can do."""
        rate = record.flops / record.seconds
        return {"flops_per_second": rate} | ({} if self._peak is None else {"share_of_peak": rate / self._peak})

    def _look_at(self, rows: list[int | None]) -> str:
        """How to see the rows of a step."""
        numbers = ",".join(str(row) for row in rows if row is not None)
        output = shlex.quote(f"output={self._dataset}")
        return f"see its rows: python -m data task=preview {output} 'train_rows=[{numbers}]'"

    def routed(self, step: int, routing: Routing) -> None:
        """Records what the routers did in a step."""
        if not self._is_main:
            return
        record = routing.record()
        self._line({"step": step, **record})
        if self._wandb is not None:
            by_layer = {
                f"routers/{short}/layer_{layer}": value
                for short, name in (
                    ("router_entropy", "router_entropy"),
                    ("load_balancing_loss", "load_balancing_loss_by_layer"),
                )
                for layer, value in enumerate(record[name])
            }
            by_expert = {
                f"routers/expert_load/layer_{layer}/expert_{expert}": share
                for layer, of_layer in enumerate(record["expert_load"])
                for expert, share in enumerate(of_layer)
            }
            unused = {"routers/unused_experts": len(record["unused_experts"])}
            self._wandb.log(by_layer | by_expert | unused, step=step)

    def evaluated(self, step: int, loss: float) -> None:
        """Records an evaluation."""
        if self._is_main:
            console.print(f"step {step}: evaluation loss {loss:.4f}")
            self._write({"step": step, "evaluation_loss": loss})
            if self._lines is not None:
                self._lines.then(self._report)

    def saved(self, step: int, paused: float, took: float) -> None:
        """Records a checkpoint: the seconds for which training stood still, and until it was on the disk."""
        self._line({"step": step, "checkpoint_paused_seconds": paused, "checkpoint_seconds": took})

    def sync(self) -> None:
        """Forces the lines so far to the disk, if it takes them: no checkpoint should know more steps than they."""
        if self._lines is not None:
            self._lines.sync()

    def close(self, within: float = 10.0) -> None:
        """Closes trace and metrics.jsonl, writes the report, and ends wandb's run.

        wandb, which may have to upload, gets `within` seconds.
        """
        self.trace.close()
        if self._lines is not None:
            self._lines.close()
            with self._watched():
                try_report(self._directory)
        if self._wandb is not None:
            self._wandb.close(within)

    def _report(self) -> None:
        try_report(self._directory, with_examples=False)  # the rows' text would need a tokenizer, and its time

    def _line(self, values: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.add((json.dumps(finite(values)) + "\n").encode())

    def _write(self, values: dict[str, Any]) -> None:
        self._line(values)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in values.items() if key != "step"}, step=values["step"])


class _Speed:
    """The words beside the progress bar; in a narrow terminal the last of them are cut off."""

    def __init__(self, peak: float | None) -> None:
        self._peak = peak
        self._tokens = self._seconds = self._flops = 0.0

    def status(self, record: StepRecord) -> str:
        """Those of a step, with the speed of the last ten or so."""
        self._tokens = SMOOTHING * self._tokens + record.tokens
        self._seconds = SMOOTHING * self._seconds + record.seconds
        self._flops = SMOOTHING * self._flops + record.flops
        speed = f"loss {record.loss:.3f}  {self._tokens / self._seconds:,.0f} tokens/s"
        if self._peak is not None:
            speed += f"  {self._flops / self._seconds / self._peak:.0%} of peak"
        return f"{speed}  epoch {record.epoch:.2f}  lr {record.learning_rate:.1e}  norm {record.gradient_norm:.2g}"


def memory_gib() -> float:
    """Peak memory of this process so far in GiB: allocated on its GPU if it has one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _opened(directory: Path, resumed: dict[str, Any]) -> int:
    """The descriptor of metrics.jsonl, open to append to what the checkpoint knows of."""
    path = directory / METRICS
    if path.exists() and not path.is_file():
        raise UserError(f"run_dir={directory}: its {METRICS} is not a regular file; remove it")
    try:
        _keep_lines(path, resumed.get("step", -1), resumed.get("evaluations", {}))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(
            f"run_dir={directory}: its {METRICS} can't be written ({reason}); free space or make it writable, and give "
            f"the same command again"
        ) from error


def _keep_lines(path: Path, last: int, evaluations: dict[str, Any]) -> None:
    """Drops from metrics.jsonl the lines of steps after the `last`, of evaluations that will be made again, and what a
    killed process left of a line."""
    if not os.path.lexists(path):  # a link to elsewhere is replaced, and what it leads to stays as it is
        path.touch()
    with path.open("rb") as file:
        replace_file(path, _kept(file, last, evaluations))


def _kept(lines: BinaryIO, last: int, evaluations: dict[str, Any]) -> Iterator[bytes]:
    while line := lines.readline(LONGEST_LINE):
        try:
            record = parse_json(line, MetricsLine)
        except UnreadableError:
            continue
        again = "evaluation_loss" in record and str(record["step"]) not in evaluations
        if line.endswith(b"\n") and record["step"] <= last and not again:
            yield line
