"""The plan against what came: `task=plan` on this machine, then the run, of sixteen settings or more in one go.

Half of the settings are listed, half are drawn by a seed. Each is planned first, by all processes of its launch, and
run after. Memory is the peak of process 0: resident on the CPU, allocated on CUDA. A step's time is the median without
the first.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.load import make
from configs.program.errors import UserError
from configs.program.provenance import provenance
from data.disk.files import replace_file

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
GB = 1e9
SIZES = {
    "nano": {"hidden": 128, "intermediate": 256, "layers": 2},
    "small": {"hidden": 512, "intermediate": 1792, "layers": 4},
    "medium": {"hidden": 1024, "intermediate": 3584, "layers": 4},
    "Mixtral's widths": {"hidden": 4096, "intermediate": 14_336, "layers": 2},
}
"""Of the bases: 10, 120, 390 million and 3.2 billion parameters."""
MEMORY, SHORT, TIME = 0.10, 0.15, 0.20
"""What a plan may be off by: its peak in either direction, its peak below what was needed, a step's time."""
MEASURED = ("flops", "bandwidth", "link", "overhead", "layer", "beside")
"""Of the machine, what the plan measured."""
LARGE_TOKENS = {"small": 16_384, "medium": 8192, "Mixtral's widths": 1024}
"""Tokens of a step at most, a quarter of them in float32: on two cores more would take minutes a step."""


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    size: str
    stage: int = 0
    processes: int = 1
    micro_batch: int = 1
    row: int = 1024
    checkpointing: str = "none"
    rank: int = 16
    dtype: str = "bfloat16"
    weights: str = "bf16"
    offload: bool = False
    drawn: bool = False

    def __str__(self) -> str:
        form = "nf4" if self.weights == "nf4" else self.dtype
        zero = f"stage {self.stage}" + " offload" * self.offload
        layout = f"{self.processes} × {self.micro_batch} × {self.row:,}"
        return f"{self.size}, {form}, {zero}, {layout}, {self.checkpointing}, rank {self.rank}"

    def command(self, stock: "Stock") -> list[str]:
        """The arguments of the program, beside its task."""
        group = {0: "none", 2: "zero2", 3: "zero3"}[self.stage] + "_offload" * self.offload
        return [
            f"deepspeed={group}",
            f"model.path={stock.base(self.size)}",
            f"model.dtype={self.dtype}",
            f"model.weights={self.weights}",
            f"lora.rank={self.rank}",
            f"lora.alpha={2 * self.rank}",
            f"dataset={stock.dataset(self.row)}",
            f"micro_batch={self.micro_batch}",
            f"global_batch={self.micro_batch * self.processes}",
            f"activation_checkpointing={self.checkpointing}",
        ]


LISTED = (
    Setting("nano", row=512),
    Setting("nano", stage=3, processes=2, row=4096, rank=64),
    Setting("small", dtype="float32", micro_batch=2),
    Setting("small", stage=2, processes=2, micro_batch=4, row=512, checkpointing="full"),
    Setting("medium", stage=3, processes=2, micro_batch=2, checkpointing="attention", rank=8),
    Setting("medium", stage=3, offload=True, row=2048, checkpointing="full"),
    Setting("Mixtral's widths", row=512),
    Setting("Mixtral's widths", stage=3, row=1024, checkpointing="attention"),
)


def drawn(count: int, seed: int, *, nf4: bool) -> Iterator[Setting]:
    """That many settings by a seed, none of them twice."""
    dice, seen = random.Random(seed), set(LISTED)
    while count:
        size = dice.choice(tuple(SIZES))
        stage, offload = dice.choice(((0, False), (2, False), (3, False), (3, True)))
        form = dice.choice(("bfloat16", "bfloat16", "float32", *(["nf4"] if nf4 else [])))
        setting = Setting(
            size,
            stage=stage,
            offload=offload,
            processes=dice.choice((1, 2)),
            micro_batch=dice.choice((1, 2, 3, 4)),
            row=dice.choice((512, 1024, 2048, 4096)),
            checkpointing=dice.choice(("none", "attention", "full")),
            rank=dice.choice((8, 16, 32, 64)),
            dtype="float32" if form == "float32" else "bfloat16",
            weights="nf4" if form == "nf4" else "bf16",
            drawn=True,
        )
        large = setting.size == "Mixtral's widths"
        # Two processes of it, or one in float32, need more memory than a machine of 24 GB has.
        if large and (setting.processes > 1 or form == "float32"):
            continue
        tokens = setting.processes * setting.micro_batch * setting.row * (4 if form == "float32" else 1)
        if tokens > LARGE_TOKENS.get(size, tokens):
            continue
        if setting not in seen:
            seen.add(setting)
            count -= 1
            yield setting


@dataclass
class Stock:
    """Where bases and datasets are made, each once."""

    directory: Path
    files: list[str]
    _made: set[Path] = field(default_factory=set)

    def base(self, size: str) -> Path:
        """A random base."""
        path = self.directory / f"base-{tuple(SIZES).index(size)}"
        if path not in self._made:
            shutil.rmtree(path, ignore_errors=True)  # another launch may have made half of it
            make(path, **SIZES[size])
            self._made.add(path)
        return path

    def dataset(self, row: int) -> Path:
        """The files in rows of that many tokens."""
        path = self.directory / f"rows-{row}"
        if path not in self._made:
            settings = [f"files=[{','.join(self.files)}]", f"seq_len={row}", f"output={path}"]
            # Held-out rows would be evaluated before and after the steps, which with the large base takes minutes.
            _run([sys.executable, "-m", "data", *settings, "eval_fraction=0"])
            self._made.add(path)
        return path


class _Kept:
    """The figures of the settings that are done, by their text, in a file that is written after each."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        """Takes up what an earlier launch of the same code left.

        Raises:
            UserError: what is there is of another seed, of other steps or of other code.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "settings.json"
        code = provenance(())["commit"]
        self._record: dict[str, Any] = {"commit": code, "seed": options.seed, "steps": options.steps, "rows": {}}
        if options.seed is None:
            self._record["seed"] = random.SystemRandom().randrange(2**31)
        if self._path.is_file():
            there = json.loads(self._path.read_text())
            seed = there["seed"] if options.seed is None else options.seed
            wanted = {"commit": code, "steps": options.steps, "seed": seed}
            for name, value in wanted.items():
                if there[name] != value:
                    raise UserError(
                        f"--directory={directory}: its figures are of {name} {there[name]}, and this is {value}; name "
                        f"another directory"
                    )
            self._record = there

    @property
    def seed(self) -> int:
        """Of the drawn settings."""
        return int(self._record["seed"])

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The figures."""
        rows: dict[str, dict[str, Any]] = self._record["rows"]
        return rows

    def add(self, setting: str, row: dict[str, Any]) -> None:
        """Keeps those of one more."""
        self.rows[setting] = row
        replace_file(self._path, [json.dumps(self._record, indent=2).encode()])


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set."""
    files = [str(DATA / "gpteacher_codegen.json"), str(DATA / "alpaca_en_demo.json")]
    parser.add_argument("--data", nargs="+", default=files, metavar="FILE", help="rows, as `python -m data` takes them")
    parser.add_argument("--seed", type=int, help="of the drawn half; a new one unless given")
    parser.add_argument("--draw", type=int, default=len(LISTED), help=f"settings to draw ({len(LISTED)})")
    parser.add_argument(
        "--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), help="of all these, only some"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of a run, the first of which is not timed (5)")
    parser.add_argument("--directory", type=Path, help="where bases, datasets and figures are kept, to go on from them")
    parser.add_argument("--minutes", type=float, help="begin no setting after this many; the same command goes on")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Plans, runs, prints the table."""
    if missing := [file for file in options.data if not Path(file).is_file()]:
        raise UserError(f"--data={missing[0]}: there is no such file; name files of instruction or chat rows")
    if options.steps < 2:
        raise UserError(f"--steps={options.steps}: the first is not timed; give at least 2")
    from data.disk import nf4

    try:
        nf4.check_available("model.weights=nf4")
        has_nf4 = True
    except UserError:
        has_nf4 = False
    console = Console(width=150, highlight=False)
    with contextlib.ExitStack() as stack:
        directory = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept = _Kept(directory, options)
        settings = [*LISTED, *drawn(options.draw, kept.seed, nf4=has_nf4)]
        settings = [setting for setting in settings if setting.size in options.sizes]
        stock, until = Stock(directory, options.data), time.monotonic() + 60 * (options.minutes or math.inf)
        for number, setting in enumerate(settings):
            if str(setting) not in kept.rows:
                if time.monotonic() > until:
                    break
                kept.add(str(setting), _compare(setting, stock, options.steps, number))
            console.print(f"{number + 1} of {len(settings)}: {setting}: {_said(kept.rows[str(setting)])}")
        rows = [kept.rows[str(setting)] for setting in settings if str(setting) in kept.rows]
        seed = kept.seed
    figures: dict[str, Any] = {
        "seed": seed,
        "steps": options.steps,
        "left": len(settings) - len(rows),
        "settings": rows,
    }
    figures |= judged(rows)
    console.print(_table(rows))
    console.print(
        f"Peak memory within {MEMORY:.0%} in {figures['memory_within']} of {len(rows)}, more than {SHORT:.0%} short in "
        f"{figures['memory_short']}; a step's time within {TIME:.0%} in {figures['time_within']}."
    )
    return figures


def judged(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many plans came true."""
    return {
        "memory_within": sum(abs(row["memory_error"]) <= MEMORY for row in rows),
        "memory_short": sum(row["memory_error"] < -SHORT for row in rows),
        "time_within": sum(abs(row["time_error"]) <= TIME for row in rows),
    }


def _compare(setting: Setting, stock: Stock, steps: int, number: int) -> dict[str, Any]:
    """A setting planned and run."""
    command, written = setting.command(stock), stock.directory / f"plan-{number}.json"
    began = time.monotonic()
    _train([*command, "task=plan", f"plan.json={written}"], setting.processes)
    planning, plan = time.monotonic() - began, json.loads(written.read_text())
    directory = stock.directory / f"run-{number}"
    shutil.rmtree(directory, ignore_errors=True)  # a launch that was interrupted
    quiet = ["logging.wandb=off", "logging.progress=false", "plan.check=false", "logging.routing_every=0"]
    _train([*command, *quiet, f"max_steps={steps}", f"run_dir={directory}"], setting.processes)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    made = [line for line in lines if "seconds" in line]
    on_cuda = plan["machine"]["on_cuda"]
    planned = plan["memory"]["peak"] - plan["machine"]["runtime"] * on_cuda  # torch counts tensors alone there
    measured = max(line["memory_gib"] for line in made) * 2**30
    seconds = statistics.median(line["seconds"] for line in made[1:])
    tokens = statistics.mean(line["tokens"] for line in made[1:])
    return {
        **asdict(setting),
        "planned_memory": planned,
        "measured_memory": measured,
        "memory_error": planned / measured - 1,
        "where": plan["memory"]["where"],
        "planned_seconds": plan["step"]["seconds"],
        "measured_seconds": seconds,
        "measured_steps": [line["seconds"] for line in made],
        "time_error": plan["step"]["seconds"] / seconds - 1,
        "planned_tokens_per_second": plan["step"]["tokens_per_second"],
        "measured_tokens_per_second": tokens / seconds,
        "planning_took": planning,
        "took": time.monotonic() - began,
        "memory_parts": plan["memory"]["parts"],
        "step_parts": plan["step"]["parts"],
        "machine": {name: plan["machine"][name] for name in MEASURED},
    }


def _train(arguments: list[str], processes: int) -> None:
    program = [sys.executable, "-m", "train"]
    if processes > 1:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        program += ["-m", "train"]
    _run([*program, *arguments])


def _run(command: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def _said(row: dict[str, Any]) -> str:
    memory = f"{row['planned_memory'] / GB:.2f} of {row['measured_memory'] / GB:.2f} GB ({row['memory_error']:+.0%})"
    return f"{memory}, {row['planned_seconds']:.3g} of {row['measured_seconds']:.3g} s ({row['time_error']:+.0%})"


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("setting", title="Planned and measured")
    for name in ("GB planned", "measured", "", "s planned", "measured", ""):
        table.add_column(name, justify="right")
    for row in rows:
        setting = Setting(**{name: row[name] for name in asdict(LISTED[0])})
        memory = (
            f"{row['planned_memory'] / GB:.2f}",
            f"{row['measured_memory'] / GB:.2f}",
            f"{row['memory_error']:+.0%}",
        )
        times = (f"{row['planned_seconds']:.3g}", f"{row['measured_seconds']:.3g}", f"{row['time_error']:+.0%}")
        table.add_row(f"{setting}{' (drawn)' * setting.drawn}", *memory, *times)
    return table
