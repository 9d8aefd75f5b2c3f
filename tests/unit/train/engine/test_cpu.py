"""The one operator that DeepSpeed compiles, after a process that was killed while it did."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.program.errors import UserError
from train.engine.cpu import MARK, VARIABLE, alone, folder

START = (
    "from train.config.engine import HardwareConfig; from train.engine.processes import join_processes; "
    "join_processes(HardwareConfig(device='cpu'))"
)
LOG = folder() / "deepspeed_shm_comm" / ".ninja_log"
"""What ninja has built there, a line for each time and file."""
HOLD = "import sys; from train.engine import cpu\nwith cpu.alone(): print('in', flush=True); sys.stdin.read()"


def start(code: str, root: Path, *, start_new_session: bool = False, **more: str) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | more
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=start_new_session,
    )


def test_what_a_killed_build_left_holds_nobody_up(project_root: Path) -> None:
    operator = folder() / "deepspeed_shm_comm"
    operator.mkdir(parents=True, exist_ok=True)
    (operator / MARK).touch()
    _, stderr = (process := start(START, project_root)).communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert not (operator / MARK).exists()


def test_one_builds_at_a_time_and_the_next_when_it_is_killed(project_root: Path, tmp_path: Path) -> None:
    where = {VARIABLE: str(tmp_path)}
    first = start(HOLD, project_root, **where)
    assert first.stdout is not None and first.stdout.readline() == "in\n"
    (place,) = tmp_path.iterdir()
    (place / "operator").mkdir()
    (place / "operator" / MARK).touch()
    second = start(HOLD, project_root, **where)
    assert second.stderr is not None
    said = second.stderr.readline()
    assert re.fullmatch("train: another process compiles DeepSpeed's operator in .*; this one waits for it\n", said)
    assert second.poll() is None
    assert (place / "operator" / MARK).exists()  # its owner lives
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=60) == ("in\n", "")
    assert not (place / "operator" / MARK).exists()


def test_the_variable_is_the_users_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for given in (str(tmp_path), None):
        monkeypatch.setenv(VARIABLE, given) if given else monkeypatch.delenv(VARIABLE)
        with alone():
            assert Path(os.environ[VARIABLE]).name.startswith("openhermes-")
        assert os.environ.get(VARIABLE) == given


def test_where_nothing_can_be_written_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with (
        pytest.raises(UserError, match=f"TORCH_EXTENSIONS_DIR={tmp_path}/file: DeepSpeed's operator can't be"),
        alone(),
    ):
        pass


def test_it_is_compiled_once_whichever_ninja_comes_first_on_the_path(project_root: Path, tmp_path: Path) -> None:
    """Started from an activated environment, by the path of its Python, and where a system's ninja comes first."""
    system = tmp_path / "ninja"
    system.write_text("#!/bin/sh\nexit 1\n")
    system.chmod(0o755)
    outside = os.pathsep.join(["/usr/local/bin", "/usr/bin", "/bin"])
    inside = os.pathsep.join([str(Path(sys.executable).parent), outside])
    built = []
    for path in (inside, outside, f"{tmp_path}{os.pathsep}{outside}"):
        _, stderr = (process := start(START, project_root, PATH=path)).communicate(timeout=500)
        assert process.returncode == 0, stderr
        built.append(LOG.read_text())
    assert built[1:] == built[:1] * 2


def test_the_environments_ninja_comes_first_and_the_path_is_the_users_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    before = os.environ["PATH"]
    with alone():
        assert shutil.which("ninja") == str(Path(sys.executable).with_name("ninja"))
    assert os.environ["PATH"] == before


def test_what_compiles_goes_on_when_the_start_is_ended_and_the_next_waits_for_it(
    project_root: Path, tmp_path: Path
) -> None:
    where = {VARIABLE: str(tmp_path)}
    slow = (
        "import os, pathlib, time; place = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR'], 'it'); place.mkdir();"
        "(place / 'begun').touch(); time.sleep(6); (place / 'it.so').touch()"
    )
    compiles = f"from train.engine import cpu\nwith cpu.alone() as lock: cpu.compile_apart('it', {slow!r}, lock)"
    first = start(compiles, project_root, start_new_session=True, **where)
    while not list(tmp_path.glob("*/it/begun")):
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert not list(tmp_path.glob("*/it/it.so"))
    second = start(HOLD, project_root, **where)
    assert second.communicate(timeout=120)[0] == "in\n"
    assert list(tmp_path.glob("*/it/it.so"))
    # and the one after that has nothing to compile
    third = start(compiles.replace("sleep(6)", "sleep(600)"), project_root, **where)
    assert third.communicate(timeout=120) == ("", "")


def test_a_build_that_takes_long_is_said(project_root: Path, tmp_path: Path) -> None:
    compiles = "cpu.compile_apart('it', 'import time; time.sleep(4)', lock)"
    code = f"from train.engine import cpu\nwith cpu.alone() as lock: {compiles}"
    for rank, said in (("0", 1), ("1", 0)):
        where = {VARIABLE: str(tmp_path), "LOCAL_RANK": rank}
        _, stderr = start(code, project_root, **where).communicate(timeout=120)
        assert stderr.count("train: DeepSpeed's operator is compiled, once for") == said
        assert stderr.count("\n") == said
