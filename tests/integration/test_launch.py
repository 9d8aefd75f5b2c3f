"""Signals and exit codes go through scripts/launch and DeepSpeed's own launchers; a stand-in trains."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = """
import ctypes, os, pathlib, signal, sys, time

rank, stopped = os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # as train/failures/signals.py asks for
pathlib.Path(f"started-{rank}").write_text(str(os.getpid()))
while not stopped:
    time.sleep(0.05)
time.sleep(1 + int(rank))
pathlib.Path(f"saved-{rank}").touch()
print("saved", rank, flush=True)
sys.exit(75)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose `python -m train` runs until SIGTERM, takes a while to save, and ends with 75."""
    shutil.copytree(ROOT / "scripts" / "launch", tmp_path / "scripts" / "launch")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").touch()
    (tmp_path / "train" / "__main__.py").write_text(TRAIN)
    return tmp_path


def start(checkout: Path, terminal: int | None = None) -> subprocess.Popen[bytes]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    where = ("--nodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--gpus-per-node", "2")
    # a shell can't catch a signal that was ignored when it started, as SIGINT is where tests run in the background
    command = ("env", "--default-signal=INT", "bash", "scripts/launch/per_node.sh", *where, "run_dir=runs/x")
    if terminal is not None:
        command = ("setsid", "--ctty", *command)
    environment = os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, cwd=checkout, env=environment, stdin=terminal, stdout=terminal, stderr=terminal)


def running(checkout: Path) -> list[str]:
    """The command lines of the processes that work there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if (process / "cwd").readlink() == checkout:
                found.append((process / "cmdline").read_text())
    return found


def all_gone(checkout: Path) -> bool:
    """Whether no process works there any more, or soon: what has answered may take a moment to end."""
    until = time.monotonic() + 30
    while running(checkout) and time.monotonic() < until:
        time.sleep(0.1)
    return not running(checkout)


def shown(keyboard: int) -> str:
    """All that was printed in the terminal, once nobody has it open any more."""
    text = b""
    with contextlib.suppress(OSError):  # that is how Linux says so
        while read := os.read(keyboard, 1 << 16):
            text += read
    return text.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_lets_the_processes_save_and_their_exit_code_comes_back(
    checkout: Path, number: signal.Signals
) -> None:
    script = start(checkout)
    while len(list(checkout.glob("started-*"))) < 2:
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(number)
    assert script.wait(timeout=60) == 75
    assert {path.name for path in checkout.glob("saved-*")} == {"saved-0", "saved-1"}
    assert all_gone(checkout)


def test_ctrl_c_in_the_terminal_lets_the_processes_save_and_have_the_last_word(checkout: Path) -> None:
    """There it goes to all that runs in the foreground, where DeepSpeed's launchers would die of it."""
    keyboard, terminal = os.openpty()
    script = start(checkout, terminal)
    os.close(terminal)
    while len(list(checkout.glob("started-*"))) < 2:
        assert script.poll() is None
        time.sleep(0.05)
    os.write(keyboard, b"\x03")
    assert script.wait(timeout=60) == 75
    assert sorted(shown(keyboard).removeprefix("^C").splitlines()) == ["saved 0", "saved 1"]
    os.close(keyboard)
    assert {path.name for path in checkout.glob("saved-*")} == {"saved-0", "saved-1"}
    assert all_gone(checkout)


@pytest.mark.parametrize(
    ("which", "number"),
    [
        ("deepspeed.launcher.launch", signal.SIGKILL),
        ("bin/deepspeed", signal.SIGKILL),
        ("bin/deepspeed", signal.SIGTERM),
    ],
)
def test_a_launcher_that_is_killed_is_no_success_and_the_processes_have_saved_before_the_script_says_so(
    checkout: Path, which: str, number: signal.Signals
) -> None:
    script = start(checkout)
    while len(list(checkout.glob("started-*"))) < 2:
        assert script.poll() is None
        time.sleep(0.05)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if (process / "cwd").readlink() == checkout and which in (process / "cmdline").read_text():
                os.kill(int(process.name), number)
    assert script.wait(timeout=60) == 76
    assert {path.name for path in checkout.glob("saved-*")} == {"saved-0", "saved-1"}
    assert all_gone(checkout)


def test_a_script_that_is_stopped_and_continued_gives_the_exit_code(checkout: Path) -> None:
    script = start(checkout)
    while len(list(checkout.glob("started-*"))) < 2:
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(signal.SIGSTOP)
    for path in checkout.glob("started-*"):
        os.kill(int(path.read_text()), signal.SIGTERM)
    while len(list(checkout.glob("saved-*"))) < 2:
        time.sleep(0.05)
    script.send_signal(signal.SIGCONT)
    assert script.wait(timeout=60) == 75
    assert all_gone(checkout)


def test_a_signal_before_anything_trains_leaves_nothing_behind(checkout: Path) -> None:
    script = start(checkout)
    while not any("bin/deepspeed" in command for command in running(checkout)):
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=60) == 75
    assert all_gone(checkout)
