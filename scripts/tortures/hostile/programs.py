"""What a reader does with files: as the three programs do it, without Hydra where that decides nothing."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.config import PrepareConfig
from inference.config import InferenceConfig

TRAINING = (
    *("hardware=cpu", "logging=quiet", "logging.wandb=off", "deepspeed=none", "max_steps=2", "global_batch=2"),
    *("save_every=1", "eval_every=0", "lora.rank=2", "model.attention=sdpa", "model.dtype=float32", "seed=0"),
)
ASKED = {"base": "in/base", "prompt": "Hi", "device": "cpu", "dtype": "float32", "max_new_tokens": 3}
BATCH = {"task": "batch", "prompt": "", "batching": "padded", "output": "out/answers.jsonl"}
EVALUATION = {"task": "evaluate", "prompt": "", "tasks": ["winogrande", "gsm8k"], "data": "in/tasks", "max_tokens": 256}


def prepare(**settings: Any) -> None:
    """`python -m data`."""
    from data.run import run

    common = {"output": "out/made", "seq_len": 256, "workers": 1, "eval_fraction": 0.1}
    run(PrepareConfig(**{**common, **settings}))


def look(task: str) -> Callable[[], None]:
    """`python -m data task=preview` or `report`."""
    return lambda: prepare(task=task, output="out/prepared", rows=50)


def ask(**settings: Any) -> None:
    """`python -m inference`."""
    from inference.run import run

    run(InferenceConfig(**{**ASKED, **settings}))


def batch(**settings: Any) -> None:
    """`python -m inference task=batch`."""
    ask(**BATCH, **settings)


def merge(**settings: Any) -> None:
    """`python -m inference task=merge`."""
    ask(task="merge", prompt="", dtype="auto", output="out/merged", **{"adapter": "in/adapter", **settings})


def evaluate(**settings: Any) -> None:
    """`python -m inference task=evaluate`."""
    ask(**EVALUATION, **settings)


def card() -> None:
    """`python -m inference task=card`."""
    ask(task="card", prompt="", adapter="out/run/adapter", output="out/card.md")


def run_training(*arguments: str) -> None:
    """`python -m train`."""
    from train.program import main

    sys.argv = ["python -m train", *TRAINING, *arguments]
    main()


def train(*arguments: str) -> Callable[[], None]:
    """`python -m train` with more arguments."""
    common = ("model.path=in/base", "dataset=in/prepared", "run_dir=out/new")
    return lambda: run_training(*common, *arguments)


def resume() -> None:
    """`python -m train` for a run that was interrupted after its last step."""
    run = Path("out/run")
    (run / "receipt.json").unlink()
    shutil.rmtree(run / "adapter")
    train(f"run_dir={run}")()


def go_on() -> None:
    """What a run that goes on looks at before it is built: its newest checkpoint, or with it its receipt."""
    from configs.program.errors import UserError
    from train.saving.checkpoint import Checkpoint, DamagedError, paths

    shapes = json.loads(Path("in/shapes.json").read_text())
    try:
        found = Checkpoint(paths(Path("out/run"))[0])
        found.check({name: tuple(shape) for name, shape in shapes.items()})
    except DamagedError as error:
        raise UserError(f"checkpoint: {error}; restore it") from error
