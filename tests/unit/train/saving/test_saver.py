"""When a run is saved: as often as asked, and on a disk that is behind as soon as it has caught up."""

import threading
from pathlib import Path

import pytest

from data.prepared.dataset import PreparedDataset
from tests.support.nano import NANO
from tests.unit.train.saving.launches import launch
from train.config.engine import DeepSpeedConfig, HardwareConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import FailureConfig, LoggingConfig
from train.engine.engine import Engine
from train.engine.processes import join_processes
from train.health import Health
from train.history import History
from train.loop import train
from train.model import mixtral
from train.model.loss import MixtralWithLoss
from train.reporting.metrics import Metrics
from train.saving import checkpoint, saver
from train.saving.saver import Saver

STEPS = 4


class Disk:
    """Stands for the signals of a run, which it looks at in each step; after the third the disk takes what waits."""

    def __init__(self, saver: Saver, history: History):
        assert saver._background is not None
        self._background, self._history, self._goes = saver._background, history, threading.Event()
        self._background.submit(lambda: self._goes.wait() and None)

    @property
    def asked_to_stop(self) -> bool:
        if self._history.last is not None and self._history.last.step == 3:
            self._goes.set()
            self._background.wait()
        return False


@pytest.mark.parametrize(
    ("limit", "value", "saved"),
    [("PATIENCE", -1.0, [1, 3, 4]), ("IN_FLIGHT", 1 << 20, [1, 3, 4]), ("PATIENCE", 600.0, [1, 2, 3, 4])],
)
def test_a_checkpoint_waits_until_the_disk_has_the_one_before_and_training_does_not(
    dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: float,
    saved: list[int],
) -> None:
    monkeypatch.setattr(saver, limit, value)
    processes = join_processes(HardwareConfig(device="cpu"))
    architecture = ArchitectureConfig(**(NANO | {"vocab_size": 32_000, "hidden_size": 8, "intermediate_size": 8}))
    run, record = launch(
        dataset,
        processes,
        tmp_path / "run",
        model=ModelConfig(architecture=architecture, dtype="float32"),
        deepspeed=DeepSpeedConfig(stage=0),
        logging=LoggingConfig(wandb="off", progress=False),
        global_batch=1,
        max_steps=STEPS,
        save_every=1,
        keep_last=9,
    )
    config = record.config
    run.create(record.config_yaml)
    module = MixtralWithLoss(mixtral.build(config), with_router_loss=True)
    engine = Engine(module, config, config.batch(1), processes)
    history, health = History(), Health(FailureConfig())
    metrics = Metrics(run.path, config.logging, {}, is_main=True)
    saves = Saver(run, record, engine, history, metrics, health)
    train(
        engine,
        dataset,
        config,
        batch=config.batch(1),
        history=history,
        metrics=metrics,
        health=health,
        saver=saves,
        signals=Disk(saves, history),  # type: ignore[arg-type]
        done=0,
    )
    metrics.close()
    assert sorted(checkpoint.step_of(path) or 0 for path in checkpoint.paths(run.path)) == saved
