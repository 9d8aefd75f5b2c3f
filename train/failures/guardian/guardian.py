"""The guard beside each training process: a small program that outlives what happens to the process it watches.

`train/failures/guard.py` starts one as a child of each training process and talks with it through two pipes. The
guardian of process 0 is the hub: the others are connected to it, tell it how their processes are, and hear its verdict.

    process 0 ── guardian 0 (hub) ──┬── guardian 1 ── process 1
                                    └── guardian 2 ── process 2

A verdict ends the run: every guardian gives it to its process, which leaves with the exit code that the verdict holds,
and kills the process if it does not. A guardian that hears nothing from the hub for `peer_timeout` reaches the verdict
alone, so both sides of a broken link end. Durations are measured on one machine's monotonic clock each; no clock is
compared with another machine's.

It imports the standard library alone and is started without site-packages, so that it is there in a few hundredths of a
second and takes 18 MB.
"""

import contextlib
import mmap
import os
import select
import selectors
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from train.failures.guardian.channel import DISK, PAUSE, POSITION, REMEDY, START, THREADS, Channel, beat_interval

KILL_AFTER = 5.0
"""Seconds that a training process has to leave after the verdict; then it is killed."""

LEAVE_WITHIN = 20.0
"""Seconds that it has at least if it leaves for a reason of its own: enough to report it, and for the waits of
`train.failures.errors.UNISON` and `configs.program.entry.leave`."""

IDLE = 4096
"""Bytes a second that a process may read and write while it waits: signs of life, and threads that look around."""


def position(step: int, phase: str, host: str) -> str:
    """Step, phase and machine in words."""
    return f"{'its start' if step == START else f'step {step}'} ({phase}) on {host}"


def duration(seconds: float) -> str:
    """A timeout in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def progress(pid: int, thread: int) -> list[int]:
    """Numbers that grow while a thread computes, reads or writes: processor time, page faults, bytes."""
    grown: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):  # the thread may have ended
        task = Path(f"/proc/{pid}/task/{thread}")
        after_name = (task / "stat").read_text().rpartition(")")[2].split()
        grown += (int(after_name[field]) for field in (9, 11, 12))  # majflt, utime and stime of proc(5)
        grown += (int(line.split()[1]) for line in (task / "io").read_text().splitlines()[:2])
    return grown


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def bytes_moved(pid: int) -> int:
    """Bytes that a process has read and written and memory that it has touched for the first time, by its own count."""
    done = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        done += sum(int(line.split()[1]) for line in Path(f"/proc/{pid}/io").read_text().splitlines()[:2])
        faults = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        done += (int(faults[7]) + int(faults[9])) * mmap.PAGESIZE  # minflt and majflt of proc(5)
    return done


class Guardian:
    """What every guardian does: it watches its own process, and ends that process when there is a verdict."""

    def __init__(self, setup: dict[str, Any], trainer: Channel, page: mmap.mmap):
        """`setup` is what `train.failures.guard.Guard.join` sends."""
        self.setup = setup
        self.peer_timeout: float = setup["peer_timeout"]
        self.interval = beat_interval(self.peer_timeout)
        self.trainer = trainer
        self.page = page
        self.pidfd: int | None = None
        with contextlib.suppress(OSError):  # Linux before 5.3 has none
            self.pidfd = os.pidfd_open(setup["pid"])
        self.parting = False
        self.leaving = False
        self.gone = False
        self.disk_waits: dict[int, tuple[object, float]] = {}
        """For each of the page's threads, what it had got done when that last changed, and when that was."""
        self.work = 0
        """`bytes_moved` of the process when it last did more than wait, in its start."""
        self.selector = selectors.DefaultSelector()
        self.selector.register(trainer.reading, selectors.EVENT_READ, self.hear_trainer)
        self.now = self.trainer_heard = self.worked = self.forgave = time.monotonic()

    def run(self) -> NoReturn:
        """Watches until the run ends."""
        next_tick = self.now
        while True:
            events = self.selector.select(max(0.0, next_tick - time.monotonic()))
            woken = time.monotonic()
            if woken - self.now > PAUSE * self.interval:
                self.forgive(woken)
            self.now = woken
            for key, _ in events:
                key.data()
            if self.now >= next_tick:
                next_tick = self.now + self.interval
                if not self.trainer_lives():  # a child that it forked may hold the pipe open
                    self.trainer_gone()
                self.trainer.send(beat=True)
                self.watch_start()
                self.watch_disk()
                self.tick()

    def forgive(self, now: float) -> None:
        """Restarts every wait."""
        self.trainer_heard = self.forgave = now
        self.disk_waits.clear()

    def tick(self) -> None:
        """Is called once in each beat interval."""
        raise NotImplementedError

    def report(self, **events: object) -> None:
        """Tells the hub how this process is, and what happened to it."""
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """How this process is."""
        step, moves, since, phase = POSITION.unpack_from(self.page)
        return {
            "silent": self.now - self.trainer_heard,
            "standing": self.now - max(since, self.forgave, self.worked if step == START else 0.0),
            "step": step,
            "moves": moves,
            "phase": phase.rstrip(b"\0").decode(errors="replace"),
            "disk": next((path for thread, _, path in self.at_disk() if thread), ""),
        }

    def at_disk(self) -> list[tuple[int, float, str]]:
        """For each of the page's threads: its number (0 if it waits for no disk), since when, and for which path."""
        found = [DISK.unpack_from(self.page, POSITION.size + slot * DISK.size) for slot in range(THREADS)]
        return [(thread, since, path.rstrip(b"\0").decode(errors="replace")) for thread, since, path in found]

    def watch_disk(self) -> None:
        """Reports a thread that waits for a disk and has got nothing done for `disk_timeout`.

        In its start the thread may have helpers that read, and what the whole process does counts too.
        """
        for slot, (thread, since, path) in enumerate(self.at_disk()):
            done = (thread, since, self.worked, progress(self.setup["pid"], thread))
            before, when = self.disk_waits.get(slot, (None, self.now))
            if not thread or done != before:
                self.disk_waits[slot] = (done, self.now)
            elif self.now - when > self.setup["disk_timeout"] and not self.parting:
                self.report(hung=path)

    def watch_start(self) -> None:
        """Notes when the process last did more than wait: its start takes as long as there is something to read."""
        if POSITION.unpack_from(self.page)[0] == START:
            done = bytes_moved(self.setup["pid"])
            if done - self.work > IDLE * (self.now - self.worked):
                self.work, self.worked = done, self.now

    def hear_trainer(self) -> None:
        """Hears the training process, or that it has ended."""
        lines = self.trainer.receive()
        if lines is None:
            self.trainer_gone()
        else:
            self.take(lines)

    def take(self, lines: list[dict[str, Any]]) -> None:
        """Takes what the training process says."""
        self.trainer_heard = self.now
        for line in lines:
            self.leaving |= "leaving" in line
            if "done" in line or "left" in line:
                self.parting = True
                self.report(**line)

    def trainer_gone(self) -> None:
        """Reports that the training process has ended; the guardian stays until the others know."""
        if self.gone:
            return
        self.gone = True
        self.selector.unregister(self.trainer.reading)
        if not self.parting:
            self.report(died=True)

    def forget(self) -> None:
        """Removes what the training process has left behind."""
        if self.setup["forgets"] is not None:
            Path(self.setup["forgets"]).unlink(missing_ok=True)

    def trainer_lives(self) -> bool:
        """Whether the training process is still this one's parent; its number then belongs to no other process."""
        return os.getppid() == self.setup["pid"]

    def end_trainer(self, verdict: str, code: int | None, speaks: bool) -> None:
        """Gives the training process the verdict and time to leave, and kills it if it does not.

        A process that leaves for a reason of its own has longer. One that can't even say the verdict, because it waits
        for a disk with Python's lock held, say, has it said here.
        """
        self.trainer.send(verdict=verdict, code=code, speaks=speaks)
        since, own, told = time.monotonic(), max(self.peer_timeout, LEAVE_WITHIN), False
        while self.trainer_lives() and time.monotonic() - since < (own if self.leaving else KILL_AFTER):
            time.sleep(0.02)
            if select.select([self.trainer.reading], [], [], 0)[0]:  # it may have met its error just now
                lines = self.trainer.receive() or []
                self.leaving |= any("leaving" in line for line in lines)
                told |= any("told" in line for line in lines)
        if self.trainer_lives():
            if speaks and not told and not self.leaving:
                with contextlib.suppress(OSError):
                    print(f"train: {verdict}" + f"; {REMEDY}" * (code is None), file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):
                if self.pidfd is not None:
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                else:
                    os.kill(self.setup["pid"], signal.SIGKILL)
