"""Loads bases into the processes of a launch, as `python -m train` does and as transformers does, and compares them."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data.disk import nf4
from data.disk.loading.layers import quantise
from data.disk.loading.model import load_model, whole_on
from data.disk.mixtral_files import load_mixtral
from train.config.engine import DeepSpeedConfig, HardwareConfig
from train.config.model import ModelConfig
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.engine import Engine
from train.engine.processes import Processes, gathered, join_processes, leave_processes
from train.engine.shards import allocator_for
from train.engine.zero import deepspeed_config, whole_shape
from train.lora.attach import add_adapters, trainable
from train.model import mixtral
from train.model.loss import MixtralWithLoss

ARCHITECTURE = MixtralConfig(
    vocab_size=301,
    hidden_size=60,
    intermediate_size=211,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    num_local_experts=5,
)
IN_BLOCKS = MixtralConfig(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=5,
)
"""Of whole blocks of four bits; processes hold parts of an expert."""
FILES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 in many files": {"dtype": torch.float16, "max_shard_size": "300KB"},
    "float32 with names of today": {"dtype": torch.float32, "save_original_format": False},
}
DIVISIONS = {
    "none": DeepSpeedConfig(stage=0),
    "zero2": DeepSpeedConfig(stage=2),
    "zero3": DeepSpeedConfig(stage=3, persistence_threshold=200),
    "offload": DeepSpeedConfig(stage=3, offload_param="cpu", offload_optimizer="cpu"),
    "node copy": DeepSpeedConfig(stage=3, node_copy=True),
}
OVERHEAD = 150_000
"""Bytes of config.json, of the headers and of what Python looks up meanwhile: more than twice what was seen."""


def made(directory: Path, architecture: MixtralConfig, *, dtype: torch.dtype, **how: Any) -> None:
    """A base in files of that kind."""
    torch.manual_seed(0)
    MixtralForCausalLM._from_config(architecture, dtype=dtype).save_pretrained(directory, **how)


@contextlib.contextmanager
def sharding(config: TrainConfig, batch: BatchArithmetic) -> Iterator[None]:
    """Within it, transformers loads as it does under ZeRO-3: process 0 reads, and sends to the others."""
    if config.deepspeed.stage != 3:
        yield
        return
    kept = HfDeepSpeedConfig(deepspeed_config(config, batch))
    try:
        yield
    finally:
        del kept
        unset_hf_deepspeed_config()


def read_by_me() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def held(parameter: Any) -> dict[str, torch.Tensor]:
    """What this process holds of a parameter, without padding."""
    if not hasattr(parameter, "ds_id"):
        return {"whole": parameter.detach()}
    found = {}
    rank = torch.distributed.get_rank()
    for kind, tensor in (("partition", parameter.ds_tensor), ("copy", parameter.ds_secondary_tensor)):
        if tensor is not None:
            place = rank if kind == "partition" else rank % (parameter.ds_secondary_tensor_group_size)
            found[kind] = tensor[: max(0, parameter.ds_numel - place * tensor.ds_numel)]
    return found


def noted(parameter: Any) -> dict[str, Any]:
    """What DeepSpeed knows of it, but for its number."""
    names = ("ds_shape", "ds_numel", "ds_numel_aligned", "ds_status", "ds_persist", "ds_param_type")
    return (
        {name: getattr(parameter, name, None) for name in names}
        | {
            name: [
                getattr(getattr(parameter, name, None), field, None)
                for field in ("ds_numel", "status", "shape", "device")
            ]
            for name in ("ds_tensor", "ds_secondary_tensor")
        }
        | {"shape": parameter.shape, "dtype": parameter.dtype, "requires_grad": parameter.requires_grad}
    )


def compared(base: Path, config: TrainConfig, processes: Processes, itemsize: int) -> list[str]:
    """What differs between both ways on this process, and whether it read more than it holds."""
    batch = BatchArithmetic(1, 1, processes.count)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes the groups of node copies once in a process
    with sharding(config, batch):
        theirs = load_mixtral(base, ARCHITECTURE, "base", dtype=mixtral.DTYPES[config.model.dtype])
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    before = read_by_me()
    ours = mixtral.pretrained(config.model, allocator_for(config, batch, processes.device), device=processes.device)
    read = read_by_me() - before
    wrong = []
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    if list(mine) != list(other) or ours.training != theirs.training:
        wrong.append("the parameters are others")
    needed = 0
    for name, parameter in mine.items():
        if noted(parameter) != noted(other[name]):
            wrong.append(f"{name}: {noted(parameter)} and {noted(other[name])}")
        parts, of_theirs = held(parameter), held(other[name])
        needed += sum(part.numel() for part in parts.values()) * itemsize
        wrong += [f"{name}: {kind}" for kind, part in parts.items() if not torch.equal(part, of_theirs[kind])]
    buffers = dict(theirs.named_buffers())
    wrong += [name for name, buffer in ours.named_buffers() if not torch.equal(buffer, buffers.pop(name))]
    wrong += list(buffers)
    if not needed <= read <= needed + OVERHEAD:
        wrong.append(f"{read} bytes were read, and {needed} are held")
    return wrong


def quantised(base: Path, config: TrainConfig, processes: Processes, itemsize: int) -> list[str]:
    """The same of a base in four bits: what differs from the whole one, quantised; and what crosses the network."""
    named, device = "base", processes.device
    batch = BatchArithmetic(1, 1, processes.count)
    how = {"dtype": mixtral.DTYPES[config.model.dtype], "device": device}
    whole = load_model(base, IN_BLOCKS, named, whole_on(device), **how)
    quantise(whole, named)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    before = read_by_me()
    ours = mixtral.pretrained(config.model, allocator_for(config, batch, device), device=device)
    read = read_by_me() - before
    add_adapters(ours, config.lora)
    wrong, bits, most = [], dict(whole.named_parameters()), 0
    for path, parameter in ours.named_parameters():
        name = path.replace(".base_layer", "")
        if "lora_" in name:
            continue
        parts = held(parameter)
        most += len(parts) * itemsize * (bits[name].numel() * (128 / 72 if nf4.is_quantised(parameter) else 1))
        for kind, part in parts.items():
            start = 0
            if kind == "partition":
                start = processes.rank * parameter.ds_tensor.ds_numel
            elif kind == "copy":
                copy = parameter.ds_secondary_tensor
                start = processes.rank % parameter.ds_secondary_tensor_group_size * copy.ds_numel
            if not torch.equal(part.flatten(), bits[name].flatten()[start : start + part.numel()]):
                wrong.append(f"{name}: {kind}")
    if read > most + OVERHEAD:
        wrong.append(f"{read} bytes were read, and all that it could need are {most}")
    sent: list[int] = []
    send = deepspeed.comm.broadcast
    deepspeed.comm.broadcast = lambda tensor, *where, **how: sent.append(tensor.nbytes) or send(tensor, *where, **how)
    try:
        Engine(MixtralWithLoss(ours, with_router_loss=False), config, batch, processes)
    finally:
        deepspeed.comm.broadcast = send
    adapters = sum(math.prod(whole_shape(parameter)) for _, parameter in trainable(ours)) * how["dtype"].itemsize
    if not 0 < sum(sent) <= adapters:
        wrong.append(f"{sum(sent)} bytes were sent by process 0, and the adapters are {adapters}")
    return wrong


def main(directory: Path) -> None:
    """Compares all of them that these processes can have."""
    processes = join_processes(HardwareConfig(device="cpu"))
    if processes.is_main:
        for name, how in FILES.items():
            made(directory / name, ARCHITECTURE, **how)
            made(directory / f"{name} in blocks", IN_BLOCKS, **how)
    torch.distributed.barrier()
    for files, how in FILES.items():
        for division, dividing in DIVISIONS.items():
            if (division == "node copy") != (processes.count == 4):
                continue
            for dtype in ("bfloat16", "float32"):
                config = TrainConfig(model=ModelConfig(path=str(directory / files), dtype=dtype), deepspeed=dividing)
                wrong = gathered(compared(directory / files, config, processes, how["dtype"].itemsize))
                if processes.is_main:
                    (directory / f"{files}, {division}, {dtype}.json").write_text(json.dumps(wrong))
            config.model.path, config.model.weights = str(directory / f"{files} in blocks"), "nf4"
            wrong = gathered(quantised(Path(config.model.path), config, processes, how["dtype"].itemsize))
            if processes.is_main:
                (directory / f"{files}, {division}, nf4.json").write_text(json.dumps(wrong))
    leave_processes()


if __name__ == "__main__":
    (run_dir,) = (word.removeprefix("run_dir=") for word in sys.argv if word.startswith("run_dir="))
    main(Path(run_dir))
