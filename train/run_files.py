"""The files of a run directory that a run writes and others read: their names, and one reader for those of lines.

Training writes them, the report shows them, and a sweep looks for the losses in them. A line that can't be read is left
out: a kill may leave half of one, and what the others say is true all the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

from msgspec import Meta

from data.disk.formats import sizes
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError
from data.disk.plain_text import read_start

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LAUNCHES = "launches.jsonl"
REPORT = "report.html"
ANSWERS = "answers.json"
TRACE = "trace.json.gz"
EXPERT_LOAD, EXPERT_LOAD_PICTURE = "expert_load.json", "expert_load.png"

FORMER_NAMES = {"auxiliary_loss": "load_balancing_loss"}
"""What lines of metrics.jsonl once called a quantity, and its name now."""

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]

Recordable = float | str
"""A number; one that is not finite is written as a text."""

Shape = TypeVar("Shape")


class MetricsLine(TypedDict):
    """What is relied on in a line of metrics.jsonl; whatever else it holds is there too."""

    step: Count
    loss: NotRequired[Recordable]
    """Nats per supervised token in that step."""
    evaluation_loss: NotRequired[Recordable]
    """The same of the held-out split, after that step."""
    expert_load: NotRequired[list[list[Recordable]]]
    router_entropy: NotRequired[list[Recordable]]
    checkpoint_seconds: NotRequired[float]


class Launch(TypedDict):
    """What is relied on in a line of launches.jsonl."""

    resumed_after_step: NotRequired[Count | None]


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run directory's metrics.jsonl in their order, quantities by their names of today."""
    return [
        {FORMER_NAMES.get(name, name): value for name, value in line.items()}
        for line in _lines(directory / METRICS, MetricsLine)
    ]


def read_launches(directory: Path) -> list[dict[str, Any]]:
    """When the run was begun or resumed, and after which step."""
    return [dict(line) for line in _lines(directory / LAUNCHES, Launch)]


def _lines(path: Path, shape: type[Shape]) -> Iterator[Shape]:
    for line in (read_start(path, sizes.LINES) or b"").splitlines():
        try:
            yield parse_json(line, shape)
        except UnreadableError:
            continue
