"""Real processes that die, stop, leave, stall and lose their network, each with its guardian."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.program import entry
from configs.program.errors import UserError
from train.failures.guard import EXIT_PEER_LOST, Address, Guard
from train.failures.guardian.channel import Channel
from train.failures.guardian.judge import Hub, Member

HANG = 60.0
"""Seconds after which something that should have happened is taken not to happen. Nothing depends on how fast it is."""

KILLED = -signal.SIGKILL

PROGRAM = """
import json, os, sys, threading, time
from train.failures.guard import Guard

rank, count, options = json.loads(sys.argv[1])
guard = Guard(rank, count, **options)
print(json.dumps(guard.listen()), flush=True)
address = json.loads(sys.stdin.readline())
guard.join(address and tuple(address))
print(guard.guardian.pid, flush=True)
moving = False

def leave(code=0):
    os._exit(code)  # as train/__main__.py does, without taking anything apart

def keep_moving():
    while moving:
        guard.at(6, "forward")
        time.sleep(0.05)

for line in sys.stdin:
    try:
        print(json.dumps(eval(line)), flush=True)
    except SystemExit as stop:
        leave(stop.code)
"""
"""A process of a run: does what it is told, a line of Python at a time."""


Options = dict[str, float | str]


class Trainer:
    """A process of a run, and its guardian."""

    def __init__(self, root: Path, rank: int, count: int, host: str, prefix: list[str], options: Options):
        self.rank = rank
        self.guardian = 0
        self.stderr = ""
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-W", "error", "-c", PROGRAM, json.dumps([rank, count, options])],
            cwd=root,
            env=os.environ | {"MASTER_ADDR": host, "LOCAL_RANK": "0" if prefix else str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tell(self, text: str) -> None:
        """Sends a line and does not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def answer(self) -> object:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"process {self.rank} ended: {self.end()}"
        return json.loads(line)

    def do(self, expression: str) -> object:
        """The value of an expression in the process."""
        self.tell(expression)
        return self.answer()

    def kill(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Exit code and all of stderr, when the process has ended by itself."""
        code = self.process.wait(HANG)
        assert self.process.stderr is not None
        self.stderr += self.process.stderr.read()
        return code, self.stderr


def is_gone(pid: int) -> bool:
    """Whether a process has ended; the zombie of an orphan is for the machine's init."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


class Run:
    """The processes of a run, all of them started and joined."""

    def __init__(self, root: Path, count: int, options: Options, *, host: str = "127.0.0.1", namespaces: list[str]):
        prefixes = [["ip", "netns", "exec", name] for name in namespaces] or [[]] * count
        self.trainers = [Trainer(root, rank, count, host, prefixes[rank], options) for rank in range(count)]
        self.meeting: Address | None = None

    def join(self, before_last: Callable[[Address], None] = lambda meeting: None) -> None:
        """Lets them find each other; `before_last` happens when all but the last are on their way."""
        meetings = [trainer.answer() for trainer in self.trainers]
        for trainer in self.trainers[:-1]:
            trainer.tell(json.dumps(meetings[0]))
        if meetings[0] is not None:  # else there is one alone
            port, token = meetings[0]  # type: ignore[misc]
            before_last((port, token))
        self.trainers[-1].tell(json.dumps(meetings[0]))
        for trainer in self.trainers:
            pid = trainer.answer()
            assert isinstance(pid, int)
            trainer.guardian = pid

    def ends(self) -> list[tuple[int, str]]:
        """Exit codes and stderr of all, none of which left an orphan."""
        found = [trainer.end() for trainer in self.trainers]
        deadline = time.monotonic() + HANG
        for trainer in self.trainers:
            while not is_gone(trainer.guardian):
                assert time.monotonic() < deadline, f"guardian {trainer.rank} is still there"
                time.sleep(0.05)
        return found

    def clean_up(self) -> None:
        """Ends whatever a failed test left; what this kills has not been waited for, so its number is its own."""
        for trainer in self.trainers:
            if trainer.process.poll() is None:
                trainer.kill(signal.SIGKILL)
            trainer.process.communicate()


Start = Callable[..., Run]


@pytest.fixture
def start(project_root: Path) -> Iterator[Start]:
    """start(count, peer_timeout=…, stall_timeout=…) starts a run and joins its processes."""
    runs = []

    def started(
        count: int,
        *,
        host: str = "127.0.0.1",
        namespaces: list[str] | None = None,
        before_last: Callable[[Address], None] = lambda meeting: None,
        **options: float | str,
    ) -> Run:
        run = Run(project_root, count, options, host=host, namespaces=namespaces or [])
        runs.append(run)
        run.join(before_last)
        return run

    yield started
    for run in runs:
        run.clean_up()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(start: Start, victim: int) -> None:
    run = start(3)
    for trainer in run.trainers:
        trainer.do("guard.at(7, 'backward')")
    run.trainers[victim].kill(signal.SIGKILL)
    ends = run.ends()
    assert [code for code, _ in ends] == [KILLED if rank == victim else EXIT_PEER_LOST for rank in range(3)]
    speaker = 1 if victim == 0 else 0
    died = f"train: process {victim} died in step 7 (backward) on {os.uname().nodename}; the kernel's log there says "
    assert ends[speaker][1].startswith(f"{died}whether memory ran out; launch it again")
    assert ends[speaker][1].count("\n") == 1
    assert [stderr for rank, (_, stderr) in enumerate(ends) if rank != speaker] == ["", ""]  # one line for a machine


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_found_and_killed(start: Start, victim: int) -> None:
    run = start(2, peer_timeout=3)
    for trainer in run.trainers:
        trainer.do("guard.at(7, 'forward')")
    run.trainers[victim].kill(signal.SIGSTOP)
    ends = run.ends()
    assert ends[victim][0] == KILLED
    code, stderr = ends[1 - victim]
    assert code == EXIT_PEER_LOST
    assert f"train: process {victim} has not been heard of for 3 s (stopped, " in stderr
    assert "it was last in step 7 (forward)" in stderr


def test_pauses_shorter_than_the_bound_are_forgiven(start: Start) -> None:
    run = start(2, peer_timeout=8)
    for _ in range(3):
        run.trainers[1].kill(signal.SIGSTOP)
        time.sleep(3)
        run.trainers[1].kill(signal.SIGCONT)
        run.trainers[1].do("time.sleep(1)")
    for trainer in run.trainers:
        trainer.tell("guard.done() or leave()")
    assert run.ends() == [(0, ""), (0, "")]


def test_a_machine_that_was_held_up_blames_nobody(start: Start) -> None:
    """As a suspended virtual machine: all processes and guardians stand still for longer than the bound."""
    run = start(2, peer_timeout=5, stall_timeout=5)
    everything = [pid for trainer in run.trainers for pid in (trainer.process.pid, trainer.guardian)]
    for pid in everything:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(8)
    for pid in everything:
        os.kill(pid, signal.SIGCONT)
    for trainer in run.trainers:
        trainer.do("time.sleep(1)")
        trainer.tell("guard.done() or leave()")
    assert run.ends() == [(0, ""), (0, "")]


def test_a_machine_that_comes_back_too_late_ends_too(start: Start) -> None:
    run = start(2, peer_timeout=3)
    held = (run.trainers[1].process.pid, run.trainers[1].guardian)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    code, stderr = run.trainers[0].end()
    assert code == EXIT_PEER_LOST
    assert "process 1 has not been heard of for 3 s (its machine or the network is gone)" in stderr
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    assert run.trainers[1].end()[0] == EXIT_PEER_LOST
    run.ends()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_clean_end_in_any_order(start: Start, order: tuple[int, ...]) -> None:
    run = start(3)
    for rank in order:
        run.trainers[rank].tell("guard.done() or leave()")
    for rank in order:
        assert run.trainers[rank].end() == (0, "")
    run.ends()


def test_death_of_one_that_is_done_is_no_failure(start: Start) -> None:
    run = start(3)
    for rank in (0, 1):
        run.trainers[rank].tell("guard.done() or leave()")
    time.sleep(1)
    run.trainers[1].kill(signal.SIGKILL)
    time.sleep(1)
    run.trainers[2].tell("guard.done() or leave()")
    assert run.ends() == [(0, ""), (KILLED, ""), (0, "")]


def test_an_end_without_done_is_a_failure(start: Start) -> None:
    run = start(2)
    run.trainers[1].tell("leave()")
    (code, stderr), other = run.ends()
    assert code == EXIT_PEER_LOST
    assert "process 1 died in its start (finding the others)" in stderr
    assert other == (0, "")


@pytest.mark.parametrize("leaver", [0, 1])
def test_who_leaves_says_why_and_the_others_end_with_the_same_code(start: Start, leaver: int) -> None:
    run = start(2)
    run.trainers[leaver].tell("guard.at(7, 'forward') or guard.leaving('out of memory', 5) or leave(5)")
    ends = run.ends()
    assert ends[leaver] == (5, "")
    code, stderr = ends[1 - leaver]
    assert code == 5  # not that of a lost process: to launch it again would not help
    assert stderr == f"train: process {leaver} left in step 7 (forward) on {os.uname().nodename}: out of memory\n"


def test_a_reason_is_told_without_secrets(start: Start) -> None:
    run = start(2)
    run.trainers[1].tell("guard.leaving('token hf_abcdefghijABCDEFGHIJ12345 was refused', 1) or sys.exit(1)")
    assert run.ends()[0][1].endswith(": token <secret> was refused\n")


def test_who_announces_that_it_leaves_and_hangs_is_killed(start: Start) -> None:
    run = start(2, peer_timeout=6)
    run.trainers[1].tell("guard.leaving('out of memory', 2) or time.sleep(600)")
    assert [code for code, _ in run.ends()] == [2, KILLED]


@pytest.mark.parametrize("first", [0, 1])
def test_a_mistake_that_all_find_is_the_code_of_all(start: Start, first: int) -> None:
    """Though the verdict comes before the later one has told its guardian why, and though it waits to end last."""
    run = start(2, peer_timeout=3)
    for trainer in run.trainers:
        trainer.do("globals().update(entry=__import__('configs.program.entry').program.entry)")
    for rank in (first, 1 - first):
        run.trainers[rank].tell("guard.leaving('a=1: no', 2, after=2) or entry.leave('train', 'a=1: no')")
        time.sleep(0.05)
    assert run.ends() == [(2, "train: a=1: no\n"), (2, "")]


def test_a_task_of_srun_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setattr(time, "sleep", pytest.fail)
    with pytest.raises(SystemExit) as stop:
        entry.leave("train", "a=1: no")
    assert stop.value.code == 2


def test_a_stall_names_who_is_behind(start: Start) -> None:
    run = start(3, stall_timeout=3)
    run.trainers[0].do("globals().update(moving=True) or threading.Thread(target=keep_moving, daemon=True).start()")
    run.trainers[1].do("guard.at(5, 'loading')")
    run.trainers[2].do("guard.at(6, 'loading')")
    time.sleep(5)  # one that moves is enough
    run.trainers[0].do("globals().update(moving=False)")
    ends = run.ends()
    assert [code for code, _ in ends] == [EXIT_PEER_LOST] * 3
    behind = f"process 1 has come least far and is in step 5 (loading) on {os.uname().nodename}"
    assert f"train: nothing has moved for 3 s: {behind}; " in ends[0][1]


def test_a_start_lasts_as_long_as_there_is_something_to_read(start: Start) -> None:
    """Three times the bound, by one process, while the others wait for it; then it reads no more, and is named."""
    run = start(3, stall_timeout=3)
    for trainer in run.trainers:
        trainer.do("guard.start('loading the base')")
    run.trainers[1].do(
        "globals().update(until=time.monotonic() + 9) or threading.Thread(target=lambda: [(open('/dev/zero', 'rb')"
        ".read(1 << 20), time.sleep(0.2)) for _ in iter(lambda: time.monotonic() < until, False)], daemon=True).start()"
    )
    time.sleep(8)
    run.trainers[0].do("1")
    run.trainers[1].do("guard.start('making the engine')")
    for rank in (0, 2):
        run.trainers[rank].do("guard.start('making the engine') or guard.start('finding the checkpoint')")
    ends = run.ends()
    assert [code for code, _ in ends] == [EXIT_PEER_LOST] * 3
    behind = f"process 1 has come least far and is in its start (making the engine) on {os.uname().nodename}"
    assert f"train: nothing has moved for 3 s: {behind}; " in ends[0][1]


READS = """
def read(path):
    with guard.disk(path), open(path, "rb", buffering=0) as pipe:
        while pipe.read(1):
            pass

def work(path):
    with guard.disk(path):
        while True:
            time.sleep(0.01)
            sum(range(10000))
"""
"""Reads a pipe, where one waits in the kernel as for a disk that hangs."""


@pytest.mark.parametrize(
    "thread",
    [
        "read({path!r})",
        "threading.Thread(target=read, args=({path!r},), daemon=True).start()",
        "threading.Thread(target=work, args=('another',), daemon=True).start() or time.sleep(0.2) or "
        "threading.Thread(target=read, args=({path!r},), daemon=True).start()",
    ],
    ids=["the main thread", "the thread that saves", "one beside it"],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_hangs_ends_the_run_and_is_named(start: Start, tmp_path: Path, victim: int, thread: str) -> None:
    path = tmp_path / "checkpoint"
    os.mkfifo(path)
    run = start(2, disk_timeout=3)
    for trainer in run.trainers:
        trainer.do("guard.at(7, 'saving')")
    run.trainers[victim].do(f"exec({READS!r}, globals())")
    run.trainers[victim].tell(thread.format(path=str(path)))
    ends = run.ends()
    assert [code for code, _ in ends] == [EXIT_PEER_LOST] * 2
    where = f"it was last in step 7 (saving) on {os.uname().nodename}"
    said = f"train: process {victim} has waited for a disk for 3 s ({path}); {where}; launch it again"
    assert ends[0][1].startswith(said)


def test_a_disk_that_hangs_in_the_start_is_named_though_helpers_read(start: Start, tmp_path: Path) -> None:
    """The main thread waits for one that reads. While that reads, it is no hang."""
    path = tmp_path / "base"
    os.mkfifo(path)
    run = start(2, disk_timeout=3)
    run.trainers[1].do("guard.start('loading the base')")
    run.trainers[1].do(f"globals().update(held=guard.disk({str(path)!r})) or held.__enter__()")
    run.trainers[1].do(f"threading.Thread(target=lambda: open({str(path)!r}, 'rb').read(), daemon=True).start()")
    with path.open("wb", buffering=0) as pipe:
        for _ in range(8):
            time.sleep(1)
            pipe.write(b"." * (1 << 15))
        run.trainers[0].do("1")  # it took more than twice the bound
        ends = run.ends()
    assert [code for code, _ in ends] == [EXIT_PEER_LOST] * 2
    said = f"train: process 1 has waited for a disk for 3 s ({path}); it was last in its start (loading the base) on "
    assert ends[0][1].startswith(said)


def test_a_disk_that_is_slow_ends_nothing(start: Start, tmp_path: Path) -> None:
    """It takes three times the bound, in which a byte comes now and then."""
    path = tmp_path / "checkpoint"
    os.mkfifo(path)
    run = start(2, disk_timeout=3)
    run.trainers[1].do(f"exec({READS!r}, globals())")
    run.trainers[1].do(f"threading.Thread(target=read, args=({str(path)!r},), daemon=True).start()")
    with path.open("wb", buffering=0) as pipe:
        for _ in range(9):
            time.sleep(1)
            pipe.write(b".")
            run.trainers[0].do("guard.at(8, 'forward')")
        for trainer in run.trainers:
            trainer.tell("guard.done() or leave()")
        assert run.ends() == [(0, ""), (0, "")]


def test_who_cannot_say_it_has_it_said(start: Start, tmp_path: Path) -> None:
    """Process 0 speaks for its launcher, and waits for a disk with Python's lock held."""
    run = start(2, disk_timeout=3)
    run.trainers[0].do("globals().update(libc=__import__('ctypes').PyDLL(None))")
    run.trainers[0].do(f"guard.at(7, 'saving') or globals().update(held=guard.disk({str(tmp_path)!r}))")
    run.trainers[0].tell("held.__enter__() or libc.pause()")
    ends = run.ends()
    assert [code for code, _ in ends] == [KILLED, EXIT_PEER_LOST]
    where = f"it was last in step 7 (saving) on {os.uname().nodename}"
    said = f"train: process 0 has waited for a disk for 3 s ({tmp_path}); {where}; launch it again"
    assert ends[0][1].startswith(said)
    assert [stderr.count("\n") for _, stderr in ends] == [1, 0]


def test_a_disk_that_hangs_while_nothing_else_can_run_is_named_too(start: Start, tmp_path: Path) -> None:
    """A page of a mapped file is waited for with Python's lock held: the process looks like a stopped one."""
    run = start(2, peer_timeout=3)
    run.trainers[1].do(f"globals().update(held=guard.disk({str(tmp_path)!r})) or held.__enter__()")
    run.trainers[1].kill(signal.SIGSTOP)
    assert f"has not been heard of for 3 s (waiting for a disk: {tmp_path})" in run.trainers[0].end()[1]
    run.ends()


def test_a_handler_of_an_error_learns_the_verdict(start: Start) -> None:
    run = start(3)
    assert run.trainers[0].do("guard.verdict_within(0.1)") is None
    run.trainers[0].tell("guard.verdict_within(60)")
    time.sleep(0.5)
    run.trainers[1].kill(signal.SIGKILL)
    verdict = run.trainers[0].answer()
    assert isinstance(verdict, str)
    assert verdict.startswith("process 1 died in its start (finding the others)")
    run.trainers[0].tell("os._exit(9)")
    assert [code for code, _ in run.ends()] == [9, KILLED, EXIT_PEER_LOST]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_guardian_ends_the_run(start: Start, victim: int, number: int) -> None:
    run = start(2, peer_timeout=3)
    os.kill(run.trainers[victim].guardian, number)
    ends = run.ends()
    assert [code for code, _ in ends] == [EXIT_PEER_LOST, EXIT_PEER_LOST]
    assert f"process {victim} " in ends[1 - victim][1]


def test_what_a_killed_process_leaves_behind_goes_with_its_guardian(start: Start, tmp_path: Path) -> None:
    buffer = tmp_path / "buffer"
    buffer.touch()
    run = start(2, peer_timeout=HANG, forgets=str(buffer))
    assert buffer.exists()
    for trainer in run.trainers:
        trainer.kill(signal.SIGKILL)
    assert [code for code, _ in run.ends()] == [KILLED, KILLED]
    assert not buffer.exists()


def test_signals_to_the_whole_group_leave_guardians_alone(start: Start) -> None:
    run = start(2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        for trainer in run.trainers:
            os.kill(trainer.guardian, number)
    for trainer in run.trainers:
        trainer.do("time.sleep(1)")
        assert not is_gone(trainer.guardian)
        trainer.tell("guard.done() or leave()")
    assert run.ends() == [(0, ""), (0, "")]


def test_a_child_that_outlives_its_process_hides_nothing(start: Start) -> None:
    """A forked child, such as a worker that loads data, holds the guardian's pipe open."""
    run = start(2)
    child = run.trainers[1].do("os.fork() or time.sleep(600)")
    assert isinstance(child, int)
    run.trainers[1].kill(signal.SIGKILL)
    assert run.trainers[0].end()[0] == EXIT_PEER_LOST
    os.kill(child, signal.SIGKILL)
    run.ends()


def test_no_guardian_outlives_its_process(start: Start) -> None:
    run = start(3)
    for trainer in run.trainers:
        trainer.kill(signal.SIGSTOP)  # or the last might leave by itself, told of the first
    for trainer in run.trainers:
        trainer.kill(signal.SIGKILL)
    assert [code for code, _ in run.ends()] == [KILLED] * 3


def test_strangers_are_dropped(start: Start) -> None:
    with contextlib.ExitStack() as open_sockets:

        def visit(meeting: Address) -> None:
            about = {"rank": 1, "local_rank": 1, "host": "h", "site": "s"}
            for said in (
                b"GET / HTTP/1.1\r\n\r\n",
                b"\xff\x00\n",
                b"5\n",
                b"[" * 10_000 + b"\n",
                b"x" * 200_000,
                json.dumps(about).encode() + b"\n",
                json.dumps(about | {"token": "ü"}).encode() + b"\n",
                json.dumps(about | {"token": "0" * 32}).encode() + b"\n",
                json.dumps(about | {"token": meeting[1], "rank": 0}).encode() + b"\n",  # is there already
            ):
                stranger = socket.create_connection(("127.0.0.1", meeting[0]), timeout=HANG)
                with stranger, contextlib.suppress(ConnectionError):
                    stranger.sendall(said)
                    assert stranger.recv(1) == b"", said
            for said in (b"", b"{"):  # these keep silent
                silent = open_sockets.enter_context(socket.create_connection(("127.0.0.1", meeting[0]), timeout=HANG))
                silent.sendall(said)

        run = start(2, before_last=visit)
        for trainer in run.trainers:
            trainer.tell("guard.done() or leave()")
        assert run.ends() == [(0, ""), (0, "")]


def test_both_sides_of_a_broken_link_end(start: Start) -> None:
    here, there = names = [f"guard{os.getpid()}{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", here, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", there)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', error)}")
        for name, address in zip(names, ("10.213.7.1", "10.213.7.2"), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
        run = start(2, host="10.213.7.1", namespaces=names, peer_timeout=3)
        for trainer in run.trainers:
            trainer.do("guard.at(7, 'forward')")
            trainer.do("time.sleep(1)")
        ip("-n", there, "link", "set", "veth0", "down")
        for rank, (code, stderr) in enumerate(run.ends()):
            assert code == EXIT_PEER_LOST
            lost = f"process {1 - rank} has not been heard of for 3 s (its machine or the network is gone)"
            assert f"train: {lost}; it was last in step 7 (forward)" in stderr
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_a_port_that_cannot_be_reached_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=rf"MASTER_ADDR=127.0.0.1: process 1 can't reach port {port} .*refused"):
        Guard(1, 2).join((port, "token"), "127.0.0.1")


@pytest.mark.parametrize("end", ["done()", "leaving('why not', 1, after=60)"])
def test_one_process_alone_waits_for_nobody(start: Start, end: str) -> None:
    run = start(1)
    assert run.trainers[0].do("guard.verdict_within(60)") is None
    run.trainers[0].do(f"guard.{end}")
    assert run.trainers[0].do("guard.guardian") is None
    run.trainers[0].tell("guard.done() or leave()")
    assert run.ends() == [(0, "")]


def test_one_process_alone_is_ended_by_a_disk_that_hangs(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    os.mkfifo(path)
    run = start(1, disk_timeout=3)
    run.trainers[0].do(f"guard.at(7, 'saving') or exec({READS!r}, globals())")
    run.trainers[0].tell(f"read({str(path)!r})")
    ((code, said),) = run.ends()
    where = f"it was last in step 7 (saving) on {os.uname().nodename}"
    assert code == EXIT_PEER_LOST
    assert said.startswith(f"train: process 0 has waited for a disk for 3 s ({path}); {where}; launch it again")


def test_one_process_alone_may_be_stopped_and_let_go_on_but_not_stall(start: Start, tmp_path: Path) -> None:
    run = start(1, peer_timeout=2, stall_timeout=4, disk_timeout=4)
    run.trainers[0].do(f"guard.at(7, 'forward') or globals().update(held=guard.disk({str(tmp_path)!r}))")
    run.trainers[0].do("held.__enter__()")
    run.trainers[0].kill(signal.SIGSTOP)
    time.sleep(6)
    run.trainers[0].kill(signal.SIGCONT)
    run.trainers[0].do("held.__exit__(None, None, None)")
    ((code, said),) = run.ends()
    assert code == EXIT_PEER_LOST
    where = f"process 0 is in step 7 (forward) on {os.uname().nodename}"
    assert said.startswith(f"train: nothing has moved for 4 s: {where}; launch it again")


def test_one_process_alone_that_is_killed_leaves_no_guardian(start: Start) -> None:
    run = start(1)
    run.trainers[0].kill(signal.SIGKILL)
    assert run.ends() == [(KILLED, "")]


def test_a_full_socket_takes_whole_lines_or_none() -> None:
    """Another guardian may read late. That a socket got full within a line is no reason to take it for a stranger."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    with ours, theirs:
        theirs.setblocking(False)
        sending, receiving = Channel(ours.fileno(), ours.fileno()), Channel(theirs.fileno(), theirs.fileno())
        numbers: list[int] = []
        for number in range(20_000):
            sending.send(number=number, filling="." * 701)
        while not numbers or numbers[-1] != 20_000:
            lines = receiving.receive()
            assert lines is not None, f"after line {numbers[-1]}: not lines of JSON"
            numbers += [line["number"] for line in lines]
            sending.send(number=20_000)
        assert numbers == sorted(numbers)
        assert numbers[0] == 0
        assert 19_999 not in numbers  # it was full


@pytest.mark.parametrize(("lost", "speaking"), [([1], {0, 2}), ([0, 1], {2}), ([0, 1, 2, 3], {0, 2})])
def test_one_process_of_each_launcher_speaks_also_if_all_are_lost(lost: list[int], speaking: set[int]) -> None:
    """All fall silent at once on a machine that is too busy: then a lost one says so, or nobody would."""
    members = {
        rank: Member(rank, rank % 2, f"host{rank // 2}", f"launcher{rank // 2}", None, None, heard=0.0)
        for rank in range(4)
    }
    hub = types.SimpleNamespace(members=members)
    assert Hub.speakers(hub, [members[rank] for rank in lost]) == speaking  # type: ignore[arg-type]


def test_the_line_names_the_machine_of_the_process_that_was_lost() -> None:
    """Real launches of the tests and tortures have all their processes on machines of one name."""
    members = {rank: Member(rank, 0, f"host{rank}", "launcher", None, None, heard=10.0) for rank in range(3)}
    members[2].heard, members[2].step, members[2].phase = 0.0, 7, "backward"
    said: list[str] = []

    def conclude(lost: list[Member], verdict: str, code: int | None = None) -> None:
        said.append(verdict)

    hub = types.SimpleNamespace(now=10.0, count=3, members=members, peer_timeout=5.0, interval=1.0, conclude=conclude)
    Hub.find_silence(hub)  # type: ignore[arg-type]
    state = {"silent": 0.0, "standing": 0.0, "step": 3, "moves": 1, "phase": "forward", "disk": ""}
    Hub.hear(hub, members[1], state | {"died": True})  # type: ignore[arg-type]
    assert "process 2 has" in said[0]
    assert said[0].endswith("was last in step 7 (backward) on host2")
    assert said[1].startswith("process 1 died in step 3 (forward) on host1; ")
