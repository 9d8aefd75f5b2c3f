"""The run directory: what a run writes, and when each piece is whole.

runs/{name}-{date}-{time}/
  config.yaml               the resolved configuration
  metrics.jsonl
  checkpoints/step-000123/  adapter/ (or model/) as it was after that step
  adapter/                  the result, in PEFT's format, per_expert/ in it where asked; model/ after training in full
  receipt.json              what was run, on what, from what, with what outcome
  expert_load.json, .png    of task=profile: which experts the routers choose
"""

import datetime
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from configs.errors import UserError
from configs.receipt import machine, provenance
from configs.weights import StoredWeights, local_directory
from data.dataset import PreparedDataset
from data.layout import MANIFEST
from data.sources import sha256
from data.template import ChatTokenizer
from train import adapter_files, expert_lora
from train.config import BatchArithmetic, TrainConfig
from train.engine import Engine, Processes, agree
from train.learning import Movement, movements
from train.metrics import Metrics, console, finite, show_movements

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


RUN_ENTRIES = {
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "model",
    "receipt.json",
    "wandb",
    "expert_load.json",
    "expert_load.png",
}
"""All that a run directory holds; a directory with anything else in it is not replaced."""


class RunDirectory:
    """The place of a run. Only the main process touches the disk."""

    def __init__(self, config: TrainConfig, dataset: PreparedDataset, batch: BatchArithmetic, processes: Processes):
        """Decides the directory, the same on every process, and changes nothing yet; collective.

        Raises:
            UserError: it can't be used, or something is there that must not be replaced.
        """
        self.config = config
        self.dataset = dataset
        self.batch = batch
        self.processes = processes
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.path = Path(agree(config.run_dir or f"runs/{config.name}-{stamp}"))  # clocks differ between processes
        self._started = datetime.datetime.now(datetime.UTC)
        self._moved: list[Movement] = []
        self._base_fingerprint: str | None = None  # of a random base there is none
        if problem := agree(self._problem() if processes.is_main else None):
            raise UserError(f"run_dir={self.path}: {problem}")

    def _problem(self) -> str | None:
        """What speaks against the directory, as the rest of a sentence."""
        place = self.path.resolve()
        needed = [Path.cwd(), self.dataset.directory, Path(self.config.model.path or ".")]
        if any(path.resolve().is_relative_to(place) for path in needed):
            return "it holds the working directory, the dataset or the base; name a directory of its own"
        if place.exists() and not place.is_dir():
            return "it is a file; name another directory"
        there = {path.name for path in place.iterdir()} if place.exists() else set()
        if there - RUN_ENTRIES:
            return f"{min(there - RUN_ENTRIES)} is there, which no run writes; name another directory"
        if there and not self.config.overwrite:
            return "a run is there already; name another directory, or give overwrite=true to replace it"
        return None

    def create(self) -> None:
        """Makes the directory, in the place of an older run where there is one, and writes config.yaml; collective.

        Raises:
            UserError: it can't be written, or the base's files can't be read.
        """
        if problem := agree(self._know_the_base() if self.processes.is_main else None):
            raise UserError(problem)
        if problem := agree(self._create() if self.processes.is_main else None):
            raise UserError(f"run_dir={self.path}: {problem}")

    def _know_the_base(self) -> str | None:
        """Takes the base's fingerprint, by which inference knows it again; what speaks against that.

        Here and not when a receipt is written: what can fail, fails before anything was trained.
        """
        path, revision = self.config.model.path, self.config.model.revision
        if path is not None:
            named = f"model.path={path}"
            try:
                self._base_fingerprint = StoredWeights(local_directory(path, revision, named), named).fingerprint
            except UserError as error:
                return str(error)
        return None

    def _create(self) -> str | None:
        try:
            if self.path.exists():
                shutil.rmtree(self.path.resolve())
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(self.config)))
        except OSError as error:
            return f"it can't be written ({error.strerror or error}); name a writable directory"
        return None

    def save_checkpoint(self, engine: Engine, metrics: Metrics, step: int) -> None:
        """Writes checkpoints/step-…; collective."""
        self._save(engine, metrics, self.path / "checkpoints" / f"step-{step:06d}" / self._result_name)

    def save_result(self, engine: Engine, metrics: Metrics) -> None:
        """Writes adapter/ (or model/) and receipt.json; collective."""
        target = self.path / self._result_name
        self._save(engine, metrics, target)
        if self.processes.is_main:
            show_movements(self._moved)
            shutil.copyfile(target / "receipt.json", self.path / "receipt.json")
            console.print(f"Saved {target}")

    @property
    def _result_name(self) -> str:
        return "model" if self.config.lora.method == "none" else "adapter"

    def _save(self, engine: Engine, metrics: Metrics, target: Path) -> None:
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
            self._write_adapter(temporary, engine.module.causal_lm, tensors)
        shutil.copyfile(self.path / "config.yaml", temporary / "train_config.yaml")
        (temporary / "receipt.json").write_text(json.dumps(finite(self._receipt(metrics)), indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)

    def _write_adapter(self, directory: Path, causal_lm: Any, tensors: dict[str, torch.Tensor]) -> None:
        settings = (self.config.model, self.config.lora, tensors, expert_lora.adapters(causal_lm))
        adapter_files.write(directory, *settings)
        if self.config.lora.export_per_expert:
            per_expert = directory / "per_expert"
            per_expert.mkdir()
            adapter_files.write_per_expert(per_expert, *settings)
        self._moved = movements(causal_lm, tensors)

    def _receipt(self, metrics: Metrics) -> dict[str, Any]:
        """What was run, on what, from what, and how far it came."""
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **provenance(PACKAGES),
            "hardware": hardware(self.processes),
            "batch": asdict(self.batch),
            "base": {
                "path": self.config.model.path,
                "revision": self.config.model.revision,
                "fingerprint": self._base_fingerprint,
            },
            "dataset": {
                "path": str(self.dataset.directory),
                "manifest_sha256": sha256(self.dataset.directory / MANIFEST),
            },
            "experts_moved": [moved.record() for moved in self._moved],
            "evaluation_loss": {str(step): loss for step, loss in metrics.evaluations.items()},
            "steps": metrics.last.step if metrics.last else 0,
            "loss": metrics.last.loss if metrics.last else None,
        }


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
        **machine(),
        "device": torch.cuda.get_device_name(processes.device) if on_cuda else "cpu",
        "processes": processes.count,
        "threads_per_process": torch.get_num_threads(),
    }
