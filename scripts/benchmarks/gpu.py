"""One GPU, found out in minutes: do the tests pass on it, how fast is a step of Mixtral's own size, what fits.

Weights are random and made on the device; neither a network nor a download is needed. What it will do is printed first.
What there is no time or memory for is left out, with a line. With --device cpu the same code runs at small sizes.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.program.errors import UserError

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "tokenizers", "hydra", "pytest", "hypothesis")
RESERVE = 10.0
"""Seconds that are kept for what follows the last measurement."""
TORCH = (2, 11)
PYTHON = (3, 11)
MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
SHARDED_LAYERS = 8
"""Layers of the step under ZeRO-3, which on one GPU gathers what is there already: a few show as much as all."""
RATES = {"H100": (600, 2.4), "H200": (600, 3.6), "A100": (230, 1.5)}
"""TFLOP/s and TB/s for the arithmetic, by a GPU's name: what products and memory are known to reach. Others are taken
for an H100."""
console = Console(width=120)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set."""
    parser.add_argument("--minutes", type=float, default=10, help="that all of it may take (10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data", default="data/sample/general.jsonl", metavar="FILE", help="rows to train on")


class Minutes:
    """What is left of them."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes - RESERVE

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the figures."""
    check(options)
    minutes = Minutes(options.minutes)
    on_cuda = options.device == "cuda"
    sizes, row = (MIXTRAL, 4096) if on_cuda else (SMALL, 128)
    figures: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(options).items()}}
    figures["gpu"] = gpu = name_and_memory(on_cuda)
    layers = layers_that_fit(sizes, row, gpu["gigabytes"]) if on_cuda else sizes["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as scratch:
        common = {
            "device": options.device,
            "dataset": f"{scratch}/rows",
            "seconds": 12 if on_cuda else 0.2,
            "tokens": [4096, 16384] if on_cuda else [64, 128],
            "new_tokens": 64 if on_cuda else 8,
        }
        parts = plan(common, sizes, layers, on_cuda)
        announce(parts, options, gpu)
        prepare(options, row, scratch, minutes)
        for part in parts:
            figures[part["name"]] = found = measure(part, minutes, scratch)
            console.print(f"{part['name']}: {json.dumps(found)}", soft_wrap=True)
    figures["arithmetic"] = arithmetic(figures)
    compare(figures)
    return figures


def check(options: argparse.Namespace) -> None:
    """Raises `UserError` if Python, a package or the GPU is missing."""
    if sys.version_info < PYTHON:
        raise UserError(f"Python {sys.version.split()[0]}: it takes {PYTHON[0]}.{PYTHON[1]} or newer")
    on_cuda = options.device == "cuda"
    missing = [
        name for name in (*PACKAGES, *(("triton",) if on_cuda else ())) if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(f"packages that are not installed: {', '.join(missing)}; scripts/install.sh installs them all")
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH:
        raise UserError(f"torch {torch.__version__}: it takes {TORCH[0]}.{TORCH[1]} or newer")
    if on_cuda and not torch.cuda.is_available():
        raise UserError(
            "--device=cuda: torch finds no GPU that it can use; give --device cpu for a trial at small sizes"
        )
    if not (ROOT / options.data).is_file():
        raise UserError(f"--data={options.data}: there is no such file; name a file of instruction or chat rows")


def name_and_memory(on_cuda: bool) -> dict[str, Any]:
    """Memory of the GPU, and what is free on it."""
    import torch

    if not on_cuda:
        return {"name": "none", "gigabytes": 0.0}
    return {"name": torch.cuda.get_device_name(), "gigabytes": torch.cuda.mem_get_info()[0] / 1e9}


def layers_that_fit(sizes: dict[str, int], row: int, gigabytes: float) -> int:
    """By arithmetic: the weights and what is kept of a row for each layer, beside what there is once."""
    per_layer, once = memory_of(sizes, row)
    return max(1, min(sizes["num_hidden_layers"], int((gigabytes - once) / per_layer)))


def memory_of(sizes: dict[str, int], row: int) -> tuple[float, float]:
    """GB that a layer takes: weights, factors with masters, moments and gradients, activations; and GB that are taken
    once: embedding, head, a layer's backward, CUDA and cuBLAS."""
    from benchmarks.traffic import kept_by_a_layer

    hidden, inner, experts = (sizes[name] for name in ("hidden_size", "intermediate_size", "num_local_experts"))
    key_value = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    weights = experts * 3 * hidden * inner + 2 * hidden * hidden + 2 * hidden * key_value
    factors = 16 * (experts * (2 * hidden + 3 * inner) + 2 * (2 * hidden + hidden + key_value))
    per_layer = (2 * weights + 20 * factors + kept_by_a_layer(row)) / 1e9
    return per_layer, 2 * 2 * 32_000 * hidden / 1e9 + 6.0


def plan(common: dict[str, Any], sizes: dict[str, int], layers: int, on_cuda: bool) -> list[dict[str, Any]]:
    """The parts in their order: what each does, the seconds that it takes at least, and its command's settings."""
    of_all = common | {"sizes": sizes | {"num_hidden_layers": layers}}
    fewer = common | {"sizes": sizes | {"num_hidden_layers": min(layers, SHARDED_LAYERS)}, "stage": 3}
    block = ["--device", common["device"], "--steps", "10" if on_cuda else "1", "--warmup", "3" if on_cuda else "0"]
    if not on_cuda:
        block += ["--hidden", "64", "--intermediate", "64", "--tokens", "64", "--lora-rank", "2", "--threads", "1"]
    tokens = " and ".join(f"{number:,}" for number in common["tokens"])
    least = 1.0 if on_cuda else 0.1
    return [
        {"name": "tests", "does": "tests/gpu, in at most half of the time", "least": 60 * least},
        {
            "name": "ways",
            "does": f"a block by the grouped product and by the loop, {tokens} tokens",
            "least": 40 * least,
        }
        | {"settings": of_all},
        {
            "name": "block",
            "does": "a block against PEFT's wrapper and the frozen one",
            "least": 40 * least,
            "options": block,
        },
        {
            "name": "step",
            "does": f"a training step of {layers} layers, ZeRO-2",
            "least": 60 * least,
            "settings": of_all,
        },
        {"name": "generate", "does": f"{common['new_tokens']} tokens by {layers} layers", "least": 40 * least}
        | {"settings": of_all},
        {
            "name": "zero3",
            "does": f"a training step of {fewer['sizes']['num_hidden_layers']} layers, ZeRO-3",
            "least": 40 * least,
        }
        | {"settings": fewer},
    ]


def announce(parts: list[dict[str, Any]], options: argparse.Namespace, gpu: dict[str, Any]) -> None:
    """Prints what will be done."""
    console.print(f"On {gpu['name']}, {gpu['gigabytes']:.0f} GB free, in {options.minutes:g} minutes or less:")
    for part in ({"name": "rows", "does": f"prepares {options.data}"}, *parts):
        console.print(f"  {part['name']:<9} {part['does']}")


def prepare(options: argparse.Namespace, row: int, scratch: str, minutes: Minutes) -> None:
    """Real rows; none if there is no time, as then there is none for what needs them.

    Raises:
        UserError: they can't be prepared, or not in time.
    """
    if minutes.seconds_left <= 0:
        return
    files, output = f"files=[{options.data}]", f"output={scratch}/rows"
    command = [sys.executable, "-m", "data", files, f"seq_len={row}", output, "workers=1"]
    try:
        done = finished(command, minutes.seconds_left)
    except subprocess.TimeoutExpired as expired:
        raise UserError(f"--minutes={options.minutes:g}: preparing rows takes longer; give more") from expired
    if done.returncode:
        raise UserError(f"--data={options.data}: {done.stderr.strip().splitlines()[-1]}")


def finished(command: list[str], seconds: float, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end. If its time is over, or this program ends, it is killed with all that it has started:
    a test's own processes would keep the GPU's memory."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(**more), start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def measure(part: dict[str, Any], minutes: Minutes, scratch: str) -> dict[str, Any]:
    """The figures of a part; or why there are none."""
    left = minutes.seconds_left
    if left < part["least"]:
        return {"left_out": f"it takes {part['least']:.0f} s, and {max(left, 0):.0f} s are left"}
    try:
        if part["name"] == "tests":
            return of_tests(left / 2)
        if part["name"] == "block":
            return of_block(part["options"], left, Path(scratch))
        return of_child(part, left)
    except subprocess.TimeoutExpired as expired:
        return {"left_out": f"it did not end in {expired.timeout:.0f} s"}


def environment(**more: str) -> dict[str, str]:
    """The environment of the processes: alone on this GPU, with this checkout, without a hub."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    launch = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
    kept = {name: value for name, value in os.environ.items() if name not in launch}
    return kept | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"} | more


def of_tests(seconds: float) -> dict[str, Any]:
    """The last line of pytest, and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    done = finished(command, seconds)
    lines = done.stdout.strip().splitlines() or [done.stderr]
    return {"said": lines[-1], "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}


def of_block(options: list[str], seconds: float, scratch: Path) -> dict[str, Any]:
    """The figures of `benchmark.py experts`."""
    file = scratch / "block.json"
    command = [sys.executable, "scripts/benchmark.py", "experts", *options, "--json", str(file)]
    done = finished(command, seconds)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-3:]}
    figures = json.loads(file.read_text())["figures"]
    names = ("median_ms", "speedup_over_peft", "over_the_frozen_floor", "share_of_peak", "memory_above_model_mib")
    return {name: figures[name] for name in names}


def of_child(part: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The figures of a part in a process of its own; with fewer layers if those that should fit don't."""
    settings = dict(part["settings"])
    name = "step" if part["name"] == "zero3" else part["name"]
    end = time.monotonic() + seconds
    while True:
        command = [sys.executable, "-P", "-m", "benchmarks.harness.gpu_parts", name, json.dumps(settings)]
        on_cpu = {"DS_ACCELERATOR": "cpu"} if settings["device"] == "cpu" else {}
        done = finished(command, max(1.0, end - time.monotonic()), **on_cpu)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            return {"failed": done.stderr.strip().splitlines()[-3:]}
        figures: dict[str, Any] = json.loads(lines[-1])
        layers = settings["sizes"]["num_hidden_layers"]
        if not figures.get("out_of_memory") or layers <= 2:
            return figures
        console.print(f"{part['name']}: {layers} layers don't fit; trying {layers - 2}")
        settings["sizes"] = settings["sizes"] | {"num_hidden_layers": layers - 2}


def arithmetic(figures: dict[str, Any]) -> dict[str, Any]:
    """What bytes and operations make one expect, counted at Mixtral's size without a GPU by `benchmark.py traffic`."""
    from benchmarks.traffic import expected

    name = next((name for name in RATES if name in figures["gpu"]["name"]), "H100")
    layers, row = figures["step"].get("layers", MIXTRAL["num_hidden_layers"]), 4096
    per_layer, once = memory_of(MIXTRAL, row)
    tflops, terabytes = RATES[name]
    rates = {"gpu": name, "layers": layers, "tflops": tflops, "terabytes_per_second": terabytes}
    return rates | expected(row, layers, tflops, terabytes) | {"memory_gb": per_layer * layers + once}


def compare(figures: dict[str, Any]) -> None:
    """Prints what was measured beside the arithmetic."""
    step, expected = figures["step"], figures["arithmetic"]
    if "seconds" not in step:
        console.print("There is no step to compare with the arithmetic")
        return
    by_arithmetic = f"by arithmetic, {expected['layers']} layers of Mixtral on an {expected['gpu']}"
    table = Table("", "measured", by_arithmetic, title=f"A training step of {step['layers']} layers, one row")
    for name, said, digits in (
        ("seconds", "seconds", 3),
        ("tokens_per_second", "tokens/s", 0),
        ("share_of_peak", "needed work, of what products reach", 3),
    ):
        table.add_row(said, f"{step[name]:,.{digits}f}", f"{expected[name]:,.{digits}f}")
    table.add_row("GB at the peak", f"{step['memory_gb']['peak']:.1f}", f"{expected['memory_gb']:.1f}")
    console.print(table)
    for part, gigabytes in step["memory_gb"].items():
        console.print(f"  {part}: {gigabytes:.2f} GB")
