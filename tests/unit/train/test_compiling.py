"""The one operator that DeepSpeed compiles, after a process that was killed while it did."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from train import compiling

START = "from train import engine; from train.config import HardwareConfig as H; engine.start(H(device='cpu'))"
HOLD = "import sys; from train import compiling\nwith compiling.alone(): print('in', flush=True); sys.stdin.read()"


def start(code: str, root: Path, **more: str) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | more
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=env, text=True, **pipes)  # type: ignore[call-overload]


def test_what_a_killed_build_left_holds_nobody_up(project_root: Path) -> None:
    operator = compiling.folder() / "deepspeed_shm_comm"
    operator.mkdir(parents=True, exist_ok=True)
    (operator / compiling.MARK).touch()
    _, stderr = (process := start(START, project_root)).communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert not (operator / compiling.MARK).exists()


def test_one_builds_at_a_time_and_the_next_when_it_is_killed(project_root: Path, tmp_path: Path) -> None:
    where = {compiling.VARIABLE: str(tmp_path)}
    first = start(HOLD, project_root, **where)
    assert first.stdout is not None and first.stdout.readline() == "in\n"
    (place,) = tmp_path.iterdir()
    (place / "operator").mkdir()
    (place / "operator" / compiling.MARK).touch()
    second = start(HOLD, project_root, **where)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(6)
    assert (place / "operator" / compiling.MARK).exists()  # its owner lives
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=60) == ("in\n", "")
    assert not (place / "operator" / compiling.MARK).exists()


def test_the_variable_is_the_users_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for given in (str(tmp_path), None):
        monkeypatch.setenv(compiling.VARIABLE, given) if given else monkeypatch.delenv(compiling.VARIABLE)
        with compiling.alone():
            assert Path(os.environ[compiling.VARIABLE]).name.startswith("openhermes-")
        assert os.environ.get(compiling.VARIABLE) == given


def test_where_nothing_can_be_written_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(compiling.VARIABLE, str(tmp_path / "file"))
    with (
        pytest.raises(UserError, match=f"TORCH_EXTENSIONS_DIR={tmp_path}/file: DeepSpeed's operator can't be"),
        compiling.alone(),
    ):
        pass
