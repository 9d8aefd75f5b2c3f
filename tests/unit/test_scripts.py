"""scripts/install.sh says in one sentence what is missing, on machines that lack it: a PATH of stand-ins."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "sha256sum", "cut", "grep", "basename", "dirname", "tail", "env", "rm", "mkdir")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout with the scripts alone, and bin/ with the few tools that they use."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (tmp_path / "bin" / tool).symlink_to(found)
    return tmp_path


def stand_in(machine: Path, name: str, script: str) -> None:
    path = machine / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def start(machine: Path, script: str, *, checkout: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine / "bin"), "HOME": os.environ["HOME"]}
    command = [str(machine / "bin" / "bash"), f"scripts/{script}"]
    return subprocess.run(
        command, cwd=checkout or machine, env=environment, capture_output=True, text=True, check=False
    )


def said_one_sentence(done: subprocess.CompletedProcess[str], script: str, *words: str) -> bool:
    lines = done.stderr.strip().splitlines()
    return (
        done.returncode == 2
        and len(lines) == 1
        and lines[0].startswith(f"{script}: ")
        and all(word in lines[0] for word in words)
    )


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
@pytest.mark.parametrize("name", ["two words", "a\tb", "a:b", "it's", "a(1)", "a&b", "$a", 'a"b', "a\\b", "a;b"])
def test_in_a_path_that_pip_and_torch_cannot_quote(machine: Path, script: str, name: str) -> None:
    """Everything else is there; nothing is installed."""
    stand_in(machine, "g++", "exit 0")
    stand_in(machine, "python3", f'exec "{sys.executable}" "$@"')
    checkout = machine / name
    checkout.mkdir()
    for part in ("scripts", "pyproject.toml", "constraints.txt"):
        (machine / part).rename(checkout / part)
    assert said_one_sentence(start(machine, script, checkout=checkout), script, str(checkout), "move the checkout")
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_without_a_compiler(machine: Path, script: str) -> None:
    stand_in(machine, "python3", f'exec "{sys.executable}" "$@"')
    assert said_one_sentence(start(machine, script), script, "g++", "apt install")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_without_a_python_that_is_new_enough(machine: Path, script: str) -> None:
    stand_in(machine, "g++", "exit 0")
    stand_in(machine, "python3", "exit 1")  # what asking an old one for its version gives
    assert said_one_sentence(start(machine, script), script, "Python 3.11 or newer")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_where_pip_cannot_install(machine: Path, script: str) -> None:
    stand_in(machine, "g++", "exit 0")
    # An environment whose pip has no network: `-m pip` fails as pip does, the rest is Python.
    fails = 'if [ "${2:-}" = pip ]; then echo "ERROR: no matching distribution"; exit 1; fi'
    stand_in(machine, "python3", f'exec "{sys.executable}" "$@"')
    environment = machine / ".venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/usr/bin/env bash\n{fails}\nexec "{sys.executable}" "$@"\n')
    (environment / "python").chmod(0o755)
    (machine / ".venv" / "made-in").write_text(f"{machine}\n")
    done = start(machine, script)
    assert said_one_sentence(done, script, "no matching distribution", "network")
    assert not (machine / ".venv" / "installed").exists()
