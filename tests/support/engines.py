"""What tests of engines have in common: settings, rows, and the state that is compared."""

import pytest
import torch

from data.prepared.dataset import Batch
from tests.support.nano import LENGTHS, packed
from train.config.engine import DeepSpeedConfig
from train.config.model import ModelConfig
from train.config.train import TrainConfig
from train.engine.engine import Engine

DEEPSPEEDS_WARNINGS = [  # DeepSpeed's calls, and torch's own where DeepSpeed imports it
    pytest.mark.filterwarnings("ignore:.*torch.distributed.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def settings(dtype: str, stage: int) -> TrainConfig:
    """Of a stage that divides even the smallest parameters."""
    sharded = DeepSpeedConfig(stage=stage, persistence_threshold=0)
    return TrainConfig(model=ModelConfig(dtype=dtype), deepspeed=sharded, router_aux_loss=0)


def rows(seed: int) -> Batch:
    """A row of random ids."""
    generator = torch.Generator().manual_seed(seed)
    return packed(torch.randint(3, 400, (sum(LENGTHS),), generator=generator))


def held(trainer: Engine) -> dict[tuple[str, str], torch.Tensor]:
    """Masters and moments, by parameter and kind."""
    return {(name, kind): tensor for name, state in trainer.state() for kind, tensor in state.items()}


def same(one: dict[tuple[str, str], torch.Tensor], other: dict[tuple[str, str], torch.Tensor]) -> bool:
    """Whether two of these are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
