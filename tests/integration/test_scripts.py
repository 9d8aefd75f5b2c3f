"""Every benchmark that trains, and every torture, runs once at its smallest; what they find at full size is kept in
scripts/benchmarks/results and scripts/tortures/results."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.tortures import network
from scripts.tortures.harness import disks
from scripts.tortures.harness.workplace import Workplace

from .conftest import ROOT, run

SMALL = ("--hidden", "64", "--intermediate", "96", "--layers", "1", "--heads", "4", "--lora-rank", "2", "--row", "128")
SAMPLE = ("--data", str(ROOT / "data" / "sample" / "identity.jsonl"))

pytestmark = pytest.mark.slow


def measured(tmp_path: Path, name: str, *options: str) -> dict[str, Any]:
    """The figures of `python scripts/benchmark.py NAME …`."""
    figures = tmp_path / "figures.json"
    once = ("--steps", "1", "--warmup", "1", "--device", "cpu", "--threads", "1", "--json", str(figures))
    run(sys.executable, "scripts/benchmark.py", name, *SAMPLE, *SMALL, *once, *options)
    return dict(json.loads(figures.read_text())["figures"])


def test_step_compares_both_trainers(tmp_path: Path) -> None:
    figures = measured(tmp_path, "step")
    assert figures["failed"] == []
    assert figures["tokens_per_second"].keys() == figures["losses"].keys() == {"ours", "trl"}


def test_save_compares_both_ways(tmp_path: Path) -> None:
    figures = measured(tmp_path, "save", "--rounds", "1")
    for of in ("adapters", "whole_model"):
        assert figures[of]["bytes"].keys() == figures[of]["paused"].keys() == {"ours", "deepspeed"}


def test_compiled_compares_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for three kernels
    assert measured(tmp_path, "compiled")["median_seconds"].keys() == {"plain", "compiled"}


def test_gpu_runs_every_part_at_small_sizes(tmp_path: Path) -> None:
    """The same code as on a GPU, but for the sizes; the tests for GPUs are all skipped."""
    file = tmp_path / "figures.json"
    run(sys.executable, "scripts/benchmark.py", "gpu", "--device", "cpu", "--minutes", "20", "--json", str(file))
    figures = json.loads(file.read_text())["figures"]
    assert "skipped" in figures["tests"]["said"]
    assert figures["ways"].keys() == {"64", "128"}
    assert figures["block"]["median_ms"].keys() == {"ours", "frozen", "peft"}  # by `benchmark.py experts`
    assert figures["block"]["speedup_over_peft"] > 0
    for part in ("step", "zero3", "generate"):
        assert figures[part]["tokens_per_second"] > 0, figures[part]
    assert figures["step"]["memory_gb"]["weights and factors"] > 0
    assert figures["arithmetic"]["seconds"] > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("damage", ("--flips", "2", "--only", "newest two|^all$")),
        ("disk", ("--offsets", "0", "--only", "result")),
        ("kill", ("--points", "4", "--processes", "1")),
        ("long", ("--steps", "20", "--every", "10", "--windows", "4", "--growth", "9")),
        ("network", ("--only", "silence of 5")),
        ("peers", ("--only", "SIGKILL to . of 2 in backward")),
        ("planted", ("--only", "a careless program|a recipe with a tag")),
        ("signals", ("--trials", "0", "--only", "starting")),
        ("size", ("--layers", "1", "--hidden", "64", "--lora-rank", "4", "--weights", "bf16")),
    ],
)
def test_torture(runs: Workplace, name: str, options: tuple[str, ...]) -> None:
    """On the base, rows and fork server of the other tests; `scripts/torture.py NAME` is this and a receipt, as that of
    `files` shows in test_files.py."""
    needed = {"disk": disks.why_not, "network": network.why_not}
    if name in needed and (reason := needed[name]()):
        pytest.skip(reason)
    torture = importlib.import_module(f"scripts.tortures.{name}")
    parser = argparse.ArgumentParser()
    torture.arguments(parser)
    figures = torture.run(parser.parse_args([*options, "--forked", "--scratch", str(runs.scratch)]))
    assert figures["failed"] == []
