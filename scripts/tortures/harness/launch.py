"""One launch of a small run, as a user types it or forked; its processes, and how they end.

A launch is one of three things. `python -m train …`, or `deepspeed … --module train …`, as a user types it. Or, because
starting Python with torch and DeepSpeed takes longer than such a run, processes forked from a server that has imported
them (`multiprocessing`'s fork server): each is a process of its own, with its own memory, threads and guard, that runs
the program's `main`, and dies of real signals; with two, RANK and the like are set as a launcher sets them.
"""

import argparse
import contextlib
import mmap
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from configs.program.errors import UserError
from train.failures.guardian.channel import POSITION

from .outcome import hidden
from .trials import FailedError, attempt

ROOT = Path(__file__).parents[3]

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "400", "WANDB_MODE": "disabled"}
PATIENCE = 240.0
"""Seconds after which a launch that has not ended counts as one that hangs."""
FORKED = (
    __name__,
    "train.run",
    "transformers.models.mixtral.modeling_mixtral",
    "peft",
    "datasets",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
    "hydra._internal.core_plugins.basic_launcher",
    "networkx",
)
"""What the fork server imports: everything whose import takes long."""
MARK = "TORTURED_LAUNCH"
"""The environment variable by which processes of a launch are found."""


def attempts(
    options: argparse.Namespace, trials: Iterable[tuple[str, Callable[[], dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """The findings of the trials whose names `--only` matches.

    Raises:
        UserError: it matches none.
    """
    found = [attempt(name, trial) for name, trial in trials if re.search(options.only, name)]
    if not found:
        raise UserError(f"--only={options.only}: no trial is called so; leave it out to see all of their names")
    return found


class Launch:
    """One launch of a run."""

    def __init__(
        self,
        run: Path,
        arguments: list[str],
        processes: int,
        *,
        forked: bool,
        by_script: bool = False,
        nodes: int = 1,
        module: str = "train",
    ):
        """Starts it.

        Args:
            run: the run directory.
            arguments: of `python -m train`.
            processes: 1 or more, on this machine.
            forked: from the server, without a launcher, or as a user types it.
            by_script: typed with scripts/launch/per_node.sh instead of `deepspeed`.
            nodes: how many the forked processes take themselves to be on.
            module: what the forked processes run, in the place of `train`.
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
        self.port = port = free_port()
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
                child = context.Process(target=_trainer, args=(module, arguments, own, str(self.log)))
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
        """The training processes that run, by rank."""
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
            time.sleep(0.1)  # looking through all processes takes a while itself
        return found

    def place_of(self, rank: int) -> Callable[[], tuple[int, str]] | None:
        """What reads step and phase of a process from the page that it shares with its guardian; None before that."""
        pid = self.ranks().get(rank)
        with contextlib.suppress(psutil.Error, OSError):
            for child in psutil.Process(pid).children():
                for descriptor in Path(f"/proc/{child.pid}/fd").iterdir():
                    if _is_guardian(child) and str(descriptor.readlink()).startswith("/memfd:position"):
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
        """The exit codes: of each process if they were forked, else of the command.

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
        """The step after which it said that it resumes; 0 at the beginning, None if it never came that far."""
        found = re.search(r"Resuming .* after step (\d+)", self.said())
        return int(found[1]) if found else 0 if self.has_begun else None

    @property
    def has_begun(self) -> bool:
        """Whether it has come as far as metrics.jsonl, whose later lines are dropped by then."""
        now = _state(self.run / "metrics.jsonl")
        return now is not None and now != self._metrics

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for the condition; False if the launch ends before."""
        while self.running:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def writes(self) -> set[tuple[str, int]]:
        """What it has half-written at this moment."""
        return hidden(self.run) - self.stale


def _trainer(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """A forked process: `python -m MODULE ARGUMENTS`."""
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [f"python -m {module}", *arguments]
    import train

    assert train.__file__ is not None and Path(train.__file__).is_relative_to(ROOT), train.__file__
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal to a process of ours, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _reader(page: Path) -> Callable[[], tuple[int, str]]:
    with page.open("rb") as file:
        shared = mmap.mmap(file.fileno(), POSITION.size, access=mmap.ACCESS_READ)

    def read() -> tuple[int, str]:
        step, _, _, phase = POSITION.unpack_from(shared)
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
    return any("train.failures.guardian" in word for word in _words(process))


def _is_wandb(process: psutil.Process) -> bool:
    return any(word.endswith("wandb-core") for word in _words(process)[:1])


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced or written to; the inode alone may be used again."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino, path.stat().st_mtime_ns
    return None


def free_port() -> str:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
