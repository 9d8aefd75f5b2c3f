"""The entry point shared by `python -m data`, `python -m train` and `python -m inference`.

Hydra composes YAML and command line onto the program's dataclass, which holds every default, and the program's own
`main` receives that dataclass. A mistake of the user's ends in one sentence on stderr and exit code 2; any other
exception is a fault of ours and keeps its traceback.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from configs.program import jobs
from configs.program.arguments import readable
from configs.program.console import quiet_libraries
from configs.program.errors import UserError, shown
from configs.program.explanations import command_line, composing, help
from configs.program.explanations.program import Program
from configs.program.jobs import Job
from configs.program.launch import local_rank
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

    `texts` names settings that hold a person's words: their values are taken from the command line as they stand, while
    Hydra would read commas, brackets and `${…}` as grammar. `sweep` does the jobs of `--multirun` and gives the exit
    code; without it the program refuses that.

    All other texts are read as `configs/program/arguments.py` says.

    Exits 2 with one sentence if Hydra, OmegaConf or `main` (by `UserError`) refuse the input. Never returns an
    error: what the user can't mend propagates.
    """
    sys.excepthook = _traceback
    threading.excepthook = _traceback_of_thread
    register(config_name, schema)
    quiet_libraries()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions over instead of printing them and exiting 1

    words = dict(argument.split("=", 1) for argument in sys.argv[1:] if _names_one_of(argument, texts))
    typed_in = [argument for argument in sys.argv[1:] if not _names_one_of(argument, texts)]
    entries: dict[str, dict[str, str]] = {}

    def typed(composed: Any) -> Config:
        # `+key=value` adds what the dataclass lacks; only a merge onto the bare dataclass notices
        plain = OmegaConf.to_container(composed, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain, *map(_nested, entries.items()))
        config = OmegaConf.to_object(merged)
        assert isinstance(config, schema)
        for name, text in words.items():
            setattr(config, name, text)
        return config

    known, directories = Program(program, config_name, schema, CONFIG_DIR), [CONFIG_DIR]
    asked_for: list[Job[Config]] = []
    try:
        try:
            arguments, entries = readable(typed_in, schema)
            asked = command_line.flags(known, arguments)
            if asked.config_dir is not None:
                directories.insert(0, Path(asked.config_dir))
            if asked.multirun and sweep is None:
                raise UserError(f"--multirun: {program} does not sweep; give the command once for each value")
            command_line.check(known, asked)
            sys.argv[1:], asked.overrides = _for_hydra(arguments, known), _for_hydra(asked.overrides, known)
            if asked.help:
                help.stdout(help.text(known, next(jobs.jobs(asked, CONFIG_DIR, config_name)).config))
            elif asked.hydra_help or asked.cfg or asked.info or asked.shell_completion:
                hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(lambda _: None)()
            else:
                composed = jobs.jobs(asked, CONFIG_DIR, config_name)
                asked_for = [replace(job, config=typed(job.config)) for job in composed]
        except composing.ERRORS as error:
            raise UserError(composing.explain(error, known, directories)) from error
        sys.argv[1:] = map(redact, sys.argv[1:])  # libraries note the command in files of theirs
        if sweep is not None and asked.multirun:
            sys.exit(sweep(asked_for))
        for job in asked_for:  # none with --help and the like
            main(job.config)
    except UserError as error:
        leave(program, str(error))
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _for_hydra(arguments: list[str], program: Program) -> list[str]:
    """The arguments as Hydra has to get them."""
    # Hydra lets no one give a new key to a dictionary, such as `columns`, unless a plus says so.
    open_to_keys = program.dictionaries()
    given = _without_null_groups(arguments, program.schema)
    return [f"+{argument}" if _names_one_of(argument, open_to_keys) else argument for argument in given]


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


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own, without secrets: errors of libraries may hold what they were given."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _traceback_of_thread(args: threading.ExceptHookArgs) -> None:
    """The same for an error that ends a thread."""
    if args.exc_type is not SystemExit:
        assert args.exc_value is not None
        print(f"Exception in thread {args.thread.name if args.thread else 'unknown'}:", file=sys.stderr)
        _traceback(args.exc_type, args.exc_value, args.exc_traceback)


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
