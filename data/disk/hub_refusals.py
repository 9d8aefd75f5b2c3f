"""What a hub or its client refuses, in one sentence with the reason."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from configs.program.errors import UserError, one_line

LONGEST_WAIT = 120
"""Seconds of the longest wait that a hub may ask for by `Retry-After`; a longer one is reported instead."""

MOST_NAMED = 5
"""Commits that a refusal names."""

TRANSIENT = (408, 429, 500, 502, 503, 504)
"""Statuses that may be different a moment later."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit of a repository of a hub."""

    name: str
    kind: str
    """`dataset` or `model`."""
    commit: str
    named: str
    """How errors call it: setting and value."""


class UnreachableError(UserError):
    """The hub gave no answer: it is off, too busy, or the user said that it is not to be asked."""


def cache_folder(kind: str, name: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=name, repo_type=kind)


def refuse(error: Exception, repository: Commit) -> NoReturn:
    """Raises the sentence for an error of the client."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cause = error
    while isinstance(cause, LocalEntryNotFoundError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    # The user may have meant a directory, unless it is we who chose the name.
    lead = "there is no such directory, and " if repository.named.endswith(repository.name) else ""
    if isinstance(cause, HfHubHTTPError):
        kind, what = _answered(cause, repository)
    else:
        kind, what = _not_answered(cause, repository)
    raise kind(f"{repository.named}: {lead}{what}") from error


def _answered(error: Any, repository: Commit) -> tuple[type[UserError], str]:
    """What to say of an answer that is an error."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status, cached = error.response.status_code, _cached(repository)
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"
        what = f"the hub gives it only to those who were granted access ({status}); ask for it at {page}, and {log_in}"
    elif isinstance(error, RepositoryNotFoundError):
        what = f"the hub has no such {repository.kind}, or it is private ({status}); check the name, or {log_in}"
    elif isinstance(error, RevisionNotFoundError):
        what = f"the hub has no revision {repository.commit} of it ({status}); check the branch, tag or commit{cached}"
    elif isinstance(error, EntryNotFoundError):
        what = f"the hub lacks a file of it ({status}, {one_line(error, -1)}); check the revision{cached}"
    elif status in TRANSIENT:
        after = error.response.headers.get("retry-after", "")
        why = "too many requests" if status == 429 else "it is not available"
        when = f"in {after} seconds" if after.isdigit() and int(after) > LONGEST_WAIT else "later"
        return UnreachableError, f"the hub answered {status} ({why}), the last time too; try again {when}{cached}"
    else:
        what = f"the hub answered {status} ({one_line(error)}); check the name and the revision, or {log_in}"
    return UserError, what


def _not_answered(error: Exception, repository: Commit) -> tuple[type[UserError], str]:
    """What to say if there was no whole answer, or nothing could be asked."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, OfflineModeIsEnabled

    cached, at = _cached(repository), f"the hub at {constants.ENDPOINT}"
    if isinstance(error, OfflineModeIsEnabled):
        asked = f"{repository.name} at {repository.commit}"
        what = f"{asked} is not in the cache, or not all of it, and HF_HUB_OFFLINE is set; unset it{cached}"
        return UnreachableError, what
    if isinstance(error, httpx2.ConnectError | httpx2.TimeoutException):
        what = f"{at} can't be reached ({one_line(error)}); check the network and HF_ENDPOINT{cached}"
        return UnreachableError, what
    if isinstance(error, httpx2.ProxyError | httpx2.UnsupportedProtocol | httpx2.InvalidURL | FileMetadataError):
        what = f"{at} can't be asked ({one_line(error)}); check HF_ENDPOINT and the proxy"
    elif isinstance(error, OSError) and error.errno is not None:
        cache = constants.HF_HUB_CACHE
        what = f"the cache {cache} can't be written ({error.strerror}); make room there, or point HF_HOME elsewhere"
    elif isinstance(error, ValueError):
        what = f"the hub's client refuses it ({one_line(error)}); check the name and the revision"
    else:
        what = f"the transfer was cut off again and again ({one_line(error)}); try again: files that are whole are kept"
    return UserError, what


def _cached(repository: Commit) -> str:
    """What the end of a refusal says of the commits that are in the cache."""
    snapshots = cache_folder(repository.kind, repository.name) / "snapshots"
    commits = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    others = [commit for commit in commits if commit != repository.commit]
    return f", or name a commit that is in the cache: {', '.join(others[:MOST_NAMED])}" if others else ""
