"""Resuming at size: a base of 20 GB and a checkpoint of 2 GB, on two processes, with `failures.peer_timeout=5`.

The base has fourteen layers of half of Mixtral-8x7B's widths, stored in float32. Its files are sparse: each tensor
begins with a mebibyte of random numbers, the rest is a hole, which reads as zeros and takes no disk; the embedding is
random as a whole. So all of it is hashed and read, and a small machine has room for it. It is held in four bits unless
`--weights=bf16`, for the same reason. The routers are zeros, so every token goes to the same two experts of a layer:
the others are read and held, and cost a step no time. What trains are the default adapters, of a rank that makes a
checkpoint as large as is wanted.

A run goes to its end and saves after every step. Then what it left after its first checkpoint is taken away, as if it
had been killed there, and the same command goes on. It must resume after that step and end with the same losses and
the same adapter, to the last bit; a log must show what is hashed and read, and how much of it; no process may be given
up; and none may hold more than it has to. Of that, a limit follows for each stage from what the run is made of:

    hashing     nothing but blocks of what is read
    loading     its share of the base, and the adapters whole
    finding     (making the engine, hashing checkpoints) that, its share of the optimizer's state, the largest tensors
    restoring   (and training) that, what is gathered and dequantised, and on process 0 the copy that is being saved
"""

import argparse
import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import MixtralConfig

from data.disk import nf4
from data.disk.loading.model import EMBEDDING
from data.disk.loading.progress import WORTH_A_LINE
from data.disk.tensor_file import header
from data.disk.weights import INDEX
from train.run_files import CONFIG, LAUNCHES, METRICS
from train.saving import checkpoint

from .harness.launch import Launch
from .harness.outcome import first_difference, stored_shapes
from .harness.trials import attempt, common_arguments, report, require
from .harness.workplace import Workplace, opened

PEER_TIMEOUT = 5.0
PROCESSES = 2
STEPS = 2
LIVE = "1000"
"""Parameters that stay gathered when their layer is through: by default a third of this base."""
LONGEST, MARGIN = 1500.0, 30.0
"""Seconds that a launch may take, and that its end may take then."""
FILLED = 1 << 20
"""Bytes of each tensor that are random."""
ROUTER = "block_sparse_moe.gate.weight"
SLACK = 768 << 20
"""Bytes that a process may hold beside what is counted: blocks of what is read, code, what the allocator keeps."""
LOOKS_EVERY = 0.1
"""Seconds."""
STAGES = {
    "loading the base": "loading",
    "making the engine": "finding",
    "finding the checkpoint": "finding",
    "restoring the checkpoint": "restoring",
    "resuming": "restoring",
    "beginning": "restoring",
}
"""Of the start, by the phases of train/run.py with which they begin; before the first of them it hashes."""
HASHING, LOADING, FINDING, RESTORING = "hashing", "loading", "finding", "restoring"
LINES = ("Hashing the base", "Hashing step-000001", "Reading the base", "Reading step-000001")
"""What a log tells of, if it is large."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py size`."""
    parser.add_argument("--layers", type=int, default=14, help="of the base: 1.45 GB each at the default width (14)")
    parser.add_argument("--hidden", type=int, default=2048, help="width; an expert's is 3.5 times that (2048)")
    parser.add_argument("--lora-rank", type=int, default=48, help="of the adapters: 42 MB of a checkpoint each (48)")
    parser.add_argument("--weights", choices=("nf4", "bf16"), default="nf4", help="how the base is held (nf4)")
    common_arguments(parser, trials=False)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes a base, trains, takes away, goes on, prints, and returns what was seen."""
    with opened(options) as workplace:
        trial = attempt(f"{options.layers} layers, rank {options.lora_rank}", lambda: resumed(workplace, options))
        figures = report("Resuming at size", [trial], options.seed)
        workplace.keep = bool(figures["failed"])
    return figures


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a run holds, in bytes."""

    files: int
    """Of the base."""
    held: int
    """Of the base in memory, over all processes."""
    block: int
    """Of the largest part of it that is gathered at once: a layer's experts."""
    expert: int
    """Of an expert in bfloat16, as which it is multiplied with."""


def resumed(workplace: Workplace, options: argparse.Namespace) -> dict[str, Any]:
    """The run, what was taken away, the same command again, and what was seen of that."""
    base, whole, run = (workplace.scratch / name for name in ("size-base", "size-whole", "size"))
    sizes = make(base, options.layers, options.hidden, options.weights, options.seed)
    settings = {
        "model.path": str(base),
        "model.weights": options.weights,
        "deepspeed.max_live_parameters": LIVE,
        "lora.rank": str(options.lora_rank),
        "lora.export_per_expert": "false",
        "failures.peer_timeout": f"{PEER_TIMEOUT:g}",
        "logging.progress": "true",
        "plan.check": "false",
        "max_steps": str(STEPS),
        "save_every": "1",
        "keep_last": str(STEPS),
    }
    _watched(workplace.launch(whole, PROCESSES, **settings))
    as_if_killed(whole, run)
    shapes = stored_shapes(checkpoint.path_of(run, 1))
    size = sum(path.stat().st_size for path in checkpoint.path_of(run, 1).rglob("*") if path.is_file())
    launch = workplace.launch(run, PROCESSES, **settings)
    peaks, seconds = _watched(launch)
    require(launch.resumed_step == 1, f"it went on after step {launch.resumed_step}, not 1:\n{launch.said()}")
    difference = first_difference(run, whole)
    require(not difference, str(difference))
    limits = _limits(sizes, shapes, peaks.pop(""))
    found = {
        "base_bytes": sizes.files,
        "checkpoint_bytes": size,
        "held_bytes": sizes.held,
        "said": [line for line in launch.said().splitlines() if line.startswith(LINES)],
        "seconds": {stage: round(took, 1) for stage, took in seconds.items()},
        "memory_mib": {stage: _mib(of_each) for stage, of_each in peaks.items()},
        "limits_mib": {stage: _mib(of_each) for stage, of_each in limits.items()},
    }
    large = {"the base": sizes.files, "step-000001": size}
    for words in LINES:
        if large[words.split(maxsplit=1)[1]] >= PROCESSES * WORTH_A_LINE:
            told = any(line.startswith(words) for line in found["said"])
            require(told, f"it does not say how much there is of {words}:\n{launch.said()}")
    for stage, of_each in peaks.items():
        too_much = any(peak > limit for peak, limit in zip(of_each, limits[stage], strict=True))
        require(not too_much, f"it holds more than it has to while it is {stage}: {found}")
    launch.wait_for_none_left(30)
    for directory in (base, whole, run):
        shutil.rmtree(directory)
    return found


def make(directory: Path, layers: int, hidden: int, weights: str, seed: int) -> Sizes:
    """Writes the base."""
    heads, experts, inner = max(4, hidden // 64), 8, hidden * 7 // 2
    architecture = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        num_local_experts=experts,
        sliding_window=None,
    )
    architecture.architectures = ["MixtralForCausalLM"]
    architecture.save_pretrained(directory)
    keys = hidden // heads * (heads // 4)
    files: list[dict[str, tuple[int, ...]]] = [{EMBEDDING: (architecture.vocab_size, hidden)}]
    files[0] |= {"model.norm.weight": (hidden,), "lm_head.weight": (architecture.vocab_size, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        named = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        named |= {f"self_attn.{name}_proj": (keys, hidden) for name in "kv"}
        named |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        named |= {"block_sparse_moe.gate": (experts, hidden)}
        for expert in range(experts):
            of = f"block_sparse_moe.experts.{expert}"
            named |= {f"{of}.w1": (inner, hidden), f"{of}.w2": (hidden, inner), f"{of}.w3": (inner, hidden)}
        files.append({f"{prefix}.{name}.weight": shape for name, shape in named.items()})
    generator = np.random.default_rng(seed)
    held = 0
    for number, tensors in enumerate(files, start=1):
        _write(directory / f"model-{number:05d}-of-{len(files):05d}.safetensors", tensors, generator)
        for name, shape in tensors.items():
            in_four_bits = weights == nf4.FORM and (".experts." in name or ".self_attn." in name)
            held += nf4.size(math.prod(shape)) if in_four_bits else 2 * math.prod(shape)
    names = [path.name for path in sorted(directory.glob("*.safetensors"))]
    of_name = {name: file for file, tensors in zip(names, files, strict=True) for name in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": of_name}))
    expert = 3 * hidden * inner
    block = experts * (nf4.size(expert) if weights == nf4.FORM else 2 * expert)
    return Sizes(sum((directory / name).stat().st_size for name in names), held, block, 2 * expert)


def _write(file: Path, tensors: dict[str, tuple[int, ...]], generator: np.random.Generator) -> None:
    """A file with what of the tensors is random, and holes."""
    sizes = {name: 4 * math.prod(shape) for name, shape in tensors.items()}
    head = header((name, "F32", shape, sizes[name]) for name, shape in tensors.items())
    with file.open("wb") as stream:
        stream.write(head)
        begin = len(head)
        for name, size in sizes.items():
            stream.seek(begin)
            numbers = min(size if name == EMBEDDING else FILLED, size) // 4
            drawn = generator.standard_normal(numbers, np.float32) * np.float32(0.05)
            if not name.endswith(ROUTER):
                stream.write((np.ones(numbers, np.float32) if "norm" in name else drawn).tobytes())
            begin += size
        stream.truncate(begin)


def as_if_killed(whole: Path, run: Path) -> None:
    """Makes a run directory out of what a finished run left up to its first checkpoint, which is moved."""
    (run / checkpoint.FOLDER).mkdir(parents=True)
    checkpoint.path_of(whole, 1).rename(checkpoint.path_of(run, 1))
    shutil.rmtree(whole / checkpoint.FOLDER)
    for name in (CONFIG, METRICS, LAUNCHES):
        shutil.copy(whole / name, run / name)


def _watched(launch: Launch) -> tuple[dict[str, list[int]], dict[str, float]]:
    """A launch to its end: the most that each process held in each stage, and how long process 0 was in it.

    What each holds when it is seen first, the program and nothing else, stands under the name of no stage.
    """
    peaks: dict[str, list[int]] = {"": [0] * PROCESSES}
    seconds: dict[str, float] = {}
    stages = [HASHING] * PROCESSES
    positions: dict[int, Callable[[], tuple[int, str]]] = {}
    last = began = time.monotonic()
    while launch.running and last - began < LONGEST:
        time.sleep(LOOKS_EVERY)
        before, last = last, time.monotonic()
        for rank, pid in launch.ranks().items():
            if rank not in positions and (read := launch.position(rank)):
                positions[rank] = read
            if rank in positions:
                stages[rank] = STAGES.get(positions[rank]()[1], stages[rank])
            holds, of_each = _anonymous(pid), peaks.setdefault(stages[rank], [0] * PROCESSES)
            peaks[""][rank] = peaks[""][rank] or holds
            of_each[rank] = max(of_each[rank], holds)
        seconds[stages[0]] = seconds.get(stages[0], 0.0) + last - before
    codes = launch.wait(MARGIN)
    require(not any(codes), f"it ended with {codes}:\n{launch.said()}")
    return peaks, seconds


def _limits(sizes: Sizes, shapes: dict[str, tuple[int, ...]], first: list[int]) -> dict[str, list[int]]:
    """The most that each process may hold in each stage, if it held `first` when it was seen first."""
    numbers = [math.prod(shape) for shape in shapes.values()]
    trained, largest = sum(numbers), max(numbers)
    hashing = SLACK
    loading = hashing + sizes.held // PROCESSES + 6 * trained  # adapters are made whole, in float32 and in bfloat16
    finding = loading + (2 + 4 + 4 + 4 + 4) * trained // PROCESSES + 4 * 4 * largest
    restoring = finding + 2 * sizes.block + 2 * sizes.expert
    saved = (4 + 4 + 4 + 2) * trained
    limits = {HASHING: hashing, LOADING: loading, FINDING: finding, RESTORING: restoring}
    with_copy = {stage: limit + saved * (stage == RESTORING) for stage, limit in limits.items()}
    return {stage: [first[0] + with_copy[stage], *(held + limits[stage] for held in first[1:])] for stage in limits}


def _anonymous(pid: int) -> int:
    """Bytes that a process holds, but for those of files and what it shares."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def _mib(sizes: list[int]) -> list[int]:
    return [round(size / 2**20) for size in sizes]
