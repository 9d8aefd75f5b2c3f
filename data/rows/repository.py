"""A dataset's repository, on a hub or in a directory: which of its files are the rows of a config and split.

Which they are is decided as the library `datasets` does, by its own patterns: by `configs` in the head of README.md,
else by the words train, test and validation in the names of folders or files, else all files are the split train. Only
names decide, so that no pattern of a repository reaches anything but its own files.
"""

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from configs.program.errors import UserError, one_line
from data.disk.formats import sizes
from data.disk.formats.json_text import read_json
from data.disk.formats.regular import UnreadableError, open_regular, read_at_most
from data.disk.hub import Repository
from data.rows.containers import plain_name
from data.rows.reading import Chunk, read_file

KINDS = {
    ".parquet": "Parquet",
    ".pq": "Parquet",
    ".arrow": "Arrow",
    ".json": "JSON",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
}
"""What is read, by the ends of names; of two kinds that are equally frequent, the first."""

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Which files, or which splits in folders, are in a directory that `datasets` saved."""

IGNORED = (SAVED,)
"""Files that describe others, beside those that `datasets` leaves out by itself."""

CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a dataset as Parquet, a folder for each config."""

README = "README.md"
DEEPEST = 50
MOST_PATTERNS = 10_000
MOST_FILES = 100_000

FORMATS = "rows are read from Parquet, Arrow, JSON, JSON Lines, CSV and TSV"


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows."""

    path: str
    """Where it lies on this machine."""
    name: str
    """How it is called in its repository."""

    def chunks(self, dataset: str, named: str) -> Iterator[Chunk]:
        """Its rows; they say that they come from `dataset/name`.

        Raises:
            UserError: it is damaged, or not what its name says; the text begins with `named`.
        """
        shown = f"{dataset}/{self.name}"
        try:
            for chunk in read_file(self.path):
                yield replace(chunk, file=shown)
        except UserError as error:
            raise UserError(str(error).replace(f"files={self.path}:", f"{named}: {self.name}:", 1)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of a repository, and how errors call it."""

    config: str | None
    split: str
    named: str
    config_setting: str = "dataset_config"
    split_setting: str = "split"


def fetched(repository: Repository, wanted: Wanted, revision: str | None = None) -> list[DataFile]:
    """The files of a config and split of a hub's dataset, downloaded if they are not in the cache.

    Raises:
        UserError: there are none, or they can't be had.
    """
    names = list(repository.files())
    readme = _head(repository.fetch([README]), names, wanted) if README in names else b""
    script = f"{repository.name.rpartition('/')[2]}.py"
    remedy = f"if the hub made a copy of it as Parquet, give revision={CONVERTED}"
    chosen = choose(names, readme, wanted, script=(script, remedy), by_folder=revision == CONVERTED)
    folder = repository.fetch(chosen)
    return [DataFile(str(folder / name), name) for name in chosen]


def found(directory: Path, wanted: Wanted) -> list[DataFile]:
    """The files of a config and split of a directory that is laid out as a hub's dataset.

    Raises:
        UserError: there are none.
    """
    names: list[str] = []
    for folder, folders, files in os.walk(directory, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [(Path(folder) / name).relative_to(directory).as_posix() for name in sorted(files)]
        if len(names) > MOST_FILES:
            raise UserError(
                f"{wanted.named}: it holds more than {MOST_FILES:,} files; name those with rows, as files=[…]"
            )
    if SAVED in names or SAVED_SPLITS in names:
        return _saved(directory, set(names), wanted)
    script = (f"{directory.resolve().name}.py", "name the files with rows, as files=[…]")
    chosen = choose(names, _head(directory, names, wanted), wanted, script=script)
    for name in chosen:
        try:
            open_regular(directory / name, linked=True).close()
        except UnreadableError as error:
            raise UserError(f"{wanted.named}: its {name} can't be read ({error}); take it out, or mend it") from error
    return [DataFile(str(directory / name), name) for name in chosen]


def _head(directory: Path, names: list[str], wanted: Wanted) -> bytes:
    """The beginning of the README.md; empty if there is none."""
    try:
        with open_regular(directory / README) as file:
            return read_at_most(file, sizes.README + 1)
    except UnreadableError as error:
        if README not in names:
            return b""
        raise UserError(f"{wanted.named}: its {README} can't be read ({error}); take it out, or mend it") from error


def _saved(directory: Path, names: set[str], wanted: Wanted) -> list[DataFile]:
    """The files of a split of what the library `datasets` saved to disk, without those that it keeps there as a cache.

    Raises:
        UserError: there is no such split, or what lists the files can't be read.
    """
    _config({}, wanted)
    folder = ""
    if SAVED_SPLITS in names:
        splits = _listed(directory, SAVED_SPLITS, "splits", wanted.named)
        if wanted.split not in splits:
            raise _no_split(wanted, map(str, splits))
        folder = f"{wanted.split}/"
    elif wanted.split != "train":
        raise _no_split(wanted, ["train"])
    entries = _listed(directory, folder + SAVED, "_data_files", wanted.named)
    files = [f"{folder}{entry.get('filename')}" if isinstance(entry, dict) else "" for entry in entries]
    if missing := [name for name in files if name not in names]:
        raise UserError(f"{wanted.named}: {missing[0]}, which {folder + SAVED} names, is missing; save it anew")
    return [DataFile(str(directory / name), name) for name in files]


def _listed(directory: Path, name: str, key: str, named: str) -> list[Any]:
    """What a file of a saved dataset lists."""
    remedy = "name its files, as files=[…]"
    listed = read_json(directory / name, dict[str, Any], named, remedy, largest=sizes.MANIFEST).get(key)
    if not isinstance(listed, list):
        raise UserError(f"{named}: its {name} can't be read ({key} is not a list); {remedy}")
    return listed


def choose(
    names: Iterable[str], readme: bytes, wanted: Wanted, *, script: tuple[str, str], by_folder: bool = False
) -> list[str]:
    """The names of the files of a config and split, in the order in which they are read.

    Args:
        names: of all files of the repository.
        readme: the content of its README.md; empty if there is none.
        wanted: config and split.
        script: the name of a loading script, if it had one, and what to do then.
        by_folder: whether each folder at the top is a config.

    Raises:
        UserError: there are none; it says which configs or splits there are.
    """
    named, everything = wanted.named, list(names)
    rows = [name for name in everything if kind_of(name) is not None and _is_plain(name)]
    configs = declared(readme, named) if not by_folder else _folders(rows)
    if script[0] in everything and not configs:
        raise UserError(f"{named}: its rows come from a loading script, {script[0]}, which is not run; {script[1]}")
    if not rows:
        ends = sorted({PurePosixPath(name).suffix for name in everything if not name.startswith(".")} - {".md", ""})
        raise UserError(f"{named}: it holds no file of rows{', only ' if ends else ''}{', '.join(ends[:5])}; {FORMATS}")
    config = _config(configs, wanted)
    splits = _splits(rows, config, named)
    if wanted.split not in splits:
        raise _no_split(wanted, splits)
    files = splits[wanted.split]
    if not files:
        raise UserError(
            f"{named}: the files that its {README} names for {wanted.split} are missing, or of another kind; {FORMATS}"
        )
    counts = Counter(kind_of(name) for name in files)
    most = max((kind for kind in dict.fromkeys(KINDS.values()) if counts[kind]), key=lambda kind: counts[kind])
    return [name for name in files if kind_of(name) == most]


def _no_split(wanted: Wanted, there: Iterable[str]) -> UserError:
    part = wanted.split.partition("[")[0]
    sliced = " whole splits are read, and limits says how many rows;" if part != wanted.split else ""
    which = f"{sliced} it is one of {', '.join(there)}"
    return UserError(f"{wanted.split_setting}={wanted.split}: {wanted.named} has no such split;{which}")


def kind_of(name: str) -> str | None:
    """What the end of a file's name says that it is; None if it can't be read here."""
    return None if PurePosixPath(name).name in IGNORED else KINDS.get(plain_name(name).suffix.lower())


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)


# Configs


@dataclass(frozen=True, slots=True)
class Config:
    """A config of a repository."""

    patterns: dict[str, list[str]] | None
    """The files of each split; None if the names of the files decide."""
    folder: str = ""
    """Where its files are."""
    is_default: bool = False


def declared(readme: bytes, named: str) -> dict[str, Config]:
    """The configs in the head of a README.md, by their names; values are taken as plain text.

    Raises:
        UserError: they can't be read, or name files elsewhere.
    """
    from datasets.data_files import sanitize_patterns

    text = readme[: sizes.README + 1].decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    head, end, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not end:
        return {}
    configs: dict[str, Config] = {}
    try:
        if len(readme) > sizes.README:
            raise ValueError(f"it is longer than {sizes.README >> 20} MiB")
        card, alias = _parsed(head)
        if not isinstance(card, dict) or not isinstance(card.get("configs"), list):
            return {}
        if alias:
            raise ValueError(f"the head has an alias, *{alias}")
        for entry in _plain(card["configs"], [MOST_PATTERNS]):
            splits = sanitize_patterns(entry["data_files"]) if "data_files" in entry else None
            for pattern in (entry.get("data_dir", ""), *(p for paths in (splits or {}).values() for p in paths)):
                if "://" in pattern or "::" in pattern or pattern.startswith("/") or ".." in pattern.split("/"):
                    raise ValueError(f"{pattern} is not one of its own files")
            name = entry.get("config_name", "default")
            configs[name] = Config(splits, entry.get("data_dir", "").strip("/"), entry.get("default") == "true")
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{named}: the configs in its {README} can't be read ({one_line(error)}); download the files with rows, "
            f"and name them with files=[…]"
        ) from error
    return configs


def _parsed(head: str) -> tuple[Any, str | None]:
    """YAML with all scalars as text, and the first alias in it."""
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    depth, alias = 0, None
    for event in yaml.parse(head, loader):  # first, because what is nested deeply would overflow the stack
        alias = alias or (event.anchor if isinstance(event, yaml.AliasEvent) else None)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
    return yaml.load(head, loader), alias


def _plain(value: Any, budget: list[int], depth: int = 6) -> Any:
    """A copy of lists and dictionaries of texts."""
    budget[0] -= 1
    if budget[0] < 0 or depth == 0:
        raise ValueError(f"they have more than {MOST_PATTERNS} entries")
    if isinstance(value, dict):
        return {str(key): _plain(item, budget, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, budget, depth - 1) for item in value]
    return str(value)


def _folders(rows: list[str]) -> dict[str, Config]:
    """A config for each folder at the top."""
    return {name: Config(None, name) for name in sorted({row.partition("/")[0] for row in rows if "/" in row})}


def _config(configs: dict[str, Config], wanted: Wanted) -> Config:
    name, setting = wanted.config, wanted.config_setting
    if name is None:
        defaults = [name for name, config in configs.items() if config.is_default or name == "default"]
        if not configs:
            return Config(None)
        if len(configs) == 1 or len(defaults) == 1:
            return configs[defaults[0] if defaults else next(iter(configs))]
        raise UserError(
            f"{wanted.named}: it has several configs; give {setting}={next(iter(configs))}, or another of "
            f"{', '.join(configs)}"
        )
    if name in configs:
        return configs[name]
    if not configs:
        if name == "default":
            return Config(None)
        raise UserError(f"{setting}={name}: {wanted.named} has no configs; leave it out")
    raise UserError(f"{setting}={name}: {wanted.named} has no such config; it is one of {', '.join(configs)}")


# Splits


def _splits(rows: list[str], config: Config, named: str) -> dict[str, list[str]]:
    """The files of each split, by the patterns of `datasets`, which look into a tree of empty files so named."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    if len(rows) > MOST_FILES:
        raise UserError(
            f"{named}: it holds more than {MOST_FILES:,} files; download those with rows, and name them as files=[…]"
        )
    with tempfile.TemporaryDirectory(prefix="openhermes-") as temporary:
        top = Path(temporary).resolve() / "names"
        top.mkdir()
        for name in rows:
            file = top / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        base = str(top / config.folder)
        try:
            patterns = get_data_patterns(base) if config.patterns is None else config.patterns
        except (EmptyDatasetError, ValueError) as error:
            where = f"folder {config.folder}" if config.folder else "files"
            raise UserError(
                f"{named}: the names of its {where} show no splits; name the files with rows, as files=[…]"
            ) from error
        splits: dict[str, list[str]] = {}
        for split, of_split in patterns.items():
            paths: list[str] = []
            for pattern in of_split:
                with contextlib.suppress(FileNotFoundError):
                    paths += resolve_pattern(pattern, base)
            splits[str(split)] = list(dict.fromkeys(Path(path).relative_to(top).as_posix() for path in paths))
    return splits
