"""Ends the run on every machine when one of its processes dies, hangs or can't be reached, and says which and where.

A collective waits for its peers, for ever or until a timeout that names nobody. So each training process has a guardian
(`train/failures/guardian/`) beside it, and the guardians watch each other:

    guard = Guard(rank, count)
    Meeting(rank, seconds=1800).join(guard)     # collective
    guard.start("loading the base")             # what takes as long as there is something to read
    guard.at(7, "forward")                      # as often as the main thread moves on
    guard.done()                                # collective; from here on no process's end is a failure

The first failure is the verdict for all: a process died; it left with an error (`leaving`); nothing was heard of it for
`peer_timeout` (it is stopped, or its machine or the network is gone); no process made progress for `stall_timeout`
(until the first step, none read or wrote anything); or a disk gave one of them nothing for `disk_timeout`. Of these the
last two can also end a run of one process, for which nobody waits: who stops it may let it go on.
The processes then print one line for each launcher and end, with `EXIT_PEER_LOST` or, if a process left by itself, with
its exit code, so that whoever launches again knows whether that helps. A process that does not end by itself is killed,
even if it is stopped. A guardian that dies ends the run too, because nobody would notice the next failure.
"""

import contextlib
import mmap
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from configs.program.errors import UserError, one_line, say
from configs.program.launch import local_rank
from configs.program.secrets import redact
from train.failures.guardian.channel import (
    DISK,
    JOIN_TIMEOUT,
    PAGE_BYTES,
    PAUSE,
    POSITION,
    REMEDY,
    START,
    THREADS,
    Channel,
    beat_interval,
)

EXIT_PEER_LOST = 76
"""The exit code of a process that ends because another one was lost: launch the run again."""

_SPARED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
"""Signals that launchers and terminals send to whole process groups. A guardian outlives them, to see what its process
does."""

ROOT = Path(__file__).parents[2]
"""The folder that `train` is in."""
BOOT = (
    "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_module('train.failures.guardian', run_name='__main__', alter_sys=True)"
)
"""Starts the guardian without site-packages. As a package it comes from cached byte code; a script would be compiled at
every start."""

Address = tuple[int, str]
"""The port at which process 0's guardian is found, and the token by which it knows the run's own."""


class Guard:
    """This process's part in the guard."""

    def __init__(
        self,
        process_rank: int,
        process_count: int,
        *,
        peer_timeout: float = 120.0,
        stall_timeout: float = 1800.0,
        disk_timeout: float = 1800.0,
        start_timeout: float = 1800.0,
        forgets: str | None = None,
    ):
        """Starts nothing yet.

        Args:
            process_rank: the number of this process, from 0.
            process_count: how many processes the run has.
            peer_timeout: seconds without a sign of life after which a process counts as lost. Signs come from a thread
                of the process, every second or ten times within this time. While C code keeps Python's global lock, the
                process looks like a stopped one: hence two minutes by default.
            stall_timeout: seconds after which the run ends if no process called `at`; longer than any phase may take.
            disk_timeout: seconds after which the run ends if a thread that waits for a disk (`disk`) got nothing done.
            start_timeout: seconds within which all processes have to come to `join`.
            forgets: a file that the guardian removes if the process leaves it behind.
        """
        self.guardian: subprocess.Popen[bytes] | None = None
        self._rank = process_rank
        self._count = process_count
        self._peer_timeout = peer_timeout
        self._stall_timeout = stall_timeout
        self._disk_timeout = disk_timeout
        self._start_timeout = start_timeout
        self._forgets = forgets
        self._interval = beat_interval(peer_timeout)
        self._listener: socket.socket | None = None
        self._token = ""
        self._page: mmap.mmap | None = None
        self._step = START
        self._moves = 0
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._judged = threading.Event()
        self._lock = threading.Lock()
        self._verdict: str | None = None
        self.exit_code = EXIT_PEER_LOST
        """The exit code with which a process ends because of the verdict, once there is one."""
        self._asked = False
        self._leaving = False

    def listen(self) -> Address | None:
        """On process 0, opens a port on all interfaces and returns what every process gives to `join`; else None."""
        if self._rank > 0 or self._count == 1:
            return None
        self._listener = _listener(self._count)
        self._token = secrets.token_hex(16)
        return self._listener.getsockname()[1], self._token

    def join(self, address: Address | None, host: str | None = None, *, within: float | None = None) -> None:
        """Starts the guardian and waits until those of all processes have found each other; collective.

        Args:
            address: what `listen` returned on process 0; None in a run of one process, which waits for nobody.
            host: process 0's address; by default the launcher's MASTER_ADDR.
            within: the most seconds that this process waits; by default as long as the guardians do.

        Raises:
            UserError: process 0's guardian can't be reached.
        """
        port, token = address or (0, "")
        if self._listener is not None:
            connection = self._listener
        elif self._count == 1:
            connection = socket.socket()
        else:
            host = host or os.environ["MASTER_ADDR"]
            try:
                connection = socket.create_connection((host, port), timeout=JOIN_TIMEOUT)
            except OSError as error:
                raise UserError(
                    f"MASTER_ADDR={host}: process {self._rank} can't reach port {port} of process 0 there "
                    f"({one_line(error)}); the processes of a run must reach each other's ports"
                ) from error
        page = os.memfd_create("position")
        os.ftruncate(page, PAGE_BYTES)
        self._page = mmap.mmap(page, PAGE_BYTES)
        self.start("finding the others")
        program = [sys.executable, "-I", "-S", "-c", BOOT, str(ROOT)]
        fds = (page, connection.fileno())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SPARED)  # it inherits what is blocked here
        try:
            guardian = subprocess.Popen(
                [*program, *map(str, fds)], pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(page)
        connection.close()
        assert guardian.stdin is not None and guardian.stdout is not None
        self._channel = Channel(guardian.stdout.fileno(), guardian.stdin.fileno())
        self._channel.send(
            rank=self._rank,
            count=self._count,
            local_rank=local_rank(),
            host=os.uname().nodename,
            site=f"{os.uname().nodename} {os.environ.get('LAUNCHER_PID', os.getppid())}",
            pid=os.getpid(),
            peer_timeout=self._peer_timeout,
            stall_timeout=self._stall_timeout,
            disk_timeout=self._disk_timeout,
            start_timeout=self._start_timeout,
            forgets=self._forgets,
            token=token,
        )
        self.guardian = guardian  # whoever sees it may send
        threading.Thread(target=self._watch, args=(guardian,), name="guard", daemon=True).start()
        if self._count > 1:
            self._ready.wait(within)

    def refuse(self, address: Address | None, reason: str, code: int, *, within: float) -> None:
        """`join` for a process that has an end of its own already: the others learn of it when they come."""
        self._leaving = True  # no verdict takes its exit code from it
        self.join(address, within=within)
        self.leaving(reason, code)

    def start(self, phase: str) -> None:
        """Notes what the main thread does before the first step. It may take long if bytes are read or written."""
        self.at(START, phase)

    def at(self, step: int, phase: str) -> None:
        """Notes where the main thread is: a write to memory, cheap enough for any place. `phase` has up to 32 bytes."""
        if self._page is None:
            return
        self._moves = self._moves + 1 if step == self._step else 0
        self._step = step
        POSITION.pack_into(self._page, 0, step, self._moves, time.monotonic(), phase.encode())

    @contextlib.contextmanager
    def disk(self, path: Path) -> Iterator[None]:
        """Within it, this thread waits for the disk that `path` is on, and for nothing else: no collective, no lock.

        At most `THREADS` may do so at once. A call that waits for a disk can't be given a timeout, so the guardian ends
        the run if the disk hangs.
        """
        if self._page is None:
            yield
            return
        thread, name = threading.get_native_id(), os.fsencode(path)[-240:]
        with self._lock:
            slots = [POSITION.size + DISK.size * slot for slot in range(THREADS)]
            waiting = [DISK.unpack_from(self._page, slot)[0] for slot in slots]
            at = slots[waiting.index(thread if thread in waiting else 0)]
            before = self._page[at : at + DISK.size]
            DISK.pack_into(self._page, at, thread, time.monotonic(), name)
        try:
            yield
        finally:
            self._page[at : at + DISK.size] = before

    def leaving(self, reason: str, code: int, *, after: float = 0.0) -> None:
        """Tells the others that this process ends by itself, and why; they end with the same exit code. Without others,
        the guard has ended.

        It waits `after` seconds before that: if all processes meet the same error, they all call this within the wait,
        and none ends because of another.
        """
        if self._count == 1:
            self.done()
        elif self.guardian is not None:
            self._leaving = True
            self._channel.send(leaving=True)  # before the wait: another's verdict may come within it
            time.sleep(after)
            self._channel.send(left=redact(reason)[:300], code=code)

    def done(self) -> None:
        """Waits until every process has come here, and ends the guard; collective."""
        if self.guardian is None:
            return
        self._channel.send(done=True)
        self._ended.wait()
        with self.guardian:  # closes the pipes and waits for its end
            self.guardian = None

    def verdict_within(self, seconds: float) -> str | None:
        """The verdict, if there is one or one comes within the time; for the handler of an error.

        An error of a collective is mostly another process's failure, and this tells before a traceback is printed. If
        it returns a verdict (already printed, by one process for each launcher), the caller has `guardian.KILL_AFTER`
        seconds to end with `exit_code`. A death is known at once, a network that is gone after `peer_timeout`.
        """
        if self.guardian is None or self._count == 1:
            return None
        with self._lock:
            self._asked = True
        self._judged.wait(seconds)
        with self._lock:
            self._asked = False
            return self._verdict

    def _watch(self, guardian: subprocess.Popen[bytes]) -> None:
        """The guard's thread: sends signs of life to the guardian, and brings its verdict to this process."""
        poll = select.poll()
        poll.register(self._channel.reading, select.POLLIN)
        heard = woken = beaten = time.monotonic()
        while True:
            events = poll.poll(self._interval * 1000)
            now = time.monotonic()
            if events or now - woken > PAUSE * self._interval:  # this process itself was held up
                heard = now
            woken = now
            lines = self._channel.receive() if events else []
            if lines is None:
                self._conclude(f"the guardian of process {self._rank} died", speaks=True)
                return
            for line in lines:
                if "verdict" in line:
                    self._conclude(line["verdict"], line["code"], speaks=line["speaks"])
                    return
                if "end" in line:
                    self._ended.set()
                    return
                if "ready" in line:
                    self._ready.set()
            if now - heard > self._peer_timeout:
                guardian.kill()  # it may be stopped
                self._conclude(f"the guardian of process {self._rank} has not been heard of", speaks=True)
                return
            if now - beaten >= self._interval:
                beaten = now
                self._channel.send(beat=True)

    def _conclude(self, verdict: str, code: int | None = None, *, speaks: bool) -> None:
        """Ends this process, unless its main thread is about to, because of the verdict or for a reason of its own."""
        with self._lock:
            self._verdict = verdict if code is not None else f"{verdict}; {REMEDY}"
            self.exit_code = EXIT_PEER_LOST if code is None else code
            ends = not self._asked and not self._leaving
        if speaks and not self._leaving:
            say("train", self._verdict)
            self._channel.send(told=True)
        self._judged.set()
        self._ready.set()  # nobody is to be waited for
        if ends:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(self.exit_code)


def _listener(backlog: int) -> socket.socket:
    """A socket that listens on a free port of all interfaces, of IPv6 and IPv4 if the machine has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)
