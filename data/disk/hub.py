"""The only way to ask a model hub: a revision → its commit, once; that commit's files → the cache, and nothing else.

A revision that can't be had is never replaced by another one. What fails for a moment is tried again a bounded number
of times; what fails for good becomes one sentence that keeps the hub's reason.
"""

import contextlib
import fnmatch
import glob
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from configs.program.errors import UserError
from configs.program.secrets import redact
from data.disk.formats import sizes
from data.disk.hub_refusals import LONGEST_WAIT, TRANSIENT, Commit, UnreachableError, cache_folder, refuse
from data.disk.plain_text import read_bytes

TRIES = 4
"""How often a question or a transfer is tried. Within a transfer, the client itself goes on up to five times after it
was cut off."""

SECONDS = 20.0
"""How long an answer may take to begin, and to go on."""

WORTH_A_LINE = 10_000_000
"""Bytes of a download that is announced; terminals show its progress too."""

COMMIT = re.compile("[0-9a-f]{40}")
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository(Commit):
    """A repository of a hub at a commit, whose files can be asked for."""

    @property
    def folder(self) -> Path:
        """Where the files of the commit lie in the cache."""
        return cache_folder(self.kind, self.name) / "snapshots" / self.commit

    def files(self) -> dict[str, int | None]:
        """The names of all its files, with their bytes; of a model that an older client cached, those that are there.

        Raises:
            UserError: the hub doesn't have the commit, or doesn't let us see it.
            UnreachableError: the hub can't be asked, and its answer is not in the cache.
        """
        from huggingface_hub import HfApi, get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
        from huggingface_hub.hf_api import RepoFile

        try:
            listed = get_cached_repo_tree(self.name, repo_type=self.kind, revision=self.commit)
        except CachedRepoTreeNotFoundError:
            api = HfApi()

            def ask() -> list[Any]:
                return list(api.list_repo_tree(self.name, repo_type=self.kind, revision=self.commit, recursive=True))

            try:
                listed = _asking(ask, self, by_client=TRANSIENT)
            except UnreachableError:
                # An index tells of a model whether all of it is there; of a dataset nothing does.
                if self.kind != "model" or not self.folder.is_dir():
                    raise
                here = (path for path in self.folder.rglob("*") if path.is_file())
                return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in here}
        return {entry.path: entry.size for entry in listed if isinstance(entry, RepoFile)}

    def fetch(self, names: Iterable[str]) -> Path:
        """The folder that holds these files; downloads those that are not in the cache yet.

        Of the processes of a machine one downloads, and the others wait for it, as long as it takes.

        Raises:
            UserError: they can't be had, all of them and at this commit.
        """
        wanted = list(names)
        if not self._missing(wanted):
            return self.folder
        try:
            with _alone(self.kind, self.name):
                if missing := self._missing(wanted):
                    self._download(missing)
        except OSError as error:  # of the cache: no space, or no right to write
            refuse(error, self)
        if missing := self._missing(wanted):
            raise UserError(
                f"{self.named}: the hub did not give {missing[0]}; try again, or give a folder with the files"
            )
        return self.folder

    def _missing(self, names: list[str]) -> list[str]:
        return [name for name in names if not (self.folder / name).is_file()]

    def _download(self, names: list[str]) -> None:
        from huggingface_hub import snapshot_download

        sizes = self.files()
        size = sum(sizes.get(name) or 0 for name in names)
        if size >= WORTH_A_LINE and not _offline():
            files = "1 file" if len(names) == 1 else f"{len(names):,} files"
            _note(f"downloading {files}, {size / 1e6:,.1f} MB, of {self.name} at {self.commit}")
        patterns = [glob.escape(name) for name in names]
        _asking(
            lambda: snapshot_download(
                self.name, repo_type=self.kind, revision=self.commit, allow_patterns=patterns, etag_timeout=SECONDS
            ),
            self,
            by_client=(408, 429),
        )


def find(kind: str, name: str, revision: str | None, named: str) -> Repository:
    """The repository at the commit that a commit, tag or branch (None for the default one) stands for now.

    If the hub gives no answer, a tag or branch stands for the commit that it stood for when the hub was last asked, and
    a line says so.

    Raises:
        UserError: there is no such repository or revision, it may not be seen, or the hub can't be asked about it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    if not NAME.fullmatch(name):
        raise UserError(
            f"{named}: there is no such directory, and it is not a name on a hub, such as user/name; check the path"
        )
    if revision is not None and COMMIT.fullmatch(revision):
        return Repository(name=name, kind=kind, commit=revision, named=named)
    asked = Repository(name=name, kind=kind, commit=revision or "main", named=named)
    api = HfApi()
    try:
        info = _asking(lambda: api.repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS), asked)
    except UnreachableError as error:
        try:
            last = api.resolve_revision(name, repo_type=kind, revision=revision, local_files_only=True).resolved
        except (RevisionResolutionError, OSError, ValueError):
            raise error from None
        if not COMMIT.fullmatch(last):  # a damaged cache, whose text would be taken for a folder's name
            raise error
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _note(f"it gives no answer about {name}; {asked.commit} stands for {last}, as in its last answer")
        return Repository(name=name, kind=kind, commit=last, named=named)
    commit = str(info.sha)
    with contextlib.suppress(OSError):  # a cache that can't be written can still be read
        _remember(cache_folder(kind, name) / "refs" / asked.commit, commit)
    return Repository(name=name, kind=kind, commit=commit, named=named)


def matching(names: Iterable[str], wanted: Iterable[str], unwanted: Iterable[str] = ()) -> list[str]:
    """The names that a pattern of `wanted` matches, and none of `unwanted`."""
    return [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in unwanted)
    ]


def _note(sentence: str) -> None:
    sys.stderr.write(redact(f"hub: {sentence}\n"))


def _remember(ref: Path, commit: str) -> None:
    """Keeps what a revision stands for where the hub's clients look for it when the hub can't be asked."""
    if ref.is_file() and read_bytes(ref, sizes.HEAD) == commit.encode():
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f".{ref.name}.{os.getpid()}")
    new.write_text(commit)
    new.replace(ref)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


@contextlib.contextmanager
def _alone(kind: str, name: str) -> Iterator[None]:
    """Within it, no other process of this machine downloads from the repository."""
    from huggingface_hub.utils._fixes import WeakFileLock

    folder = cache_folder(kind, name)
    locks = folder.parent / ".locks" / folder.name
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / "repository.lock"):
        yield


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Within it, the client shows its progress on a terminal and says nothing else."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    client = logging.getLogger("huggingface_hub")
    level, had_bars = client.level, not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client.setLevel(logging.CRITICAL)
        if not sys.stderr.isatty():
            disable_progress_bars()
        try:
            yield
        finally:
            client.setLevel(level)
            if had_bars:
                enable_progress_bars()


def _asking(call: Callable[[], Result], repository: Repository, *, by_client: tuple[int, ...] | None = None) -> Result:
    """What the hub answers; asked again if it may answer otherwise a moment later.

    `by_client` are the statuses after which the client tries again by itself, as it then does if the network fails.

    Raises:
        UserError: it refuses, or doesn't answer.
    """
    import httpx2
    from huggingface_hub import get_session

    tried = 0
    while True:
        tried += 1
        try:
            with _quietly():
                get_session().timeout = httpx2.Timeout(SECONDS)  # left alone, some calls of the client wait for ever
                return call()
        except (OSError, ValueError, RuntimeError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            wait = _wait(error, tried, by_client)
            if wait is None or wait > LONGEST_WAIT or tried == TRIES:
                refuse(error, repository)
        time.sleep(wait)


def _wait(error: Exception, tried: int, by_client: tuple[int, ...] | None) -> float | None:
    """Seconds until it is worth trying again; None if it isn't, or if the client tried often enough by itself."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in TRANSIENT or error.response.status_code in (by_client or ()):
            return None
        after = error.response.headers.get("retry-after", "")
        return float(after) if after.isdigit() else 2.0 ** (tried - 1)
    if isinstance(error, LocalEntryNotFoundError) or (isinstance(error, OSError) and error.errno is not None):
        return None
    if isinstance(error, httpx2.ProxyError | httpx2.UnsupportedProtocol | httpx2.InvalidURL | ValueError) or _offline():
        return None
    lost = httpx2.ConnectError | httpx2.TimeoutException | httpx2.RemoteProtocolError
    if by_client is not None and isinstance(error, lost):
        return None
    return 2.0 ** (tried - 1)
