"""Loading a base under ZeRO-3, against transformers with DeepSpeed: memory, bytes read and seconds of each process.

The base is random, of Mixtral's real widths, and made a tensor at a time. Each contender loads it in processes of its
own; before that, the kernel is told to forget the files. `transformers` is its `from_pretrained` under ZeRO-3: process
0 reads everything and sends the parts. It has to end with the same shards as ours. `nf4` is ours with
`model.weights=nf4`, which quantises what it reads.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.program.console import quiet_libraries

ROOT = Path(__file__).parents[2]
CONTENDERS = ("ours", "nf4", "transformers")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14_336)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="how often each contender loads; all figures are kept")
    parser.add_argument("--directory", type=Path, help="where to make the base; a temporary directory unless given")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the base, loads it in turn, prints the table."""
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        base = Path(directory) / "base"
        make(base, options.hidden, options.intermediate, options.layers)
        files = sorted(base.glob("*.safetensors"))
        runs: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
        for _ in range(options.rounds):
            for name in CONTENDERS:
                for file in files:
                    _forget(file)
                runs[name].append(_launch(name, base, options.processes))
        size = sum(file.stat().st_size for file in files)
    same = [once for name, of_one in runs.items() if name != "nf4" for once in of_one]
    shards = {tuple(process["shards"] for process in once) for once in same}
    columns = ("", "process", "its share", "peak memory above the start", "read from files", "seconds")
    table = Table(*columns, title=f"Loading {size / 1e9:.2f} GB")
    for name, of_one in runs.items():
        for once in of_one:
            for rank, process in enumerate(once):
                sizes = (f"{process[key] / 1e6:,.0f} MB" for key in ("share", "peak_memory", "read"))
                table.add_row(name, str(rank), *sizes, f"{process['seconds']:.1f}")
    Console().print(table)
    figures: dict[str, Any] = {
        "sizes": {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "processes")},
        "bytes": size,
    }
    for name, of_one in runs.items():
        figures[name] = [{key: value for key, value in p.items() if key != "shards"} for once in of_one for p in once]
    if len(shards) > 1:
        figures["failed"] = "the contenders' shards differ"
        print(figures["failed"], file=sys.stderr)
    return figures


def make(directory: Path, hidden: int, intermediate: int, layers: int) -> None:
    """A random base in Mixtral's names, a file for each layer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from data.disk.mixtral_files import stored_parts
    from data.disk.tensor_file import TensorFile

    architecture = MixtralConfig(
        architectures=["MixtralForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        vocab_size=32_000,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
    )
    architecture.save_pretrained(directory)
    with torch.device("meta"):
        parameters = dict(MixtralForCausalLM(architecture).named_parameters())
    of_file: dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]] = defaultdict(list)
    for name, parameter in parameters.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "none"
        for part, tensor in stored_parts(name, parameter):
            of_file[f"model-{layer}.safetensors"].append((part, torch.bfloat16, tuple(tensor.shape)))
    generator = torch.Generator().manual_seed(0)
    for file, tensors in of_file.items():
        writer = TensorFile(directory / file, tensors)
        for name, dtype, shape in tensors:
            writer.write(name, torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator))
        writer.close()
    index = {name: file for file, tensors in of_file.items() for name, *_ in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _forget(file: Path) -> None:
    """Has the kernel drop a file from its cache, so that every contender reads it from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _launch(name: str, base: Path, processes: int) -> list[dict[str, Any]]:
    """What each process of a contender measured, by rank."""
    from train.engine.processes import free_port

    # Without the working directory on the path (-P): this file's folder has a data.py, which would hide the package.
    command = [sys.executable, "-P", "-m", "benchmarks.load", name, str(base)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")]), "PYTHONWARNINGS": "ignore"}
    env |= {"HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(processes)
    ]
    printed = [process.communicate()[0] for process in started]
    for process in started:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return [json.loads(text.splitlines()[-1]) for text in printed]


def _contend(name: str, base: Path) -> dict[str, Any]:
    """One process of one contender."""
    import deepspeed  # noqa: F401 - so that its memory and its files are not counted
    import torch
    import xxhash
    from transformers.integrations import HfDeepSpeedConfig

    from data.disk.architecture import find_mixtral
    from data.disk.mixtral_files import load_mixtral
    from train.config.engine import DeepSpeedConfig, HardwareConfig
    from train.config.model import ModelConfig
    from train.config.train import TrainConfig
    from train.engine.processes import join_processes, leave_processes
    from train.engine.shards import place_for
    from train.engine.zero import deepspeed_config
    from train.model.mixtral import pretrained

    processes = join_processes(HardwareConfig(device="cpu"))
    config = TrainConfig(
        model=ModelConfig(path=str(base), weights="nf4" if name == "nf4" else "bf16"),
        deepspeed=DeepSpeedConfig(stage=3),
        hardware=HardwareConfig(device="cpu"),
    )
    batch = config.batch(processes.count)
    torch.distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident now
    resident, read, started = _memory("VmRSS"), _read(), time.perf_counter()
    if name != "transformers":
        model = pretrained(config.model, place_for(config, batch, processes.device), device=processes.device)
    else:
        kept = HfDeepSpeedConfig(deepspeed_config(config, batch))
        _, architecture = find_mixtral(str(base), None, "base")
        model = load_mixtral(base, architecture, "base", dtype=torch.bfloat16)
        del kept
    seconds = time.perf_counter() - started
    figures = {"seconds": seconds, "peak_memory": _memory("VmHWM") - resident, "read": _read() - read}
    parts = {key: parameter.ds_tensor for key, parameter in model.named_parameters()}
    digest = xxhash.xxh3_128()
    for parameter, part in zip(model.parameters(), parts.values(), strict=True):
        padding = max(0, part.numel() * (processes.rank + 1) - parameter.ds_numel)
        held = part[: max(0, part.numel() - padding)]
        digest.update(held.view(torch.uint8).numpy().data)
    torch.distributed.barrier()
    leave_processes()
    return figures | {"share": sum(part.nbytes for part in parts.values()), "shards": digest.hexdigest()}


def _memory(field: str) -> int:
    """Bytes, as the kernel counts this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _read() -> int:
    """Bytes that this process has read: by calls, or through maps of files, which the disk's count alone shows."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return max(int(lines["rchar"]), int(lines["read_bytes"]))


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps(_contend(sys.argv[1], Path(sys.argv[2]))))
