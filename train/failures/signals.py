"""SIGTERM, SIGINT, SIGHUP: the first asks the run to finish its step and save, the second ends the process at once."""

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from configs.program.errors import say

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: the run was asked to stop, and the same command goes on with it."""

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SIGHUP comes when the terminal closes. With nohup it is ignored, and the run goes on."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: sets the signal that a process gets when its parent ends."""
TOGETHER = 1.0
"""Seconds within which signals count as one."""
LAST_WORDS = 2.0
"""Seconds that the last line may take: perhaps nobody reads at the other end."""


class Signals:
    """Listens as soon as it is made.

    Python runs signal handlers only between instructions of the main thread, which may wait in a collective for ever.
    So the signals come through a file descriptor, to which the interpreter writes at once, and a thread reads them.
    """

    def __init__(self, grace: float):
        """`grace` is the time in seconds from the first signal until the process leaves in any case."""
        self._grace = grace
        self._asked: int | None = None
        self._at = 0.0
        self._passed_on = False
        self._training = False
        self._on_leaving: Callable[[str, int], None] | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        follow_launcher()
        for number in ASKING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _handled_elsewhere)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal has come."""
        return self._asked is not None

    def tell(self, on_leaving: Callable[[str, int], None]) -> None:
        """Has `on_leaving` called with the reason and the exit code if this process leaves at once."""
        self._on_leaving = on_leaving

    def begin_training(self) -> None:
        """From here on a signal leads to a checkpoint; before, the process leaves at once, with nothing to save."""
        self._training = True
        if self._asked is not None:
            self._leave("before training had begun")

    def _listen(self) -> None:
        while numbers := self._reader.recv(16):
            for number in numbers:
                if number in ASKING:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._asked is not None:
            if (self._asked, number, self._passed_on) == (signal.SIGINT, signal.SIGTERM, False):
                # Ctrl-C reaches DeepSpeed's launcher too, which sends SIGTERM to one process after the other, to each
                # when the one before has ended: seconds later.
                self._passed_on = True
                return
            if now - self._at >= TOGETHER and number != signal.SIGHUP:  # a terminal that closes is in no hurry
                self._exit(128 + number, f"{signal.Signals(number).name} again: leaving at once")
            return
        self._asked, self._at = number, now
        if not self._training:
            self._leave("before training had begun")
        timer = threading.Timer(self._grace, self._leave, [f"failures.grace={self._grace:g} seconds are over"])
        timer.daemon = True
        timer.start()

    def _leave(self, why: str) -> None:
        assert self._asked is not None
        again = "the same command with the same run_dir goes on from the last checkpoint"
        if not self._training:  # whether there is one is not known here
            again += ", or begins if there is none"
        self._exit(EXIT_PREEMPTED, f"stopped by {signal.Signals(self._asked).name}, {why}; {again}")

    def _exit(self, code: int, why: str) -> NoReturn:
        threading.Timer(LAST_WORDS, os._exit, [code]).start()
        if self._on_leaving is not None:
            self._on_leaving(why, code)
        say("train", why)
        os._exit(code)


def follow_launcher() -> None:
    """Asks for SIGTERM when the launcher dies, because a launcher that is killed leaves its processes behind.

    Called before the program's imports, which take seconds: a process whose launcher dies in them would wait for peers
    that have ended.
    """
    if "RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _handled_elsewhere(number: int, frame: object) -> None:
    """Replaces the default handler, which would end the process."""
