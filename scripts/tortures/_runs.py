"""Small runs that are made to end badly: what they train on, how they are launched, and what must be equal after all.

A launch is one of three things. `python -m train …`, or `deepspeed … --module train …`, as a user types it. Or, because
starting Python with torch and DeepSpeed takes longer than such a run, processes forked from a server that has imported
them (`multiprocessing`'s fork server): each is a process of its own, with its own memory, threads and guard, that runs
the program's `main`, and dies of real signals; with two, RANK and the like are set as a launcher sets them.
"""

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from train import checkpoint
from train.checkpoint import Checkpoint, DamagedError
from train.guardian import PLACE

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "400", "WANDB_MODE": "disabled"}
STEPS = 24
SETTINGS = {
    "hardware": "cpu",
    "logging": "quiet",
    "max_steps": str(STEPS),
    "global_batch": "2",
    "save_every": "2",
    "eval_every": "6",
    "lora.rank": "4",
    "lora.dropout": "0.1",
    "optim.lr": "1e-3",
    "logging.routing_every": "4",
}
"""Of every run that is not told another. With dropout, because random numbers must be those of the run that was not
interrupted too."""
CLOCK = {"tokens_per_second", "memory_gib", "checkpoint_paused_seconds", "checkpoint_seconds"}
"""What metrics.jsonl says of time and memory; all else must be equal."""
FOR_THE_RECORD = {"receipt.json", "train_config.yaml"}
"""Files of a result that tell when and where it was made."""
PATIENCE = 240.0
"""Seconds after which a launch that has not ended counts as one that hangs."""
FORKED = (
    f"{__package__}._runs",
    "train.run",
    "transformers.models.mixtral.modeling_mixtral",
    "peft",
    "datasets",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
    "hydra._internal.core_plugins.basic_launcher",
    "networkx",
)
"""What the fork server imports: all that a run does that takes long."""
MARK = "TORTURED_LAUNCH"
"""The environment variable by which processes of a launch are found."""

Settings = dict[str, str]


class FailedError(Exception):
    """Something did not go as it has to; the text says what."""


def require(holds: object, told: str) -> None:
    """Raises `FailedError` with what is told unless it holds."""
    if not holds:
        raise FailedError(told)


def attempts(
    options: argparse.Namespace, trials: Iterable[tuple[str, Callable[[], dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """What the trials found whose names `--only` matches.

    Raises:
        UserError: it matches none.
    """
    found = [attempt(name, trial) for name, trial in trials if re.search(options.only, name)]
    if not found:
        raise UserError(f"--only={options.only}: no trial is called so; leave it out to see all of their names")
    return found


def attempt(name: str, trial: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a trial found, with its name, and why it `failed`, or None."""
    try:
        return {"trial": name, **trial(), "failed": None}
    except (FailedError, DamagedError, OSError, LookupError, subprocess.SubprocessError) as error:
        return {"trial": name, "failed": f"{type(error).__name__}: {error}"}


def report(title: str, trials: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Prints a table of trials, and what repeats those that failed; the figures."""
    columns = list(dict.fromkeys(key for trial in trials for key in trial if key != "failed"))
    table = Table(*columns, "", title=title)
    for trial in trials:
        cells = [_shown(trial.get(column, "")) for column in columns]
        table.add_row(*cells, "FAILED" if trial["failed"] else "ok")
    console = Console(width=160)
    console.print(table)
    failed = [f"{trial['trial']}: {trial['failed']}" for trial in trials if trial["failed"]]
    for told in failed:
        console.print(f"Failed (--seed {seed}): {told}", style="bold red", markup=False)
    console.print(f"{len(trials) - len(failed)} of {len(trials)} went as they have to")
    return {"seed": seed, "trials": trials, "failed": failed}


def _shown(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def arguments(parser: argparse.ArgumentParser, *, trials: bool = True) -> None:
    """The options that all have, and `--only` of those that have trials."""
    parser.add_argument("--seed", type=int, default=0, help="decides all that is drawn (0)")
    if trials:
        parser.add_argument("--only", default="", metavar="PATTERN", help="only the trials whose names it matches")
    parser.add_argument("--forked", action="store_true", help="fork the runs to compare with too, which is faster")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the runs lie (default: a temporary place)")


@contextlib.contextmanager
def workplace(options: argparse.Namespace) -> Iterator["Workplace"]:
    """A place for runs; it is removed unless something failed there, or the user named it."""
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="torture-"))
    scratch.mkdir(parents=True, exist_ok=True)
    place = Workplace(scratch.resolve(), typed=not options.forked)
    place.prepare()
    try:
        yield place
    finally:
        place.end_all()
        if place.keep or options.scratch:
            print(f"The runs are in {scratch}")
        else:
            shutil.rmtree(scratch)


@dataclass
class Workplace:
    """A directory with a nano base, the prepared sample, and runs on them."""

    scratch: Path
    keep: bool = False
    """Whether the directory is worth looking at."""
    typed: bool = True
    """Whether the runs to compare with are made by the command that a user types, or forked too."""
    launches: list["Launch"] = field(default_factory=list)

    @property
    def base(self) -> Path:
        """A random nano Mixtral."""
        return self.scratch / "base"

    @property
    def rows(self) -> Path:
        """The sample, prepared."""
        return self.scratch / "rows"

    def prepare(self) -> None:
        """Makes base and rows."""
        if not self.base.exists():
            program = (
                "import sys, torch; from train import model; from train.config import *; torch.manual_seed(0);"
                "sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, "
                "num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.08);"
                "made = model.base(ModelConfig(architecture=ArchitectureConfig(**sizes)));"
                "made.save_pretrained(sys.argv[1])"
            )
            _typed(sys.executable, "-c", program, str(self.base))
        if not self.rows.exists():
            _typed(sys.executable, "-m", "data", "data=sample", "seq_len=256", f"output={self.rows}")

    def settings(self, run: Path, **changed: str) -> Settings:
        """Of a launch in the directory `run`; a name's points are given as two underlines."""
        where = {"dataset": str(self.rows), "model.path": str(self.base), "run_dir": str(run)}
        return SETTINGS | where | {name.replace("__", "."): value for name, value in changed.items()}

    def launch(
        self, run: Path, processes: int, *, forked: bool = True, by_script: bool = False, **changed: str
    ) -> "Launch":
        """Starts a run, or goes on with one."""
        settings = self.settings(run, **changed)
        arguments = [f"{name}={value}" for name, value in settings.items()]
        made = Launch(run, arguments, processes, forked=forked, by_script=by_script)
        self.launches.append(made)
        return made

    def finish(self, run: Path, processes: int, *, forked: bool = True, **changed: str) -> "Launch":
        """A launch that nothing is done to, to its end.

        Raises:
            FailedError: it does not end well.
        """
        launch = self.launch(run, processes, forked=forked, **changed)
        codes = launch.wait()
        if any(codes):
            raise FailedError(f"a launch that nothing was done to ended with {codes}:\n{launch.said()}")
        return launch

    def reference(self, processes: int, **changed: str) -> Path:
        """A run that nothing happens to; made once for the same settings."""
        name = "-".join(["whole", str(processes), *(f"{key}={value}" for key, value in sorted(changed.items()))])
        run = self.scratch / re.sub(r"[^\w.-]", "_", name)
        if not (run / "receipt.json").exists():
            self.finish(run, processes, forked=not self.typed, **changed)
        return run

    def interrupted(self, name: str, step: int, processes: int = 1, **changed: str) -> Path:
        """A run that was asked to stop after a step, with its checkpoints; made once for each name."""
        run = self.scratch / name
        if not run.exists():
            launch = self.launch(run, processes, **changed)
            launch.until(lambda: launch.has_begun and last_step(run) >= step)
            for pid in launch.ranks().values():
                kill(pid, signal.SIGTERM)
            codes = launch.wait()
            require(set(codes) == {75}, f"a run that was asked to stop ended with {codes}:\n{launch.said()}")
        return run

    def copy(self, run: Path, name: str) -> Path:
        """A copy of a run, to be damaged."""
        return Path(shutil.copytree(run, self.scratch / name))

    def end_all(self) -> None:
        """Leaves no process behind."""
        for launch in self.launches:
            launch.end()


class Launch:
    """One launch of a run."""

    def __init__(
        self, run: Path, arguments: list[str], processes: int, *, forked: bool, by_script: bool = False, nodes: int = 1
    ):
        """Starts it.

        Args:
            run: the run directory.
            arguments: of `python -m train`.
            processes: 1 or more, on this machine.
            forked: from the server, without a launcher, or as a user types it.
            by_script: typed with scripts/launch/per_node.sh in the place of `deepspeed`.
            nodes: how many the forked processes take themselves to be on.
        """
        self.run, self.count, self.forked = run, processes, forked
        self.log = run.with_name(f"{run.name}.{time.monotonic_ns()}.log")
        self._mark = f"{run} {time.monotonic_ns()}"
        self._children: list[Any] = []
        self._command: subprocess.Popen[bytes] | None = None
        environment = {**ENVIRONMENT, MARK: self._mark}
        self.started = time.monotonic()
        self.stale = hidden(run)
        """What an earlier launch left half-written."""
        self._metrics = _state(run / "metrics.jsonl")
        self.port = port = _free_port()
        if forked:
            # Of the server, which starts with the first process: it imports this checkout, wherever it is started.
            os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "scripts")]))
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(FORKED))
            for rank in range(processes):
                own = environment.copy()
                if processes > 1:
                    of_node = processes // nodes
                    own |= {"RANK": str(rank), "LOCAL_RANK": str(rank % of_node), "WORLD_SIZE": str(processes)}
                    own |= {"LOCAL_SIZE": str(of_node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                child = context.Process(target=_trainer, args=(arguments, own, str(self.log)))
                child.start()
                self._children.append(child)
            return
        command = [sys.executable, "-m", "train"]
        if processes > 1:
            deepspeed = str(Path(sys.executable).with_name("deepspeed"))
            command = [deepspeed, "--quiet", "--num_gpus", str(processes), "--master_port", port]
            command += ["--no_local_rank", "--module", "train"]
        if by_script:
            # A shell can't catch a signal that was ignored when it started, as SIGINT is in the background.
            command = ["env", "--default-signal=INT", "bash", str(ROOT / "scripts" / "launch" / "per_node.sh")]
            command += ["--nodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", port]
            command += ["--gpus-per-node", str(processes)]
        with self.log.open("wb") as log:
            self._command = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether any process that was started here directly still runs."""
        if self._command is not None:
            return self._command.poll() is None
        return any(child.is_alive() for child in self._children)

    def ranks(self) -> dict[int, int]:
        """The training processes by their ranks, those that run."""
        if self.forked:
            return {rank: child.pid for rank, child in enumerate(self._children) if child.is_alive()}
        if self.count == 1:
            assert self._command is not None
            return {0: self._command.pid} if self.running else {}
        beside = (_is_guardian, _is_wandb)
        training = [process for process in self.left() if not any(is_it(process) for is_it in beside)]
        found = {process.pid: _field(process, "RANK") for process in training}
        return {int(rank): pid for pid, rank in found.items() if rank}

    @property
    def group(self) -> int:
        """The process group of a launch that was typed."""
        assert self._command is not None
        return self._command.pid

    def launchers(self) -> list[int]:
        """The processes of the launcher, the outer one first."""
        if self.forked or self.count == 1:
            return []
        assert self._command is not None
        inner = [process.pid for process in self.left() if "deepspeed.launcher.launch" in _words(process)]
        return [self._command.pid, *inner]

    def wandb(self) -> psutil.Process | None:
        """The process that wandb has started for itself."""
        return next(filter(_is_wandb, self.left()), None)

    def wait_for_ranks(self) -> dict[int, int]:
        """The training processes by rank, when all are there, or the launch has ended."""
        while len(found := self.ranks()) < self.count and self.running:
            time.sleep(0.02)
        return found

    def place_of(self, rank: int) -> Callable[[], tuple[int, str]] | None:
        """What gives step and phase of a process: the page that it shares with its guardian. None before it does."""
        pid = self.ranks().get(rank)
        with contextlib.suppress(psutil.Error, OSError):
            for child in psutil.Process(pid).children():
                for descriptor in Path(f"/proc/{child.pid}/fd").iterdir():
                    if _is_guardian(child) and str(descriptor.readlink()).startswith("/memfd:place"):
                        return _reader(descriptor)
        return None

    def left(self) -> list[psutil.Process]:
        """All processes that belong to this launch and run, guardians and launchers among them."""
        alive = {child.pid for child in self._children if child.is_alive()}
        found = []
        for process in psutil.process_iter():
            if process.pid in alive or _field(process, MARK) == self._mark:
                found.append(process)
        return found

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes: of each process where they were forked, else of the command.

        Raises:
            FailedError: it does not end in this time; it is ended then.
        """
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            time.sleep(0.005)
        if self.running:
            where = self.where()
            self.end()
            raise FailedError(f"it has not ended after {seconds:.0f} s ({where}):\n{self.said()}")
        if self._command is not None:
            return [self._command.returncode]
        return [child.exitcode for child in self._children]

    def where(self) -> str:
        """Where its processes are, as far as their guards tell."""
        places = {rank: self.place_of(rank) for rank in range(self.count)}
        return ", ".join(f"process {rank} in {place()}" for rank, place in places.items() if place) or "places unknown"

    def wait_for_none_left(self, seconds: float) -> None:
        """Returns when no process of it is left.

        Raises:
            FailedError: some are, after this time; they are ended then.
        """
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            which = [(process.pid, " ".join(_words(process))[:200]) for process in left]
            self.end()
            raise FailedError(f"processes were left after {seconds:.0f} s: {which}\n{self.said()}")

    def end(self) -> None:
        """Kills what is left of it."""
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for child in self._children:
            child.join()
        if self._command is not None:
            self._command.wait()

    def said(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def resumed_step(self) -> int | None:
        """The step after which it said that it resumes; 0 at the beginning, None where it never came so far."""
        found = re.search(r"Resuming .* after step (\d+)", self.said())
        return int(found[1]) if found else 0 if self.has_begun else None

    @property
    def has_begun(self) -> bool:
        """Whether it has come as far as metrics.jsonl, whose later lines are dropped by then."""
        now = _state(self.run / "metrics.jsonl")
        return now is not None and now != self._metrics

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for the condition; False where the launch ends before."""
        while self.running:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def writes(self) -> set[tuple[str, int]]:
        """What it has half-written at this moment."""
        return hidden(self.run) - self.stale


def _trainer(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """A forked process: `python -m train ARGUMENTS`."""
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = ["python -m train", *arguments]
    import train

    assert train.__file__ is not None and Path(train.__file__).is_relative_to(ROOT), train.__file__
    runpy.run_module("train", run_name="__main__", alter_sys=True)


def hidden(run: Path) -> set[tuple[str, int]]:
    """The half-written or half-removed entries of a run, by name and inode."""
    found = set()
    for directory in (run, run / checkpoint.FOLDER):
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith((".tmp", ".old")):
                    found.add((entry.name, entry.inode()))
    return found


def of_a_save(names: set[tuple[str, int]]) -> set[str]:
    """Of half-written entries those that belong to a checkpoint or to the result."""
    return {name for name, _ in names if name.startswith((".step-", ".adapter.", ".receipt."))}


def last_written(run: Path, name: str) -> str | None:
    """The file of a half-written directory that was written to last, as a path in it."""
    for directory in (run / checkpoint.FOLDER / name, run / name):
        with contextlib.suppress(OSError):
            if directory.is_file():
                return directory.name
            files = [path for path in directory.rglob("*") if path.is_file()]
            if files:
                return str(max(files, key=lambda path: path.stat().st_mtime_ns).relative_to(directory))
    return None


def last_step(run: Path) -> int:
    """The last step of metrics.jsonl; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in reversed((run / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):
                step = json.loads(line)
                if "loss" in step:
                    return int(step["step"])
    return 0


def last_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((checkpoint.number(place) or 0 for place in checkpoint.places(run)), default=0)


def record(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or the memory decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
    return [line for line in kept if line.keys() != {"step"}]


def difference(run: Path, whole: Path) -> str | None:
    """The first difference of a finished run from the one that nothing happened to; None where there is none."""
    ours, theirs = record(run), record(whole)
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return f"{run}: metrics.jsonl has {mine}, and {whole} has {other}"
    if len(ours) != len(theirs):
        return f"{run}: metrics.jsonl has {len(ours)} lines, and {whole} has {len(theirs)}"
    for path in [*whole.glob("adapter/adapter_*"), *whole.glob("model/*")]:
        name = path.relative_to(whole)
        if path.name not in FOR_THE_RECORD and (run / name).read_bytes() != path.read_bytes():
            return f"{run}: {name} has other bytes than that of {whole}"
    return None


def check_newest(run: Path) -> int:
    """Reads the newest checkpoint whole; its step.

    Raises:
        DamagedError: it is not whole.
    """
    found = Checkpoint(checkpoint.places(run)[0])
    found.check(shapes(found.place))
    return found.step


def shapes(place: Path) -> dict[str, tuple[int, ...]]:
    """The parameters of a checkpoint that is known to be whole."""
    from configs.weights import read_header

    return {tensor.name: tensor.shape for tensor in read_header(place / "master.safetensors")}


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal to a process of ours, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def generator(*parts: object) -> random.Random:
    """Random numbers that follow from the parts."""
    return random.Random(" ".join(map(str, parts)))


def _typed(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def _reader(page: Path) -> Callable[[], tuple[int, str]]:
    with page.open("rb") as file:
        shared = mmap.mmap(file.fileno(), PLACE.size, access=mmap.ACCESS_READ)

    def read() -> tuple[int, str]:
        step, _, _, phase = PLACE.unpack_from(shared)
        return step, phase.rstrip(b"\0").decode(errors="replace")

    return read


def _field(process: psutil.Process, name: str) -> str | None:
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ().get(name)
    return None


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _is_guardian(process: psutil.Process) -> bool:
    return any(word.endswith("guardian.py") for word in _words(process))


def _is_wandb(process: psutil.Process) -> bool:
    return any(word.endswith("wandb-core") for word in _words(process)[:1])


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced or written to; inodes alone are used again."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino, path.stat().st_mtime_ns
    return None


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
