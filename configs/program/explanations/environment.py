"""A package that is missing: most often the environment is not active. Needs nothing but Python's own library."""

from __future__ import annotations  # an older Python is to come as far as the sentence

import contextlib
import sys
from collections.abc import Iterator

OURS = ("configs", "data", "train", "inference")


@contextlib.contextmanager
def needed(program: str) -> Iterator[None]:
    """Within it the program's modules are imported; one that is missing ends in a sentence and exit code 2."""
    remedy = "activate the environment with `source .venv/bin/activate`, or make it with ./scripts/quickstart.sh"
    if sys.version_info < (3, 11):  # noqa: UP036 - of whoever has not activated ours
        sys.stderr.write(
            f"{program}: {sys.executable}: it is Python {sys.version.split()[0]}, and 3.11 is needed; {remedy}\n"
        )
        sys.exit(2)
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", *OURS):
            raise
        sys.stderr.write(f"{program}: {package}: {sys.executable} has no such package; {remedy}\n")
        sys.exit(2)
