"""`python -m train`: configuration → objects, each named once, in order → train()."""

from dataclasses import asdict

from configs import entry
from data.dataset import PreparedDataset
from train import engine
from train.checkpoint import RunDirectory
from train.config import TrainConfig
from train.engine import Engine
from train.loop import train
from train.loss import MixtralWithLoss
from train.metrics import Metrics
from train.model import build
from train.plan import show_plan


def main() -> None:
    """The program."""
    entry.run("train", "train", TrainConfig, run)


def run(config: TrainConfig) -> None:
    """Trains, or with `dry_run` shows the plan."""
    config.check()
    if config.dry_run:
        show_plan(config)
        return
    dataset = PreparedDataset(config.dataset)
    processes = engine.start(config.hardware)
    batch = config.batch(processes.count)
    directory = RunDirectory(config, processes)
    with engine.partitioned_loading(config, batch):
        model = build(config)
    module = MixtralWithLoss(model, with_router_loss=config.router_aux_loss > 0)
    trainer = Engine(module, config, batch, processes)
    metrics = Metrics(directory.path, config.logging, asdict(config), is_main=processes.is_main)
    train(trainer, dataset, config, batch=batch, run=directory, metrics=metrics)
    directory.write_receipt(dataset, batch, metrics)
    metrics.close()
    engine.finish()
