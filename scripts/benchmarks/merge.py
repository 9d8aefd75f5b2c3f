"""Merging an adapter, against a plain copy of the base's files and against stock PEFT: GB/s and peak memory.

The base is a random Mixtral in several files of Mixtral's original names. Every contender runs in a process of its own,
all write to the same disk and wait until it has the bytes (fsync), and they take turns. `copy` is what no merge can
beat: the same bytes read and written. `peft` loads, merges and saves with `merge_and_unload` and `save_pretrained`.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
CONTENDERS = ("copy", "ours", "peft")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard", default="300MB", help="size of a file of the base")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs; medians are reported")
    parser.add_argument("--peft-rounds", type=int, default=1, help="how often PEFT runs, which takes long")
    parser.add_argument("--directory", type=Path, help="where to write; a temporary directory unless given")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the base, runs the contenders in turn, prints the table."""
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        top = Path(directory)
        _child("make", top, options)
        size = sum(file.stat().st_size for file in (top / "base").glob("*.safetensors"))
        largest = max(file.stat().st_size for file in (top / "base").glob("*.safetensors"))
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for number in range(options.rounds):
            for name in CONTENDERS:
                if name != "peft" or number < options.peft_rounds:
                    taken[name].append(_child(name, top, options))
    figures: dict[str, Any] = {
        "sizes": {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "rank")},
        "bytes": size,
        "largest_file": largest,
    }
    table = Table("", "GB/s", "of the copy", "peak memory above the start", title=f"Merging {size / 1e9:.2f} GB")
    for name, runs in taken.items():
        seconds = statistics.median(outcome["seconds"] for outcome in runs)
        memory = statistics.median(outcome["memory"] for outcome in runs)
        # Ratios within a round, because the machine's speed drifts.
        ratios = [c["seconds"] / o["seconds"] for c, o in zip(taken["copy"], runs, strict=False)]
        figures[name] = {
            "seconds": [outcome["seconds"] for outcome in runs],
            "gigabytes_per_second": size / seconds / 1e9,
            "share_of_the_copy": statistics.median(ratios),
            "peak_memory": memory,
        }
        shown = (f"{size / seconds / 1e9:.2f}", f"{statistics.median(ratios):.0%}", f"{memory / 1e6:,.0f} MB")
        table.add_row(name, *shown)
    Console().print(table)
    return figures


def _child(name: str, top: Path, options: argparse.Namespace) -> dict[str, float]:
    """Runs a contender in a process of its own; what it printed last."""
    sizes = {key: getattr(options, key) for key in ("hidden", "intermediate", "layers", "rank", "shard")}
    # As a module of its package, and without the working directory on the path (-P): this file's folder has a data.py,
    # which would hide the package of that name.
    command = [sys.executable, "-P", "-m", "benchmarks.merge", name, str(top), json.dumps(sizes)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    env = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make(top: Path, *, hidden: int, intermediate: int, layers: int, rank: int, shard: str) -> None:
    """A random base and a stock PEFT adapter for it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 256)}
    architecture = MixtralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=32_000, **heads
    )
    base = MixtralForCausalLM._from_config(architecture, dtype=torch.bfloat16)
    base.save_pretrained(top / "base", max_shard_size=shard)
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(base, LoraConfig(r=rank, target_parameters=experts, **targets))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(str(top / "adapter"))


def _sync(directory: Path) -> None:
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _contend(name: str, top: Path) -> dict[str, float]:
    """One contender's run: seconds, and the peak of its resident memory above what it was before."""
    target = top / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    if name == "copy":
        before, started = _peak(), time.perf_counter()
        for file in sorted((top / "base").glob("*.safetensors")):
            shutil.copyfile(file, target / file.name)
    elif name == "ours":
        import peft  # noqa: F401 - the other contender has loaded its libraries too when the clock starts
        from transformers import AutoConfig

        from data.disk.mixtral_files import pieces
        from data.disk.weights import StoredWeights
        from inference.adapter import Adapter
        from inference.merging.merge import write_weights

        before, started = _peak(), time.perf_counter()
        architecture = AutoConfig.from_pretrained(top / "base", trust_remote_code=False)
        parts = pieces(StoredWeights(top / "base", "base"), architecture)
        write_weights(target, parts, Adapter(top / "adapter", architecture))
    else:
        import torch
        from peft import PeftModel
        from transformers import MixtralForCausalLM

        before, started = _peak(), time.perf_counter()
        base = MixtralForCausalLM.from_pretrained(top / "base", dtype=torch.bfloat16, trust_remote_code=False)
        merged = PeftModel.from_pretrained(base, str(top / "adapter")).merge_and_unload()
        merged.save_pretrained(target, max_shard_size="300MB")
    _sync(target)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return {"seconds": seconds, "memory": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    what, directory, sizes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    print(json.dumps(make(directory, **sizes) or {} if what == "make" else _contend(what, directory)))
