"""What one GPU can't show: NCCL, gathers and streams with a peer, a model over several devices. Skipped with fewer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.adapters import KINDS, make_adapter, make_base

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]

ROOT = Path(__file__).parents[2]
STEPS = 6


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def program(*arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings of a run on a small base, all but how it is divided."""
    top = tmp_path_factory.mktemp("two_gpus")
    program("data", "data=sample_general", f"output={top}/prepared")
    common = ("logging=quiet", "hardware=cuda", f"dataset={top}/prepared")
    program("train", "recipe=quickstart_base", *common, "max_steps=20", f"run_dir={top}/base")
    how = (f"model.path={top}/base/model", "model.dtype=float32", f"max_steps={STEPS}", "eval_every=2", "optim.lr=1e-3")
    return ("recipe=quickstart", *common, *how)


def train(run_dir: Path, processes: int, *settings: str, bound: bool = False) -> list[float]:
    """The losses of a run; `bound`: each process sees its own GPU alone."""
    there = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    there["MASTER_PORT"] = port()
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | there
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | ({"CUDA_VISIBLE_DEVICES": str(rank)} if bound else {})
        command = [sys.executable, "-m", "train", *settings, f"run_dir={run_dir}"]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment | own))
    assert [process.wait(500) for process in started] == [0] * processes
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def alone(start: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train(tmp_path_factory.mktemp("alone") / "run", 1, *start, "deepspeed=none")


@pytest.mark.parametrize("persistence", [0, 10_000, 20_000_000])
@pytest.mark.parametrize("what", ["none", "attention", "full"])
def test_two_gpus_give_the_losses_of_one(
    start: tuple[str, ...], alone: list[float], tmp_path: Path, persistence: int, what: str
) -> None:
    how = (f"deepspeed.persistence_threshold={persistence}", f"activation_checkpointing={what}")
    assert train(tmp_path / "run", 2, *start, *how) == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_gpus_that_are_bound_one_to_a_task_are_used(
    start: tuple[str, ...], alone: list[float], tmp_path: Path, zero: str
) -> None:
    losses = train(tmp_path / "run", 2, *start, f"deepspeed={zero}", bound=True)
    assert losses == pytest.approx(alone, rel=1e-3)


def test_a_batch_is_answered_by_a_model_on_two_gpus(tmp_path: Path) -> None:
    base = make_base(torch.bfloat16, vocab_size=32_000, hidden_size=64)
    base.save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **KINDS["all"])
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"instruction": f"Say {n}."}) + "\n" for n in range(5)))
    model = (f"base={tmp_path}/base", f"adapter={tmp_path}/adapter", "max_new_tokens=8", "device=cuda")
    for device_map in ("auto", "balanced"):
        output = tmp_path / f"{device_map}.jsonl"
        program(
            "inference",
            "task=batch",
            *model,
            f"input={tmp_path}/in.jsonl",
            f"output={output}",
            f"device_map={device_map}",
        )
        assert len(output.read_text().splitlines()) == 5
