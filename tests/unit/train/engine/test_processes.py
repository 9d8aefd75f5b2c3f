"""What a launcher, or a person, has set in the environment is looked at before processes meet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.program.errors import UserError
from train.config.engine import HardwareConfig
from train.engine.processes import join_processes

ROOT = Path(__file__).parents[4]
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MASTER_PORT", "abc", "MASTER_PORT=abc: it must be a whole number from 1 to 65535"),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000: "),
        ("MASTER_PORT", "0", "MASTER_PORT=0: "),
        ("MASTER_PORT", "", "MASTER_PORT: the launcher set RANK without it"),
        ("MASTER_ADDR", "", "MASTER_ADDR: the launcher set RANK without it"),
        ("LOCAL_RANK", "", "LOCAL_RANK: the launcher set RANK without it"),
        ("RANK", "first", "RANK=first: it must be a whole number from 0 to 1;"),
        ("RANK", "2", "RANK=2: it must be a whole number from 0 to 1;"),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two: "),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0: "),
        ("LOCAL_RANK", "-1", "LOCAL_RANK=-1: "),
        ("LOCAL_WORLD_SIZE", "x", "LOCAL_WORLD_SIZE=x: "),
        ("LOCAL_SIZE", "1.5", "LOCAL_SIZE=1.5: "),
    ],
)
def test_a_variable_that_no_process_can_be_found_by_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    for variable, usual in (LAUNCHED | {name: value}).items():
        monkeypatch.setenv(variable, usual)
    before = dict(os.environ)
    with pytest.raises(UserError) as error:
        join_processes(HardwareConfig(device="cpu"))
    assert str(error.value).startswith(told)
    assert dict(os.environ) == before


def test_one_process_leaves_no_shared_memory_and_its_devices_are_counted_without_a_program() -> None:
    program = (
        "import os; from pathlib import Path; from train.config.engine import HardwareConfig;"
        "from train.engine.processes import join_processes; join_processes(HardwareConfig(device='cpu'));"
        "print(os.environ['LOCAL_SIZE'], [*Path('/dev/shm').glob(f'*_{os.environ[\"MASTER_PORT\"]}_*')])"
    )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 []"
