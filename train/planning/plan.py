"""One plan: a configuration on a machine → whether it fits, and what it takes in memory, seconds and money."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from configs.program.errors import UserError
from train.config.train import BatchArithmetic, TrainConfig
from train.planning.given.machine import GB, Machine
from train.planning.given.rows import Rows
from train.planning.given.sizes import Sizes
from train.planning.memory import Memory, memory
from train.planning.speed import Speed, speed


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would take."""

    config: TrainConfig
    machine: Machine
    rows: Rows
    batch: BatchArithmetic
    memory: Memory
    speed: Speed
    loading: float
    """Seconds until the base is on the devices."""
    checkpoint: float
    """Seconds until a checkpoint is on the disk; training goes on meanwhile."""
    refused: str | None
    """Why it doesn't fit, as a part of a sentence; None if it does."""

    @property
    def steps(self) -> int:
        """Of the whole run; 0 if the rows aren't known."""
        steps = math.ceil(self.rows.of_epoch * self.config.epochs / self.batch.rows)
        return min(steps, self.config.max_steps or steps)

    @property
    def epoch_hours(self) -> float:
        """Of one epoch."""
        return self.rows.of_epoch / self.batch.rows * self.speed.step / 3600

    @property
    def hours(self) -> float:
        """Of the whole run, loading included."""
        return (self.steps * self.speed.step + self.loading) / 3600

    @property
    def dollars(self) -> float:
        """Of the whole run."""
        return self.hours * self.machine.price * self.batch.processes

    def record(self) -> dict[str, Any]:
        """All of it, fit for JSON: bytes, seconds, dollars."""
        return {
            "machine": asdict(self.machine),
            "rows": asdict(self.rows),
            "batch": asdict(self.batch),
            "fits": self.refused is None,
            "refused": self.refused,
            "memory": {
                "parts": self.memory.parts,
                "peak": self.memory.peak,
                "where": self.memory.where,
                "host": self.memory.host,
                "phases": self.memory.phases,
            },
            "step": {
                "parts": self.speed.parts,
                "hidden": self.speed.hidden,
                "seconds": self.speed.step,
                "tokens_per_second": self.speed.tokens_per_second,
                "bound": self.speed.bound,
            },
            "run": {
                "steps": self.steps,
                "epoch_hours": self.epoch_hours,
                "hours": self.hours,
                "loading_seconds": self.loading,
                "checkpoint_seconds": self.checkpoint,
                "dollars": self.dollars,
            },
        }


def plan_of(config: TrainConfig, sizes: Sizes, rows: Rows, machine: Machine) -> Plan:
    """The plan of a run.

    Raises:
        UserError: the global batch can't be divided so.
    """
    batch = config.batch(machine.processes)
    tokens = rows.length * batch.micro_batch
    found = memory(config, sizes, tokens, batch.processes, machine)
    base = sizes.base_parameters * sizes.itemsize
    return Plan(
        config=config,
        machine=machine,
        rows=rows,
        batch=batch,
        memory=found,
        speed=speed(config, sizes, rows, batch, machine),
        loading=2 * base / machine.disk,  # it is read to be hashed, and again to be loaded
        checkpoint=12 * sizes.trained / machine.disk,
        refused=_refused(config, found, sizes, machine),
    )


def _refused(config: TrainConfig, found: Memory, sizes: Sizes, machine: Machine) -> str | None:
    if config.deepspeed.node_copy and machine.nodes == 1:
        return "a copy for each node helps on several nodes alone"
    what = "a GPU" if machine.on_cuda else "a process"
    base = found.parts.get("base", 0.0)
    if base > machine.memory:
        return f"{base / GB:.1f} GB of base on {what} of {machine.memory / GB:.0f} GB"
    if found.peak > machine.memory:
        return f"{found.peak / GB:.1f} GB at the peak on {what} of {machine.memory / GB:.0f} GB"
    if machine.on_cuda and found.host > machine.host_memory:
        return f"{found.host / GB:.0f} GB offloaded in a node's {machine.host_memory / GB:.0f} GB"
    return None


def divides(config: TrainConfig, processes: int) -> bool:
    """Whether the global batch can be divided among that many processes."""
    try:
        config.batch(processes)
    except UserError:
        return False
    return True
