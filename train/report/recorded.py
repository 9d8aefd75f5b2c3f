"""A run directory → what it recorded, whatever state the run is in: it may be running, stopped or damaged in places."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs.program.errors import UserError
from data.disk.plain_text import read_json
from train.config.train import TrainConfig

METRICS, RECEIPT, CONFIG, LAUNCHES = "metrics.jsonl", "receipt.json", "config.yaml", "launches.jsonl"
FORMER_NAMES = {"auxiliary_loss": "load_balancing_loss"}
"""What lines of metrics.jsonl once called a quantity, and its name now."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run directory holds."""

    directory: Path
    receipt: dict[str, Any]
    """Of the newest launch that saved; empty before the first save."""
    settings: dict[str, Any]
    """Of config.yaml."""
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, in order; those that can't be read are left out."""
    launches: list[dict[str, Any]] = field(default_factory=list)
    """When the run was begun or gone on with, and after which step."""

    def series(self, name: str) -> list[tuple[float, float]]:
        """The steps and the values of a quantity; a value that is no number is NaN."""
        return [(float(line["step"]), _float(line[name])) for line in self.lines if name in line]

    @property
    def steps(self) -> int:
        """The last step that was recorded."""
        return max((int(line["step"]) for line in self.lines), default=0)

    def routed(self) -> dict[str, Any] | None:
        """The newest line about the routers."""
        return next((line for line in reversed(self.lines) if "expert_load" in line), None)


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def read_run(directory: Path) -> Recorded:
    """Reads a run directory.

    Raises:
        UserError: it holds no run.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"run_dir={directory}: it holds no run (there is no {CONFIG}); give the directory of one")
    try:
        settings = OmegaConf.to_container(OmegaConf.load(directory / CONFIG))
    except Exception as error:  # of YAML and of OmegaConf, of many kinds
        raise UserError(
            f"run_dir={directory}: its {CONFIG} can't be read; give the directory of a whole run"
        ) from error
    return Recorded(
        directory=directory,
        receipt=read_json(directory / RECEIPT),
        settings={str(name): value for name, value in settings.items()} if isinstance(settings, dict) else {},
        lines=[
            {FORMER_NAMES.get(name, name): value for name, value in line.items()}
            for line in _lines(directory / METRICS)
            if isinstance(line.get("step"), int)
        ],
        launches=_lines(directory / LAUNCHES),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:  # the last may be half written
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def note_launch(directory: Path, started: str, processes: int, resumed_after: int) -> None:
    """Adds a line to `launches.jsonl`; a disk that takes none is no reason to end the run."""
    line = {"started": started, "processes": processes, "resumed_after_step": resumed_after}
    try:
        with (directory / LAUNCHES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        return


def changed_settings(settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs from the program's defaults: the setting, its value, the default."""
    defaults = OmegaConf.to_container(OmegaConf.structured(TrainConfig()))
    assert isinstance(defaults, dict)
    given, plain = _flat(settings), _flat({str(key): value for key, value in defaults.items()})
    return [(name, value, plain.get(name)) for name, value in given.items() if value != plain.get(name)]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat
