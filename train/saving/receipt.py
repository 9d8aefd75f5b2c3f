"""What a run records about itself: gathered once, when it is launched, and written with every save."""

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from omegaconf import OmegaConf

from configs.program.provenance import machine, provenance
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.processes import Processes
from train.history import History
from train.saving.identity import Inputs, stored_settings
from train.saving.run_directory import RunDirectory

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
PLANNED = {
    "memory_gib": "peak memory of process 0, GiB",
    "seconds": "seconds a step",
    "tokens_per_second": "tokens a second",
}
"""What the receipt calls quantities of metrics.jsonl that stand beside their plan."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is fixed from a run's launch on."""

    config: TrainConfig
    settings: dict[str, Any]
    """The configuration as it is stored, without secrets."""
    batch: BatchArithmetic
    training_rows: int
    """Packed rows of the training split."""
    launch: dict[str, Any]
    """When, by which command, of which commit and on what it was launched; on the main process."""
    inputs: dict[str, Any]
    """What it is given, by hash; on the main process, for `task=train`. See `Inputs.hashes`."""

    expected: Mapping[str, float | str] = field(default_factory=dict)
    """What the plan says of the quantities of `PLANNED`, or why it says nothing."""

    @property
    def config_yaml(self) -> str:
        """The content of config.yaml."""
        return OmegaConf.to_yaml(OmegaConf.create(self.settings))

    def rows_seen(self, step: int) -> int:
        """The rows that were trained on up to a step; the last step of a run may have fewer than the others."""
        return min(step * self.batch.rows, self.training_rows * self.config.epochs)

    def receipt(self, history: History, measured: Mapping[str, float]) -> dict[str, Any]:
        """What was run, on what, from what, and how far it has come; `measured` are the quantities of `PLANNED`."""
        both = {
            heading: {"planned": self.expected[name], "measured": measured.get(name)}
            for name, heading in PLANNED.items()
            if name in self.expected
        }
        return {
            **self.launch,
            "written": _now(),
            "batch": asdict(self.batch),
            "resumed_after_step": history.resumed_after or None,
            **self.inputs,
            "evaluation_loss": {str(step): loss for step, loss in history.evaluations.items()},
            "steps": history.last.step if history.last else 0,
            "loss": history.last.loss if history.last else None,
            "plan": both or None,
            "settings": self.settings,
        }


def record_launch(
    directory: RunDirectory,
    config: TrainConfig,
    batch: BatchArithmetic,
    inputs: Inputs,
    processes: Processes,
    *,
    training_rows: int,
    expected: Mapping[str, float | str],
) -> Record:
    """Gathers the record of a run that is being launched into `directory`; collective.

    Raises:
        UserError: an input can't be read.
    """

    def gather() -> tuple[dict[str, Any], dict[str, Any]]:
        # Now and not when the run is saved: by then the checkout may be another one.
        launch = {"started": _now(), **provenance(PACKAGES), "hardware": hardware(processes)}
        return launch, inputs.hashes() if config.task == "train" else {}

    launch, hashes = directory.on_main(gather) or ({}, {})
    return Record(config, stored_settings(config), batch, training_rows, launch, hashes, expected)


def hardware(processes: Processes) -> dict[str, Any]:
    """What the run computes on."""
    on_cuda = processes.device.type == "cuda"
    return {
        **machine(),
        "device": torch.cuda.get_device_name(processes.device) if on_cuda else "cpu",
        "processes": processes.count,
        "threads_per_process": torch.get_num_threads(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
