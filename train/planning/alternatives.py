"""Other settings for the same training: all that the machine could be asked for, and what becomes of each."""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from data.disk import nf4
from train.config.engine import DeepSpeedConfig
from train.config.train import TrainConfig
from train.planning.given.machine import Machine
from train.planning.given.rows import Rows
from train.planning.given.sizes import Sizes, sizes_of
from train.planning.plan import Plan, divides, plan_of

MICRO_BATCHES = (1, 2, 4, 8)
CHECKPOINTING = ("none", "attention", "full")
PERSISTENT = 20_000_000
"""Elements below which attention, adapters, routers and norms of a Mixtral stay whole on every process."""
ROOM_FOR_TWO = 4_000_000_000
"""Elements of two layers' experts of a Mixtral-8x7B."""

ALIKE = 0.02
"""The share by which costs may differ and still count as equal."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A plan, and the settings that lead to it."""

    settings: tuple[str, ...]
    """As they stand on a command line."""
    plan: Plan


def alternatives(config: TrainConfig, sizes: Sizes, rows: Rows, machine: Machine) -> list[Alternative]:
    """Every combination whose training is the same: the same rows in the same steps. Not sorted."""
    forms = {config.model.weights: sizes}
    if config.lora.method == "lora" and (machine.on_cuda or find_spec("bitsandbytes")):
        other = copy.deepcopy(config)
        other.model.weights = nf4.FORM if config.model.weights == nf4.UNQUANTISED else nf4.UNQUANTISED
        forms[other.model.weights] = sizes_of(other)
    found = []
    for weights, of_form in forms.items():
        for way, micro_batch, checkpointing in itertools.product(_ways(machine), MICRO_BATCHES, CHECKPOINTING):
            other = copy.deepcopy(config)
            other.model.weights, other.micro_batch, other.activation_checkpointing = weights, micro_batch, checkpointing
            for name, value in way.items():
                setattr(other.deepspeed, name, value)
            if divides(other, machine.processes):
                found.append(Alternative(_said(other, way, config.deepspeed), plan_of(other, of_form, rows, machine)))
    return found


def ranked(found: list[Alternative], by: str = "money") -> list[Alternative]:
    """Those that fit, the best first, by `money` or by `time`.

    Of those that differ by less than a plan can tell, `ALIKE`, the one with most memory to spare comes first.
    """
    fitting = [each for each in found if each.plan.refused is None]

    def cost(each: Alternative) -> float:
        priced = each.plan.machine.price if by == "money" else 0.0
        return each.plan.speed.step * (priced * each.plan.batch.processes or 1.0)

    least = min(map(cost, fitting), default=1.0)
    return sorted(fitting, key=lambda each: (int(math.log(cost(each) / least, 1 + ALIKE)), each.plan.memory.peak))


def _ways(machine: Machine) -> Iterator[dict[str, Any]]:
    plain: dict[str, Any] = {"offload_param": "none", "offload_optimizer": "none", "node_copy": False}
    ahead: dict[str, Any] = {"persistence_threshold": PERSISTENT, "max_live_parameters": ROOM_FOR_TWO}
    yield plain | {"stage": 0}
    yield plain | {"stage": 2}
    yield plain | ahead | {"stage": 3}
    if machine.nodes > 1:
        yield plain | ahead | {"stage": 3, "node_copy": True}
    if machine.on_cuda:
        yield plain | {"stage": 2, "offload_optimizer": "cpu"}
        yield plain | ahead | {"stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"}


def _said(config: TrainConfig, way: dict[str, Any], before: DeepSpeedConfig) -> tuple[str, ...]:
    """The settings that lead to it. Those of a recipe outlive the choice of a group, so whatever differs is named."""
    offloads = way["offload_optimizer"] == "cpu"
    group = {0: "none", 2: "zero2", 3: "zero3_offload" if offloads else "zero3"}[way["stage"]]
    said = [f"deepspeed={group}"]
    for name in ("offload_param", "offload_optimizer"):
        if way[name] != getattr(before, name) or (way[name] == "cpu" and way["stage"] == 2):
            said.append(f"deepspeed.{name}={way[name]}")
    thresholds = ("persistence_threshold", "max_live_parameters")
    said += [f"deepspeed.{name}={way[name]}" for name in thresholds if name in way]
    if way["node_copy"] or before.node_copy:
        said.append(f"deepspeed.node_copy={str(way['node_copy']).lower()}")
    weights = f"model.weights={config.model.weights}"
    batch = [f"micro_batch={config.micro_batch}", f"activation_checkpointing={config.activation_checkpointing}"]
    return (*said, weights, *batch)
