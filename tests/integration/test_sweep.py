"""`python -m train -m …`: every job a process of its own, and the same command goes on where a sweep was stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.tortures.harness.outcome import last_step
from scripts.tortures.harness.workplace import Workplace
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.slow

RATES = ("0.001", "0.0001")


def command(runs: Workplace, place: Path, *more: str) -> list[str]:
    """A sweep over two learning rates."""
    settings = runs.settings(place / "${optim.lr}", optim__lr=",".join(RATES), max_steps="4")
    return [sys.executable, "-m", "train", "-m", *(f"{name}={value}" for name, value in settings.items()), *more]


def sweep(*words: str) -> tuple[int, str]:
    """Runs it to its end: exit code, and what it and its jobs said."""
    env = os.environ | {"WANDB_MODE": "disabled", "COLUMNS": "200"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def table(said: str) -> list[list[str]]:
    """The rows of the table at the end, without its headings."""
    return [line.split() for line in re.split(r"\nrun .*exit code *\n", said)[1].splitlines() if line]


def test_a_sweep_is_stopped_and_goes_on(runs: Workplace, tmp_path: Path) -> None:
    env = os.environ | {"WANDB_MODE": "disabled", "COLUMNS": "200"}
    long = command(runs, tmp_path, "max_steps=400")
    with (tmp_path / "said").open("w") as log:
        first = subprocess.Popen(long, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    while not (tmp_path / RATES[0] / "metrics.jsonl").exists() or last_step(tmp_path / RATES[0]) < 2:
        assert first.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # to the sweep alone: it hands it on
    assert first.wait(300) == 75
    stopped = table((tmp_path / "said").read_text())
    assert stopped[0][-1] == "75"
    assert stopped[1][-2:] == ["not", "begun"]
    assert not (tmp_path / RATES[1]).exists()
    assert list((tmp_path / RATES[0] / "checkpoints").iterdir())


def test_each_job_trains_in_its_own_directory_and_one_that_fails_stops_none(runs: Workplace, tmp_path: Path) -> None:
    in_the_way = tmp_path / RATES[0]
    in_the_way.mkdir()
    (in_the_way / "thesis.txt").write_text("years of work")
    code, said = sweep(*command(runs, tmp_path))
    assert code == 2, said
    assert "thesis.txt is there" in said
    assert [row[-1] for row in table(said)] == ["2", "0"]

    (in_the_way / "thesis.txt").unlink()
    code, said = sweep(*command(runs, tmp_path))
    assert code == 0, said
    assert f"{tmp_path}/{RATES[1]}: the run is finished" in said
    losses = []
    for rate, row in zip(RATES, table(said), strict=True):
        receipt = json.loads((tmp_path / rate / "receipt.json").read_text())
        assert receipt["settings"]["optim"]["lr"] == float(rate)
        lines = [json.loads(line) for line in (tmp_path / rate / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert row[:4] == [f"{tmp_path}/{rate}", rate, "4", f"{losses[-1][-1]:.4f}"]
        assert row[-1] == "0"
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]
