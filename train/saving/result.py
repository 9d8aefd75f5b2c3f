"""The adapter, or the whole model, of one save, written as its parameters come."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from configs.program.console import console
from configs.program.secrets import redact
from data.card import write_adapter_card
from data.disk.adapter_directory import CONFIG, PER_EXPERT, RECEIPT, TRAIN_CONFIG
from data.disk.formats import sizes
from data.disk.formats.json_text import read_json
from data.template import ChatTokenizer
from train.config.train import TrainConfig
from train.engine.engine import Engine
from train.history import finite
from train.lora import factors
from train.lora.files import peft_files
from train.lora.proof import Movement
from train.saving.background import Background
from train.saving.starting_point import movements_of
from train.saving.whole_model import ModelFiles


def show_movements(movements: list[Movement]) -> None:
    """Prints how far the experts' adapters have moved: least, middle and most of each projection, and which they are.

    The receipt holds every number, and the report draws them.
    """
    title = "How far the experts' adapters have moved: ‖s(BA − B₀A₀)‖ (layer, expert)"
    table = Table("projection", title=title, title_justify="left")
    for name in ("least", "median", "most", "moved"):
        table.add_column(name, justify="right")
    for projection in dict.fromkeys(moved.projection for moved in movements):
        norms = sorted(
            (norm, moved.layer, expert)
            for moved in movements
            if moved.projection == projection
            for expert, (norm, rank) in enumerate(zip(moved.norms_E, moved.ranks, strict=True))
            if rank
        )
        if norms:
            least, most = (f"{norm:.3g} ({layer}, {expert})" for norm, layer, expert in (norms[0], norms[-1]))
            count = sum(norm > 0 for norm, _, _ in norms)
            all_of_them = "all" if count == len(norms) else f"{count} of {len(norms)}"
            table.add_row(projection, least, f"{norms[len(norms) // 2][0]:.3g}", most, all_of_them)
    if table.rows:
        console.print(table)


def result_name(config: TrainConfig) -> str:
    """The name of the run's result in the run directory."""
    return "model" if config.lora.method == "none" else "adapter"


class Result:
    """Writes the result, by the jobs of a `Background`: an adapter in PEFT's format, or a model's files."""

    def __init__(
        self, path: Path, config: TrainConfig, engine: Engine, background: Background, *, per_expert: bool = False
    ):
        """Begins.

        Args:
            path: the directory that is written; what is there is removed.
            config: of the run.
            engine: whose trained parameters will follow, in its order.
            background: does the work. After the first error nothing more is written.
            per_expert: whether an adapter also gets the export with keys for each expert.
        """
        self._path, self._config, self._background, self._per_expert = path, config, background, per_expert
        self._model = engine.module.causal_lm
        self._dtype = self._model.dtype
        self._tensors: dict[str, torch.Tensor] = {}
        background.submit(self._begin)
        in_full = config.lora.method == "none"
        self._files = ModelFiles(path, engine.shapes, self._dtype) if in_full else None
        self.moved: list[Movement] = []
        """How far each expert's adapter is from where it began; known once all is written."""

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
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir(parents=True)

    def _finish(self, receipt: dict[str, Any], settings: str) -> None:
        if self._files is not None:
            self._files.finish(self._model, self._config.model.path)
        else:
            adapters = factors.adapters(self._model)
            content = (self._config.model, self._config.lora, self._tensors, adapters)
            peft_files.write(self._path, *content)
            if self._per_expert:
                per_expert = self._path / PER_EXPERT
                per_expert.mkdir()
                peft_files.write_per_expert(per_expert, *content)
            self.moved = movements_of(self._config, self._model, self._tensors)
        complete = finite({**receipt, "experts_moved": [moved.record() for moved in self.moved]})
        for directory in (path for path in (self._path, self._path / PER_EXPERT) if path.is_dir()):
            (directory / TRAIN_CONFIG).write_text(settings, encoding="utf-8")
            (directory / RECEIPT).write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
            if self._files is None:
                self._make_whole(directory, complete)

    def _make_whole(self, directory: Path, receipt: dict[str, Any]) -> None:
        """Adds what an adapter needs to be handed on alone: tokenizer, chat template and card."""
        base = self._config.model.path
        ChatTokenizer.load().save(directory, Path(base) if base and Path(base).is_dir() else None)
        named, remedy = f"run_dir={directory}", "give the same command again"
        settings = read_json(directory / CONFIG, dict[str, Any], named, remedy, largest=sizes.SETTINGS)
        write_adapter_card(directory, redact(self._config.name), settings, receipt)
