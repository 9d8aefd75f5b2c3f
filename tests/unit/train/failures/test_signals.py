"""Signals, in processes of their own: asked once, asked twice, asked too early, out of patience."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from train.failures.signals import EXIT_PREEMPTED, TOGETHER

LIMIT = 60.0
"""Seconds after which a test gives up."""

PROGRAM = """
import sys, time
from train.failures.signals import Signals
signals = Signals(grace=float(sys.argv[1]))
signals.tell(lambda why, code: print(f"told {code}: {why}", flush=True))
if sys.argv[2] == "training":
    signals.begin_training()
print("ready", flush=True)
if sys.argv[3] == "waiting":
    import threading
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # as the main thread waits in a collective
while not signals.asked_to_stop:
    time.sleep(0.01)
print("asked", flush=True)
if sys.argv[3] == "slow":
    time.sleep(600)
"""


@contextmanager
def started(
    project_root: Path, grace: float, where: str, how: str = "", *launcher: str
) -> Iterator["subprocess.Popen[str]"]:
    command = [*launcher, sys.executable, "-c", PROGRAM, str(grace), where, how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=project_root, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks(project_root: Path, number: signal.Signals) -> None:
    with started(project_root, 60, "training") as process:
        process.send_signal(number)
        assert process.wait(LIMIT) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "asked\n"


def test_before_training_it_leaves_at_once(project_root: Path) -> None:
    with started(project_root, 60, "loading", "waiting") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == EXIT_PREEMPTED
        assert process.stderr is not None
        assert "stopped by SIGTERM, before training had begun" in process.stderr.read()


def test_the_second_leaves_at_once_unless_it_comes_with_the_first(project_root: Path) -> None:
    with started(project_root, 60, "training", "slow") as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # as a launcher passes Ctrl-C on
        time.sleep(TOGETHER + 0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 128 + signal.SIGTERM
        assert process.stderr is not None
        assert "SIGTERM again: leaving at once" in process.stderr.read()


def test_ctrl_c_that_a_launcher_passes_on_late_takes_no_time_from_the_save(project_root: Path) -> None:
    """DeepSpeed's sends SIGTERM to a process when the one before has ended. Ctrl-C again is the user's."""
    with started(project_root, 60, "training", "slow") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(TOGETHER + 0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 128 + signal.SIGINT


def test_a_terminal_that_closes_after_ctrl_c_takes_no_time_from_the_save(project_root: Path) -> None:
    with started(project_root, 60, "training", "slow") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(TOGETHER + 0.5)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None


def test_with_nohup_a_terminal_that_closes_is_nothing_to_the_run(project_root: Path) -> None:
    with started(project_root, 60, "training", "", "nohup") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0


def test_grace_has_an_end_even_where_the_main_thread_never_comes_back(project_root: Path) -> None:
    with started(project_root, 0.5, "training", "waiting") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == EXIT_PREEMPTED
        assert process.stderr is not None
        assert "failures.grace=0.5 seconds are over" in process.stderr.read()


@pytest.mark.parametrize("end", ["closed", "full"])
def test_it_leaves_in_time_where_nobody_reads_what_it_says(project_root: Path, end: str) -> None:
    reading, writing = os.pipe()
    if end == "closed":
        os.close(reading)
    else:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
    command = [sys.executable, "-c", PROGRAM, "0.1", "training", "waiting"]
    with subprocess.Popen(command, cwd=project_root, stdout=subprocess.PIPE, stderr=writing, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == EXIT_PREEMPTED


def test_who_leaves_by_itself_tells_its_peers_first(project_root: Path) -> None:
    with started(project_root, 0.1, "training", "waiting") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == EXIT_PREEMPTED
        assert process.stdout is not None
        assert process.stdout.read().startswith("told 75: stopped by SIGTERM, failures.grace=0.1 seconds are over")


def test_a_process_whose_launcher_is_killed_is_asked_to_stop(project_root: Path) -> None:
    launcher = "import os, subprocess, sys; os.environ['RANK'] = '0'; subprocess.run([sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", launcher, "-c", PROGRAM, "60", "training", ""]
    with subprocess.Popen(command, cwd=project_root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.read() == "asked\n"  # the end of the pipe: the child has ended too


def test_a_process_whose_launcher_is_killed_while_it_imports_ends(project_root: Path) -> None:
    # Settings that are good: only then is torch imported.
    start = "[sys.executable, '-m', 'train', 'lora=none']"
    launcher = f"import os, subprocess, sys; os.environ['RANK'] = '0'; subprocess.run({start})"
    with subprocess.Popen(
        [sys.executable, "-c", launcher], cwd=project_root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as parent:
        importing = None
        while importing is None:  # torch is mapped: far from the end of what is imported
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            importing = next((pid for pid in children if "torch" in Path(f"/proc/{pid}/maps").read_text()), None)
        parent.kill()
        assert parent.stdout is not None
        assert parent.stdout.read() == b""  # the end of the pipe: the child has ended, before it could speak
