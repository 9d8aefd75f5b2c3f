"""Real processes: what a user types, typed by the tests, or the same program in processes forked from a server that has
imported what it needs. Nothing here is mocked, and nothing runs in this process."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.tortures.harness.forked import fork
from scripts.tortures.harness.launch import Launch
from scripts.tortures.harness.workplace import Workplace
from train.engine.processes import free_port

ROOT = Path(__file__).parents[2]


def run(*command: str, expect: int = 0, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Runs a command in the checkout and fails with its output if the exit code is not the expected one."""
    env = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    for secret in ("WANDB_API_KEY", "WANDB_MODE"):
        env.pop(secret, None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == expect, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def program(name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`python -m {name} …`, as typed."""
    return run(sys.executable, "-m", name, *overrides)


def inference(*overrides: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m inference …` without the time that importing torch takes (scripts/tortures/harness/forked.py)."""
    with tempfile.TemporaryDirectory() as directory:
        printed = [Path(directory, name) for name in ("stdout", "stderr")]
        process = fork("inference", list(overrides), {}, *printed)
        process.join(500)
        done = subprocess.CompletedProcess(overrides, process.exitcode or 0, *(path.read_text() for path in printed))
    assert process.exitcode == expect, f"{overrides} ended with {process.exitcode}:\n{done.stdout}\n{done.stderr}"
    return done


def train(
    processes: int,
    *overrides: str,
    expect: int = 0,
    forked: bool = True,
    nodes: int = 1,
    module: str = "train",
) -> str:
    """`python -m train …` for one process, `deepspeed … --module train …` for more; on the CPU, without wandb.

    Args:
        processes: how many train.
        overrides: the settings, `run_dir` among them.
        expect: the exit code of each process, or of the command.
        forked: without the time that starting Python takes (scripts/tortures/harness/forked.py), or as typed.
        nodes: how many the forked processes take themselves to be on.
        module: what the forked processes run, in the place of `train`.

    Returns:
        What was printed.
    """
    (run_dir,) = (Path(setting.removeprefix("run_dir=")) for setting in overrides if setting.startswith("run_dir="))
    # More threads than cores wait for each other in each operation: the other worker's tests run too.
    settings = ["hardware=cpu", "hardware.threads=1", "logging=quiet", *overrides]
    launch = Launch(run_dir, settings, processes, forked=forked, nodes=nodes, module=module)
    try:
        codes = launch.wait(500)
    finally:
        launch.end()
    assert set(codes) == {expect}, f"{overrides} ended with {codes}:\n{launch.said()}"
    return launch.said()


def steps(run_dir: Path) -> list[dict[str, float]]:
    """The training steps of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def evaluations(run_dir: Path) -> dict[int, float]:
    """The evaluation losses of metrics.jsonl, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["evaluation_loss"] for line in lines if "evaluation_loss" in line}


@contextlib.contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A directory that all workers of pytest-xdist share; while one is within, the others wait before it."""
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent
    with (top / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield top / name


@dataclass(frozen=True)
class Quickstart:
    """What scripts/quickstart.sh makes, in a directory of the tests'."""

    general: Path
    sample: Path
    base_run: Path
    run: Path


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Prepares the sample and trains base and adapter, with ZeRO-3 on two processes; the adapter by its command."""
    with made_once(tmp_path_factory, "quickstart") as top:
        made = Quickstart(top / "general", top / "sample", top / "base", top / "run")
        if not (made.run / "receipt.json").exists():
            shutil.rmtree(top, ignore_errors=True)
            top.mkdir()
            program("data", "data=sample_general", f"output={made.general}")
            program("data", "data=sample", f"output={made.sample}")
            train(2, "recipe=quickstart_base", f"dataset={made.general}", f"run_dir={made.base_run}")
            start = (f"dataset={made.sample}", f"model.path={made.base_run}/model", f"run_dir={made.run}")
            # With a progress bar, and wandb as it is for a user who is not logged in.
            deepspeed = str(Path(sys.executable).with_name("deepspeed"))
            launcher = (deepspeed, "--quiet", "--num_gpus", "2", "--master_port", free_port(), "--no_local_rank")
            run(*launcher, "--module", "train", "recipe=quickstart", "hardware=cpu", *start)
    return made


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A place for small runs that are made to end badly, by the functions of scripts/torture.py.

    What they train on, and the runs that nothing happens to, are those of all workers.
    """
    with made_once(tmp_path_factory, "workplace") as top:
        top.mkdir(exist_ok=True)
        Workplace(top).prepare()
    place = Workplace(tmp_path_factory.mktemp("runs"), typed=False)
    for made in ("base", "rows", "wholes"):
        (place.scratch / made).symlink_to(top / made)
    yield place
    place.end_all()
