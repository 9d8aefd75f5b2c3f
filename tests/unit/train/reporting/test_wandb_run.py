"""wandb fails in every way that it can; whoever tells it something notices nothing. Real wandb, offline, in processes
of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import contextlib, os, signal, sys, threading, time
from pathlib import Path
import psutil
from train.reporting import wandb_run
from train.config.train import LoggingConfig
from train.reporting.wandb_run import Wandb

sys.argv[:1] = []
directory = Path(sys.argv[0])
before = sys.exit, sys.excepthook

def begin():
    return Wandb(directory, LoggingConfig(wandb="offline"), {}, None)

def helper():
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # others come and go
                if child.name() == "wandb-core" and list(directory.glob("wandb/*/run-*.wandb")):
                    return child
        time.sleep(0.01)

def end(what="went on"):
    print(what, flush=True)
    os._exit(0)
"""


def run(project_root: Path, directory: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | environment
    env["COLUMNS"] = "80"
    command = [sys.executable, "-c", PROGRAM + body, str(directory)]
    return subprocess.run(command, cwd=project_root, env=env, capture_output=True, text=True, timeout=300, check=False)


def check_stopped_once(done: subprocess.CompletedProcess[str], why: str = "") -> None:
    """One line, and nothing of wandb's own."""
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"wandb stopped: {why}")
    assert line.endswith("; metrics.jsonl goes on")


def test_it_holds_what_it_is_told(project_root: Path, tmp_path: Path) -> None:
    body = """
told = begin()
told.log({"loss": 1.0}, 1)
told.close(within=60)
assert not psutil.Process().children()  # its process has ended too
assert (sys.exit, sys.excepthook) == before  # wandb's would print keys
assert threading.excepthook == threading.__excepthook__
end(told.id)
"""
    done = run(project_root, tmp_path, body)
    assert (done.returncode, done.stderr) == (0, "")
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert stored.stem == f"run-{done.stdout.strip()}"
    assert b"loss" in stored.read_bytes()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_its_process_is_killed(project_root: Path, tmp_path: Path, number: str) -> None:
    body = f"""
told = begin()
os.kill(helper().pid, signal.{number})
while not told._stopped:
    told.log({{"loss": 1.0}}, 1)
    time.sleep(0.01)
told.log({{"loss": 1.0}}, 2)
time.sleep(2)  # for what its threads have to say
told.close(within=60)
end()
"""
    check_stopped_once(run(project_root, tmp_path, body))


def test_its_process_is_killed_before_the_end(project_root: Path, tmp_path: Path) -> None:
    body = """
told = begin()
os.kill(helper().pid, signal.SIGKILL)
told.close(within=60)
end()
"""
    check_stopped_once(run(project_root, tmp_path, body))


def test_its_process_hangs_at_the_end(project_root: Path, tmp_path: Path) -> None:
    body = """
told = begin()
stopped = helper()
stopped.suspend()
told.log({"loss": 1.0}, 1)
told.close(within=0.5)
stopped.kill()
end()
"""
    check_stopped_once(run(project_root, tmp_path, body), "it has not ended within 0.5 s")


def test_its_process_hangs_for_long(project_root: Path, tmp_path: Path) -> None:
    body = """
wandb_run.WAITING = 50
told = begin()
stopped = helper()
stopped.suspend()
large = {"x": "." * 100_000}  # the way to it is full as well
for step in range(200):
    told.log(large, step)
told.close(within=60)
stopped.kill()
end()
"""
    check_stopped_once(run(project_root, tmp_path, body), "it has taken nothing for too long")


@pytest.mark.parametrize(
    ("body", "environment"),
    [
        ("sys.modules['wandb'] = None", {}),
        ("", {"WANDB_BASE_URL": "nowhere"}),
        ("import wandb; wandb.init = lambda **_: sys.exit(3)", {}),
        ("import wandb; wandb.init = lambda **_: wandb_run", {}),
    ],
    ids=["not installed", "wrong settings", "wants to exit", "another version"],
)
def test_it_can_not_begin(project_root: Path, tmp_path: Path, body: str, environment: dict[str, str]) -> None:
    body += """
told = begin()
while not told._stopped:
    told.log({"loss": 1.0}, 1)
    time.sleep(0.01)
told.close(within=60)
end()
"""
    check_stopped_once(run(project_root, tmp_path, body, **environment))


def test_errors_in_threads_of_its_own_stop_it_and_others_are_told(project_root: Path, tmp_path: Path) -> None:
    body = """
told = begin()
helper()
theirs = {"__name__": "wandb.sdk.something"}
exec("def fail(): raise BrokenPipeError('gone')", theirs)
for target in (theirs["fail"], theirs["fail"]):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
seen = []
told._excepthook = seen.append
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
assert [error.exc_type for error in seen] == [ZeroDivisionError]
told.close(within=60)
end()
"""
    check_stopped_once(run(project_root, tmp_path, body), "gone")


def test_what_is_printed_does_not_pass_through_it(project_root: Path, tmp_path: Path) -> None:
    body = """
told = begin()
helper().suspend()
for number in range(20_000):
    print("a line on the terminal")
psutil.Process().children()[0].kill()
end()
"""
    done = run(project_root, tmp_path, body)
    assert done.stdout.endswith("went on\n"), done.stderr
