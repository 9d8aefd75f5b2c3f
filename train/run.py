"""`python -m train`: configuration → objects, each named once, in order → train()."""

from dataclasses import asdict
from pathlib import Path

from configs import entry
from configs.errors import UserError
from data.dataset import PreparedDataset
from data.template import ChatTokenizer, has_tokenizer
from train import engine
from train.checkpoint import RunDirectory
from train.config import LoraConfig, ModelConfig, TrainConfig
from train.engine import Engine
from train.loop import train
from train.loss import MixtralWithLoss
from train.metrics import Metrics
from train.model import build
from train.plan import show_plan
from train.profile import profile


def main() -> None:
    """The program."""
    entry.run("train", "train", TrainConfig, run)


def run(config: TrainConfig) -> None:
    """Trains, or measures the routers (`task=profile`), or with `dry_run` shows the plan."""
    config.check()
    if config.dry_run:
        show_plan(config)
        return
    dataset = PreparedDataset(config.dataset)
    check_vocabulary(config.model, dataset)
    processes = engine.start(config.hardware)
    batch = config.batch(processes.count)
    directory = RunDirectory(config, dataset, batch, processes)
    if config.task == "profile":
        # The engine asks for something that trains; fresh adapters change nothing that the routers see.
        config.lora = LoraConfig(attention=[], rank=8)
    with engine.partitioned_loading(config, batch):
        model = build(config)
    engine.seed(config.seed, processes)
    module = MixtralWithLoss(model, with_router_loss=config.router_aux_loss > 0)
    trainer = Engine(module, config, batch, processes)
    directory.create()
    if config.task == "profile":
        profile(trainer, dataset, config, batch=batch, run=directory)
        engine.finish()
        return
    metrics = Metrics(directory.path, config.logging, asdict(config), is_main=processes.is_main)
    train(trainer, dataset, config, batch=batch, run=directory, metrics=metrics)
    metrics.close()
    engine.finish()


def check_vocabulary(base: ModelConfig, dataset: PreparedDataset) -> None:
    """Raises `UserError` where the base brings a tokenizer that is not the one which made the dataset's ids."""
    if base.path is None or (Path(base.path).is_dir() and not has_tokenizer(Path(base.path))):
        return
    tokenizer = ChatTokenizer.load(base.path, revision=base.revision, setting="model.path")
    if tokenizer.fingerprint != dataset.manifest["tokenizer"]["fingerprint"]:
        raise UserError(f"dataset={dataset.directory}: it was prepared with another vocabulary; prepare it again")
