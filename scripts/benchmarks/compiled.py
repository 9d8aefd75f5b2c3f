"""One training step of ours as it is, against the same with torch.compile on norms and rotary embedding.

Nothing else could gain: the rest of a step is matrix products, in the library's own kernels. Each of the two runs in a
process of its own, in turn, on the same weights and rows; warming up is timed apart.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import step
from benchmarks.step import Trainer

console = Console(width=120)
NAMES = ("plain", "compiled")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set: the same as for `step`."""
    step.arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the figures."""
    step.check(options)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        settings, _ = step.prepare(options, Path(scratch))
        trainers = {name: Trainer("ours", replace(settings, compiled=name == "compiled")) for name in NAMES}
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        for number in range(options.warmup + options.steps):
            for name in sorted(NAMES, reverse=bool(number % 2)):
                seconds[name].append(trainers[name].step()["seconds"])
        for trainer in trainers.values():
            trainer.end()
    timed = {name: took[options.warmup :] for name, took in seconds.items()}
    figures = {
        "settings": step.shown(options),
        "seconds": seconds,
        "median_seconds": {name: statistics.median(took) for name, took in timed.items()},
        "warmup_seconds": {name: sum(took[: options.warmup]) for name, took in seconds.items()},
        "speedup": statistics.median(a / b for a, b in zip(timed["plain"], timed["compiled"], strict=True)),
    }
    table = Table("", *NAMES, title="One training step, with torch.compile on norms and rotary embedding and without")
    table.add_row("a step, s (median)", *(f"{figures['median_seconds'][name]:.3f}" for name in NAMES))
    table.add_row(f"the first {options.warmup}, s", *(f"{figures['warmup_seconds'][name]:.1f}" for name in NAMES))
    console.print(table)
    console.print(f"Compiled it is {figures['speedup']:.2f} times as fast")
    return figures
