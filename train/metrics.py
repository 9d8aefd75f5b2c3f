"""What a run tells while it trains: a progress bar, metrics.jsonl, wandb."""

import contextlib
import json
import math
import os
import resource
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from configs.secrets import redact, redacted
from data.writing import sync
from train.config import LoggingConfig
from train.learning import Movement
from train.routing import Routing


class _Console(Console):
    """Says nothing more once nobody reads; rich's own would end the process, and with it the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


console = _Console(stderr=True)

METRICS = "metrics.jsonl"
WANDB_SECONDS = 10.0
"""How long wandb gets to end at most."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, over all processes."""

    step: int
    loss: float
    """Nats per supervised token."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    applied: bool
    """False where the update was refused."""
    router_balance: float
    """The routers' load-balancing loss (the auxiliary loss before its weight)."""
    tokens: int
    supervised_tokens: int
    seconds: float


class Metrics:
    """Writes on the main process; on the others every call does nothing."""

    def __init__(
        self,
        directory: Path,
        config: LoggingConfig,
        settings: dict[str, Any],
        *,
        is_main: bool,
        resumed: dict[str, Any] | None = None,
    ):
        """Opens metrics.jsonl and, where it is wanted, a wandb run that lives in the run directory.

        Args:
            directory: the run directory.
            config: what is wanted.
            settings: of the whole run, for wandb.
            is_main: whether this process writes.
            resumed: what `state` gave when the checkpoint was made that the run goes on from. Lines of later steps are
                dropped: those steps will be taken again.
        """
        self._is_main = is_main
        self._config = config
        resumed = resumed or {}
        if is_main:
            _keep_lines(directory / METRICS, resumed.get("step", -1), resumed.get("evaluations", {}))
        self._file = (directory / METRICS).open("a", encoding="utf-8") if is_main else None
        wandb = is_main and config.wandb != "off"
        self._wandb = _wandb(directory, config, settings, resumed.get("wandb")) if wandb else None
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._steps = 0
        self.evaluations = {int(step): loss for step, loss in _floats(resumed.get("evaluations", {})).items()}
        """Evaluation losses by step."""
        self.last = StepRecord(**_floats(resumed["last"])) if resumed.get("last") else None
        """The last step."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint, fit for JSON."""
        state = {
            "step": self.last.step if self.last else 0,
            "last": asdict(self.last) if self.last else None,
            "evaluations": {str(step): loss for step, loss in self.evaluations.items()},
            "wandb": self._wandb.id if self._wandb is not None else None,
        }
        return finite(state)

    @contextlib.contextmanager
    def progress(self, steps: int, *, done: int) -> Iterator[None]:
        """Shows a progress bar for that many steps while the body runs, where one is wanted."""
        self._steps = steps
        if not (self._is_main and self._config.progress):
            yield
            return
        self._progress = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        with self._progress:
            self._task = self._progress.add_task("train", total=steps, completed=done, status="")
            yield
        self._progress = None

    def stepped(self, record: StepRecord, wrong: str | None, rows: list[int | None]) -> None:
        """Records a step; where something is `wrong` with it, `refused` or `spike`, with its rows."""
        self.last = record
        if not self._is_main:
            return
        if wrong is not None:
            said = {
                "refused": "loss or gradient not finite, the update was refused",
                "spike": f"loss {record.loss:.3f} is far above the steps before; metrics.jsonl names its rows",
            }
            console.print(f"step {record.step}: {said[wrong]}", style="bold red")
        rate = record.tokens / record.seconds
        if self._progress is not None and self._task is not None:
            status = f"loss {record.loss:.3f}  {rate:,.0f} tokens/s"
            self._progress.update(self._task, completed=record.step, status=status)
        if record.step % self._config.every and wrong is None and record.step != self._steps:
            return
        suspects = {} if wrong is None else {"wrong": wrong, "rows": [row for row in rows if row is not None]}
        self._write(
            {
                "step": record.step,
                "loss": record.loss,
                "learning_rate": record.learning_rate,
                "gradient_norm": record.gradient_norm,
                "applied": record.applied,
                "auxiliary_loss": record.router_balance,
                "tokens": record.tokens,
                "supervised_tokens": record.supervised_tokens,
                "tokens_per_second": rate,
                "memory_gib": memory_gib(),
                **suspects,
            }
        )

    def routed(self, step: int, routing: Routing) -> None:
        """Records what the routers did in a step."""
        if not self._is_main:
            return
        record = routing.record()
        self._file_line({"step": step, **record})
        if self._wandb is not None:
            by_layer = {
                f"routers/{name}/layer_{layer}": value
                for name in ("router_entropy", "router_auxiliary_loss")
                for layer, value in enumerate(record[name])
            }
            by_expert = {
                f"routers/expert_load/layer_{layer}/expert_{expert}": share
                for layer, of_layer in enumerate(record["expert_load"])
                for expert, share in enumerate(of_layer)
            }
            unused = {"routers/unused_experts": len(record["unused_experts"])}
            self._wandb.log(by_layer | by_expert | unused, step=step)

    def evaluated(self, step: int, loss: float | None) -> None:
        """Records an evaluation; None, where the held-out split is empty, records nothing."""
        if loss is None:
            return
        self.evaluations[step] = loss
        if self._is_main:
            console.print(f"step {step}: evaluation loss {loss:.4f}")
            self._write({"step": step, "evaluation_loss": loss})

    def saved(self, step: int, paused: float, took: float) -> None:
        """Records a checkpoint: the seconds for which training stood still, and until it was on the disk."""
        self._file_line({"step": step, "checkpoint_paused_seconds": paused, "checkpoint_seconds": took})

    def sync(self) -> None:
        """Forces the lines so far to the disk, so that a checkpoint never knows more than they."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the files."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            # The launcher's SIGTERM may have ended wandb's own process before: it gets a bounded time.
            ending = threading.Thread(target=self._wandb.finish, daemon=True)
            ending.start()
            ending.join(WANDB_SECONDS)

    def _file_line(self, values: dict[str, Any]) -> None:
        assert self._file is not None
        with self._lock:  # checkpoints are recorded by the thread that writes them
            self._file.write(json.dumps(finite(values)) + "\n")
            self._file.flush()

    def _write(self, values: dict[str, Any]) -> None:
        self._file_line(values)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in values.items() if key != "step"}, step=values["step"])


def show_movements(movements: list[Movement]) -> None:
    """Prints how far each expert's adapter has moved: a row for each projection of each layer, a column an expert."""
    if not movements:
        return
    experts = [str(expert) for expert in range(len(movements[0].norms_E))]
    table = Table("layer", "projection", *experts, title="How far each expert's adapter has moved: ‖s(BA − B₀A₀)‖")
    for moved in movements:
        shown = [f"{norm:.3g}" if rank else "-" for norm, rank in zip(moved.norms_E, moved.ranks, strict=True)]
        table.add_row(str(moved.layer), moved.projection, *shown)
    console.print(table)


def finite(value: Any) -> Any:
    """The same value fit for JSON, which knows no NaN: a number that is not finite, at any depth, becomes its name."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _floats(named: dict[str, Any]) -> dict[str, Any]:
    """The numbers whose names `finite` wrote."""
    return {name: float(value) if isinstance(value, str) else value for name, value in named.items()}


def memory_gib() -> float:
    """Peak memory of this process so far in GiB: allocated on its GPU where it has one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _keep_lines(path: Path, last: int, evaluations: dict[str, Any]) -> None:
    """Drops the lines of steps after the `last` from metrics.jsonl, evaluations that will be made again, and what a
    killed process left of a line."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            told = json.loads(line)
            if told["step"] > last or ("evaluation_loss" in told and str(told["step"]) not in evaluations):
                continue
        except (ValueError, KeyError, TypeError):
            continue
        kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(b"".join(kept))
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def _wandb(directory: Path, config: LoggingConfig, settings: dict[str, Any], resumed: str | None) -> Any:
    """A wandb run: online where asked or logged in, else offline; the one that is `resumed`, by its id."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode: Any = config.wandb
    if mode == "auto":
        logged_in = wandb.login(prompt=False, verify=False)
        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
    named = redacted({"project": config.project, "name": directory.name})
    run: dict[str, Any] = {**named, "dir": str(directory), "config": settings}
    if resumed is not None:
        run |= {"id": resumed, "resume": "allow"}
    try:
        return wandb.init(mode=mode, **run)
    except wandb.errors.Error as error:
        console.print(f"wandb can't be reached ({redact(str(error))}); it logs offline, into {directory}/wandb")
        return wandb.init(mode="offline", **run)
