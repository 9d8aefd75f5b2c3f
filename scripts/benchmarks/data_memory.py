"""The memory that python -m data needs for a million ShareGPT rows, all of its processes together.

The rows are synthetic, in a JSON array in one line, with the size of OpenHermes 2.5, whose file openhermes2_5.json has
1,936,276,651 bytes and 1,001,551 rows, with 1,588 bytes of text each on average. How lengths spread around that is our
choice, log-normal with sigma 1; words follow Zipf's law.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from configs.program.errors import UserError
from data.prepared.layout import read_manifest

ROOT = Path(__file__).parents[2]
MEAN_TEXT = 1588
SIGMA = 1.0
WORDS = 200_000
POOL = 32 << 20
"""Bytes of text from which the rows are cut."""
FEW = 10_000
"""Rows below which both are fewer, in proportion: making them would take most of the time."""

SAMPLING = 0.05
"""Seconds between two looks at the memory."""

console = Console()


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py data_memory`."""
    parser.add_argument("--rows", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="as the setting of python -m data")
    parser.add_argument("--settings", nargs="*", default=[], help="further settings, such as duplicates=drop")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the greatest resident memory and the time."""
    with tempfile.TemporaryDirectory() as scratch:
        rows, output = Path(scratch) / "rows.json", Path(scratch) / "out"
        write(rows, options.rows)
        size = rows.stat().st_size
        settings = [f"files=[{rows}]", f"output={output}", "seq_len=4096", f"workers={options.workers}"]
        command = [sys.executable, "-m", "data", *settings, *options.settings]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        peak, processes = watch(process)
        seconds = time.perf_counter() - started
        if process.returncode:
            assert process.stderr is not None
            raise UserError(
                f"--rows={options.rows}: preparing failed; {process.stderr.read().strip().splitlines()[-1]}"
            )
        manifest = read_manifest(output)
    tokens = manifest["train"]["tokens"] + manifest["eval"]["tokens"]
    table = Table(title=f"{options.rows:,} rows, {size / 1e9:.2f} GB, {tokens:,} tokens", title_justify="left")
    for heading in ("resident, all processes", "processes", "seconds", "rows/s", "packing efficiency"):
        table.add_column(heading, justify="right")
    efficiency = manifest["train"]["efficiency"]
    rate = options.rows / seconds
    table.add_row(f"{peak / 2**30:.2f} GiB", f"{processes}", f"{seconds:.0f}", f"{rate:,.0f}", f"{efficiency:.3%}")
    console.print(table)
    return {
        "rows": options.rows,
        "bytes": size,
        "tokens": tokens,
        "kept": manifest["rows"]["kept"],
        "settings": options.settings,
        "peak_resident_bytes": peak,
        "processes": processes,
        "seconds": seconds,
        "efficiency": efficiency,
    }


def watch(process: "subprocess.Popen[str]") -> tuple[int, int]:
    """The largest sum of resident bytes of a process and its children while it runs, and how many processes."""
    peak, most = 0, 0
    top = psutil.Process(process.pid)
    while process.poll() is None:
        resident = []
        for member in [top, *top.children(recursive=True)]:
            try:
                resident.append(member.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        peak, most = max(peak, sum(resident)), max(most, len(resident))
        time.sleep(SAMPLING)
    return peak, most


def write(path: Path, rows: int) -> None:
    """A JSON array of ShareGPT rows."""
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, row in enumerate(synthetic(rows)):
            file.write(("" if number == 0 else ", ") + json.dumps(row))
        file.write("]\n")


def synthetic(rows: int) -> Iterator[dict[str, Any]]:
    """Conversations of one to three turns, a third of the text in the prompts."""
    rng = np.random.default_rng(0)
    pool = text(rng, min(1.0, rows / FEW))
    sizes = rng.lognormal(np.log(MEAN_TEXT) - SIGMA**2 / 2, SIGMA, rows)
    turns = rng.choice([1, 1, 1, 2, 3], rows)
    for size, number in zip(sizes.tolist(), turns.tolist(), strict=True):
        conversation = []
        for speaker, share in (("human", 1 / 3), ("gpt", 2 / 3)) * number:
            length = max(8, int(size * share / number))
            start = int(rng.integers(0, max(1, len(pool) - length)))
            conversation.append({"from": speaker, "value": pool[start : start + length].strip() or "yes"})
        yield {"conversations": conversation, "source": "synthetic", "category": None, "system_prompt": None}


def text(rng: np.random.Generator, share: float) -> str:
    """Words of two to ten letters, common ones often: that share of `POOL`, of that share of `WORDS`."""
    number, size = round(share * WORDS), round(share * POOL)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    shapes = rng.integers(2, 11, number)
    words = np.array(["".join(rng.choice(letters, n)) for n in shapes])
    weights = 1 / np.arange(1, number + 1)
    drawn = words[rng.choice(number, size // 7, p=weights / weights.sum())]
    ends = rng.choice([" ", " ", " ", " ", " ", " ", " ", ", ", ". ", "\n"], len(drawn))
    return "".join(np.char.add(drawn, ends).tolist())[:size]
