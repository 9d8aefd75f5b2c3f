"""The guard beside each training process: a small program that outlives what happens to the process it watches.

`train/guard.py` starts one as a child of each training process and talks with it through two pipes. The guardian of
process 0 is the hub: the others are connected to it, tell it how their processes are, and hear its verdict.

    process 0 ── guardian 0 (hub) ──┬── guardian 1 ── process 1
                                    └── guardian 2 ── process 2

A verdict ends the run: every guardian gives it to its process, which leaves with the exit code that the verdict holds,
and kills the process if it does not. A
guardian that hears nothing from the hub for `peer_timeout` reaches the verdict alone, so both sides of a broken link
end. Durations are measured on one machine's monotonic clock each; no clock is compared with another machine's.

It imports the standard library alone and is started without site-packages, so that it is there in a few hundredths of a
second and takes 18 MB.
"""

import contextlib
import hmac
import json
import mmap
import os
import select
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

PLACE = struct.Struct("<qqd32s")
"""What the training process writes into the shared page: step, moves within the step, since when, phase."""

KILL_AFTER = 5.0
"""Seconds that a training process has for leaving after the verdict; then it is killed."""

LEAVE_WITHIN = 20.0
"""Seconds that it has at least where it leaves for a reason of its own: to say it, and for the waits of
`train.failures.UNISON` and `configs.entry.leave`."""

JOIN_TIMEOUT = 30.0
"""Seconds for which the hub waits for the others to connect, or `peer_timeout` if that is longer."""

STRANGER_TIMEOUT = 10.0
"""Seconds after which a connection that has not said who it is is dropped."""

LINGER = 2.0
"""Seconds for which the hub waits until the others have read its last word."""

PAUSE = 5
"""A guardian that slept for so many beat intervals was itself held up: what it did not hear, nobody failed to say."""

LONGEST_LINE = 1 << 16


def beat_interval(peer_timeout: float) -> float:
    """Seconds between two signs of life."""
    return min(1.0, peer_timeout / 10)


class Channel:
    """Lines of JSON over file descriptors; sending never blocks."""

    def __init__(self, reading: int, writing: int):
        """Reads from one descriptor, writes to the other; they may be the same socket."""
        self.reading = reading
        self._writing = writing
        self._rest = b""
        self._unsent = b""
        """Of the last line, what a full socket did not take."""
        os.set_blocking(writing, False)

    def send(self, **fields: object) -> None:
        """One line, or nothing of it. What can't be written is lost: that the other side is gone shows in reading."""
        line = json.dumps(fields).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._unsent = self._unsent[os.write(self._writing, self._unsent) :] if self._unsent else b""
            if not self._unsent:
                self._unsent = line[os.write(self._writing, line) :]

    def receive(self) -> list[dict[str, Any]] | None:
        """The lines that have come; None at the end, and where the other side does not speak in lines of JSON."""
        try:
            data = os.read(self.reading, LONGEST_LINE)
            *lines, self._rest = (self._rest + data).split(b"\n")
            parsed = [json.loads(line) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError, RecursionError):
            return None
        understood = all(isinstance(fields, dict) for fields in parsed) and len(self._rest) <= LONGEST_LINE
        return parsed if data and understood else None


@dataclass(slots=True)
class Member:
    """A training process as the hub knows it."""

    rank: int
    local_rank: int
    host: str
    site: str
    """Processes with the same one were started by the same launcher and write to the same terminal."""
    socket: socket.socket | None
    """The connection to its guardian; None for the hub's own process."""
    channel: Channel | None
    heard: float
    """When its guardian last said something, on the hub's clock."""
    silent: float = 0.0
    """For how long the process had given its guardian no sign of life then."""
    standing: float = 0.0
    """For how long its main thread had been at the same place then."""
    step: int = 0
    moves: int = 0
    phase: str = "starting"
    done: bool = False

    @property
    def place(self) -> str:
        """Where it was last, in words."""
        return place(self.step, self.phase, self.host)


def place(step: int, phase: str, host: str) -> str:
    """Step, phase and machine in words."""
    return f"step {step} ({phase}) on {host}"


def duration(seconds: float) -> str:
    """A timeout in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def processes(ranks: list[int]) -> str:
    """Some processes in words: "process 1 has", "processes 1 and 2 have", of many the first eight."""
    if len(ranks) == 1:
        return f"process {ranks[0]} has"
    names = [str(rank) for rank in ranks]
    if len(names) > 8:
        names[8:] = [f"{len(names) - 8} more"]
    return f"processes {', '.join(names[:-1])} and {names[-1]} have"


class Guardian:
    """What every guardian does: it watches its own process, and ends it when there is a verdict."""

    def __init__(self, setup: dict[str, Any], trainer: Channel, page: mmap.mmap):
        """`setup` is what `train.guard.Guard.join` sends."""
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
        self.selector = selectors.DefaultSelector()
        self.selector.register(trainer.reading, selectors.EVENT_READ, self.hear_trainer)
        self.now = self.trainer_heard = time.monotonic()

    def run(self) -> NoReturn:
        """Until the run ends."""
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
                self.tick()

    def forgive(self, now: float) -> None:
        """Starts every wait anew."""
        self.trainer_heard = now

    def tick(self) -> None:
        """Once in a beat interval."""
        raise NotImplementedError

    def report(self, **events: object) -> None:
        """Tells the hub how this process is, and what happened to it."""
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """How this process is."""
        step, moves, since, phase = PLACE.unpack_from(self.page)
        return {
            "silent": self.now - self.trainer_heard,
            "standing": self.now - since,
            "step": step,
            "moves": moves,
            "phase": phase.rstrip(b"\0").decode(errors="replace"),
        }

    def hear_trainer(self) -> None:
        """What the training process says."""
        lines = self.trainer.receive()
        if lines is None:
            self.trainer_gone()
            return
        self.trainer_heard = self.now
        for line in lines:
            self.leaving |= "leaving" in line
            if "done" in line or "left" in line:
                self.parting = True
                self.report(**line)

    def trainer_gone(self) -> None:
        """The training process has ended; the guardian stays until the others know."""
        if self.gone:
            return
        self.gone = True
        self.selector.unregister(self.trainer.reading)
        if not self.parting:
            self.report(died=True)

    def trainer_lives(self) -> bool:
        """Whether the training process is still the parent of this one: its number is then nobody else's."""
        return os.getppid() == self.setup["pid"]

    def end_trainer(self, verdict: str, code: int | None, speaks: bool) -> None:
        """Gives the training process the verdict and time to leave, and kills it if it does not.

        A process that leaves for a reason of its own has longer.
        """
        self.trainer.send(verdict=verdict, code=code, speaks=speaks)
        since, own = time.monotonic(), max(self.peer_timeout, LEAVE_WITHIN)
        while self.trainer_lives() and time.monotonic() - since < (own if self.leaving else KILL_AFTER):
            time.sleep(0.02)
            if select.select([self.trainer.reading], [], [], 0)[0]:  # it may have met its error just now
                self.leaving |= any("leaving" in line for line in self.trainer.receive() or [])
        if self.trainer_lives():
            with contextlib.suppress(ProcessLookupError):
                if self.pidfd is not None:
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                else:
                    os.kill(self.setup["pid"], signal.SIGKILL)


class Spoke(Guardian):
    """The guardian of another process than 0."""

    def __init__(self, setup: dict[str, Any], trainer: Channel, page: mmap.mmap, connection: socket.socket):
        """`connection` leads to the hub."""
        super().__init__(setup, trainer, page)
        self.connection = connection  # which closes when nothing holds it
        self.hub = Channel(connection.fileno(), connection.fileno())
        self.hub_heard = self.now
        self.hub_place = "its start"
        self.speaks = True
        self.selector.register(connection, selectors.EVENT_READ, self.hear_hub)
        about = {key: setup[key] for key in ("token", "rank", "local_rank", "host", "site")}
        self.hub.send(**about)

    def forgive(self, now: float) -> None:
        super().forgive(now)
        self.hub_heard = now

    def report(self, **events: object) -> None:
        self.hub.send(**self.status(), **events)

    def tick(self) -> None:
        self.report()
        if self.now - self.hub_heard > self.peer_timeout:
            silence = f"process 0 has not been heard of for {duration(self.peer_timeout)}"
            self.end(f"{silence} (its machine or the network is gone); it was last in {self.hub_place}")

    def hear_hub(self) -> None:
        """What the hub says."""
        lines = self.hub.receive()
        if lines is None:
            lost = "the connection to process 0 was lost (its machine or its guardian is gone)"
            self.end(f"{lost}; it was last in {self.hub_place}")
        self.hub_heard = self.now
        for line in lines:
            if "place" in line:
                self.hub_place, self.speaks = line["place"], line["speaks"]
            elif "ready" in line:
                self.trainer.send(ready=True)
            elif "end" in line:
                self.trainer.send(end=True)
                sys.exit()
            elif "verdict" in line:
                self.speaks = line["speaks"]
                self.end(line["verdict"], line["code"])

    def end(self, verdict: str, code: int | None = None) -> NoReturn:
        """Ends the training process and this one."""
        self.end_trainer(verdict, code, self.speaks)
        sys.exit()


class Hub(Guardian):
    """The guardian of process 0, to which the others are connected; the one that judges."""

    def __init__(self, setup: dict[str, Any], trainer: Channel, page: mmap.mmap, listener: socket.socket):
        """`listener` takes the connections of the others."""
        super().__init__(setup, trainer, page)
        self.count: int = setup["count"]
        self.stall_timeout: float = setup["stall_timeout"]
        self.listener = listener
        self.strangers: dict[socket.socket, float] = {}
        self.started = self.now
        self.own = self.member(setup, None, None)
        self.members = {0: self.own}
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ, self.accept)

    @property
    def ready(self) -> bool:
        """Whether the guardian of every process has connected."""
        return len(self.members) == self.count

    def member(self, about: dict[str, Any], connection: socket.socket | None, channel: Channel | None) -> Member:
        """The process that `about` describes."""
        return Member(
            about["rank"], about["local_rank"], about["host"], about["site"], connection, channel, heard=self.now
        )

    def accept(self) -> None:
        """A new connection, of whom is not known yet."""
        with contextlib.suppress(OSError):
            stranger, _ = self.listener.accept()
            channel = Channel(stranger.fileno(), stranger.fileno())
            self.strangers[stranger] = self.now
            self.selector.register(stranger, selectors.EVENT_READ, lambda: self.hear_stranger(stranger, channel))

    def hear_stranger(self, stranger: socket.socket, channel: Channel) -> None:
        """Takes a guardian of this run, which knows the token, for what it is, and drops all else."""
        if stranger not in self.strangers:  # dropped since this event was seen
            return
        lines = channel.receive()
        if lines == []:
            return
        about, *more = lines or [{}]
        token = str(about.get("token")).encode(errors="replace")
        if not hmac.compare_digest(token, self.setup["token"].encode()) or about["rank"] in self.members:
            self.drop(stranger)
            return
        del self.strangers[stranger]
        member = self.members[about["rank"]] = self.member(about, stranger, channel)
        self.selector.modify(stranger, selectors.EVENT_READ, lambda: self.hear_member(member))
        if self.ready:
            self.selector.unregister(self.listener)
            self.listener.close()
            for other in list(self.strangers):
                self.drop(other)
            self.forgive(self.now)
            self.tell_all(ready=True)
        for line in more:
            self.hear(member, line)

    def drop(self, stranger: socket.socket) -> None:
        """Closes a connection that is nobody's."""
        del self.strangers[stranger]
        self.selector.unregister(stranger)
        stranger.close()

    def tell_all(self, **fields: object) -> None:
        """Says something to every guardian, and to the training process beside this one."""
        for member in self.members.values():
            (member.channel or self.trainer).send(**fields)

    def forgive(self, now: float) -> None:
        super().forgive(now)
        for member in self.members.values():
            member.heard = now

    def report(self, **events: object) -> None:
        self.hear(self.own, {**self.status(), **events})

    def hear_member(self, member: Member) -> None:
        """What another guardian says."""
        assert member.channel is not None and member.socket is not None
        lines = member.channel.receive()
        if lines is None:
            self.selector.unregister(member.socket)
            if not member.done:
                lost = f"the connection to process {member.rank} was lost (its machine or its guardian is gone)"
                self.conclude([member], f"{lost}; it was last in {member.place}")
        for line in lines or []:
            self.hear(member, line)

    def hear(self, member: Member, line: dict[str, Any]) -> None:
        """How a process is, and what happened to it."""
        member.heard = self.now
        for name in ("silent", "standing", "step", "moves", "phase"):
            setattr(member, name, line[name])
        if "died" in line:
            # A process that is not its child has no exit code for it.
            whether = "the kernel's log there says whether memory ran out"
            self.conclude([member], f"process {member.rank} died in {member.place}; {whether}")
        if "left" in line:
            reason = f"process {member.rank} left in {member.place}: {line['left']}"
            self.conclude([member], reason, line["code"])
        if "done" in line:
            member.done = True
            if self.ready and all(other.done for other in self.members.values()):
                self.tell_all(end=True)
                self.linger()

    def tick(self) -> None:
        self.report()
        for stranger, since in list(self.strangers.items()):
            if self.now - since > STRANGER_TIMEOUT:
                self.drop(stranger)
        patience = max(JOIN_TIMEOUT, self.peer_timeout)
        if not self.ready and self.now - self.started > patience:
            missing = [rank for rank in range(self.count) if rank not in self.members]
            self.conclude([], f"{processes(missing)} not joined the guard within {duration(patience)}")
        self.find_silence()
        self.find_stall()
        speakers = self.speakers([self.own])
        for member in self.members.values():
            if member.channel is not None:
                member.channel.send(place=self.own.place, speaks=member.rank in speakers)

    def find_silence(self) -> None:
        """A process that gives no sign of life, or whose guardian gives none."""
        watched = [member for member in self.members.values() if not member.done]
        ages = {member.rank: self.now - member.heard + member.silent for member in watched}
        if max(ages.values(), default=0.0) <= self.peer_timeout:
            return
        # The processes of a machine fall silent together, though not to the millisecond.
        silent = [member for member in watched if ages[member.rank] > self.peer_timeout - 2 * self.interval]
        first = max(silent, key=lambda member: ages[member.rank])
        answers = self.now - first.heard < PAUSE * self.interval
        cause = "stopped, or stuck outside Python" if answers else "its machine or the network is gone"
        silence = f"not been heard of for {duration(self.peer_timeout)} ({cause})"
        ranks = sorted(member.rank for member in silent)
        last = "it" if len(ranks) == 1 else f"process {first.rank}"
        self.conclude(silent, f"{processes(ranks)} {silence}; {last} was last in {first.place}")

    def find_stall(self) -> None:
        """All processes live, and none gets on."""
        watched = [member for member in self.members.values() if not member.done]
        if not watched or min(m.standing + self.now - m.heard for m in watched) <= self.stall_timeout:
            return
        least = min((member.step, member.moves) for member in watched)
        behind = [member for member in watched if (member.step, member.moves) == least]
        ranks = sorted(member.rank for member in behind)
        who = f"{processes(ranks)} come least far and {'is' if len(ranks) == 1 else 'are'}"
        if len(ranks) == self.count:
            who = "every process is"
        self.conclude([], f"nothing has moved for {duration(self.stall_timeout)}: {who} in {behind[0].place}")

    def speakers(self, lost: list[Member]) -> set[int]:
        """One process for each launcher, not of the lost ones: it says to the user what happened."""
        chosen: dict[str, int] = {}
        for member in sorted(self.members.values(), key=lambda member: (member.local_rank, member.rank)):
            if member not in lost:
                chosen.setdefault(member.site, member.rank)
        return set(chosen.values())

    def conclude(self, lost: list[Member], verdict: str, code: int | None = None) -> NoReturn:
        """Ends the run; the code is that of a process which left by itself."""
        speakers = self.speakers(lost)
        for member in self.members.values():
            if member.channel is not None:
                member.channel.send(verdict=verdict, code=code, speaks=member.rank in speakers)
        self.end_trainer(verdict, code, speaks=0 in speakers)
        self.linger()

    def linger(self) -> NoReturn:
        """Ends this process when the others have heard its last word: what is unread is lost when a socket closes."""
        deadline = time.monotonic() + LINGER
        waiting = [member for member in self.members.values() if member.socket is not None]
        while waiting and time.monotonic() < deadline:
            waiting = [member for member in waiting if member.channel and member.channel.receive() is not None]
            time.sleep(0.01)
        sys.exit()


def main() -> NoReturn:
    """The program: `guardian.py PAGE_FD SOCKET_FD`, its setup in the first line of stdin."""
    page_fd, socket_fd = (int(argument) for argument in sys.argv[1:])
    trainer = Channel(sys.stdin.fileno(), sys.stdout.fileno())
    lines: list[dict[str, Any]] | None = []
    while lines == []:
        lines = trainer.receive()
    if lines is None:
        sys.exit()
    page = mmap.mmap(page_fd, PLACE.size, access=mmap.ACCESS_READ)
    role: Callable[..., Guardian] = Hub if lines[0]["rank"] == 0 else Spoke
    role(lines[0], trainer, page, socket.socket(fileno=socket_fd)).run()


if __name__ == "__main__":
    main()
