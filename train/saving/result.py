"""The adapter, or the whole model, of one save, as its parameters come."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from configs.program.console import console
from train.config.train import TrainConfig
from train.engine.engine import Engine
from train.history import finite
from train.lora import factors, peft_files
from train.lora.proof import Movement
from train.saving.background import Background
from train.saving.run_directory import RECEIPT
from train.saving.starting_point import movements_of
from train.saving.whole_model import ModelFiles


def show_movements(movements: list[Movement]) -> None:
    """Prints how far each expert's adapter has moved: a row for each projection of each layer, a column an expert."""
    if not movements:
        return
    experts = [str(expert) for expert in range(len(movements[0].norms_E))]
    table = Table("layer", "projection", *experts, title="How far each expert's adapter has moved: ‖s(BA − B₀A₀)‖")
    for moved in movements:
        shown = [f"{norm:.3g}" if rank else "-" for norm, rank in zip(moved.norms_E, moved.ranks, strict=True)]
        table.add_row(str(moved.layer), moved.projection, *shown)
    console.print(table)


def result_name(config: TrainConfig) -> str:
    """What it is called in the run directory."""
    return "model" if config.lora.method == "none" else "adapter"


class Result:
    """Writes one, by the jobs of a `Background`: an adapter in PEFT's format, or a model's files."""

    def __init__(
        self, place: Path, config: TrainConfig, engine: Engine, background: Background, *, per_expert: bool = False
    ):
        """Begins.

        Args:
            place: the directory that it becomes; what is there goes.
            config: of the run.
            engine: whose trained parameters will come, in its order.
            background: what does the work. After the first error nothing more is written.
            per_expert: whether an adapter also gets the export with keys for each expert.
        """
        self._place, self._config, self._background, self._per_expert = place, config, background, per_expert
        self._model = engine.module.causal_lm
        self._dtype = self._model.dtype
        self._tensors: dict[str, torch.Tensor] = {}
        background.submit(self._begin)
        whole = config.lora.method == "none"
        self._files = ModelFiles(place, engine.shapes, self._dtype) if whole else None
        self.moved: list[Movement] = []
        """How far each expert's adapter is from where it began; once all is written."""

    def write(self, name: str, master: torch.Tensor) -> None:
        """Takes the next parameter, in float32."""
        if self._files is None:
            self._tensors[name] = master.to(self._dtype)  # the rounding by which DeepSpeed makes the model's own
            return
        files = self._files
        self._background.submit(lambda: files.write(name, master), master.nbytes)

    def finish(self, receipt: dict[str, Any], settings: str) -> None:
        """Completes it with the receipt and the settings, as YAML."""
        self._background.submit(lambda: self._finish(receipt, settings))

    def _begin(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True)

    def _finish(self, receipt: dict[str, Any], settings: str) -> None:
        if self._files is not None:
            self._files.finish(self._model, self._config.model.path)
        else:
            adapters = factors.adapters(self._model)
            content = (self._config.model, self._config.lora, self._tensors, adapters)
            peft_files.write(self._place, *content)
            if self._per_expert:
                per_expert = self._place / "per_expert"
                per_expert.mkdir()
                peft_files.write_per_expert(per_expert, *content)
            self.moved = movements_of(self._config, self._model, self._tensors)
        (self._place / "train_config.yaml").write_text(settings, encoding="utf-8")
        whole = {**receipt, "experts_moved": [moved.record() for moved in self.moved]}
        (self._place / RECEIPT).write_text(json.dumps(finite(whole), indent=2) + "\n", encoding="utf-8")
