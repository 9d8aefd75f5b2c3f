"""`task=plan`: the page, the JSON, or the settings of the best alternative."""

import json
import os
from pathlib import Path

from rich.console import Console

from configs.program.errors import UserError
from data.disk.files import replace_file
from train.config.cluster import HERE
from train.config.train import TrainConfig
from train.planning.alternatives import alternatives, ranked
from train.planning.given.machine import Machine, of_catalogue
from train.planning.given.measuring import measured_here
from train.planning.given.rows import Rows, rows_of
from train.planning.given.sizes import Sizes, sizes_of
from train.planning.page import WIDTH, show
from train.planning.plan import plan_of


def plan(config: TrainConfig) -> None:
    """Plans the run, without weights.

    With `best`, prints the settings of the alternative that costs least, or takes least time if there is no price.

    Raises:
        UserError: something is wrong with the settings or the dataset, or nothing fits and the `best` is asked for.
    """
    rows = rows_of(config)
    sizes = sizes_of(config)
    machine = _machine(config, sizes, rows)
    if os.environ.get("RANK", "0") != "0":
        return
    planned = plan_of(config, sizes, rows, machine)
    found = alternatives(config, sizes, rows, machine)
    best = ranked(found)
    if config.plan.json is not None:
        record = planned.record() | {
            "alternatives": [{"settings": list(each.settings)} | each.plan.record() for each in found],
            "by_money": [list(each.settings) for each in best],
            "by_time": [list(each.settings) for each in ranked(found, "time")],
        }
        _write(Path(config.plan.json), json.dumps(record, indent=2))
    if not config.best:
        show(Console(width=WIDTH, markup=False, highlight=False, emoji=False), planned, sizes, found)
    elif best:
        print(" ".join(best[0].settings))
    else:
        raise UserError(f"cluster.gpu={config.cluster.gpu}: nothing that the plan tries fits there; take a larger one")


def _machine(config: TrainConfig, sizes: Sizes, rows: Rows) -> Machine:
    if config.cluster.gpu != HERE:
        return of_catalogue(config.cluster, config.model.dtype)
    return measured_here(config, sizes, rows)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [text.encode() + b"\n"])
    except OSError as error:
        raise UserError(
            f"plan.json={path}: it can't be written ({error.strerror}); name a file in a folder that can be written"
        ) from error
