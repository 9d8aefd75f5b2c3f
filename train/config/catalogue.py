"""The clusters of `configs/cluster/` without a command line: a GPU's data sheet, by the name that torch gives it."""

import functools
import re
from pathlib import Path
from typing import Any

import yaml

from train.config.cluster import ClusterConfig

FOLDER = Path(__file__).parents[2] / "configs" / "cluster"
PART = re.compile(r"\bMIG\b")
"""In the name of a part of a GPU, which no data sheet describes."""


def cluster_of(name: str) -> ClusterConfig | None:
    """The first cluster with that GPU; None if the catalogue doesn't know it."""
    if PART.search(name):
        return None
    found = (cluster for cluster in clusters().values() if cluster.known_as and re.search(cluster.known_as, name))
    return next(found, None)


@functools.cache
def clusters() -> dict[str, ClusterConfig]:
    """All clusters, by the name of the choice."""
    return {path.stem: ClusterConfig(**_settings(path)) for path in sorted(FOLDER.glob("*.yaml"))}


def _settings(path: Path) -> dict[str, Any]:
    """The settings of a file, over those of the files in its defaults list."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings: dict[str, Any] = {}
    for name in own.pop("defaults", []):
        settings |= own if name == "_self_" else _settings(path.with_name(f"{name}.yaml"))
    return settings or own
