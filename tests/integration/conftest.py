"""Real processes: what a user types, typed by the tests, or the same program in processes forked from a server that has
imported what it needs. Nothing here is mocked, and nothing runs in this process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.tortures.harness.launch import Launch
from scripts.tortures.harness.workplace import Workplace

ROOT = Path(__file__).parents[2]

Program = Callable[..., subprocess.CompletedProcess[str]]


def run(*command: str, expect: int = 0, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Runs a command in the checkout and fails with its output where the exit code is not the expected one."""
    env = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    for secret in ("WANDB_API_KEY", "WANDB_MODE"):
        env.pop(secret, None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == expect, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def program(name: str, *overrides: str, **options: int) -> subprocess.CompletedProcess[str]:
    """`python -m {name} …`."""
    return run(sys.executable, "-m", name, *overrides, **options)


def typed(processes: int, *overrides: str, **options: int) -> subprocess.CompletedProcess[str]:
    """`python -m train …` for one process, `deepspeed … --module train …` for more; on the CPU, without wandb."""
    quiet = ("hardware=cpu", "logging=quiet", *overrides)
    if processes == 1:
        return program("train", *quiet, **options)
    return launch(processes, "train", *quiet, **options)


def train(processes: int, *overrides: str, expect: int = 0, nodes: int = 1) -> str:
    """The same without the time that starting Python takes, by forked processes (scripts/tortures/_runs.py); what they
    print. Fails with it where the exit codes are not the expected ones."""
    (run_dir,) = (Path(setting.removeprefix("run_dir=")) for setting in overrides if setting.startswith("run_dir="))
    forked = Launch(run_dir, ["hardware=cpu", "logging=quiet", *overrides], processes, forked=True, nodes=nodes)
    try:
        codes = forked.wait(500)
    finally:
        forked.end()
    assert set(codes) == {expect}, f"{overrides} ended with {codes}:\n{forked.said()}"
    return forked.said()


def launch(processes: int, module: str, *overrides: str, **options: int) -> subprocess.CompletedProcess[str]:
    """`deepspeed … --module {module} …`."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = ("--quiet", "--num_gpus", str(processes), "--master_port", port, "--no_local_rank", "--module")
    return run(launcher, *where, module, *overrides, **options)


def steps(run_dir: Path) -> list[dict[str, float]]:
    """The training steps of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def evaluations(run_dir: Path) -> dict[int, float]:
    """The evaluation losses of metrics.jsonl, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["evaluation_loss"] for line in lines if "evaluation_loss" in line}


@dataclass(frozen=True)
class Quickstart:
    """What scripts/quickstart.sh makes, by the same commands, in a directory of the tests'."""

    general: Path
    sample: Path
    base_run: Path
    run: Path


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Prepares the sample and trains base and adapter, with ZeRO-3 on two processes."""
    top = tmp_path_factory.mktemp("quickstart")
    made = Quickstart(top / "general", top / "sample", top / "base", top / "run")
    program("data", "data=sample_general", f"output={made.general}")
    program("data", "data=sample", f"output={made.sample}")
    typed(2, "recipe=quickstart_base", f"dataset={made.general}", f"run_dir={made.base_run}")
    typed(
        2,
        "recipe=quickstart",
        f"dataset={made.sample}",
        f"model.path={made.base_run}/model",
        f"run_dir={made.run}",
        "logging=default",  # a progress bar, and wandb as it is for a user who is not logged in
    )
    return made


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A place for small runs that are made to end badly, by the functions of scripts/torture.py."""
    place = Workplace(tmp_path_factory.mktemp("runs"), typed=False)
    place.prepare()
    yield place
    place.end_all()
