"""The check that a run will find the memory that it needs."""

from configs.program.errors import UserError
from train.config.train import TrainConfig
from train.planning.given.here import found_here
from train.planning.given.machine import GB
from train.planning.given.rows import Rows
from train.planning.given.sizes import sizes_of
from train.planning.memory import memory


def check_room(config: TrainConfig, rows: Rows, processes: int) -> None:
    """Compares the planned peak with the memory that is free, before anything is loaded.

    Raises:
        UserError: a process would need more.
    """
    if not config.plan.check:
        return
    machine = found_here(config, processes)
    if not config.model.path and config.lora.method == "lora":
        return
    planned = memory(config, sizes_of(config), rows.length * config.micro_batch, processes, machine)
    if planned.peak > machine.memory:
        what = "the GPU" if machine.on_cuda else "this machine"
        raise UserError(
            f"micro_batch={config.micro_batch}: by the plan each process needs {planned.peak / GB:.1f} GB at its peak "
            f"({planned.where}), and {machine.memory / GB:.1f} GB of {what} are free for it; task=plan shows what "
            f"would fit, and plan.check=false tries all the same"
        )
