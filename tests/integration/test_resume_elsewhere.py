"""Runs that go on under other conditions: fewer processes, all parameters, nothing sharded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Quickstart, evaluations, steps, train, typed
from train.failures.signals import EXIT_PREEMPTED

pytestmark = pytest.mark.slow

STEPS, STOPPED_AT = 6, 3
LIMIT = 300.0


def settings(quickstart: Quickstart, recipe: str, *more: str) -> tuple[str, ...]:
    how = ("global_batch=2", f"max_steps={STEPS}", "save_every=2", "failures.grace=100", *more)
    return (f"recipe={recipe}", f"dataset={quickstart.sample}", f"model.path={quickstart.base_run}/model", *how)


def stopped(run: Path, *overrides: str) -> None:
    """A run of one process that gets SIGTERM after some steps."""
    command = [sys.executable, "-m", "train", "hardware=cpu", "logging=quiet", *overrides, f"run_dir={run}"]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < until:
            lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
            if sum('"loss"' in line for line in lines) >= STOPPED_AT:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == EXIT_PREEMPTED, told
    assert f"run_dir={run}" in " ".join(told.split())


def numbers(run: Path) -> tuple[list[float], list[float], dict[int, float]]:
    taken = steps(run)
    assert [step["step"] for step in taken] == list(range(1, STEPS + 1))
    return [step["loss"] for step in taken], [step["gradient_norm"] for step in taken], evaluations(run)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("quickstart", ("deepspeed=none", "lora.dropout=0.2", "eval_every=2")),
        ("quickstart_base", ("optim.weight_decay=0.1", "deepspeed=zero2")),
    ],
    ids=["adapters, no ZeRO, dropout", "all parameters, ZeRO-2"],
)
def test_the_result_is_that_of_a_run_that_never_stopped(
    quickstart: Quickstart, tmp_path: Path, recipe: str, more: tuple[str, ...]
) -> None:
    how = settings(quickstart, recipe, *more)
    train(1, *how, f"run_dir={tmp_path}/whole")
    stopped(tmp_path / "cut", *how)
    assert "Resuming" in train(1, *how, f"run_dir={tmp_path}/cut")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    name = "adapter/adapter_model.safetensors" if recipe == "quickstart" else "model/model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    places = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    trained = sum(file.stat().st_size for file in places[-1].glob("master.safetensors")) // 4
    size = sum(file.stat().st_size for file in places[-1].rglob("*") if file.is_file())
    assert size <= 1.1 * trained * (2 + 3 * 4)  # the parameters in bfloat16, masters, two moments
    assert "the run is finished" in train(1, *how, f"run_dir={tmp_path}/cut")


def test_other_numbers_of_processes_take_the_same_rows_to_the_same_losses(
    quickstart: Quickstart, tmp_path: Path
) -> None:
    """Two, then one that is stopped, then three, which divide no tensor evenly; with dropout, whose masks belong to the
    micro-batches."""
    how = settings(quickstart, "quickstart", "model.dtype=float32", "lora.dropout=0.2", "global_batch=6")
    train(2, *how, f"run_dir={tmp_path}/whole")
    stopped(tmp_path / "cut", *how)
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert json.loads((checkpoints[-1] / "trainer.json").read_text())["processes"] == 1
    train(3, *how, f"run_dir={tmp_path}/cut")
    for cut, whole in zip(numbers(tmp_path / "cut"), numbers(tmp_path / "whole"), strict=True):
        assert cut == pytest.approx(whole, rel=1e-5)


def test_processes_that_were_given_different_things_do_not_begin(quickstart: Quickstart, tmp_path: Path) -> None:
    how = settings(quickstart, "quickstart", "seed=${oc.env:RANK}")
    done = typed(2, *how, f"run_dir={tmp_path}/run", expect=2)
    assert "train: seed=1: that is what process 1 was given, and process 0 has 0; give all processes the same" in (
        done.stderr.splitlines()
    )
    assert not (tmp_path / "run").exists()
