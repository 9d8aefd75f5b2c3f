"""A model's safetensors: which files they are, what they hold, and what tells one model's weights from another's."""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TypedDict

from configs.program.errors import UserError
from data.disk.files import file_hash
from data.disk.formats import sizes
from data.disk.formats.json_text import read_json
from data.disk.formats.regular import UnreadableError
from data.disk.hub import find, matching
from data.disk.tensor_file import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

LONGEST_NAME = 255
"""Bytes of the longest name that a file can have."""

SAMPLES, SAMPLE_BYTES = 4, 1024
"""How much of each tensor its fingerprint reads: this many blocks of this size, evenly spread."""

READERS = 4
"""Files that are hashed at once."""

REMEDY = "name a Mixtral's directory with config.json and safetensors, or a hub id that can be reached"


class Index(TypedDict):
    """What is read of a model.safetensors.index.json."""

    weight_map: dict[str, str]
    """The file of each tensor."""


class StoredWeights:
    """The weights of a model directory, known by their headers alone; errors call them `named`."""

    def __init__(self, directory: Path, named: str):
        """Reads the headers.

        Raises:
            UserError: the directory holds no weights in safetensors, or not all that its index names.
        """
        self.directory, self.named = directory, named
        self.tensors: dict[str, StoredTensor] = {}
        for file in weight_files(directory, named):
            try:
                tensors = {tensor.name: tensor for tensor in read_header(file)}
            except UnreadableError as error:
                raise UserError(f"{named}: its {file.name} can't be read ({error}); {REMEDY}") from error
            if twice := tensors.keys() & self.tensors.keys():
                other = self.tensors[min(twice)].file.name
                raise UserError(f"{named}: its tensor {min(twice)} is in {other} and in {file.name}; {REMEDY}")
            self.tensors |= tensors

    @property
    def files(self) -> list[Path]:
        """The files, in the order of their names."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and evenly spread samples of every tensor.

        The same for a model whose tensors were only distributed to other files. It reads a few kilobytes of each
        tensor, so that 93 GB don't take minutes. That is enough to tell a model from any other training of it, in
        which every tensor differs everywhere; it doesn't stop a forger.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            size = tensor.end - tensor.begin
            with tensor.file.open("rb") as file:
                for sample in range(SAMPLES):
                    file.seek(tensor.begin + max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(file.read(min(SAMPLE_BYTES, size)))
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Those of all files."""
        return sum(file.stat().st_size for file in self.files)

    def contents(self, advance: Callable[[int], None] = lambda size: None) -> dict[str, str]:
        """The hash of every file by its name: of all its bytes, unlike the fingerprint.

        `advance` is called after each read with the number of bytes, by any of the threads that read.
        """
        with ThreadPoolExecutor(READERS) as threads:
            hashes = threads.map(partial(file_hash, advance=advance), self.files)
            return dict(zip((file.name for file in self.files), hashes, strict=True))


FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md")
PICKLED = ("pytorch_model*.bin",)
OTHER_COPIES = ("consolidated*",)
"""What is downloaded of a model, and what is left out: second copies of the weights."""


def local_directory(source: str, revision: str | None, named: str, only: Iterable[str] = FILES) -> Path:
    """The directory of a model: itself, or the hub's snapshot of it, downloaded if it is not here yet.

    `only` has patterns of the files that are needed from the hub.

    Raises:
        UserError: there is no such directory, and no such model on the hub.
    """
    if Path(source).is_dir():
        return Path(source)
    repository = find("model", source, revision, named)
    files = repository.files()
    if only is FILES and not matching(files, ["*.safetensors"], OTHER_COPIES):
        refuse_pickles(files, named, source)
    return repository.fetch(matching(files, only, OTHER_COPIES))


def pinned(source: str, revision: str | None, named: str) -> str | None:
    """The commit that a revision on the hub stands for now; for a directory, the revision as it is.

    Raises:
        UserError: there is no such directory, and no such revision on the hub.
    """
    return revision if Path(source).is_dir() else find("model", source, revision, named).commit


def refuse_pickles(names: Iterable[str], named: str, source: str) -> None:
    """Raises `UserError` if a model without safetensors has weights that are pickled; it says how to convert them."""
    if pickled := sorted(matching(names, PICKLED)):
        convert = (
            f"from transformers import MixtralForCausalLM as M; M.from_pretrained({source!r}).save_pretrained('new')"
        )
        raise UserError(
            f"{named}: its weights are pickled ({pickled[0]}), a format that can run code, and safetensors alone are "
            f'read; convert them once, python -c "{convert}", and name new'
        )


def weight_files(directory: Path, named: str) -> list[Path]:
    """The safetensors of a model directory, all of them in it: an index that names others is refused.

    Raises:
        UserError: one is missing, or the index can't be read.
    """
    names = [SINGLE]
    if not (directory / SINGLE).is_file() and (directory / INDEX).exists():  # what stock transformers loads
        index = read_json(directory / INDEX, Index, named, REMEDY, largest=sizes.INDEX)
        names = sorted(set(index["weight_map"].values()))
        if not names:
            raise UserError(f"{named}: its {INDEX} names no file; {REMEDY}")
    if names == [SINGLE] and not (directory / SINGLE).is_file():
        refuse_pickles((path.name for path in directory.iterdir()), named, str(directory))
    for name in names:
        if Path(name).name != name or len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"{named}: its {INDEX} names {name[:LONGEST_NAME]}, which is not in the directory; {REMEDY}"
            )
        if not (directory / name).is_file():
            raise UserError(f"{named}: its {name} is missing; {REMEDY}")
    return [directory / name for name in names]
