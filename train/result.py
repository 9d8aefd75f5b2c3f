"""The adapter, or the whole model, of one save, as its parameters come."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralForCausalLM

from configs.errors import one_line
from train import adapter_files, expert_lora
from train.background import Background
from train.config import TrainConfig
from train.engine import Engine
from train.history import finite
from train.learning import Movement, movements
from train.model_files import ModelFiles
from train.run_directory import RECEIPT
from train.screen import console


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
            adapters = expert_lora.adapters(self._model)
            content = (self._config.model, self._config.lora, self._tensors, adapters)
            adapter_files.write(self._place, *content)
            if self._per_expert:
                per_expert = self._place / "per_expert"
                per_expert.mkdir()
                adapter_files.write_per_expert(per_expert, *content)
            self.moved = movements_of(self._config, self._model, self._tensors)
        (self._place / "train_config.yaml").write_text(settings, encoding="utf-8")
        whole = {**receipt, "experts_moved": [moved.record() for moved in self.moved]}
        (self._place / RECEIPT).write_text(json.dumps(finite(whole), indent=2) + "\n", encoding="utf-8")


def movements_of(config: TrainConfig, model: MixtralForCausalLM, tensors: dict[str, torch.Tensor]) -> list[Movement]:
    """How far the experts' adapters are from where the run began, whether it was resumed since or not.

    None if that can't be found out, such as where `lora.start` can't be read any more: what was learned is worth saving
    without it.
    """
    try:
        start = None
        if config.lora.start is not None:
            start = adapter_files.read(Path(config.lora.start), tensors, expert_lora.adapters(model), config.lora)
            start = {name: tensor.to(model.dtype) for name, tensor in start.items()}  # as training began from them
        return movements(model, tensors, start)
    except Exception as error:
        told = f"{one_line(error)}. How far the experts' adapters have moved is not told."
        console.print(told, soft_wrap=True)
        return []
