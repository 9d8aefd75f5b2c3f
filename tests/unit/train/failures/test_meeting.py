"""What becomes of a start in which a process refuses, dies, comes late or never. Real processes, forked from one import
of torch, with their guardians."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import json, os, signal, sys, time
import torch
from configs.program import entry
from configs.program.errors import UserError
from train.config.train import TrainConfig
from train.failures.errors import reporting_errors
from train.failures.guard import Guard
from train.failures.meeting import Meeting, tell_mistake

def start(rank, what, who):
    if rank in who and what == "never comes":
        return
    if rank in who and what == "refuses before":
        raise UserError("lr=x: it must be a number; give one")
    seconds = 4 if what == "never comes" else 120
    guard = Guard(rank, 3, peer_timeout=30, stall_timeout=30, start_timeout=seconds)
    meeting = Meeting(rank, seconds=seconds)
    meeting.join(guard)
    with reporting_errors(guard, TrainConfig(), rank):
        guard.start("hashing base and rows")
        if rank in who and what == "refuses":
            raise UserError("model.path=b: its config.json is missing; restore it")
        if rank in who and what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.init_process_group("gloo")  # by the same store
        ones = torch.ones(1)
        torch.distributed.all_reduce(ones)
        assert ones == 3
        guard.done()

what, who, port = json.loads(sys.argv[1])
started = []
for rank in range(3):
    started.append(os.fork())
    if not started[-1]:
        alone = what == "refuses before"  # each on a machine of its own
        of_launch = dict(RANK=rank, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        of_launch["LOCAL_RANK"] = 0 if alone else rank
        os.environ.update({name: str(value) for name, value in of_launch.items()})
        code = 0
        try:
            try:
                start(rank, what, who)
            except UserError as error:
                entry.leave("train", str(error))
        except SystemExit as stop:
            code = stop.code
            if what == "refuses before":
                tell_mistake(str(stop.__context__), rank, 3, within=120)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 99
        os._exit(code)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]))
"""


@pytest.mark.parametrize(
    ("what", "who", "codes", "told"),
    [
        ("meets", [], [0, 0, 0], ""),
        ("refuses", [0], [2, 2, 2], "train: model.path=b: its config.json is missing; restore it"),
        ("refuses", [1], [2, 2, 2], "train: process 1 left in its start (hashing base and rows) on "),
        ("refuses", [0, 1, 2], [2, 2, 2], "train: model.path=b: its config.json is missing; restore it"),
        ("refuses before", [0], [2, 2, 2], "train: process 0 left in its start (finding the others) on "),
        ("refuses before", [1], [2, 2, 2], "train: process 1 left in its start (finding the others) on "),
        ("refuses before", [0, 1, 2], [2, 2, 2], "train: lr=x: it must be a number; give one"),
        ("dies", [0], [-9, 76, 76], "train: process 0 "),
        ("dies", [1], [76, -9, 76], "train: process 1 died in its start (hashing base and rows) on "),
        ("never comes", [2], [76, 76, 0], "train: process 2 has not come to the start within 4 s; launch it again"),
        ("never comes", [0], [0, 76, 76], ""),
    ],
)
def test_all_processes_end_alike_and_one_says_why(
    project_root: Path, what: str, who: list[int], codes: list[int], told: str
) -> None:
    environment = os.environ | {"PYTHONPATH": str(project_root), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID"):
        environment.pop(name, None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", START, json.dumps([what, who, port])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == codes, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert (what == "meets") == (not done.stderr), done.stderr


def test_a_port_that_another_program_uses_is_named(project_root: Path) -> None:
    program = (
        "import os; os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='{}')\n"
        "from train.failures.meeting import Meeting\n"
        "Meeting(0, seconds=60)"
    )
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": str(project_root), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, "-c", program.format(port)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert f"UserError: MASTER_PORT={port}: another program listens there" in done.stderr


def test_a_mistake_in_the_command_of_one_machine_ends_the_other_too(project_root: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank, typed in enumerate(("sed=1", "failures.start_timeout=400")):
        launch = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, "-m", "train", f"dataset={tmp_path}", "lora=none", typed]
        env = os.environ | {name: str(value) for name, value in launch.items()}
        started.append(subprocess.Popen(command, cwd=project_root, env=env, stderr=subprocess.PIPE, text=True))
    told = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], told  # 76 for one that never hears of the other
    assert told[0].startswith("train: sed: there is no such setting"), told
