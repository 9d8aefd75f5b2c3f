"""One checkpoint: how long training stands still, ours against DeepSpeed's own save_checkpoint.

Both save the adapters, and a whole model, on the same engine in turn. A save costs training its pause, and the time by
which later steps are slower while a thread still writes. Both are counted, over as many steps after each kind of save.
Ours is forced to the disk and hashed before it counts; DeepSpeed's is pickled and left to the page cache.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import step as step_benchmark
from benchmarks.harness.trainers import Settings
from data.prepared.dataset import PreparedDataset
from train.config.engine import DeepSpeedConfig, HardwareConfig
from train.config.lora import LoraConfig
from train.config.model import ModelConfig
from train.config.train import LoggingConfig, TrainConfig
from train.engine.engine import Engine
from train.engine.processes import Processes, join_processes, leave_processes
from train.engine.shards import allocator_for
from train.health import Health
from train.history import History
from train.loop import step
from train.model.loss import MixtralWithLoss
from train.model.mixtral import build
from train.reporting.metrics import Metrics
from train.saving import checkpoint
from train.saving.identity import Inputs
from train.saving.receipt import record_launch
from train.saving.run_directory import RunDirectory
from train.saving.saver import Saver

RATE = 1e-4
console = Console(width=120)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `benchmark.py step`, whose model and rows these are."""
    step_benchmark.arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind (5)")
    parser.set_defaults(stage=3, steps=6, warmup=3)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        settings, _ = step_benchmark.prepare(options, Path(scratch))
        processes = join_processes(HardwareConfig(device=options.device, threads=options.threads))
        figures: dict[str, Any] = {"settings": step_benchmark.shown(options)}
        for name, lora in {
            "adapters": LoraConfig(rank=options.lora_rank, alpha=2 * options.lora_rank),
            "whole_model": LoraConfig(method="none"),
        }.items():
            figures[name] = _measure(options, settings, lora, processes, Path(scratch) / name)
            _print(name, figures[name])
        leave_processes()
    return figures


def _measure(
    options: argparse.Namespace, settings: Settings, lora: LoraConfig, processes: Processes, scratch: Path
) -> dict[str, Any]:
    """One engine, with steps alone, and with either kind of save before them."""
    config = TrainConfig(
        dataset=settings.dataset,
        run_dir=str(scratch / "run"),
        global_batch=options.rows_per_step,
        micro_batch=options.rows_per_step,
        activation_checkpointing="full" if options.checkpointing else "none",
        keep_last=1,
        model=ModelConfig(path=settings.model, dtype=options.dtype),
        lora=lora,
        deepspeed=DeepSpeedConfig(stage=options.stage),
        logging=LoggingConfig(progress=False, wandb="off"),
        hardware=HardwareConfig(device=options.device, threads=options.threads),
    )
    config.check()
    dataset, batch, health = PreparedDataset(config.dataset), config.batch(processes.count), Health(config.failures)
    model = build(config, allocator_for(config, batch, processes.device), device=processes.device)
    trainer = Engine(MixtralWithLoss(model, with_router_loss=True), config, batch, processes)
    directory = RunDirectory(config, dataset.directory, processes)
    inputs = Inputs(config, dataset)
    rows_in_all = len(dataset.train)
    record = record_launch(directory, config, batch, inputs, processes, training_rows=rows_in_all, expected={})
    directory.create(record.config_yaml)
    metrics = Metrics(directory.path, config.logging, {}, is_main=processes.is_main)
    saver = Saver(directory, record, trainer, History(), metrics, health)
    trainer.train()
    taken = 0
    rows = settings.order(len(dataset.train))[: options.rows_per_step]  # the same in every step: so are the costs

    def one_step() -> float:
        nonlocal taken
        taken += 1
        started = time.perf_counter()
        step(trainer, [dataset.train.batch(rows)], taken, RATE, config)
        return time.perf_counter() - started

    def ours() -> None:
        saver.checkpoint(taken)

    def deepspeeds() -> None:
        trainer._engine.save_checkpoint(str(scratch / "deepspeed"), tag="it", exclude_frozen_parameters=True)

    def paused_and_slowed(save: Callable[[], None], base: float) -> tuple[float, float]:
        started = time.perf_counter()
        save()
        paused = time.perf_counter() - started
        return paused, sum(one_step() - base for _ in range(options.steps))

    for _ in range(options.warmup):
        one_step()
    costs: dict[str, list[tuple[float, float]]] = {"ours": [], "deepspeed": []}
    bases = []
    size: dict[str, int] = {}
    for number in range(options.rounds + 1):
        base = statistics.median(one_step() for _ in range(options.steps))
        for name, save in sorted({"ours": ours, "deepspeed": deepspeeds}.items(), reverse=bool(number % 2)):
            cost = paused_and_slowed(save, base)
            saver.wait()
            if number:  # the first of each warms up
                costs[name].append(cost)
        bases.append(base)
        size = {"ours": _bytes(checkpoint.paths(directory.path)[0]), "deepspeed": _bytes(scratch / "deepspeed")}
        shutil.rmtree(scratch / "deepspeed")
    metrics.close()
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    figures = {
        "trained_parameters": sum(math.prod(shape) for shape in trainer.shapes.values()),
        "bytes": size,
        "step_seconds": statistics.median(bases),
        "paused_seconds": {name: [paused for paused, _ in all_] for name, all_ in costs.items()},
        "slowed_seconds": {name: [slowed for _, slowed in all_] for name, all_ in costs.items()},
        "on_the_disk_after_seconds": [line["checkpoint_seconds"] for line in lines][1:],
        "paused": {name: statistics.median(paused for paused, _ in all_) for name, all_ in costs.items()},
        "lost": {name: statistics.median(map(sum, all_)) for name, all_ in costs.items()},
    }
    pairs = list(zip(costs["ours"], costs["deepspeed"], strict=True))
    figures["pause_ratio"] = statistics.median(a[0] / b[0] for a, b in pairs)
    return figures


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _print(name: str, figures: dict[str, Any]) -> None:
    table = Table("", "ours", "DeepSpeed's", title=f"A checkpoint of {name.replace('_', ' ')}")
    both = ("ours", "deepspeed")
    table.add_row("training stands still, s", *(f"{figures['paused'][which]:.3f}" for which in both))
    table.add_row("training loses in all, s", *(f"{figures['lost'][which]:.3f}" for which in both))
    table.add_row("MB", *(f"{figures['bytes'][which] / 1e6:,.1f}" for which in both))
    console.print(table)
    written = statistics.median(figures["on_the_disk_after_seconds"])
    console.print(
        f"{figures['trained_parameters']:,} trained parameters, steps of {figures['step_seconds']:.2f} s; "
        f"ours is on the disk after {written:.2f} s"
    )
