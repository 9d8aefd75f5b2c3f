"""What is wrong with a command line and can be told before Hydra composes: by what was typed, not by what failed."""

import argparse
import re
import shlex
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from configs.program.arguments import settings_of_text
from configs.program.errors import UserError
from configs.program.explanations import names, recipes
from configs.program.explanations.program import Program, groups
from configs.program.explanations.recipes import Choice

HYDRAS_TASKS = ("multirun", "run", "cfg", "info", "shell_completion")
"""Flags of which a command has one at most."""
REPLACED = {
    "hydra/launcher": "Hydra's launchers are not used; start the job with scripts/launch/slurm.sbatch, or several in "
    "turn with -m",
    "hydra/sweeper": "Hydra's sweepers are not used; list the values behind -m, as in optim.lr=1e-4,2e-4",
}


def flags(program: Program, arguments: list[str]) -> argparse.Namespace:
    """What Hydra reads in the command line.

    Raises:
        UserError: an option that doesn't exist, or one that no program takes.
    """
    if of_launcher := next((argument for argument in arguments if argument.startswith("--local_rank")), None):
        raise UserError(f"{of_launcher}: the launcher added it; launch with `deepspeed --no_local_rank --module …`")

    def refuse(message: str) -> NoReturn:
        what, _, why = message.rpartition(": ")
        option = next((word for word in what.split() if word.startswith("-")), arguments[0])
        raise UserError(f"{option}: {why}; `python -m {program.name} --help` shows what can be given")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]  # it would print a usage of eight lines
    asked, unknown = parser.parse_known_args(arguments)
    for option in unknown:
        if option.startswith("-"):
            raise UserError(_as_setting(option, arguments, program))
    if asked.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={asked.experimental_rerun}: it would run what a pickle says; give the settings, or "
            f"the same command again"
        )
    first, *others = [f"--{flag.replace('_', '-')}" for flag in HYDRAS_TASKS if getattr(asked, flag)] or [""]
    if others:
        raise UserError(f"{first}: it can't be asked for together with {others[0]}; give {program.name} one of them")
    for flag in ("config_dir", "config_path"):
        if (given := getattr(asked, flag)) is not None and not Path(given).is_dir():
            raise UserError(f"--{flag.replace('_', '-')}={given}: there is no such directory; check the path")
    return asked


def _as_setting(option: str, arguments: list[str], program: Program) -> str:
    """The sentence for an option that doesn't exist."""
    name, equals, value = option.partition("=")
    if not equals:
        following = arguments[arguments.index(option) + 1 :][:1]
        value = following[0] if following and "=" not in following[0] and following[0][:1] != "-" else "…"
    setting = name.lstrip("-").replace("-", "_")
    if setting not in program.settings():
        return names.unknown(setting, program)
    kind = settings_of_text(program.schema).get(setting)
    listed = value if kind in (None, str) or value[:1] in ("[", "{") else f"[{value}]"
    return f"{name}: settings have no dashes in front; write {shlex.quote(f'{setting}={listed}')}"


def check(program: Program, asked: argparse.Namespace) -> None:
    """Raises `UserError` for settings, groups and files that don't exist, and for what is typed in a wrong way."""
    directories = [Path(given) for given in (asked.config_dir, asked.config_path) if given is not None]
    directories += [] if asked.config_path is not None else [program.configs]
    if (name := asked.config_name) is not None and not any((path / f"{name}.yaml").is_file() for path in directories):
        raise UserError(f"--config-name={name}: there is no {name}.yaml; leave it out")
    if asked.config_path is not None:
        return  # other groups than ours
    own, chosen = program.groups(), []
    for argument in asked.overrides:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            if "=" not in argument:
                raise UserError(_without_value(argument, own, directories)) from None
            continue  # Hydra says what can't be read
        key = override.key_or_group
        if sentence := REPLACED.get(key):
            raise UserError(f"{argument}: {sentence}")
        if override.is_sweep_override() and not asked.multirun:
            raise UserError(_comma(key, argument))
        if key in own and override.is_add():
            raise UserError(f"{key}: the group is there, and takes no plus; write {argument.lstrip('+')}")
        if key in own or any((path / key).is_dir() for path in directories if path != program.configs):
            chosen += [Choice(key, value) for value in _texts(override, multirun=asked.multirun)]
        elif key.split(".")[0].split("/")[0] != "hydra":
            _check_setting(argument, override, program)
        elif key != "hydra.searchpath":
            raise UserError(f"{argument}: Hydra composes the settings here, and does nothing else; leave it out")
    recipes.check(chosen, directories, own)


def _check_setting(argument: str, override: Override, program: Program) -> None:
    name = override.key_or_group
    of_user = any(name == setting or name.startswith(f"{setting}.") for setting in program.dictionaries())
    if name not in program.settings() and not of_user:
        others = _others_group(name, program) if name not in names.CALLED.get(program.name, {}) else None
        raise UserError(others or names.unknown(name, program))
    if override.is_delete():
        raise UserError(
            f"{name}: ~ takes away a group's choice, and a setting needs a value; give it the one that you want, or "
            f"leave {argument} out"
        )
    if override.is_add() and not of_user:
        raise UserError(f"{name}: the setting is there, and takes no plus; write {argument.removeprefix('+')}")


def _others_group(name: str, program: Program) -> str | None:
    """The sentence for a group of another program."""
    for path in sorted(program.configs.glob("*.yaml")):
        if name in groups(path):
            owner = "data" if path.stem == "prepare" else path.stem
            writes = "; what that writes is named by dataset" if (owner, program.name) == ("data", "train") else ""
            return f"{name}: `python -m {program.name}` has no such group; it is one of `python -m {owner}`{writes}"
    return None


def _without_value(argument: str, own: dict[str, bool], directories: list[Path]) -> str:
    """The sentence for a word that is not a setting; it may be a choice."""
    for group in own:
        if argument in recipes.choices(group, directories):
            return f"{argument}: it is a choice of {group}; write {group}={argument}"
    return f"{argument}: that can't be read; write field=value, and a list as 'field=[a,b]'"


def _comma(key: str, argument: str) -> str:
    """The sentence for a sweep that was not asked for."""
    if number := re.fullmatch(r"([+-]?\d+),(\d[\d.]*(?:[eE][+-]?\d+)?)", argument.partition("=")[2]):
        return f"{argument}: a comma separates values; if it is one number, write {key}={number[1]}.{number[2]}"
    return f"{argument}: it takes one value; several are a sweep, which -m asks for"


def _texts(override: Override, *, multirun: bool) -> list[str]:
    """The choices that an override makes of a group."""
    if override.is_delete():
        return []
    if override.is_sweep_override():
        return [str(text) for text in override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    value = override.value()
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]
