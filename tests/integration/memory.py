"""Loads a base into the processes of a launch, in each way that they share it, and notes what each took at its peak."""

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from data.disk.mixtral_files import stored_parts
from data.disk.tensor_file import header
from train.config.engine import DeepSpeedConfig, HardwareConfig
from train.config.model import ModelConfig
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.processes import gathered, join_processes, leave_processes
from train.engine.shards import place_for
from train.model import mixtral

ARCHITECTURE = MixtralConfig(
    architectures=["MixtralForCausalLM"],
    vocab_size=512,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
)
"""826 MB: the half of it, and what is allowed beside, are less than the whole."""
WAYS = {"zero3": (3, "bf16"), "zero3, nf4": (3, "nf4"), "none": (0, "bf16")}


def made(directory: Path) -> None:
    """A base of zeros, which take no room on the disk."""
    ARCHITECTURE.save_pretrained(directory)
    with torch.device("meta"):
        model = MixtralForCausalLM(ARCHITECTURE).bfloat16()
    parts = [part for name, parameter in model.named_parameters() for part in stored_parts(name, parameter)]
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header((name, "BF16", tensor.shape, tensor.nbytes) for name, tensor in parts))
        file.truncate(file.tell() + sum(tensor.nbytes for _, tensor in parts))


def status(field: str) -> int:
    """Bytes, as the kernel counts this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main(directory: Path) -> None:
    """Writes what each process held, and took beside, for each way."""
    processes = join_processes(HardwareConfig(device="cpu"))
    base = directory / "base"
    if processes.is_main:
        base.mkdir()
        made(base)
    torch.distributed.barrier()
    found = {}
    for way, (stage, weights) in WAYS.items():
        config = TrainConfig(model=ModelConfig(path=str(base), weights=weights), deepspeed=DeepSpeedConfig(stage=stage))
        place = place_for(config, BatchArithmetic(1, 1, processes.count), processes.device)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident now
        before = status("VmRSS")
        model = mixtral.pretrained(config.model, place, device=processes.device)
        took = status("VmHWM") - before
        share = sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in model.parameters())
        found[way] = gathered({"share": share, "took": took})
        del model, place
    if processes.is_main:
        (directory / "found.json").write_text(json.dumps(found))
    leave_processes()


if __name__ == "__main__":
    (run_dir,) = (word.removeprefix("run_dir=") for word in sys.argv if word.startswith("run_dir="))
    main(Path(run_dir))
