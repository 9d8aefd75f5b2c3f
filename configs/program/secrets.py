"""Keeps keys and passwords out of what programs write: files, logs, messages."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<secret>"

TELLING = re.compile(r"(?i)api_?key|_key$|(^|_)token$|secret|passw|credential")
"""Names of environment variables and settings whose values are secrets."""
SHORTEST = 8
"""Characters of the shortest value that is taken for a secret: hiding every `1` would hide numbers."""
COMMITS = ("revision", "commit", "name", "run_dir")
"""Settings and fields whose values may be commits, which look the same."""
SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}"  # a hub token
    r"|wandb_v\d+_\w{16,}"
    r"|\A[0-9a-f]{40}\Z"  # wandb's keys of old, as a whole value
    rf"|(?<==){''.join(f'(?<!{name}=)' for name in COMMITS)}[0-9a-f]{{40}}(?![\w/.-])"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@host
    r"|(?i:(?<=key=)|(?<=token=)|(?<=secret=)|(?<=password=))[^\s'\"]{8,}"
)
"""Secrets that show themselves, wherever they stand."""


def redact(text: str) -> str:
    """The text with `<secret>` in the place of every secret that is known from the environment or by its shape."""
    for secret in _of_environment(os.environ):
        text = text.replace(secret, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


def redacted(value: Any) -> Any:
    """The same value with the secrets in its texts hidden, at any depth."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: item if key in COMMITS and _is_commit(item) else redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def _is_commit(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{40}", value) is not None


def _of_environment(environment: Mapping[str, str]) -> list[str]:
    """The secrets in it, the longest first, so that one which contains another is hidden whole."""
    found = {value for name, value in environment.items() if TELLING.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
