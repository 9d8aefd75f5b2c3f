"""How `python -m train` ends, in processes of its own: never by taking libraries apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, runpy, sys, types
from configs.program import entry

def main():
    sys.excepthook = entry._traceback
    {body}

sys.modules["train.program"] = types.SimpleNamespace(main=main)  # which takes seconds
atexit.register(print, "taken apart")
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('done')", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("raise RuntimeError('hf_abcdefghijABCDEFGHIJ12345')", 1, "RuntimeError: <secret>\n"),
    ],
)
def test_the_exit_code_is_what_the_program_ended_with(project_root: Path, body: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "done\n" if not code else "")
    assert done.stderr.endswith(said)
    assert ("Traceback" in done.stderr) == ("raise" in body)


@pytest.mark.parametrize(("body", "code"), [("entry.leave('train', 'no')", 2), ("sys.exit('no')", 1), ("1 / 0", 1)])
def test_the_exit_code_is_the_same_where_nobody_reads(project_root: Path, body: str, code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    done = subprocess.run(command, cwd=project_root, stdout=writing, stderr=writing, check=False)
    os.close(writing)
    assert done.returncode == code
