"""task=profile: which experts the routers choose for a dataset, by layer, as JSON and as a picture."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from configs.program.console import console
from configs.program.errors import one_line
from data.prepared.dataset import PreparedDataset, evaluation_batches
from data.schema import IGNORE_INDEX
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.engine import ForwardEngine
from train.model.routing import Routing
from train.run_files import EXPERT_LOAD, EXPERT_LOAD_PICTURE
from train.saving.run_directory import RunDirectory


def profile(
    engine: ForwardEngine, dataset: PreparedDataset, config: TrainConfig, *, batch: BatchArithmetic, run: RunDirectory
) -> None:
    """Runs the training rows through the base, `max_steps` global batches of them or all, and writes expert_load.json
    and expert_load.png into the run directory; collective."""
    rows = rows_to_profile(dataset, config, batch)
    rank, count = engine.processes.rank, engine.processes.count
    micro_batches = evaluation_batches(dataset.train, rows, batch.micro_batch, rank, count)
    forwards = math.ceil(len(rows) / (batch.micro_batch * count))
    shown = config.logging.progress and engine.processes.is_main
    with engine.evaluating(), engine.watching_routers():
        for micro_batch in track(micro_batches, "Profiling", total=forwards, console=console, disable=not shown):
            nothing_supervised = torch.full_like(micro_batch.targets, IGNORE_INDEX)  # and so no work for the head
            engine.forward(replace(micro_batch, targets=nothing_supervised))
    routing = engine.take_routing()
    if engine.processes.is_main:
        save(load_record(routing, config, rows=len(rows)), run.path)


def save(record: dict[str, Any], directory: Path) -> None:
    """Writes expert_load.json, and the picture beside it if that can be drawn."""
    (directory / EXPERT_LOAD).write_text(json.dumps(record, indent=2) + "\n")
    message = f"Saved {directory / EXPERT_LOAD}"
    try:
        draw(record, directory / EXPERT_LOAD_PICTURE)
        message += f" and {EXPERT_LOAD_PICTURE}"
    except Exception as error:  # of any kind: matplotlib looks for fonts, and keeps files of its own
        message += f"; {EXPERT_LOAD_PICTURE} can't be drawn ({one_line(error)})"
    console.print(message, soft_wrap=True)


def rows_to_profile(dataset: PreparedDataset, config: TrainConfig, batch: BatchArithmetic) -> list[int]:
    """The rows of the first `max_steps` steps that training would take, or of a whole epoch.

    In training's order, not the stored one, in which rows of the longest conversations come first.
    """
    schedule = dataset.schedule(epochs=1, rows_per_step=batch.rows, seed=config.seed)
    steps = min(schedule.steps, config.max_steps or schedule.steps)
    return [row for step in range(steps) for row in schedule.rows_of(step) if row is not None]


def load_record(routing: Routing, config: TrainConfig, *, rows: int) -> dict[str, Any]:
    """The content of expert_load.json; lists by layer, then by expert."""
    return {
        "base": config.model.path,
        "dataset": config.dataset,
        "rows": rows,
        "tokens": int(routing.tokens),
        "tokens_per_expert": [[int(tokens) for tokens in of_layer] for of_layer in routing.load_LE.tolist()],
        **routing.record(),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """A heatmap: a row for each layer, a column for each expert, its share of the layer's token-expert pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    load = record["expert_load"]
    layers, experts = len(load), len(load[0])
    figure, axis = pyplot.subplots(figsize=(1.6 + 0.62 * experts, 1.3 + 0.34 * layers), layout="constrained")
    highest = max(max(of_layer) for of_layer in load)
    image = axis.imshow(load, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
    for layer, of_layer in enumerate(load):
        for expert, part in enumerate(of_layer):
            colour = "white" if part < 0.6 * highest else "black"
            axis.text(expert, layer, f"{100 * part:.1f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(experts))
    axis.set_yticks(range(layers))
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.set_title(f"Share of each layer's choices, % (even: {100 / experts:.1f})", fontsize=10)
    figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
