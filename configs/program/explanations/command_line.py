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
from omegaconf import OmegaConf

from configs.program.arguments import settings_of_text
from configs.program.errors import UserError
from configs.program.explanations import names, recipes
from configs.program.explanations.recipes import Choice

REPLACED = {
    "hydra/launcher": "Hydra's launchers are not used; start the job with scripts/launch/slurm.sbatch, or several in "
    "turn with -m",
    "hydra/sweeper": "Hydra's sweepers are not used; list the values behind -m, as in optim.lr=1e-4,2e-4",
}


def flags(program: str, arguments: list[str], schema: type) -> argparse.Namespace:
    """What Hydra reads in the command line.

    Raises:
        UserError: an option that there is not, or one that no program takes.
    """
    if of_launcher := next((argument for argument in arguments if argument.startswith("--local_rank")), None):
        raise UserError(f"{of_launcher}: the launcher added it; launch with `deepspeed --no_local_rank --module …`")

    def refuse(message: str) -> NoReturn:
        what, _, why = message.rpartition(": ")
        option = next((word for word in what.split() if word.startswith("-")), arguments[0] if arguments else program)
        raise UserError(f"{option}: {why}; `python -m {program} --help` shows what can be given")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]  # it would print a usage of eight lines
    asked, unknown = parser.parse_known_args(arguments)
    for option in unknown:
        if option.startswith("-"):
            raise UserError(_as_setting(option, arguments, program, schema))
    if asked.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={asked.experimental_rerun}: it would run what a pickle says; give the settings, or "
            f"the same command again"
        )
    if asked.multirun and (asked.run or asked.cfg or asked.info or asked.shell_completion):
        raise UserError(f"--multirun: it can't be asked for together with another task; give `{program}` one of them")
    for flag in ("config_dir", "config_path"):
        if (given := getattr(asked, flag)) is not None and not Path(given).is_dir():
            raise UserError(f"--{flag.replace('_', '-')}={given}: there is no such directory; check the path")
    return asked


def _as_setting(option: str, arguments: list[str], program: str, schema: type) -> str:
    """The sentence for an option that there is not."""
    name, equals, value = option.partition("=")
    if not equals:
        following = arguments[arguments.index(option) + 1 :][:1]
        value = following[0] if following and "=" not in following[0] and following[0][:1] != "-" else "…"
    setting = name.lstrip("-").replace("-", "_")
    if setting not in names.settings(schema):
        return names.unknown(setting, program, schema)
    kind = settings_of_text(schema).get(setting)
    listed = value if kind in (None, str) or value[:1] in ("[", "{") else f"[{value}]"
    return f"{name}: settings have no dashes in front; write {shlex.quote(f'{setting}={listed}')}"


def check(program: str, config_name: str, schema: type, asked: argparse.Namespace, config_dir: Path) -> None:
    """Raises `UserError` for settings, groups and files that there are not, and for what is typed in a wrong way."""
    directories = [Path(given) for given in (asked.config_dir, asked.config_path) if given is not None]
    directories += [] if asked.config_path is not None else [config_dir]
    if (name := asked.config_name) is not None and not any((path / f"{name}.yaml").is_file() for path in directories):
        raise UserError(f"--config-name={name}: there is no {name}.yaml; leave it out")
    if asked.config_path is not None:
        return  # other groups than ours
    own = groups(config_name, schema, config_dir)
    known, open_to_keys = names.settings(schema), names.dictionaries(schema)
    chosen = []
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
        if key in own or any((path / key).is_dir() for path in directories if path != config_dir):
            chosen += [Choice(key, value) for value in _texts(override, multirun=asked.multirun)]
        elif key.split(".")[0].split("/")[0] != "hydra":
            _check_setting(argument, override, program, schema, known, open_to_keys, config_dir)
    recipes.check(chosen, directories, own)


def groups(config_name: str, schema: type, config_dir: Path) -> dict[str, bool]:
    """The groups of YAML files that a program has → whether they are about settings of the same name."""
    listed = OmegaConf.to_container(OmegaConf.load(config_dir / f"{config_name}.yaml"))
    assert isinstance(listed, dict)
    named = [key for item in listed["defaults"] if isinstance(item, dict) for key in item]
    settings = OmegaConf.structured(schema)
    return {str(name): name in settings for name in named if not str(name).startswith("override ")}


def _check_setting(
    argument: str,
    override: Override,
    program: str,
    schema: type,
    known: list[str],
    open_to_keys: tuple[str, ...],
    config_dir: Path,
) -> None:
    name = override.key_or_group
    if name not in known and (config_dir / name).is_dir() and any((config_dir / name).glob("*.yaml")):
        raise UserError(f"{name}: `python -m {program}` has no such group; {_whose(name, config_dir)}")
    of_user = any(name == setting or name.startswith(f"{setting}.") for setting in open_to_keys)
    if name not in known and not of_user:
        raise UserError(names.unknown(name, program, schema))
    if override.is_delete():
        raise UserError(
            f"{name}: ~ takes away a group's choice, and a setting needs a value; give it the one that you want, or "
            f"leave {argument} out"
        )
    if override.is_add() and not of_user:
        raise UserError(f"{name}: the setting is there, and takes no plus; write {argument.removeprefix('+')}")


def _whose(group: str, config_dir: Path) -> str:
    """Which program has the group."""
    for path in sorted(config_dir.glob("*.yaml")):
        if any(not isinstance(item, str) and group in item for item in OmegaConf.load(path).defaults):
            program = "data" if path.stem == "prepare" else path.stem
            return f"it is one of `python -m {program}`, and what that writes is named by dataset=prepared/…"
    return "leave it out"


def _without_value(argument: str, own: dict[str, bool], directories: list[Path]) -> str:
    """The sentence for a word that is no setting; it may be a choice."""
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
