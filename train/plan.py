"""What a run would be, found out without weights: parameters, batch arithmetic, DeepSpeed configuration."""

import json
import os
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from transformers import MixtralForCausalLM

from configs.program.errors import UserError
from data.disk.architecture import read_architecture
from train.config.model import ModelConfig
from train.config.train import TrainConfig
from train.engine.zero import deepspeed_config
from train.lora import attach
from train.model import mixtral


def show_plan(config: TrainConfig) -> None:
    """Builds the model with its adapters on the meta device, on which tensors have shapes and no numbers, and prints.

    The architecture is that of `model.path` if that is a directory, else `model.architecture`: no hub is asked. The
    number of processes is that of the launch, or `hardware.processes` if nothing was launched.
    """
    processes = int(os.environ.get("WORLD_SIZE", config.hardware.processes))
    if os.environ.get("RANK", "0") != "0":
        return
    batch = config.batch(processes)
    with torch.device("meta"):
        planned = _planned_base(config.model)
        total = sum(parameter.numel() for parameter in planned.parameters())
        if config.lora.method != "none":
            attach.add_adapters(planned, config.lora)
    kinds: Counter[str] = Counter()
    for name, parameter in attach.trainable(planned):
        kinds[attach.kind(name)] += parameter.numel()

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.print(f"base                 {config.model.path or 'random weights'}")
    console.print(f"base parameters      {total:,}")
    console.print(f"trained parameters   {sum(kinds.values()):,} ({sum(kinds.values()) / total:.3%} of the base)")
    for name, number in sorted(kinds.items()):
        console.print(f"  {name:<18} {number:,}")
    console.print(f"batch                {batch}")
    console.print("DeepSpeed            " + json.dumps(deepspeed_config(config, batch), indent=2))


def _planned_base(config: ModelConfig) -> MixtralForCausalLM:
    if config.path is None or not Path(config.path).is_dir():
        return mixtral.random_base(config)
    try:
        architecture = read_architecture(config.path, None, f"model.path={config.path}")
        return MixtralForCausalLM._from_config(architecture, dtype=mixtral.DTYPES[config.dtype])
    except UserError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"model.path={config.path}: it is no Mixtral's directory; name one with config.json") from error
