"""Signals, lost peers, full disks, planted code: runs end cleanly. The long forms are `python scripts/torture.py`."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tortures import disk, peers, planted, signals
from scripts.tortures.harness import disks
from scripts.tortures.harness.forked import ENVIRONMENT, ROOT
from scripts.tortures.harness.garden import Garden
from scripts.tortures.harness.outcome import check_newest, last_step
from scripts.tortures.harness.processes import kill
from scripts.tortures.harness.trials import generator
from scripts.tortures.harness.workplace import Workplace
from train.saving import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "number", "seed"),
    [
        ("all", signal.SIGTERM, 98),
        ("one, under the launcher", signal.SIGINT, 13),
        ("the process group", signal.SIGINT, 27),
        ("the process group of one process", signal.SIGINT, 12),
    ],
)
def test_a_signal_stops_all_after_the_same_step(runs: Workplace, way: str, number: signal.Signals, seed: int) -> None:
    """The seeds give about a tenth of a second from the step before to the signal, and 0.3 to that of the other."""
    run = runs.scratch / f"asked {way}".replace(" ", "-").replace(",", "")
    settings = signals.LONG | {"max_steps": "3", "global_batch": "12"}
    if way != "all":
        # DeepSpeed's launcher kills what has not saved after 30 seconds: steps that are short on a busy machine too.
        settings |= {"max_steps": "12", "global_batch": "2", "eval_every": "6"}
    signals.asked_once(runs, run, way, number, generator(way, seed), after=1, settings=settings)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_what_becomes_of_wandb_is_nothing_to_the_run(runs: Workplace, number: signal.Signals) -> None:
    signals.wandb_alone(runs, runs.scratch / f"wandb-{number.name}", number)


def test_when_a_process_hangs_the_other_says_where_it_was(runs: Workplace) -> None:
    """One that is killed is in the short form of the torture, in test_scripts.py."""
    peers.lost(runs, runs.scratch / "stopped", signal.SIGSTOP, 1, "saving", after=2)


def test_a_run_that_is_killed_leaves_no_shared_memory(runs: Workplace) -> None:
    launch = runs.launch(runs.scratch / "killed", 2)
    assert launch.until(lambda: launch.has_begun), launch.said()
    for pid in launch.ranks().values():
        kill(pid)
    launch.wait()
    assert not list(Path("/dev/shm").glob(f"*_{launch.port}_*"))


@pytest.fixture
def mounts() -> None:
    if reason := disks.why_not():
        pytest.skip(reason)


@pytest.mark.usefixtures("mounts")
def test_a_full_disk_leaves_the_last_checkpoint(runs: Workplace) -> None:
    whole = runs.reference(1, **disk.SETTINGS)
    size = disk.pages(checkpoint.paths(whole)[0])
    disk.full(runs, whole, 1.5 * size, first=6)


@pytest.mark.usefixtures("mounts")
def test_a_disk_that_is_full_between_two_saves_ends_no_run(runs: Workplace) -> None:
    disk.full_between_saves(runs)


def test_a_disk_that_hangs_ends_all_and_leaves_the_last_checkpoint(runs: Workplace) -> None:
    if reason := disks.why_not_freeze():
        pytest.skip(reason)
    disk.frozen(runs, after=6, max_steps="12")


def test_a_slow_disk_costs_nothing_but_later_checkpoints(runs: Workplace) -> None:
    if reason := disks.why_not_slow():
        pytest.skip(reason)
    disk.slow(runs)


@pytest.mark.parametrize("how", ["plain", "nohup"])
def test_a_terminal_that_closes_costs_no_step(runs: Workplace, how: str) -> None:
    """Its progress bar then meets errors, and SIGHUP comes, which nohup lets the run ignore."""
    run = runs.scratch / f"closed-{how}"
    settings = runs.settings(run, logging="default", logging__wandb="offline", max_steps="6", global_batch="8")
    # The tests themselves may have been started with nohup, which is inherited.
    command = ["setsid", "--ctty", "env", f"--{'ignore' if how == 'nohup' else 'default'}-signal=HUP"]
    command += [sys.executable, "-m", "train", *(f"{name}={value}" for name, value in settings.items())]
    ours, theirs = pty.openpty()
    env = os.environ | ENVIRONMENT
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while b"1/6" not in said:
            said += os.read(ours, 4096)
        os.close(ours)
        code = process.wait(300)
    assert code == (0 if how == "nohup" else 75)
    assert check_newest(run) == last_step(run) >= 1
    assert (last_step(run) == 6) == (how == "nohup")


@pytest.mark.usefixtures("mounts")
def test_a_read_only_directory_leaves_the_last_checkpoint(runs: Workplace) -> None:
    disk.read_only_during(runs, runs.reference(1, **disk.SETTINGS))


@pytest.mark.parametrize(
    "trial",
    [
        planted.resuming_beside_everything,
        planted.a_checkpoint_whose_tensors_are_a_pickle,
        planted.answering_beside_everything,
        planted.answering_with_an_adapter_that_is_a_pickle,
    ],
    ids=lambda trial: trial.__name__,
)
def test_planted_code_is_not_executed(runs: Workplace, tmp_path: Path, trial: planted.Trial) -> None:
    trial(Garden(runs, tmp_path / "garden"))
