"""One process, every ZeRO stage: what is skipped, what a restored engine does next, and going forward alone."""

import copy
import math

import deepspeed
import pytest
import torch

from data.prepared.dataset import Batch
from tests.support.engines import DEEPSPEEDS_WARNINGS, held, rows, same, settings
from tests.support.nano import LENGTHS, losses, nano
from train.config.engine import HardwareConfig
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.engine import Engine, ForwardEngine
from train.engine.processes import join_processes
from train.engine.state import MASTER, MOMENTS
from train.loop import step
from train.model.loss import MixtralWithLoss

pytestmark = DEEPSPEEDS_WARNINGS

EVERY_STAGE = pytest.mark.parametrize(("dtype", "stage"), [(d, s) for d in ("float32", "bfloat16") for s in range(4)])

BEYOND = 1e25
"""A factor of the loss that makes no gradient infinite, but their norm in float32."""


def module(dtype: str) -> MixtralWithLoss:
    torch.manual_seed(0)
    return MixtralWithLoss(nano(dtype).train(), with_router_loss=False)


def engine(config: TrainConfig) -> Engine:
    processes = join_processes(HardwareConfig(device="cpu"))
    made = Engine(module(config.model.dtype), config, BatchArithmetic(1, 1, processes.count), processes)
    made.train()
    return made


@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_sends_the_adapters_alone(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has read the base. If this fails, DeepSpeed looks at another attribute: see `_read_by_each`."""
    sent: list[int] = []
    send = deepspeed.comm.broadcast
    monkeypatch.setattr(
        deepspeed.comm, "broadcast", lambda tensor, *a, **k: sent.append(tensor.nbytes) or send(tensor, *a, **k)
    )
    trainer = engine(settings("bfloat16", stage))
    adapters = [p for name, p in trainer.module.named_parameters() if "lora_" in name]
    assert adapters
    assert sum(sent) == sum(adapter.nbytes for adapter in adapters)
    assert not any(hasattr(parameter, "ds_optim_param") for parameter in trainer.module.parameters())


@pytest.mark.parametrize(
    ("dtype", "stage", "factor"),
    [(dtype, stage, math.nan) for dtype in ("float32", "bfloat16") for stage in range(4)]
    # stage 3 takes the norm in float64, in which there is none beyond
    + [("float32", stage, BEYOND) for stage in range(3)]
    + [("bfloat16", stage, BEYOND) for stage in (0, 2)],
)
def test_a_step_that_is_not_finite_changes_nothing(dtype: str, stage: int, factor: float) -> None:
    """Also if each gradient is finite and their norm is not: clipped by it, they are zero, and Adam moves on."""
    config = settings(dtype, stage)
    trainer = engine(config)
    assert step(trainer, [rows(0)], 1, 1e-3, config).update.applied
    before = held(trainer)
    loss, _ = trainer.forward(rows(1))
    trainer.backward(loss * factor)
    update = trainer.step(1e-3)
    assert not update.applied
    assert not math.isfinite(update.gradient_norm)
    assert same(held(trainer), before)
    assert trainer.optimizer_steps == 1
    assert step(trainer, [rows(1)], 2, 1e-3, config).update.applied
    assert trainer.optimizer_steps == 2
    assert not same(held(trainer), before)


@EVERY_STAGE
def test_a_restored_engine_goes_on_to_the_bit(dtype: str, stage: int) -> None:
    config = settings(dtype, stage)
    trainer = engine(config)
    assert trainer.optimizer_steps == 0
    for (name, kind), tensor in held(trainer).items():
        assert tuple(tensor.shape) == trainer.shapes[name]
        assert kind == MASTER or not tensor.any()
    for number in (1, 2):
        step(trainer, [rows(number)], number, 1e-3, config)
    stored = {key: tensor.clone() for key, tensor in held(trainer).items()}
    assert {kind for _, kind in stored} == {MASTER, *MOMENTS}

    again = engine(config)
    blank = Batch(*(torch.full_like(getattr(rows(0), name), fill) for name, fill in BLANK.items()))
    again.restore(lambda name, kind: stored[name, kind], trainer.optimizer_steps, blank)
    assert again.optimizer_steps == 2
    assert same(held(again), stored)
    results = [step(each, [rows(3)], 3, 1e-3, config) for each in (trainer, again)]
    assert results[0] == results[1]
    assert same(held(trainer), held(again))


@pytest.mark.parametrize(
    ("dtype", "stage"), [("float32", 0), ("float32", 2), ("float32", 3), ("bfloat16", 0), ("bfloat16", 3)]
)
def test_going_forward_takes_no_optimizer(dtype: str, stage: int) -> None:
    config = settings(dtype, stage)
    processes = join_processes(HardwareConfig(device="cpu"))
    made = module(dtype)
    with torch.no_grad():
        expected, _ = losses(copy.deepcopy(made).eval(), rows(0))
    forward_engine = ForwardEngine(made, config, BatchArithmetic(1, 1, processes.count), processes)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    if stage == 3:
        assert not any(parameter.numel() for parameter in made.causal_lm.model.layers.parameters())
    with forward_engine.evaluating(), forward_engine.watching_routers():
        loss, _ = forward_engine.forward(rows(0))
    assert torch.equal(loss, expected)
    assert forward_engine.take_routing().tokens == sum(LENGTHS)


BLANK = {"ids": 0, "positions": 0, "targets": -100, "is_token": False}
