"""The run directory: what a run writes, and when each piece is whole.

runs/{name}-{date}-{time}/
  config.yaml               the resolved configuration
  metrics.jsonl
  checkpoints/step-000123/  adapter/ (or model/) as it was after that step
  adapter/                  the result, in PEFT's format; model/ after training in full
  receipt.json              what was run, on what, from what, with what outcome
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from configs.errors import UserError
from data.dataset import MANIFEST, PreparedDataset
from data.template import ChatTokenizer
from train import expert_lora
from train.config import BatchArithmetic, TrainConfig
from train.engine import Engine, Processes, agree
from train.metrics import Metrics, console

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


class RunDirectory:
    """Creates the run directory and writes into it. Only the main process touches the disk."""

    def __init__(self, config: TrainConfig, processes: Processes):
        """Decides the directory, the same on every process, and writes config.yaml; collective.

        Raises:
            UserError: the directory holds something already, or can't be written.
        """
        self.config = config
        self.processes = processes
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        chosen = agree(config.run_dir or f"runs/{config.name}-{stamp}")  # clocks differ between processes
        self.path = Path(chosen)
        self._started = datetime.datetime.now(datetime.UTC)
        problem = agree(self._create() if processes.is_main else None)
        if problem:
            raise UserError(problem)

    def _create(self) -> str | None:
        """Makes the directory; returns the sentence for the user where that can't be."""
        try:
            if self.path.exists() and any(self.path.iterdir()):
                if not (self.config.overwrite and (self.path / "config.yaml").is_file()):
                    return (
                        f"run_dir={self.path}: something is there already; name another directory, or give "
                        f"overwrite=true to replace a run"
                    )
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(self.config)))
        except OSError as error:
            return f"run_dir={self.path}: it can't be written ({error.strerror}); name a writable directory"
        return None

    def save_checkpoint(self, engine: Engine, step: int) -> None:
        """Writes checkpoints/step-…; collective."""
        self._save(engine, self.path / "checkpoints" / f"step-{step:06d}" / self._result_name)

    def save_result(self, engine: Engine) -> None:
        """Writes adapter/ (or model/); collective."""
        self._save(engine, self.path / self._result_name)
        if self.processes.is_main:
            console.print(f"Saved {self.path / self._result_name}")

    @property
    def _result_name(self) -> str:
        return "model" if self.config.lora.method == "none" else "adapter"

    def _save(self, engine: Engine, target: Path) -> None:
        everything = self.config.lora.method == "none"
        tensors = engine.collect(lambda _, parameter: everything or parameter.requires_grad)
        if not self.processes.is_main:
            return
        temporary = target.parent / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if everything:
            write_model(temporary, engine.module.causal_lm, tensors)
        else:
            write_adapter(temporary, self.config, tensors)
        shutil.copyfile(self.path / "config.yaml", temporary / "train_config.yaml")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)

    def write_receipt(self, dataset: PreparedDataset, batch: BatchArithmetic, metrics: Metrics) -> None:
        """Writes receipt.json, beside the result and into it, on the main process."""
        if not self.processes.is_main:
            return
        receipt = {
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": ["python", "-m", "train", *sys.argv[1:]],
            "commit": _commit(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "hardware": hardware(self.processes),
            "batch": asdict(batch),
            "base": {"path": self.config.model.path, "revision": self.config.model.revision},
            "dataset": {"path": str(dataset.directory), "manifest_sha256": _sha256(dataset.directory / MANIFEST)},
            "evaluation_loss": {str(step): loss for step, loss in metrics.evaluations.items()},
            "steps": metrics.last.step if metrics.last else 0,
            "loss": metrics.last.loss if metrics.last else None,
        }
        text = json.dumps(receipt, indent=2) + "\n"
        (self.path / "receipt.json").write_text(text)
        (self.path / self._result_name / "receipt.json").write_text(text)


def write_adapter(directory: Path, config: TrainConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does; stock PEFT loads them.

    Args:
        directory: exists.
        config: says what is adapted.
        tensors: the trained parameters by our names.
    """
    from peft import LoraConfig as PeftConfig

    projections = tuple(config.lora.experts)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            key, matrix = expert_lora.to_peft(name, tensor, projections)
        else:
            key, matrix = f"base_model.model.{name.replace('.default.', '.')}", tensor
        stored[key] = matrix.contiguous()
    save_file(stored, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    PeftConfig(
        base_model_name_or_path=config.model.path,
        revision=config.model.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=list(config.lora.attention),
        target_parameters=[f"mlp.experts.{projection}" for projection in projections],
    ).save_pretrained(str(directory))


def write_model(directory: Path, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a whole model as transformers does (Mixtral's per-expert names), with tokenizer and chat template."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for each file would break the one of the run
    model.save_pretrained(directory, state_dict=tensors)
    ChatTokenizer.load().save(directory)


def hardware(processes: Processes) -> dict[str, Any]:
    """What the run computes on."""
    on_cuda = processes.device.type == "cuda"
    return {
        "processes": processes.count,
        "device": torch.cuda.get_device_name(processes.device) if on_cuda else _cpu_name(),
        "cpus": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The checkout's commit, with a mark where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
