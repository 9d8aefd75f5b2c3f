"""The way in, shared by `python -m data`, `python -m train` and `python -m inference`.

Hydra composes YAML and command line onto the program's dataclass, which holds every default, and the program's own
`main` receives that dataclass. A mistake of the user's ends in one sentence on stderr and exit code 2; any other
exception is a fault of ours and keeps its traceback.
"""

import difflib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.arguments import readable
from configs.errors import UserError
from configs.secrets import redact

CONFIG_DIR = Path(__file__).parent
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

Config = TypeVar("Config")


def register(config_name: str, schema: type) -> None:
    """Makes `schema` the typed base of `configs/{config_name}.yaml`, which names it as `{config_name}_schema`."""
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)


def run(
    program: str, config_name: str, schema: type[Config], main: Callable[[Config], None], *, texts: tuple[str, ...] = ()
) -> None:
    """Composes `configs/{config_name}.yaml` and `sys.argv`, and calls `main` with the result.

    `texts` names settings that hold a person's words: their values are taken from the command line as they stand, where
    Hydra would read commas, brackets and `${…}` as grammar.

    All other texts are read as `configs/arguments.py` says.

    Exits 2 with one sentence where Hydra, OmegaConf or `main` (by `UserError`) refuse the input. Never returns an
    error: what is not the user's to mend propagates.
    """
    if of_launcher := next((argument for argument in sys.argv[1:] if argument.startswith("--local_rank")), None):
        leave(program, f"{of_launcher}: the launcher added it; launch with `deepspeed --no_local_rank --module …`")
    sys.excepthook = _traceback
    threading.excepthook = _traceback_of_thread
    register(config_name, schema)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions over instead of printing them and exiting 1

    words = dict(argument.split("=", 1) for argument in sys.argv[1:] if _names_one_of(argument, texts))
    try:
        arguments, entries = readable(
            (argument for argument in sys.argv[1:] if not _names_one_of(argument, texts)), schema
        )
    except UserError as error:
        leave(program, str(error))
    # Hydra lets no one give a new key to a dictionary, such as `columns`, unless a plus says so.
    open_to_keys = _dictionaries(OmegaConf.structured(schema))
    sys.argv[1:] = [f"+{argument}" if _names_one_of(argument, open_to_keys) else argument for argument in arguments]

    def typed(composed: Any) -> None:
        try:  # `+key=value` adds what the dataclass lacks; only a merge onto the bare dataclass notices
            config = OmegaConf.to_object(
                OmegaConf.merge(
                    OmegaConf.structured(schema),
                    OmegaConf.to_container(composed, resolve=True),
                    *map(_nested, entries.items()),
                )
            )
        except OmegaConfBaseException as error:
            leave(program, explain(error, program, config_name, schema))
        assert isinstance(config, schema)
        for name, text in words.items():
            setattr(config, name, text)
        sys.argv[1:] = map(redact, sys.argv[1:])  # libraries note the command in files of theirs
        try:
            main(config)
        except UserError as error:  # here, because Hydra would add a line of its own on the way out
            leave(program, str(error))

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(typed)()
    except (HydraException, OmegaConfBaseException) as error:
        leave(program, explain(error, program, config_name, schema))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else config_name
        leave(program, f"{where}: it can't be read ({error.problem}); write plain YAML there")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own, without secrets: errors of libraries may hold what they were given."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _traceback_of_thread(told: threading.ExceptHookArgs) -> None:
    """The same for an error that ends a thread."""
    if told.exc_type is not SystemExit:
        assert told.exc_value is not None
        print(f"Exception in thread {told.thread.name if told.thread else 'unknown'}:", file=sys.stderr)
        _traceback(told.exc_type, told.exc_value, told.exc_traceback)


def _nested(named: tuple[str, Any]) -> dict[str, Any]:
    """{"a.b": value} → {"a": {"b": value}}, of one name."""
    name, value = named
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _names_one_of(argument: str, settings: tuple[str, ...]) -> bool:
    return "=" in argument and argument.partition("=")[0] in settings


def leave(program: str, sentence: str) -> NoReturn:
    """Prints the sentence once per machine and ends this process with exit code 2."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if local_rank == "0":
        print(f"{program}: {redact(sentence)}", file=sys.stderr, flush=True)
    elif local_rank != os.environ.get("SLURM_LOCALID"):  # srun lets the others be when one task ends
        # The launcher ends all processes when the first one ends: leave that to the one that has the sentence, and
        # have nothing to say about being ended.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    sys.exit(EXIT_USER_ERROR)


def explain(error: Exception, program: str, config_name: str, schema: type) -> str:  # noqa: PLR0911 - one per kind
    """One sentence (field, value, remedy) for what Hydra or OmegaConf refused."""
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(str(cause) for cause in causes)
    first_lines = [str(cause).strip().splitlines()[0].rstrip(".") for cause in causes if str(cause).strip()]

    if unknown := re.search(r"(?:Key|Could not override) '([^']+)'(?: not in| is not in|\.)", text):
        key = re.search(r"full_key: (\S+)", text)
        asked = re.search(r"Could not override '([^']+)'", text)
        name = asked.group(1) if asked else key.group(1) if key else unknown.group(1)
        known = _keys(OmegaConf.structured(schema))
        close = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.split(".")[-1] == name][:1]
        guess = f"did you mean {close[0]}? " if close else ""
        return f"{name}: there is no such setting; {guess}`python -m {program} --cfg job` lists them all"

    if wrong := re.search(r"Value '(.*?)'(?: of type '\w+')? (?:could not be converted to|is not a valid) (\w+)", text):
        where = re.search(r"full_key: (.+)", text)
        field = where.group(1) if where else "a setting"
        return f"{field}={wrong.group(1)}: that is not of type {wrong.group(2)}; give a value of that type"

    if missing := re.search(r"Could not find '([^']+)'", text):
        group, _, name = missing.group(1).rpartition("/")
        options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
        if options:
            return f"{group}={name}: there is no such choice; choose one of {', '.join(options)}"
        return f"{group or name}: there is no such group of settings; see {CONFIG_DIR.name}/"

    if no_dictionary := re.search(r"An item is already at '([^']+)'", text):
        name = no_dictionary.group(1)
        return f"{name}: it takes names with their values; write '{name}={{name: value}}'"

    for merging in filter(None, (re.search(r"Error merging override ([^\s=]+=.*)", line) for line in first_lines)):
        setting = merging.group(1).strip()
        if "is not a ListConfig" in text:
            name, _, value = setting.partition("=")
            return f"{setting}: it takes a list; write '{name}=[{value}]'"
        return f"{setting}: the setting can't have that value; `python -m {program} --cfg job` shows its default"

    if unread := [cause.override for cause in causes if isinstance(cause, OverrideParseException)]:
        return f"{unread[0]}: that can't be read; write field=value, and a list as 'field=[a,b]'"

    return f"{first_lines[0] if first_lines else type(error).__name__}; check it against configs/{config_name}.yaml"


def _dictionaries(node: Any, prefix: str = "") -> tuple[str, ...]:
    """The settings whose keys the user chooses, as dotted names."""
    found: tuple[str, ...] = ()
    for key in node:
        child = node._get_node(key)
        if OmegaConf.is_dict(child) and not child._is_none():
            of_user = OmegaConf.get_type(child) is dict
            found += (f"{prefix}{key}",) if of_user else _dictionaries(child, f"{prefix}{key}.")
    return found


def _keys(node: Any, prefix: str = "") -> list[str]:
    """Every setting of a composed config, as dotted names."""
    keys = []
    for key in node:
        name = f"{prefix}{key}"
        keys.append(name)
        if OmegaConf.is_config(node._get_node(key)) and OmegaConf.is_dict(node._get_node(key)):
            keys += _keys(node._get_node(key), f"{name}.") if not node._is_none() else []
    return keys
