"""What a run would be, found out without weights: parameters, batches, steps, tokens, DeepSpeed configuration."""

import json
import os
from collections import Counter
from collections.abc import Iterator

from rich.console import Console

from configs.program.errors import UserError
from data.prepared.dataset import PreparedDataset
from train.config.engine import HardwareConfig
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.processes import uses_cuda
from train.engine.zero import deepspeed_config
from train.lora import attach
from train.planning.given.sizes import planned_model


def show_plan(config: TrainConfig) -> None:
    """Builds the model with its adapters on the meta device, on which tensors have shapes and no numbers, and prints.

    What it says of the dataset, steps, epochs and tokens, is read from its manifest.

    The architecture is that of `model.path` if that is a directory, else `model.architecture`: no hub is asked. The
    number of processes is that of the launch, or `hardware.processes` if nothing was launched.

    Raises:
        UserError: something is wrong with the settings, or, after all else was printed, with the dataset.
    """
    processes = int(os.environ.get("WORLD_SIZE", config.hardware.processes))
    if os.environ.get("RANK", "0") != "0":
        return
    batch = config.batch(processes)
    planned, total = planned_model(config)
    kinds: Counter[str] = Counter()
    for name, parameter in attach.trainable(planned):
        kinds[attach.kind(name)] += parameter.numel()

    dataset, wrong = _dataset(config.dataset)
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.print(f"base                 {config.model.path or 'random weights'}")
    console.print(f"base parameters      {total:,}")
    held = sum(parameter.nbytes for parameter in planned.parameters()) - sum(
        parameter.nbytes for _, parameter in attach.trainable(planned)
    )
    if config.lora.method != "none":
        of_each = "" if config.deepspeed.stage == 3 else ", on each process"
        console.print(f"base in memory       {held / 1e9:,.1f} GB (model.weights={config.model.weights}){of_each}")
    console.print(f"trained parameters   {sum(kinds.values()):,} ({sum(kinds.values()) / total:.3%} of the base)")
    for name, number in sorted(kinds.items()):
        console.print(f"  {name:<18} {number:,}")
    console.print(f"batch                {batch}")
    for heading, value in _of_rows(config, batch, dataset) if dataset is not None else ():
        console.print(f"{heading:<20} {value}")
    console.print(f"device               {_device(config.hardware)}")
    console.print("DeepSpeed            " + json.dumps(deepspeed_config(config, batch), indent=2))
    if wrong is not None:
        raise wrong


def _dataset(directory: str) -> tuple[PreparedDataset | None, UserError | None]:
    """The dataset, or what is wrong with it: the rest of the plan needs none."""
    try:
        return PreparedDataset(directory), None
    except UserError as error:
        return None, error


def _of_rows(config: TrainConfig, batch: BatchArithmetic, dataset: PreparedDataset) -> Iterator[tuple[str, str]]:
    """What the plan says of the dataset: headings and texts."""
    of_epoch = dataset.manifest["train"]
    rows, tokens, supervised = (of_epoch[name] for name in ("packed_rows", "tokens", "supervised_tokens"))
    in_all = dataset.schedule(epochs=config.epochs, rows_per_step=batch.rows, seed=config.seed).steps
    steps = min(in_all, config.max_steps or in_all)
    seen = min(steps * batch.rows / rows, config.epochs)
    yield (
        "dataset",
        f"{config.dataset}: {rows:,} rows of {dataset.seq_len:,}, {supervised:,} of {tokens:,} tokens supervised",
    )
    shortened = f", of {in_all:,} for {config.epochs} epochs (max_steps={config.max_steps})" if steps < in_all else ""
    yield "steps", f"{steps:,}, {seen:.4g} epochs of {rows / batch.rows:,.4g} steps{shortened}"
    about = "about " if steps < in_all else ""
    yield "tokens", f"{about}{round(seen * tokens):,} in all, {round(seen * supervised):,} supervised"


def _device(hardware: HardwareConfig) -> str:
    """Which device the plan is for, and why."""
    if hardware.device != "auto":
        return hardware.device
    found = "cuda" if uses_cuda(hardware) else "cpu"
    return f"{found}, as hardware.device=auto finds here; hardware.device says which one to plan for"
