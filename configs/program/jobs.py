"""The jobs that a command line asks for, one or with `--multirun` several, each with settings composed by Hydra.

Hydra's own way of running them would compose twice, run several one after the other in this process, where DeepSpeed
starts only once, and write multirun.yaml with keys in the clear.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from configs.program.errors import UserError

Config = TypeVar("Config")

FLAGS = ("config_path", "config_name", "config_dir")
"""Those of Hydra's flags that a job takes over."""


@dataclass(frozen=True, slots=True)
class Job(Generic[Config]):
    """One run of the program."""

    arguments: list[str]
    """Behind `python -m {program}`."""
    swept: dict[str, str]
    """Its values of the settings that differ between the jobs, as Hydra writes them."""
    config: Config


def flags(arguments: list[str]) -> argparse.Namespace:
    """The command line as Hydra reads it; ends the process with its usage if it can't."""
    return get_args_parser().parse_known_args(arguments)[0]


def jobs(asked: argparse.Namespace, config_path: Path, config_name: str) -> Iterator[Job[Any]]:
    """The jobs that a command line asks for, the last swept setting changing fastest; their configs are composed, and
    not resolved.

    Raises:
        UserError: a sweep is not over listed values.
        HydraException: the settings are refused.
    """
    given = {flag: value for flag in FLAGS if (value := getattr(asked, flag)) is not None}
    taken_over = [f"--{flag.replace('_', '-')}={value}" for flag, value in given.items()]
    directory = str(Path(given.get("config_path", config_path)).resolve())
    search = [f'hydra.searchpath=["file://{Path(given["config_dir"]).resolve()}"]'] if "config_dir" in given else []
    with initialize_config_dir(directory, version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        typed = parser.parse_overrides(asked.overrides)
        # Hydra refuses to compose a sweep
        choices = [_choices(one) for one in typed] if asked.multirun else [[(text, None)] for text in asked.overrides]
        for chosen in itertools.product(*choices):
            overrides = [override for override, _ in chosen]
            swept = {key: value for _, key_and_value in chosen if key_and_value for key, value in [key_and_value]}
            composed = compose(given.get("config_name", config_name), [*overrides, *search])
            yield Job([*taken_over, *overrides], swept, composed)


def _choices(override: Override) -> list[tuple[str, tuple[str, str] | None]]:
    """What one argument becomes in the jobs, with name and value if it differs between them."""
    if not override.is_sweep_override():
        assert override.input_line is not None
        return [(override.input_line, None)]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: a sweep takes listed values; write {override.key_or_group}=1,2,3")
    key, values = override.get_key_element(), override.sweep_string_iterator()
    return [(f"{key}={value}", (override.key_or_group, str(value))) for value in values]
