"""What the programs say on the terminal: whole, and never in the way."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from configs.program.console import console, quiet_libraries

SAYING = """
import os, sys
from configs.program.console import console, quiet_libraries
for number in range(3):
    console.print(f"step {number} " + "." * 60_000, soft_wrap=True)
os.write(1, b"went on")
os._exit(0)
"""


@pytest.mark.parametrize("name", ["runs/[a]", "runs/[/b]", "runs/[bold]x", "runs/:warning:"])
def test_names_that_look_like_markup_are_printed_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.print(f"Saved {name}", style="bold red")
    assert capsys.readouterr().err == f"Saved {name}\n"


def test_what_the_terminal_can_not_show_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("w", encoding="ascii") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        console.print("‖BA‖")
    assert (tmp_path / "terminal").read_text() == "\\u2016BA\\u2016\n"


def test_a_program_without_stderr_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr("sys.stderr", stream)
        console.print("step 1")


@pytest.mark.parametrize("end", ["closed pipe", "pipe nobody reads", "closed terminal", "full disk"])
def test_training_goes_on_whatever_becomes_of_the_terminal(project_root: Path, end: str) -> None:
    reading, writing = pty.openpty() if end == "closed terminal" else os.pipe()
    if end.startswith("closed"):
        os.close(reading)
    if end == "full disk":
        writing = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-c", SAYING]
    done = subprocess.run(command, cwd=project_root, stdout=subprocess.PIPE, stderr=writing, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"went on")


def test_a_terminal_that_takes_text_again_gets_it(project_root: Path) -> None:
    program = """
import os
from configs.program import console as screen
screen.PATIENCE = 0.1
screen.console.print("." * 70_000, soft_wrap=True)  # more than the pipe holds
screen.console.print("left out")
os.write(1, b"x")
while True:
    screen.console.print("shown")
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=project_root, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.read(1) == b"x"
        said = b""
        while b"shown\n" not in said:
            said += os.read(process.stderr.fileno(), 4096)
        process.kill()
    assert said.startswith(b"." * 70_000 + b"\nshown\n")


def test_what_libraries_prepare_for_a_compiler_that_nobody_uses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it is then left out by all of them is in tests/integration/targets.py."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    quiet_libraries()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"  # the user's
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    quiet_libraries()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
