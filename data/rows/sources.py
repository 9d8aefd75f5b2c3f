"""What rows are read from: files and directories, hashed, or a hub's dataset at a commit."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.program.errors import UserError
from data.config import PrepareConfig
from data.disk import hub
from data.disk.files import sha256
from data.rows.reading import Chunk, read_file
from data.rows.repository import SAVED, SAVED_SPLITS, DataFile, Wanted, fetched, found


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file, or a dataset of a hub or in a directory."""

    name: str
    description: dict[str, Any]
    """What the manifest says of it; the same if the contents are the same."""
    files: tuple[DataFile, ...] = ()
    """The files with a dataset's rows, in their order; empty before it is fetched."""
    repository: hub.Repository | None = None
    """Where a hub keeps it."""
    limit: int | None = None
    """Rows that are read of it; None for all."""
    weight: float = 1.0
    """How often an epoch trains on each of its conversations."""

    @property
    def bytes(self) -> int:
        """The size of its files."""
        return sum(Path(path).stat().st_size for path in [file.path for file in self.files] or [self.name])

    def fetched(self) -> "Source":
        """The same, with all its files on this machine.

        Raises:
            UserError: a hub doesn't give them.
        """
        if self.repository is None:
            return self
        own = self.description
        files = fetched(self.repository, _wanted(self.name, own["config"], own["split"]), own["revision"])
        return replace(self, files=tuple(files), description={**own, "files": [{"file": file.name} for file in files]})

    def chunks(self) -> Iterator[Chunk]:
        """Its rows in their order, in pieces that another process can parse.

        Raises:
            UserError: a file is of no known kind or damaged.
        """
        left = self.limit
        for chunk in self._chunks():
            if left is None:
                yield chunk
                continue
            yield chunk.first(left)
            left -= len(chunk)
            if left <= 0:
                return

    def _chunks(self) -> Iterator[Chunk]:
        if "dataset" not in self.description:
            yield from read_file(self.name)
        for file in self.files:
            yield from file.chunks(self.name, f"dataset={self.name}")


def find_sources(config: PrepareConfig) -> list[Source]:
    """The files, patterns resolved and each hashed, or the hub dataset.

    Raises:
        UserError: a file is missing or can't be read, a pattern matches nothing, or `limits` name no source.
    """
    sources: list[Source] = []
    for entry in config.files:
        for name in files_of("files", entry):
            if any(Path(name).samefile(other.name) for other in sources):
                raise UserError(
                    f"files={name}: it is named twice; to train on it more often, give 'weights={{{entry}: 2}}'"
                )
            description = {"file": name, "bytes": Path(name).stat().st_size, "sha256": sha256(Path(name))}
            sources.append(
                Source(
                    name=name,
                    description=description,
                    limit=config.limits.get(name, config.limits.get(entry)),
                    weight=config.weights.get(name, config.weights.get(entry, 1.0)),
                )
            )
    if config.dataset:
        sources.append(_dataset(config, config.dataset))
    _refuse_strangers(config, {*config.files, *(source.name for source in sources)})
    return sources


def _refuse_strangers(config: PrepareConfig, known: set[str]) -> None:
    """Raises `UserError` if `limits` or `weights` name what is not a source."""
    named = config.files or [str(config.dataset)]
    for setting, of_source in (("limits", config.limits), ("weights", config.weights)):
        for name in of_source:
            if name not in known:
                raise UserError(f"{setting}.{name}: no source has that name; it is one of {', '.join(named)}")


def _dataset(config: PrepareConfig, name: str) -> Source:
    """A hub's dataset at the commit of its revision, or one in a directory, each file hashed."""
    wanted = _wanted(name, config.dataset_config, config.split)
    described = {"dataset": name, "config": config.dataset_config, "split": config.split}
    shape: dict[str, Any] = {"name": name, "limit": config.limits.get(name), "weight": config.weights.get(name, 1.0)}
    if Path(name).is_dir():
        if config.revision is not None:
            raise UserError(f"revision={config.revision}: dataset={name} is a directory, which has none; leave it out")
        files = found(Path(name), wanted)
        hashed = [
            {"file": file.name, "bytes": Path(file.path).stat().st_size, "sha256": sha256(Path(file.path))}
            for file in files
        ]
        return Source(description={**described, "files": hashed}, files=tuple(files), **shape)
    if Path(name).is_file():
        raise UserError(f"dataset={name}: it is a file; give files=[{name}]")
    repository = hub.find("dataset", name, config.revision, wanted.named)
    described |= {"revision": config.revision, "commit": repository.commit}
    return Source(description=described, repository=repository, **shape)


def _wanted(name: str, config: str | None, split: str) -> Wanted:
    return Wanted(config=config, split=split, named=f"dataset={name}")


def files_of(setting: str, entry: str) -> list[str]:
    """The files that a name or pattern stands for, readable, in the order of their names.

    Raises:
        UserError: there is none, or one can't be read; the text begins with `setting`.
    """
    # Path.glob takes no absolute patterns.
    is_pattern = glob.has_magic(entry) and not Path(entry).is_file()
    names = sorted(glob.glob(entry, recursive=True)) if is_pattern else [entry]  # noqa: PTH207
    if not names:
        brackets = " (a [ of the name itself is written [[])" if "[" in entry else ""
        raise UserError(f"{setting}={entry}: no file matches; check the pattern{brackets}, relative to {Path.cwd()}")
    for name in names:
        path = Path(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{setting}={name!r}: its name is not UTF-8 text; rename it") from None
        if path.is_dir() and any((path / saved).is_file() for saved in (SAVED, SAVED_SPLITS)):
            raise UserError(f"{setting}={name}: `datasets` saved it to disk; give dataset={name} without files")
        if path.is_dir():
            raise UserError(f"{setting}={name}: it is a directory; name the files in it, for example {name}/*.jsonl")
        if not path.is_file():
            raise UserError(f"{setting}={name}: there is no such file; check the path, relative to {Path.cwd()}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{setting}={name}: it can't be read; check its permissions")
    return names
