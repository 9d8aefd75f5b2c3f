"""What rows are read from: files, each hashed, or a hub dataset at a commit."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError, one_line
from data.config import PrepareConfig
from data.reading import Chunk, read_arrow, read_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file, or the hub dataset."""

    name: str
    description: dict[str, Any]
    """What the manifest says of it; the same where the contents are the same."""
    is_hub: bool = False
    limit: int | None = None
    """Rows that are read of it; None for all."""
    weight: float = 1.0
    """How often an epoch trains on each of its conversations."""

    def chunks(self) -> Iterator[Chunk]:
        """Its rows in their order, in pieces that another process can parse.

        Raises:
            UserError: the file is of no known kind or damaged, or the hub dataset can't be had.
        """
        left = self.limit
        for chunk in _read_hub(self) if self.is_hub else read_file(self.name):
            if left is None:
                yield chunk
                continue
            yield chunk.first(left)
            left -= len(chunk)
            if left <= 0:
                return


def find_sources(config: PrepareConfig) -> list[Source]:
    """The files, patterns resolved and each hashed, or the hub dataset.

    Raises:
        UserError: a file is missing or can't be read, or a pattern matches nothing.
    """
    sources: list[Source] = []
    for entry in config.files:
        for name in files_of("files", entry):
            if any(Path(name).samefile(other.name) for other in sources):
                raise UserError(
                    f"files={name}: it is named twice; to train on it more often, give weights={{{entry}: 2}}"
                )
            description = {"file": name, "bytes": Path(name).stat().st_size, "sha256": sha256(Path(name))}
            sources.append(
                Source(
                    name=name,
                    description=description,
                    limit=config.limits.get(entry),
                    weight=config.weights.get(entry, 1.0),
                )
            )
    if config.dataset:
        dataset = config.dataset
        described = {
            "dataset": dataset,
            "revision": config.revision,
            "commit": commit_of(dataset, config.revision),
            "split": config.split,
        }
        limit, weight = config.limits.get(dataset), config.weights.get(dataset, 1.0)
        sources.append(Source(name=dataset, description=described, is_hub=True, limit=limit, weight=weight))
    return sources


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
        if path.is_dir():
            raise UserError(f"{setting}={name}: it is a directory; name the files in it, for example {name}/*.jsonl")
        if not path.is_file():
            raise UserError(f"{setting}={name}: there is no such file; check the path, relative to {Path.cwd()}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{setting}={name}: it can't be read; check its permissions")
    return names


def sha256(path: Path) -> str:
    """The hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit_of(dataset: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub dataset stands for now; None for a local directory or without a hub."""
    if Path(dataset).is_dir():
        return None
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
    except Exception:  # of whatever keeps the hub from answering; what is in the cache may still be read
        return None


def _read_hub(source: Source) -> Iterator[Chunk]:
    """A dataset of the hub, or of a local directory in the same layout."""
    import datasets

    name, described = source.name, source.description
    try:
        rows = datasets.load_dataset(
            name, revision=described["commit"] or described["revision"], split=described["split"]
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset={name}: it can't be loaded ({one_line(error)}); check the id, revision and split, "
            f"and that the hub can be reached, or name downloaded files with files=[…]"
        ) from error
    tables = rows.with_format("arrow").iter(batch_size=Chunk.ROWS)
    yield from read_arrow(name, tables)
