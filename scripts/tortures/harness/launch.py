"""One launch of a small run, as a user types it or forked; its processes, and how they end.

A launch is one of three things: `python -m train …`, or `deepspeed … --module train …`, as a user types it, or
processes forked from a server (forked.py); with two, RANK and the like are set as a launcher sets them.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from train.engine.processes import free_port

from .forked import ENVIRONMENT, ROOT, fork
from .outcome import hidden
from .processes import is_guardian, is_wandb, position_of, variable, words
from .trials import FailedError
from .wire import ADDRESSES, LINK

PATIENCE = 240.0
"""Seconds after which a launch that has not ended counts as one that hangs."""
MARK = "TORTURED_LAUNCH"
"""The environment variable by which processes of a launch are found."""


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
        namespaces: tuple[str, ...] = (),
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
            namespaces: those of a `Wire`, if each node is to be one.
            module: what the forked processes run, in the place of `train`.
        """
        self.run, self.count, self.forked = run, processes, forked
        self.log = run.with_name(f"{run.name}.{time.monotonic_ns()}.log")
        self._mark = f"{run} {time.monotonic_ns()}"
        self._children: list[BaseProcess] = []
        self._command: subprocess.Popen[bytes] | None = None
        environment = {**ENVIRONMENT, MARK: self._mark}
        self.started = time.monotonic()
        self.stale = hidden(run)
        """What an earlier launch left half-written."""
        self._metrics = _state(run / "metrics.jsonl")
        self.port = port = free_port()
        if forked:
            nodes = len(namespaces) or nodes
            for rank in range(processes):
                own, namespace, of_node = environment.copy(), None, processes // nodes
                if processes > 1:
                    own |= {"RANK": str(rank), "LOCAL_RANK": str(rank % of_node), "WORLD_SIZE": str(processes)}
                    own |= {"LOCAL_SIZE": str(of_node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                if nodes > 1:
                    own |= {"LAUNCHER_PID": f"{rank // of_node}"}  # each has its own, which says what became of the run
                if namespaces:
                    namespace = namespaces[rank // of_node]
                    own |= {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": LINK}
                self._children.append(fork(module, arguments, own, self.log, self.log, namespace))
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
            alive = {rank: child.pid for rank, child in enumerate(self._children) if child.is_alive()}
            return {rank: pid for rank, pid in alive.items() if pid is not None}
        if self.count == 1:
            assert self._command is not None
            return {0: self._command.pid} if self.running else {}
        beside = (is_guardian, is_wandb)
        training = [process for process in self.left() if not any(is_it(process) for is_it in beside)]
        found = {process.pid: variable(process, "RANK") for process in training}
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
        inner = [process.pid for process in self.left() if "deepspeed.launcher.launch" in words(process)]
        return [self._command.pid, *inner]

    def wandb(self) -> psutil.Process | None:
        """The process that wandb has started for itself."""
        return next(filter(is_wandb, self.left()), None)

    def wait_for_ranks(self) -> dict[int, int]:
        """The training processes by rank, when all are there, or the launch has ended."""
        while len(found := self.ranks()) < self.count and self.running:
            time.sleep(0.1)  # looking through all processes takes a while itself
        return found

    def position(self, rank: int) -> Callable[[], tuple[int, str]] | None:
        """What reads step and phase of a process from the page that it shares with its guardian; None before that."""
        return position_of(self.ranks().get(rank))

    def left(self) -> list[psutil.Process]:
        """All processes that belong to this launch and run, guardians and launchers among them."""
        alive = {child.pid for child in self._children if child.is_alive()}
        found = []
        for process in psutil.process_iter():
            if process.pid in alive or variable(process, MARK) == self._mark:
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
        positions = {rank: self.position(rank) for rank in range(self.count)}
        return (
            ", ".join(f"process {rank} in {read()}" for rank, read in positions.items() if read) or "positions unknown"
        )

    def wait_for_none_left(self, seconds: float) -> None:
        """Returns when no process of it is left.

        Raises:
            FailedError: some are, after this time; they are ended then.
        """
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            which = [(process.pid, " ".join(words(process))[:200]) for process in left]
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
            time.sleep(0.004)  # far less than a step takes, and so rare that looking takes no time from the run
        return False

    def writes(self) -> set[tuple[str, int]]:
        """What it has half-written at this moment."""
        return hidden(self.run) - self.stale


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced or written to; the inode alone may be used again."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino, path.stat().st_mtime_ns
    return None
