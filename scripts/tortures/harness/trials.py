"""Trials, the table of what became of them, and the options that all tortures share."""

import argparse
import random
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.program.errors import UserError
from train.saving.checkpoint import DamagedError


class FailedError(Exception):
    """Something did not go as it has to; the text says what."""


def require(holds: object, message: str) -> None:
    """Raises `FailedError` with the text unless the condition holds."""
    if not holds:
        raise FailedError(message)


def attempt(name: str, trial: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a trial found, with its name, and why it `failed`, or None."""
    try:
        return {"trial": name, **trial(), "failed": None}
    except (FailedError, DamagedError, OSError, LookupError, subprocess.SubprocessError) as error:
        return {"trial": name, "failed": f"{type(error).__name__}: {error}"}


def attempts(
    options: argparse.Namespace, trials: Iterable[tuple[str, Callable[[], dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """The findings of the trials whose names `--only` matches.

    Raises:
        UserError: it matches none.
    """
    found = [attempt(name, trial) for name, trial in trials if re.search(options.only, name)]
    if not found:
        raise UserError(f"--only={options.only}: no trial is called so; leave it out to see all of their names")
    return found


def report(title: str, trials: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Prints a table of trials, and what repeats those that failed; the figures."""
    columns = list(dict.fromkeys(key for trial in trials for key in trial if key != "failed"))
    table = Table(*columns, "", title=title)
    for trial in trials:
        cells = [_shown(trial.get(column, "")) for column in columns]
        table.add_row(*cells, "FAILED" if trial["failed"] else "ok")
    console = Console(width=160)
    console.print(table)
    failed = [f"{trial['trial']}: {trial['failed']}" for trial in trials if trial["failed"]]
    for message in failed:
        console.print(f"Failed (--seed {seed}): {message}", style="bold red", markup=False)
    console.print(f"{len(trials) - len(failed)} of {len(trials)} went as they have to")
    return {"seed": seed, "trials": trials, "failed": failed}


def _shown(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def common_arguments(parser: argparse.ArgumentParser, *, trials: bool = True) -> None:
    """The options that all tortures have, and `--only` for those that have trials."""
    parser.add_argument("--seed", type=int, default=0, help="decides all that is drawn (0)")
    if trials:
        parser.add_argument("--only", default="", metavar="PATTERN", help="only the trials whose names it matches")
    parser.add_argument("--forked", action="store_true", help="fork the runs to compare with too, which is faster")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the runs lie (default: a temporary place)")


def generator(*parts: object) -> random.Random:
    """Random numbers that follow from the parts."""
    return random.Random(" ".join(map(str, parts)))
