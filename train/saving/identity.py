"""Whether a run that was interrupted can go on: the same settings, the same rows, the same base."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from configs.program.errors import UserError
from configs.program.launch import local_rank
from configs.program.secrets import redacted
from data.disk.adapter_directory import WEIGHTS
from data.disk.architecture import CONFIG
from data.disk.files import file_hash, sha256
from data.disk.loading.progress import progress
from data.disk.nf4 import UNQUANTISED
from data.disk.weights import StoredWeights, local_directory
from data.prepared.dataset import PreparedDataset
from data.prepared.layout import MANIFEST
from data.prepared.whole import check_files
from train.config.train import TrainConfig

FREE = (
    "name",
    "run_dir",
    "overwrite",
    "resume",
    "resume_despite",
    "dry_run",
    "best",
    "cluster",
    "plan",
    "save_every",
    "keep_last",
    "eval_every",
    "logging",
    "hardware",
    "failures",
    "dataset",
    "model.path",
    "model.revision",
    "activation_checkpointing",
    "lora.export_per_expert",
    "deepspeed.bucket_size",
    "deepspeed.prefetch_bucket_size",
    "deepspeed.persistence_threshold",
    "deepspeed.max_live_parameters",
    "deepspeed.node_copy",
)
"""Settings and groups that may change while a run goes on: they decide no number (hardware decides rounding alone), or
what they name is compared instead."""

BY_MACHINE = ("run_dir", "dataset", "hardware", "model.path", "model.revision", "lora.start", "lora.load")
"""Settings that may differ between the processes of one launch."""


class Inputs:
    """What a run is given beside its settings, by hash: dataset, base, a load, an adapter that it starts from.

    Each file is read once, when its hash is first asked for, so what is recorded is what the processes agreed on.
    """

    def __init__(self, config: TrainConfig, dataset: PreparedDataset):
        """Reads nothing yet."""
        self._config, self._dataset = config, dataset

    @cached_property
    def _manifest(self) -> str:
        return sha256(self._dataset.directory / MANIFEST)

    @cached_property
    def _weights(self) -> StoredWeights | None:
        base = self._config.model
        if base.path is None:
            return None
        named = f"model.path={base.path}"
        return StoredWeights(local_directory(base.path, base.revision, named), named)

    @cached_property
    def _architecture(self) -> str | None:
        """The hash of the base's config.json; None if it has none."""
        file = self._weights and self._weights.directory / CONFIG
        return file_hash(file) if file and file.is_file() else None

    @cached_property
    def _lora(self) -> dict[str, str | None]:
        """The hashes of the files that `lora.load` and `lora.start` name; None for one that is not there."""
        load, start = self._config.lora.load, self._config.lora.start
        files = {"load": load and Path(load), "start": start and Path(start) / WEIGHTS}
        return {name: file_hash(file) if file and file.is_file() else None for name, file in files.items()}

    def read(self) -> None:
        """Reads what takes long: on every process what tells inputs apart, and on the main one all of the base.
        Processes that wait for each other in a collective have only so much time.

        Raises:
            UserError: a file can't be read.
        """
        self.same_everywhere()
        if os.environ.get("RANK", "0") == "0" and self._config.task == "train":
            self.hashes()

    def read_rows(self) -> None:
        """The same for the rows, on one process of each machine."""
        if local_rank() == 0:
            _ = self.wrong_rows

    @cached_property
    def wrong_rows(self) -> str | None:
        """A sentence about the first file of the dataset that is not what its manifest says, or None.

        At 1.4 GB/s on one core of an AMD EPYC, reading a million conversations takes less than a second.
        """
        try:
            check_files(self._dataset.directory, self._dataset.manifest, "dataset")
        except UserError as error:
            return str(error)
        return None

    def same_everywhere(self) -> dict[str, Any]:
        """What all processes of a launch must have been given alike: settings, and the inputs by their hashes.

        Raises:
            UserError: a file can't be read.
        """
        given = {
            name: value for name, value in _leaves(stored_settings(self._config)) if not _is_among(name, BY_MACHINE)
        }
        with _reading():
            lora = self._lora
            if self._weights is not None:  # a hub's branch may have moved between two downloads, and copies may differ
                hint = "on a hub, model.revision=COMMIT chooses them"
                given[f"model.path (its weights; {hint})"] = self._weights.fingerprint
                given[f"model.path (its {CONFIG}; {hint})"] = self._architecture
            return given | {
                "dataset (its manifest.json)": self._manifest,
                "lora.load (its content)": lora["load"],
                f"lora.start (its {WEIGHTS})": lora["start"],
            }

    def hashes(self) -> dict[str, Any]:
        """What receipts and checkpoints record of the inputs; the first time it reads all of the base's weights.

        Raises:
            UserError: a file can't be read.
        """
        return self.hashes_but_base() | {"base": self._base}

    def hashes_but_base(self) -> dict[str, Any]:
        """The same, with None for the base.

        Raises:
            UserError: a file can't be read.
        """
        with _reading():
            dataset = {"path": str(self._dataset.directory), "manifest_sha256": self._manifest}
            return redacted({"base": None, "dataset": dataset, **self._lora})

    @cached_property
    def _base(self) -> dict[str, Any]:
        model = self._config.model
        base: dict[str, Any] = {"path": model.path, "revision": model.revision, "fingerprint": None, "files": {}}
        base["weights"] = model.weights  # the fingerprint is of the files, whatever is made of them in memory
        with _reading():
            weights = self._weights
            if weights is not None:
                with progress("Hashing the base", weights.bytes, shown=True) as advance:
                    base |= {"fingerprint": weights.fingerprint, "files": weights.contents(advance)}
                if self._architecture is not None:
                    base["files"] |= {CONFIG: self._architecture}
        return redacted(base)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Within it, a file that can't be read is a mistake of the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or 'model.path'}: it can't be read ({error.strerror or error}); make it readable"
        ) from error


def stored_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings as they are stored and compared: plain values, without secrets."""
    return redacted(asdict(config))


class RecordedBase(TypedDict):
    """What a run recorded of its base."""

    fingerprint: str | None
    files: dict[str, str]


class RecordedDataset(TypedDict):
    """What a run recorded of its dataset."""

    manifest_sha256: str


class Recorded(TypedDict):
    """What receipts and checkpoints hold of a run's settings and inputs."""

    settings: dict[str, Any]
    base: RecordedBase
    dataset: RecordedDataset
    load: NotRequired[str | None]
    start: NotRequired[str | None]


def check(stored: Recorded, config: TrainConfig, hashes: dict[str, Any], *, finished: Path | None = None) -> None:
    """Compares a launch with the run that is there, leaving out what `resume_despite` names.

    Args:
        stored: what that run recorded: its `settings`, and the hashes of its inputs.
        config: of this launch.
        hashes: of this launch's inputs, see `Inputs.hashes`; a base that is None is not compared.
        finished: the run directory, if the run has come to its end, and nothing in it goes on.

    Raises:
        UserError: something differs; it names the first.
    """
    despite = tuple(config.resume_despite) if finished is None else ()
    if "global_batch" in despite:
        raise UserError(
            "resume_despite=[global_batch]: it decides which rows each step takes, and some would be left out or come "
            "twice; give the same global_batch, or a new run_dir"
        )
    remedy = "or give overwrite=true to start over"

    def despite_or(same: str, name: str) -> str:
        """What there is to do if the input of that name differs."""
        if finished is None:
            return f"{same}, 'resume_despite=[{name}]', {remedy}"
        start = f"lora.start={finished}/adapter" if config.lora.method == "lora" else f"model.path={finished}/model"
        return f"that run is finished; to train its result further, give {start} and a new run_dir, {remedy}"

    before = {"model.weights": UNQUANTISED} | dict(_leaves(stored["settings"]))
    now = dict(_leaves(stored_settings(config)))
    for name, value in now.items():
        if name in before and before[name] != value and not _is_among(name, FREE) and not _is_among(name, despite):
            raise UserError(
                f"{name}={value}: the run that is there was started with {before[name]}; "
                f"{despite_or('give the same', name)}"
            )
    if stored["dataset"]["manifest_sha256"] != hashes["dataset"]["manifest_sha256"] and "dataset" not in despite:
        raise UserError(
            f"dataset={config.dataset}: it is not the one that the run was started on (its manifest.json has changed); "
            f"{despite_or('give that one', 'dataset')}"
        )
    if stored.get("load") != hashes["load"]:
        raise UserError(
            f"lora.load={config.lora.load}: it has changed since the run was started, and with it the experts' ranks; "
            f"give the file as it was, {remedy}"
        )
    # Older runs did not record it.
    if stored.get("start", hashes["start"]) != hashes["start"] and not _is_among("lora.start", despite):
        raise UserError(
            f"lora.start={config.lora.start}: it has changed since the run was started, and how far the adapters have "
            f"moved is measured from it; {despite_or('give it as it was', 'lora.start')}"
        )
    if "model.path" not in despite and hashes["base"] is not None:
        old, new = stored["base"]["files"], hashes["base"]["files"]
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if changed:
            raise UserError(
                f"model.path={config.model.path}: it is not the base that the run was started on ({changed[0]} has "
                f"changed); {despite_or('give that one', 'model.path')}"
            )


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _is_among(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)
