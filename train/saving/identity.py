"""Whether a run that was interrupted can go on: the same settings, the same rows, the same base."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.program.errors import UserError
from configs.program.secrets import redacted
from data.disk.adapter_directory import WEIGHTS
from data.disk.files import file_hash, sha256
from data.disk.weights import StoredWeights, local_directory
from data.prepared.dataset import PreparedDataset
from data.prepared.layout import MANIFEST
from train.config.train import TrainConfig

FREE = (
    "name",
    "run_dir",
    "overwrite",
    "resume",
    "resume_despite",
    "dry_run",
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
    "deepspeed.bucket_size",
    "deepspeed.prefetch_bucket_size",
    "deepspeed.persistence_threshold",
    "deepspeed.max_live_parameters",
    "deepspeed.node_copy",
)
"""Settings and groups that may change under a run: they decide no number (hardware decides rounding alone), or what
they name is compared instead."""

BY_MACHINE = ("run_dir", "dataset", "hardware", "model.path", "model.revision", "lora.start", "lora.load")
"""Settings that may differ between the processes of one launch."""


def fed(config: TrainConfig, dataset: PreparedDataset) -> dict[str, Any]:
    """What a run is fed, by hash: the prepared dataset, the base's weights and configuration, a load, an adapter that
    it starts from.

    Raises:
        UserError: a file of them can't be read.
    """
    path, revision = config.model.path, config.model.revision
    base: dict[str, Any] = {"path": path, "revision": revision, "fingerprint": None, "files": {}}
    with _reading():
        if path is not None:
            named = f"model.path={path}"
            weights = StoredWeights(local_directory(path, revision, named), named)
            architecture = weights.directory / "config.json"
            base |= {"fingerprint": weights.fingerprint, "files": weights.contents()}
            if architecture.is_file():
                base["files"] |= {architecture.name: file_hash(architecture)}
        manifest = {"path": str(dataset.directory), "manifest_sha256": sha256(dataset.directory / MANIFEST)}
        return redacted({"base": base, "dataset": manifest, **_of_lora(config)})


def _of_lora(config: TrainConfig) -> dict[str, str | None]:
    """The hashes of the files that `lora.load` and `lora.start` name; None where there is none."""
    load, start = config.lora.load, config.lora.start
    files = {"load": load and Path(load), "start": start and Path(start) / WEIGHTS}
    return {name: file_hash(file) if file and file.is_file() else None for name, file in files.items()}


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Within it, a file that can't be read is the user's matter."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or 'model.path'}: it can't be read ({error.strerror or error}); make it readable"
        ) from error


def stored_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings as they are stored and compared: plain values, without secrets."""
    return redacted(asdict(config))


def same_everywhere(config: TrainConfig, dataset: PreparedDataset) -> dict[str, Any]:
    """What all processes of a launch must have been given alike."""
    given = {name: value for name, value in _leaves(stored_settings(config)) if not _among(name, BY_MACHINE)}
    path, revision = config.model.path, config.model.revision
    with _reading():
        of_lora = _of_lora(config)
        if path is not None:  # a hub's branch may have moved between two downloads, and copies may differ
            named = f"model.path={path}"
            given["model.path (its weights)"] = StoredWeights(local_directory(path, revision, named), named).fingerprint
        return given | {
            "dataset (its manifest.json)": sha256(dataset.directory / MANIFEST),
            "lora.load (its content)": of_lora["load"],
            f"lora.start (its {WEIGHTS})": of_lora["start"],
        }


def check(record: dict[str, Any], config: TrainConfig, now: dict[str, Any]) -> None:
    """Compares a launch with the run that was, leaving out what `resume_despite` names.

    Args:
        record: of the run that was: `settings`, and what `fed` found.
        config: of this launch.
        now: what `fed` found.

    Raises:
        UserError: something is not as it was; it names the first.
    """
    anyway = tuple(config.resume_despite)
    if "global_batch" in anyway:
        raise UserError(
            "resume_despite=[global_batch]: it decides which rows each step takes, and some would be left out or come "
            "twice; give the same global_batch, or a new run_dir"
        )
    remedy = "or give overwrite=true to start over"
    was, asked = dict(_leaves(record["settings"])), dict(_leaves(stored_settings(config)))
    for name, value in asked.items():
        if name in was and was[name] != value and not _among(name, FREE) and not _among(name, anyway):
            raise UserError(
                f"{name}={value}: the run that is there was started with {was[name]}; give the same, "
                f"resume_despite=[{name}], {remedy}"
            )
    if record["dataset"]["manifest_sha256"] != now["dataset"]["manifest_sha256"] and "dataset" not in anyway:
        raise UserError(
            f"dataset={config.dataset}: it is not the one that the run was started on (its manifest.json has changed); "
            f"give that one, resume_despite=[dataset], {remedy}"
        )
    if record.get("load") != now["load"]:
        raise UserError(
            f"lora.load={config.lora.load}: it has changed since the run was started, and with it the experts' ranks; "
            f"give the file as it was, {remedy}"
        )
    # Older runs did not record it.
    if record.get("start", now["start"]) != now["start"] and not _among("lora.start", anyway):
        raise UserError(
            f"lora.start={config.lora.start}: it has changed since the run was started, and how far the adapters have "
            f"moved is measured from it; give it as it was, resume_despite=[lora.start], {remedy}"
        )
    if "model.path" not in anyway:
        old, new = record["base"]["files"], now["base"]["files"]
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if changed:
            raise UserError(
                f"model.path={config.model.path}: it is not the base that the run was started on ({changed[0]} has "
                f"changed); give that one, resume_despite=[model.path], {remedy}"
            )


def check_rows(dataset: PreparedDataset) -> None:
    """Raises `UserError` for the first file of the dataset whose bytes are not those that its manifest tells."""
    for name, told in dataset.manifest["files"].items():
        if sha256(Path(dataset.directory) / name) != told["sha256"]:
            raise UserError(f"dataset={dataset.directory}: {name} has changed since it was prepared; prepare it again")


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _among(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)
