"""The way in, shared by `python -m data`, `python -m train` and `python -m inference`.

Hydra composes YAML and command line onto the program's dataclass, which holds every default, and the program's own
`main` receives that dataclass. A mistake of the user's ends in one sentence on stderr and exit code 2; any other
exception is a fault of ours and keeps its traceback.
"""

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.program import multirun
from configs.program.arguments import readable
from configs.program.errors import UserError, one_line, shown
from configs.program.launch import local_rank
from configs.program.multirun import Job
from configs.program.secrets import redact

CONFIG_DIR = Path(__file__).parents[1]
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

Config = TypeVar("Config")


def register(config_name: str, schema: type) -> None:
    """Makes `schema` the typed base of `configs/{config_name}.yaml`, which names it as `{config_name}_schema`."""
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)


def run(
    program: str,
    config_name: str,
    schema: type[Config],
    main: Callable[[Config], None],
    *,
    texts: tuple[str, ...] = (),
    sweep: Callable[[list[Job[Config]]], int] | None = None,
) -> None:
    """Composes `configs/{config_name}.yaml` and `sys.argv`, and calls `main` with the result.

    `texts` names settings that hold a person's words: their values are taken from the command line as they stand, where
    Hydra would read commas, brackets and `${…}` as grammar. `sweep` does the jobs of `--multirun` and gives the exit
    code; without it the program refuses that.

    All other texts are read as `configs/arguments.py` says.

    Exits 2 with one sentence if Hydra, OmegaConf or `main` (by `UserError`) refuse the input. Never returns an
    error: what is not the user's to mend propagates.
    """
    sys.excepthook = _traceback
    threading.excepthook = _traceback_of_thread
    register(config_name, schema)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions over instead of printing them and exiting 1

    words = dict(argument.split("=", 1) for argument in sys.argv[1:] if _names_one_of(argument, texts))
    # Hydra lets no one give a new key to a dictionary, such as `columns`, unless a plus says so.
    open_to_keys = _dictionaries(OmegaConf.structured(schema))

    def typed(composed: Any) -> Config:
        # `+key=value` adds what the dataclass lacks; only a merge onto the bare dataclass notices
        plain = OmegaConf.to_container(composed, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain, *map(_nested, entries.items()))
        config = OmegaConf.to_object(merged)
        assert isinstance(config, schema)
        for name, text in words.items():
            setattr(config, name, text)
        return config

    composed: list[Any] = []

    def compose(one: Any) -> None:
        composed.append(one)

    try:
        with _explained(program, config_name, schema):
            typed_in = [argument for argument in sys.argv[1:] if not _names_one_of(argument, texts)]
            arguments, entries = readable(typed_in, schema)
            asked = _flags(program, arguments)
            arguments = _without_null_groups(arguments, schema)
            sys.argv[1:] = [f"+{given}" if _names_one_of(given, open_to_keys) else given for given in arguments]
            if asked.multirun and sweep is None:
                raise UserError(f"--multirun: {program} does not sweep; give the command once for each value")
            if asked.multirun:
                asked.overrides = _without_null_groups(asked.overrides, schema)
                jobs = [replace(job, config=typed(job.config)) for job in multirun.jobs(asked, CONFIG_DIR, config_name)]
            else:
                hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(compose)()
            configs = [typed(one) for one in composed]
        sys.argv[1:] = map(redact, sys.argv[1:])  # libraries note the command in files of theirs
        # Outside of Hydra, which would say the overrides, keys among them, if `main` raises.
        if asked.multirun and sweep is not None:
            sys.exit(sweep(jobs))
        for config in configs:  # none with --help and the like
            main(config)
    except UserError as error:
        leave(program, str(error))
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _flags(program: str, arguments: list[str]) -> argparse.Namespace:
    """What Hydra reads in the command line; raises `UserError` for what no program takes."""
    if of_launcher := next((argument for argument in arguments if argument.startswith("--local_rank")), None):
        raise UserError(f"{of_launcher}: the launcher added it; launch with `deepspeed --no_local_rank --module …`")
    asked = multirun.flags(arguments)
    if asked.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={asked.experimental_rerun}: it would run what a pickle says; give the settings, or "
            f"the same command again"
        )
    if asked.multirun and (asked.run or asked.cfg or asked.info or asked.shell_completion):
        raise UserError(f"--multirun: it can't be asked for together with another task; give `{program}` one of them")
    return asked


def _without_null_groups(arguments: list[str], schema: type) -> list[str]:
    """The arguments without those that leave a group of files out, such as `recipe=null`, as it is left out anyway.

    Raises:
        UserError: a group of settings is given as null.
    """
    groups = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    null = [argument for argument in arguments if argument.endswith("=null") and argument[: -len("=null")] in groups]
    for argument in null:
        name = argument.removesuffix("=null")
        if name in OmegaConf.structured(schema):
            choices = sorted(path.stem for path in (CONFIG_DIR / name).glob("*.yaml"))
            raise UserError(f"{argument}: it can't be null; leave it out, or choose one of {', '.join(choices)}")
    return [argument for argument in arguments if argument not in null]


@contextlib.contextmanager
def _explained(program: str, config_name: str, schema: type) -> Iterator[None]:
    """Within it, what Hydra, OmegaConf and YAML raise becomes one sentence, and the process ends with exit code 2."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        leave(program, explain(error, program, config_name, schema))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else config_name
        leave(program, f"{where}: it can't be read ({error.problem}); write plain YAML there")
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        leave(program, f"{_unreadable(sys.argv[1:])}: it is not UTF-8 text ({one_line(error)}); write plain YAML there")


def _unreadable(arguments: list[str]) -> str:
    """The first YAML file that is not UTF-8, among those that the command line can choose from."""
    asked = multirun.flags(arguments)
    for directory in filter(None, (asked.config_dir, asked.config_path, CONFIG_DIR)):
        for path in sorted(Path(directory).rglob("*.yaml")):
            try:
                yaml.compose(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, yaml.reader.ReaderError):
                return str(path)
            except (OSError, yaml.YAMLError):
                continue
    return "a file of settings"


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
    if local_rank() == 0:
        with contextlib.suppress(OSError):  # nobody may be reading any more
            print(f"{program}: {shown(redact(sentence))}", file=sys.stderr, flush=True)
    elif str(local_rank()) != os.environ.get("SLURM_LOCALID"):  # srun lets the others be when one task ends
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

    if null := re.search(r"(?:Incompatible value 'None' for field of type|field '[^']*' is not Optional).*", text):
        where = re.search(r"full_key: (\S+)", text[null.start() :])
        return f"{where.group(1) if where else 'a setting'}=null: it can't be null; leave it out, or give a value"

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
