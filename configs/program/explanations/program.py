"""A program as its command line knows it: name, file, dataclass, and what can be given by name."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True, slots=True)
class Program:
    """What `entry.run` is given of a program."""

    name: str
    """It is run by `python -m {name}`."""
    file: str
    """Its defaults list is in `{configs}/{file}.yaml`."""
    schema: type
    """The dataclass of its settings."""
    configs: Path
    """The folder of groups."""

    def settings(self) -> list[str]:
        """Every setting and every group of settings, as dotted names."""
        return _settings(_structured(self.schema))

    def dictionaries(self) -> tuple[str, ...]:
        """The settings whose keys the user chooses, as dotted names."""
        return _dictionaries(_structured(self.schema))

    def groups(self) -> dict[str, bool]:
        """The groups of YAML files → whether they are about settings of the same name, as `recipe` is not."""
        return {name: name in _structured(self.schema) for name in groups(self.configs / f"{self.file}.yaml")}


def groups(file: Path) -> list[str]:
    """The groups that a file's defaults list names."""
    listed = OmegaConf.load(file).defaults
    names = [str(key) for item in listed if not isinstance(item, str) for key in item]
    return [name for name in names if not name.startswith("override ")]


@cache  # making one takes as long as Hydra takes to compose, and these are only read
def _structured(schema: type) -> DictConfig:
    made: DictConfig = OmegaConf.structured(schema)
    return made


def _settings(node: Any, prefix: str = "") -> list[str]:
    names = []
    for key in node:
        name = f"{prefix}{key}"
        names.append(name)
        child = node._get_node(key)
        if OmegaConf.is_config(child) and OmegaConf.is_dict(child) and not child._is_none():
            names += _settings(child, f"{name}.")
    return names


def _dictionaries(node: Any, prefix: str = "") -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    for key in node:
        child = node._get_node(key)
        if OmegaConf.is_dict(child) and not child._is_none():
            of_user = OmegaConf.get_type(child) is dict
            found += (f"{prefix}{key}",) if of_user else _dictionaries(child, f"{prefix}{key}.")
    return found
