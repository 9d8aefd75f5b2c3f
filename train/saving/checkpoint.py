"""One checkpoint: everything that a run needs to go on as if it had never stopped, complete or invisible.

checkpoints/step-000123/
  adapter/ or model/        what was learned so far, laid out as the run's result is
  master.safetensors        the trained parameters in float32, of full shape, by name
  exp_avg.safetensors       Adam's first moments
  exp_avg_sq.safetensors    Adam's second moments
  trainer.json              step, schedule, data position, seed, settings, and the hashes of the inputs
  manifest.json             every other file with its size and hash, and its own digest

Nothing in it depends on the number of processes, and nothing is ever unpickled: safetensors and JSON only. It is
written into a hidden sibling, forced to the disk, and takes its name last.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
import xxhash
from msgspec import Meta

from configs.program.errors import one_line
from data.disk.files import discard, file_hash, publish, remove, sync
from data.disk.formats import sizes
from data.disk.formats.json_text import parse_json, shaped
from data.disk.formats.regular import UnreadableError, read_regular
from data.disk.tensor_file import StoredTensor, TensorFile, fill, read_header
from train.history import History
from train.saving.background import Background
from train.saving.identity import Recorded

FOLDER = "checkpoints"
MANIFEST, TRAINER = "manifest.json", "trainer.json"
FORMAT = 1
"""The version of trainer.json; a file with another number was written by another version of this program."""
STATE = ("master", "exp_avg", "exp_avg_sq")
"""What is stored of every trained parameter, in float32: its value and Adam's two moments, by torch's names."""

Shape = tuple[int, ...]
Count = Annotated[int, Meta(ge=0)]


class State(TypedDict):
    """The state of `History` and `Metrics`; the former says after which step the run goes on."""

    step: Count
    last: dict[str, float | str | bool] | None
    evaluations: dict[str, float | str]
    wandb: NotRequired[str | None]


class HealthState(TypedDict):
    """The state of `Health`."""

    refused: Count
    recent: list[float]


class Trainer(Recorded):
    """The content of trainer.json."""

    format: int
    step: Count
    optimizer_steps: Count
    metrics: State
    health: HealthState


class Written(TypedDict):
    """What a manifest says of a file."""

    bytes: Count
    xxh3: str


class Sealed(TypedDict):
    """The content of a manifest."""

    digest: str
    files: dict[str, Written]


def state_bytes(shapes: Mapping[str, Shape]) -> int:
    """What `STATE` takes of trained parameters of these full shapes."""
    return sum(len(STATE) * 4 * math.prod(shape) for shape in shapes.values())


class CheckpointWriter:
    """Writes one checkpoint, by the jobs of a `Background`."""

    def __init__(self, path: Path, shapes: dict[str, Shape], background: Background):
        """Begins the files.

        Args:
            path: checkpoints/step-…, the directory that it becomes.
            shapes: of the trained parameters, in the order in which they will come.
            background: does the work. After the first error nothing more is written.
        """
        self._path, self._background = path, background
        self._temporary = path.parent / f".{path.name}.tmp"
        self._files: dict[str, TensorFile] = {}
        self._shapes = shapes
        background.submit(self._begin)

    @property
    def directory(self) -> Path:
        """Where it is written until it is complete."""
        return self._temporary

    def write(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Writes what is stored of the next parameter, for each of `STATE`."""
        for kind in STATE:
            self._background.submit(partial(self._write, kind, name, state[kind]), state[kind].nbytes)

    def _write(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        self._files[kind].write(name, tensor)

    def finish(self, trainer: dict[str, Any]) -> None:
        """Completes it with the content of trainer.json."""
        self._background.submit(lambda: self._finish(trainer))

    def _begin(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        sync(self._path.parent.parent)
        tensors = [(name, torch.float32, shape) for name, shape in self._shapes.items()]
        self._files = {kind: TensorFile(self._temporary / f"{kind}.safetensors", tensors) for kind in STATE}

    def _finish(self, trainer: dict[str, Any]) -> None:
        hashes = {f"{kind}.safetensors": tensors.close() for kind, tensors in self._files.items()}
        (self._temporary / TRAINER).write_bytes(_json({"format": FORMAT, **trainer}))
        files = {}
        for file in sorted(path for path in self._temporary.rglob("*") if path.is_file()):
            name = str(file.relative_to(self._temporary))
            files[name] = {"bytes": file.stat().st_size, "xxh3": hashes.get(name) or file_hash(file)}
        (self._temporary / MANIFEST).write_bytes(_sealed({"files": files}))
        publish(self._temporary, self._path)


class DamagedError(ValueError):
    """A checkpoint is not what was written; the text says which part."""


class Checkpoint:
    """A checkpoint on disk whose manifest and trainer.json are whole."""

    def __init__(self, path: Path):
        """Opens it.

        Raises:
            DamagedError: one of the two is missing, can't be read, or is not as it was written.
        """
        self.path = path
        self._stored: dict[str, dict[str, StoredTensor]] = {}
        self._files = _unsealed(path / MANIFEST)
        self._check(TRAINER)
        try:
            content = parse_json(read_regular(path / TRAINER, sizes.RECORD), dict[str, Any])
            if content.get("format") != FORMAT:
                raise DamagedError(f"{TRAINER} is of another version of this program")
            self.trainer = shaped(content, Trainer)
            History(content["metrics"])
        except UnreadableError as error:
            raise DamagedError(f"{TRAINER} can't be read: {error}") from error
        except (ValueError, TypeError) as error:
            if isinstance(error, DamagedError):
                raise
            raise DamagedError(f"{TRAINER} has metrics that can't be read: {one_line(error)}") from error

    @property
    def step(self) -> int:
        """The number of steps that had been taken."""
        return self.trainer["step"]

    @property
    def bytes(self) -> int:
        """Those of all files, by the manifest."""
        return sum(written["bytes"] for written in self._files.values())

    def check(self, shapes: dict[str, Shape], advance: Callable[[int], None] = lambda size: None) -> None:
        """Compares every file with the manifest, and the tensors with the parameters that train.

        `advance` is called after each read with the number of bytes.

        Raises:
            DamagedError: a file or tensor is missing, unknown, changed, or of another shape; it names the first.
        """
        for name in self._files:
            self._check(name, advance)
        for kind in STATE:
            file = f"{kind}.safetensors"
            if file not in self._files:
                raise DamagedError(f"{file} is missing")
            stored = {name: (tensor.dtype, tensor.shape) for name, tensor in self._tensors(kind).items()}
            for name, shape in shapes.items():
                if name not in stored:
                    raise DamagedError(f"{file} lacks the tensor {name}")
                if stored[name] != ("F32", shape):
                    raise DamagedError(f"{file} has the tensor {name} as {stored[name]}, not F32 {list(shape)}")
            if unknown := stored.keys() - shapes.keys():
                raise DamagedError(f"{file} has an unknown tensor {min(unknown)}")

    def _check(self, name: str, advance: Callable[[int], None] = lambda size: None) -> None:
        written = self._files.get(name)
        if written is None:
            raise DamagedError(f"{MANIFEST} lacks {name}")
        path = self.path / name
        try:
            if not path.is_file():
                raise DamagedError(f"{name} is missing")
            if path.stat().st_size != written["bytes"] or file_hash(path, advance) != written["xxh3"]:
                raise DamagedError(f"{name} is not as it was written")
        except OSError as error:
            raise DamagedError(f"{name} can't be read: {one_line(error)}") from error

    def read(self, name: str, kind: str) -> torch.Tensor:
        """One of `STATE` of a parameter, in float32 on the CPU, of the parameter's full shape.

        Raises:
            DamagedError: it can't be read any more.
        """
        stored = self._tensors(kind)[name]
        tensor = torch.empty(stored.shape, dtype=torch.float32)
        try:
            fill(tensor, stored.file, stored.begin)
        except (OSError, UnreadableError) as error:
            raise DamagedError(f"{stored.file.name} can't be read: {one_line(error)}") from error
        return tensor

    def _tensors(self, kind: str) -> dict[str, StoredTensor]:
        """Where the tensors of a file lie, by name."""
        if kind not in self._stored:
            file = self.path / f"{kind}.safetensors"
            try:
                self._stored[kind] = {tensor.name: tensor for tensor in read_header(file)}
            except UnreadableError as error:
                raise DamagedError(f"{file.name} can't be read: {error}") from error
        return self._stored[kind]


def paths(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first, whole or damaged."""
    try:
        entries = list((run / FOLDER).iterdir())  # glob would take a folder that can't be read for an empty one
    except FileNotFoundError:
        return []
    found = [(step_of(path), path) for path in entries if step_of(path) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / FOLDER / f"step-{step:06d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None if the name is not a checkpoint's."""
    digits = path.name.removeprefix("step-")
    return int(digits) if path.name.startswith("step-") and digits.isdecimal() else None


def clean(run: Path) -> None:
    """Removes what a process that was killed left half-written or half-removed."""
    for pattern in (".*.tmp", ".*.old"):
        for path in [*(run / FOLDER).glob(pattern), *run.glob(pattern)]:
            discard(path)


def prune(run: Path, *, newest: int, keep_last: int, best: int | None) -> None:
    """Removes all checkpoints but the last `keep_last` up to the step `newest`, just written, and that of step `best`.

    Later ones are damaged, or of steps that the run has taken again since.
    """
    past = [old for old in paths(run) if (step_of(old) or 0) <= newest]
    for old in paths(run):
        if old not in past[:keep_last] and step_of(old) != best:
            remove(old)


def best(evaluations: dict[int, float], steps: Iterable[int]) -> int | None:
    """The step with the lowest evaluation loss among these; None if none has one that is finite."""
    evaluated = (step for step in steps if math.isfinite(evaluations.get(step, math.nan)))
    return min(evaluated, key=lambda step: evaluations[step], default=None)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _sealed(content: dict[str, Any]) -> bytes:
    """JSON that holds its own digest."""
    return _json({"digest": xxhash.xxh3_128_hexdigest(_json(content)), **content})


def _unsealed(path: Path) -> dict[str, Written]:
    """The files in a manifest that `_sealed` made."""
    if not path.exists():
        raise DamagedError(f"{path.name} is missing")
    try:
        raw = read_regular(path, sizes.SETTINGS)
        content = parse_json(raw, Sealed)
    except UnreadableError as error:
        raise DamagedError(f"{path.name} can't be read: {error}") from error
    if raw != _sealed({name: value for name, value in content.items() if name != "digest"}):
        raise DamagedError(f"{path.name} is not as it was written")
    return content["files"]
