"""Resuming a run: the newest whole checkpoint → engine, health, history."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from configs.program.console import console
from configs.program.errors import UserError
from configs.program.launch import local_rank
from data.disk.adapter_directory import RECEIPT
from data.disk.formats import sizes
from data.disk.formats.json_text import read_json
from data.disk.loading.progress import progress
from data.prepared.dataset import Batch
from train.config.train import TrainConfig
from train.engine.engine import Engine
from train.engine.processes import agree, gathered
from train.engine.state import Read
from train.health import Health
from train.saving import checkpoint, identity, run_directory
from train.saving.background import SIGN_OF_LIFE, Background
from train.saving.checkpoint import Checkpoint, DamagedError
from train.saving.identity import Inputs, Recorded
from train.saving.receipt import Record
from train.saving.run_directory import RunDirectory


def check_run_there(config: TrainConfig, inputs: Inputs, dataset: Path) -> None:
    """Compares the launch with the run that is there, without the base's weights, before processes meet.

    Args:
        config: of this launch.
        inputs: of this launch.
        dataset: the directory of the prepared dataset.

    Raises:
        UserError: the directory can't be used, or the run that is there was another one.
    """
    if config.run_dir is None:
        return
    path = Path(config.run_dir)
    with contextlib.suppress(OSError):  # reported with its reason when it is used
        if problem := run_directory.problem(path, config, dataset):
            raise UserError(f"run_dir={path}: {problem}")
        finished, resumes = run_directory.state(path, config)
        _compare(path, config, inputs.hashes_but_base(), finished=finished, resumes=resumes)


def check_same_run(directory: RunDirectory, record: Record, inputs: Inputs) -> None:
    """Compares the launch with the run that is there, if one is, and the rows with their manifest; collective.

    Raises:
        UserError: the run that is there was another one, or the rows on any machine are not those of the manifest.
    """
    of_run = {"finished": directory.finished, "resumes": directory.resumes}
    directory.on_main(lambda: _compare(directory.path, record.config, record.inputs, **of_run))
    if not directory.finished:
        _check_rows(inputs)


def _compare(path: Path, config: TrainConfig, hashes: dict[str, Any], *, finished: bool, resumes: bool) -> None:
    if finished:
        remedy = "restore it, or give overwrite=true to do the run again"
        receipt = read_json(path / RECEIPT, Recorded, f"run_dir={path}", remedy, largest=sizes.RECORD)
        identity.check(receipt, config, hashes, finished=path)
    elif resumes:
        for saved in checkpoint.paths(path):
            with contextlib.suppress(DamagedError):  # reported by `find_checkpoint`, which reads all of it
                identity.check(Checkpoint(saved).trainer, config, hashes)
                return


def _check_rows(inputs: Inputs) -> None:
    """Raises `UserError` if the rows on any machine are not those that the manifest names; collective.

    One process of each machine has read them.
    """
    problem = inputs.wrong_rows if local_rank() == 0 else None
    if problem := next(filter(None, gathered(problem)), None):
        raise UserError(problem)


def find_checkpoint(
    directory: RunDirectory,
    record: Record,
    shapes: dict[str, tuple[int, ...]],
    watched: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Checkpoint | None:
    """The newest checkpoint that is whole, on the main process; None if the run starts from the beginning; collective.

    Args:
        directory: of the run.
        record: of this launch.
        shapes: the full shape of each trained parameter, by name.
        watched: what the main process reads within, see `Guard.disk`.

    Raises:
        UserError: there are checkpoints, and none can be used.
    """

    if not directory.resumes:
        return None
    found: list[Checkpoint] = []
    thread = Background(watched) if directory.is_main else None
    if thread is not None:
        thread.submit(lambda: found.append(_newest_whole(directory, record, shapes)))
    while agree(thread is not None and not thread.wait(SIGN_OF_LIFE)):
        pass  # so that none waits in one collective for as long as it takes to hash gigabytes

    def newest() -> Checkpoint:
        assert thread is not None, "only the main process has one"
        thread.close()
        if error := thread.take_error():
            raise error
        return found[0]

    return directory.on_main(newest)


def _newest_whole(directory: RunDirectory, record: Record, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    first = ""
    for path in checkpoint.paths(directory.path):
        try:
            found = Checkpoint(path)
            with progress(f"Hashing {path.name}", found.bytes, shown=True) as advance:
                found.check(shapes, advance)
        except DamagedError as error:
            first = first or f"{path.name}: {error}"
            console.print(f"{path} is damaged ({error}); the one before is used", style="bold red", soft_wrap=True)
            continue
        identity.check(found.trainer, record.config, record.inputs)
        console.print(f"Resuming {directory.path} after step {found.step}", soft_wrap=True)
        return found
    raise UserError(
        f"run_dir={directory.path}: it has checkpoints, and none of them is whole ({first}); restore one, or give "
        f"overwrite=true to start over"
    )


def restore(
    directory: RunDirectory, found: Checkpoint | None, engine: Engine, health: Health, blank: Batch
) -> dict[str, Any] | None:
    """Puts engine and health in the state in which the checkpoint was made; collective.

    Args:
        directory: of the run.
        found: by `find_checkpoint`, on the main process.
        engine: as it starts.
        health: as it starts.
        blank: a micro-batch without tokens.

    Returns:
        The state of `History` and `Metrics` in the checkpoint; None if the run starts from the beginning.

    Raises:
        UserError: the checkpoint was damaged after it was found.
    """
    if not directory.resumes:
        return None
    trainer = agree(found.trainer if found is not None else None)

    try:
        with _reading(found, engine) as read:
            engine.restore(read, trainer["optimizer_steps"], blank)
    except DamagedError as error:
        raise UserError(
            f"run_dir={directory.path}: a checkpoint that was whole a moment ago is damaged ({error}); give the same "
            f"command again, and the one before is used"
        ) from error
    health.restore(trainer["health"])
    return dict(trainer["metrics"])


@contextlib.contextmanager
def _reading(found: Checkpoint | None, engine: Engine) -> Iterator[Read]:
    """What reads a checkpoint's tensors, which the main process alone does; it shows how far it is."""
    path = Path() if found is None else found.path
    size = checkpoint.state_bytes(engine.shapes)
    with progress(f"Reading {path.name}", size, shown=found is not None) as advance:

        def read(name: str, kind: str) -> torch.Tensor:
            assert found is not None, "only the main process reads"
            with engine.disk(path):
                tensor = found.read(name, kind)
            advance(tensor.nbytes)
            return tensor

        yield read
