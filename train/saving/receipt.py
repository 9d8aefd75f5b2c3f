"""What a run records about itself: packages, hardware."""

from typing import Any

import torch

from configs.program.provenance import machine
from train.engine.processes import Processes

PACKAGES = (
    "openhermes-mixtral",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "tokenizers",
    "safetensors",
)
"""Those whose versions the receipt records."""


def hardware(processes: Processes) -> dict[str, Any]:
    """What the run computes on."""
    on_cuda = processes.device.type == "cuda"
    return {
        **machine(),
        "device": torch.cuda.get_device_name(processes.device) if on_cuda else "cpu",
        "processes": processes.count,
        "threads_per_process": torch.get_num_threads(),
    }
