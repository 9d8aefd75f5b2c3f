"""A run directory → what it recorded, whatever state the run is in: it may be running, stopped or damaged in places."""

import json
import math
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from omegaconf import OmegaConf

from configs.program.errors import UserError
from data.disk.adapter_directory import RECEIPT
from data.disk.formats import sizes
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError, read_regular
from data.disk.plain_text import parse_yaml, read_start
from train.config.train import TrainConfig
from train.run_files import CONFIG, LAUNCHES, Recordable, read_launches, read_metrics


class Moved(TypedDict):
    """What a receipt holds of the experts of a layer."""

    layer: int
    projection: str
    ranks: list[int]
    norms: list[Recordable]


class Hardware(TypedDict):
    """On what a run was launched."""

    processes: int
    device: str


class Receipt(TypedDict):
    """What is relied on in a receipt."""

    started: str
    written: str
    hardware: Hardware
    dataset: dict[str, Any]
    experts_moved: NotRequired[list[Moved] | None]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run directory holds."""

    directory: Path
    receipt: dict[str, Any]
    """The receipt of the newest launch that saved; empty before the first save."""
    settings: dict[str, Any]
    """What config.yaml holds."""
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl, in order; those that can't be read are left out."""
    launches: list[dict[str, Any]] = field(default_factory=list)
    """When the run was begun or resumed, and after which step."""
    damaged: list[str] = field(default_factory=list)
    """What is there and was left out, and why, a line each."""

    def series(self, name: str) -> list[tuple[float, float]]:
        """The steps and the values of a quantity; a value that is not a number is NaN."""
        return [(float(line["step"]), number(line[name])) for line in self.lines if name in line]

    @property
    def steps(self) -> int:
        """The last step that was recorded."""
        return max((int(line["step"]) for line in self.lines), default=0)

    def routed(self) -> dict[str, Any] | None:
        """The newest line about the routers."""
        return next((line for line in reversed(self.lines) if "expert_load" in line), None)


def number(value: object) -> float:
    """A number as it was recorded; NaN for anything else."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def read_run(directory: Path) -> Recorded:
    """Reads a run directory.

    Raises:
        UserError: it holds no run.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"run_dir={directory}: it holds no run (there is no {CONFIG}); give the directory of one")
    try:
        content = (read_start(directory / CONFIG, sizes.SETTINGS) or b"").decode()
        if parse_yaml(content) is None:
            raise ValueError("it holds no settings")
        settings = OmegaConf.to_container(OmegaConf.create(content))
    except Exception as error:  # of YAML and of OmegaConf, of many kinds
        raise UserError(
            f"run_dir={directory}: its {CONFIG} can't be read; give the directory of a whole run"
        ) from error
    damaged: list[str] = []
    return Recorded(
        directory=directory,
        receipt=part(directory / RECEIPT, Receipt, damaged) or {},
        settings={str(name): value for name, value in settings.items()} if isinstance(settings, dict) else {},
        lines=read_metrics(directory),
        launches=read_launches(directory),
        damaged=damaged,
    )


def part(path: Path, shape: type[Any], damaged: list[str]) -> Any:
    """What a JSON file holds; None if there is none, or if it is not of the shape, of which `damaged` gets a line."""
    if not os.path.lexists(path):
        return None
    try:
        return parse_json(read_regular(path, sizes.RECORD), shape)
    except UnreadableError as error:
        damaged.append(f"{path} can't be read ({error})")
        return None


def note_launch(directory: Path, started: str, processes: int, resumed_after: int) -> None:
    """Adds a line to `launches.jsonl`; a disk that takes none doesn't end the run."""
    line = {"started": started, "processes": processes, "resumed_after_step": resumed_after}
    try:
        # Not through a link to elsewhere, nor into a pipe, at which it would wait for a reader.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(directory / LAUNCHES, flags, 0o666), "w", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        return


def changed_settings(settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs from the program's defaults: the setting, its value, the default."""
    plain = _defaults()
    return [(name, value, plain.get(name)) for name, value in _flat(settings).items() if value != plain.get(name)]


@cache
def _defaults() -> dict[str, Any]:
    defaults = OmegaConf.to_container(OmegaConf.structured(TrainConfig()))
    assert isinstance(defaults, dict)
    return _flat({str(key): value for key, value in defaults.items()})


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat
