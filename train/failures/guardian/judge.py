"""The guardian of process 0, which hears all others and judges."""

import contextlib
import hmac
import mmap
import selectors
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from train.failures.guardian.channel import PAUSE, START, Channel
from train.failures.guardian.guardian import Guardian, duration, is_stopped, position

STRANGER_TIMEOUT = 10.0
"""Seconds after which a connection that has not introduced itself is dropped."""

LINGER = 2.0
"""How many seconds the hub waits for the others to read its last word."""


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
    """For how many seconds, at that time, the process had given its guardian no sign of life."""
    standing: float = 0.0
    """For how many seconds, at that time, its main thread had been in the same phase."""
    step: int = START
    moves: int = 0
    phase: str = "starting"
    disk: str = ""
    """The path for which it waits for a disk, if it does."""
    done: bool = False

    @property
    def position(self) -> str:
        """Where it was last, in words."""
        return position(self.step, self.phase, self.host)


def ranks_in_words(ranks: list[int]) -> str:
    """Some processes in words: "process 1 has", "processes 1 and 2 have"; if there are many, the first eight."""
    if len(ranks) == 1:
        return f"process {ranks[0]} has"
    names = [str(rank) for rank in ranks]
    if len(names) > 8:
        names[8:] = [f"{len(names) - 8} more"]
    return f"processes {', '.join(names[:-1])} and {names[-1]} have"


class Hub(Guardian):
    """The guardian of process 0, to which the others are connected, and which judges."""

    def __init__(self, setup: dict[str, Any], trainer: Channel, page: mmap.mmap, listener: socket.socket):
        """`listener` takes the connections of the others."""
        super().__init__(setup, trainer, page)
        self.count: int = setup["count"]
        self.stall_timeout: float = setup["stall_timeout"]
        self.disk_timeout: float = setup["disk_timeout"]
        self.listener = listener
        self.strangers: dict[socket.socket, float] = {}
        self.started = self.now
        self.own = self.member(setup, None, None)
        self.members = {0: self.own}
        if self.ready:  # it is a run of one process
            listener.close()
            return
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
        """Takes a new connection; whose it is is not known yet."""
        with contextlib.suppress(OSError):
            stranger, _ = self.listener.accept()
            channel = Channel(stranger.fileno(), stranger.fileno())
            self.strangers[stranger] = self.now
            self.selector.register(stranger, selectors.EVENT_READ, lambda: self.hear_stranger(stranger, channel))

    def hear_stranger(self, stranger: socket.socket, channel: Channel) -> None:
        """Admits a guardian of this run, which knows the token, and drops any other connection."""
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
        """Closes a connection that is no guardian's."""
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
        """Takes what another guardian says."""
        assert member.channel is not None and member.socket is not None
        lines = member.channel.receive()
        if lines is None:
            self.selector.unregister(member.socket)
            if not member.done:
                lost = f"the connection to process {member.rank} was lost (its machine or its guardian is gone)"
                self.conclude([member], f"{lost}; it was last in {member.position}")
        for line in lines or []:
            self.hear(member, line)

    def hear(self, member: Member, line: dict[str, Any]) -> None:
        """Takes in how a process is, and what happened to it."""
        member.heard = self.now
        for name in ("silent", "standing", "step", "moves", "phase", "disk"):
            setattr(member, name, line[name])
        if "died" in line:
            # A process that is not its child has no exit code for it.
            whether = "the kernel's log there says whether memory ran out"
            self.conclude([member], f"process {member.rank} died in {member.position}; {whether}")
        if "hung" in line:
            waited = f"process {member.rank} has waited for a disk for {duration(self.disk_timeout)} ({line['hung']})"
            self.conclude([], f"{waited}; it was last in {member.position}")
        if "left" in line:
            reason = f"process {member.rank} left in {member.position}: {line['left']}"
            self.conclude([member], reason, line["code"])
        if "done" in line:
            member.done = True
            if self.ready and all(other.done for other in self.members.values()):
                self.tell_all(end=True)
                self.linger()

    def tick(self) -> None:
        if self.count == 1 and is_stopped(self.setup["pid"]):
            self.forgive(self.now)
        self.report()
        for stranger, since in list(self.strangers.items()):
            if self.now - since > STRANGER_TIMEOUT:
                self.drop(stranger)
        patience = self.setup["start_timeout"]
        if not self.ready and self.now - self.started > patience:
            missing = [rank for rank in range(self.count) if rank not in self.members]
            self.conclude([], f"{ranks_in_words(missing)} not come to the start within {duration(patience)}")
        self.find_silence()
        self.find_stall()
        speakers = self.speakers([self.own])
        for member in self.members.values():
            if member.channel is not None:
                member.channel.send(position=self.own.position, speaks=member.rank in speakers)

    def find_silence(self) -> None:
        """Looks for a process that gives no sign of life, or whose guardian gives none."""
        if self.count == 1:  # nobody waits for it
            return
        watched = [member for member in self.members.values() if not member.done]
        ages = {member.rank: self.now - member.heard + member.silent for member in watched}
        if max(ages.values(), default=0.0) <= self.peer_timeout:
            return
        # The processes of a machine fall silent together, though not to the millisecond.
        silent = [member for member in watched if ages[member.rank] > self.peer_timeout - 2 * self.interval]
        first = max(silent, key=lambda member: ages[member.rank])
        answers = self.now - first.heard < PAUSE * self.interval
        stuck = f"waiting for a disk: {first.disk}" if first.disk else "stopped, or stuck outside Python"
        cause = stuck if answers else "its machine or the network is gone"
        silence = f"not been heard of for {duration(self.peer_timeout)} ({cause})"
        ranks = sorted(member.rank for member in silent)
        last = "it" if len(ranks) == 1 else f"process {first.rank}"
        self.conclude(silent, f"{ranks_in_words(ranks)} {silence}; {last} was last in {first.position}")

    def find_stall(self) -> None:
        """Looks whether all processes live and none makes progress."""
        watched = [member for member in self.members.values() if not member.done]
        if not watched or min(m.standing + self.now - m.heard for m in watched) <= self.stall_timeout:
            return
        least = min((member.step, member.moves) for member in watched)
        behind = [member for member in watched if (member.step, member.moves) == least]
        ranks = sorted(member.rank for member in behind)
        who = f"{ranks_in_words(ranks)} come least far and {'is' if len(ranks) == 1 else 'are'}"
        if len(ranks) == self.count:
            who = "every process is" if self.count > 1 else "process 0 is"
        self.conclude([], f"nothing has moved for {duration(self.stall_timeout)}: {who} in {behind[0].position}")

    def speakers(self, lost: list[Member]) -> set[int]:
        """For each launcher one process; it tells the user what happened. A lost one speaks only if all are lost: a
        machine that was too busy to give signs of life may still print a line."""
        chosen: dict[str, int] = {}
        remaining = [member for member in self.members.values() if member not in lost] or list(self.members.values())
        for member in sorted(remaining, key=lambda member: (member.local_rank, member.rank)):
            chosen.setdefault(member.site, member.rank)
        return set(chosen.values())

    def conclude(self, lost: list[Member], verdict: str, code: int | None = None) -> NoReturn:
        """Ends the run; `code` is the exit code of a process that left by itself."""
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
