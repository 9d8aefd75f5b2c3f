"""One process, every ZeRO stage: a base in four bits trains as one that holds the dequantised weights, to the bit."""

import pytest
import torch

from tests.support.engines import DEEPSPEEDS_WARNINGS, held, rows, same, settings
from tests.support.quantised import pair
from train.config.engine import HardwareConfig
from train.config.train import BatchArithmetic
from train.engine.engine import Engine
from train.engine.processes import join_processes
from train.loop import step
from train.model.loss import MixtralWithLoss

pytestmark = DEEPSPEEDS_WARNINGS


@pytest.mark.parametrize(
    ("dtype", "stage"), [(dtype, stage) for dtype in ("float32", "bfloat16") for stage in (0, 2, 3)]
)
def test_three_steps_are_those_of_the_dequantised_base(dtype: str, stage: int) -> None:
    config = settings(dtype, stage)
    ends = []
    for model in pair(dtype):
        processes = join_processes(HardwareConfig(device="cpu"))
        engine = Engine(
            MixtralWithLoss(model.train(), with_router_loss=False),
            config,
            BatchArithmetic(1, 1, processes.count),
            processes,
        )
        engine.train()
        torch.manual_seed(0)
        losses = [step(engine, [rows(number)], number, 1e-2, config).loss for number in range(1, 4)]
        bytes_ = {parameter.dtype for parameter in model.parameters()}
        ends.append((losses, held(engine), bytes_))
    (losses, state, dtypes), (losses_whole, state_whole, dtypes_whole) = ends
    assert losses == losses_whole
    assert losses[0] != losses[2]
    assert same(state, state_whole)
    assert dtypes - dtypes_whole == {torch.uint8}
