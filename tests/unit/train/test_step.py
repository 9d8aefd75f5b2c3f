"""One update in the engine, one process without ZeRO, against gradients taken by hand."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from data.prepared.dataset import Batch
from tests.support.nano import LENGTHS, losses, nano, packed
from train.config.engine import DeepSpeedConfig, HardwareConfig, OptimConfig
from train.config.model import ModelConfig
from train.config.train import BatchArithmetic, LoggingConfig, TrainConfig
from train.engine.engine import Engine
from train.engine.processes import join_processes
from train.loop import step, watched_step
from train.lora import attach
from train.lora.proof import FirstGradients
from train.model.loss import MixtralWithLoss
from train.reporting.metrics import Metrics


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_router_loss_weighs_the_same_however_many_micro_batches_there_are(weight: float) -> None:
    """Each adds c · balance · (its tokens / all tokens): undivided it would grow with the accumulation."""
    module = MixtralWithLoss(nano("float32").train(), with_router_loss=weight > 0)
    long = packed(torch.randint(3, 400, (sum(LENGTHS),)))
    short = Batch(*(F.pad(getattr(long, name)[:, :40], (0, 98), value=fill) for name, fill in FILLINGS.items()))
    tokens, supervised = long.tokens + short.tokens, long.supervised_tokens + short.supervised_tokens
    assert short.tokens == 40 < long.tokens

    by_hand = copy.deepcopy(module)
    parts = [(batch, *losses(by_hand, batch)) for batch in (long, short)]
    total = sum(
        cross_entropy / supervised + weight * batch.tokens / tokens * balance for batch, cross_entropy, balance in parts
    )
    total.backward()
    norm = math.sqrt(sum(float(factor.grad.double().square().sum()) for _, factor in attach.trainable(by_hand)))

    config = TrainConfig(
        model=ModelConfig(dtype="float32"),
        deepspeed=DeepSpeedConfig(stage=0),
        optim=OptimConfig(clip=1e9),
        router_aux_loss=weight,
    )
    processes = join_processes(HardwareConfig(device="cpu"))
    trainer = Engine(module, config, BatchArithmetic(1, 2, processes.count), processes)
    trainer.train()
    result = step(trainer, [long, short], 1, 1e-3, config)
    assert result.update.gradient_norm == pytest.approx(norm, rel=1e-5)
    expected = sum(float(cross_entropy.detach()) for _, cross_entropy, _ in parts) / supervised
    assert result.loss == pytest.approx(expected, rel=1e-5)


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    """Without ZeRO too; in bfloat16 the sum would be off by a thousandth."""
    processes = join_processes(HardwareConfig(device="cpu"))
    module = MixtralWithLoss(nano("bfloat16").train(), with_router_loss=False)
    batches = [packed(torch.randint(3, 400, (sum(LENGTHS),))) for _ in range(4)]
    by_hand = copy.deepcopy(module)
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        losses(by_hand, batch)[0].backward()
        for name, factor in attach.trainable(by_hand):
            sums[name] = sums.get(name, 0) + factor.grad.double()
            factor.grad = None
    config = TrainConfig(deepspeed=DeepSpeedConfig(stage=0))
    trainer = Engine(module, config, BatchArithmetic(1, len(batches), processes.count), processes)
    trainer.train()
    for batch in batches:
        trainer.backward(trainer.forward(batch)[0])
        if batch is not batches[-1]:
            trainer.micro_step_done()
    for name, factor in attach.trainable(module):
        assert (factor.grad - sums[name]).norm() <= 1e-6 * sums[name].norm(), name
    assert trainer.step(1e-3).applied
    assert all(factor.dtype == torch.bfloat16 for _, factor in attach.trainable(module))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's own, imported
@pytest.mark.filterwarnings("ignore:.*torch.distributed.*is deprecated:FutureWarning")  # as join_processes says why
@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_zero3_attention_and_a_moe_block_are_gathered_whole_once_a_pass(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As leaves: attention's projections with their adapters, and the router with the experts; in the forward, in the
    backward, and where the forward is repeated."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    causal_lm = nano("float32").train()
    if checkpointing:
        causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    config = TrainConfig(
        model=ModelConfig(dtype="float32"),
        deepspeed=DeepSpeedConfig(stage=3, persistence_threshold=0),
        router_aux_loss=0,
    )
    processes = join_processes(HardwareConfig(device="cpu"))
    trainer = Engine(
        MixtralWithLoss(causal_lm, with_router_loss=False), config, BatchArithmetic(1, 1, processes.count), processes
    )
    trainer.train()
    fetched: list[str] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def noted(coordinator: PartitionedParameterCoordinator, module: torch.nn.Module, **how: bool) -> None:
        fetched.append(type(module).__name__)
        fetch(coordinator, module, **how)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", noted)
    result = step(trainer, [packed(torch.randint(3, 400, (sum(LENGTHS),)))], 1, 1e-3, config)
    assert result.update.applied
    blocks = causal_lm.config.num_hidden_layers
    for leaf in ("Attention", "MixtralSparseMoeBlock"):
        assert fetched.count(leaf) == blocks * (3 if checkpointing else 2), leaf
    assert not {"Linear", "MixtralExperts", "MixtralTopKRouter"} & set(fetched)  # Linear: the base's and PEFT's
    weights = [weight for layer in causal_lm.model.layers for weight in layer.parameters()]
    assert len(weights) > 10 * blocks
    assert not any(weight.numel() for weight in weights)  # and let go


@pytest.mark.parametrize(("every", "noted"), [(0, []), (1, [1, 2]), (2, [1, 2]), (3, [1])])
def test_what_the_routers_do_is_noted_as_often_as_asked(
    every: int, noted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update's gradients are compared in any case."""
    config = TrainConfig(
        model=ModelConfig(dtype="float32"),
        deepspeed=DeepSpeedConfig(stage=0),
        logging=LoggingConfig(routing_every=every, wandb="off", progress=False),
    )
    processes = join_processes(HardwareConfig(device="cpu"))
    module = MixtralWithLoss(nano("float32").train(), with_router_loss=True)
    trainer = Engine(module, config, BatchArithmetic(1, 1, processes.count), processes)
    trainer.train()
    compared = []
    check = FirstGradients.check
    monkeypatch.setattr(FirstGradients, "check", lambda *given: compared.append(1) or check(*given))
    metrics = Metrics(tmp_path, config.logging, {}, is_main=True)
    for number in (1, 2):
        batch = packed(torch.randint(3, 400, (sum(LENGTHS),)))
        watched_step(trainer, [batch], number, 1e-3, config, metrics, first=number == 1)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "expert_load" in line] == noted
    assert compared == [1]


FILLINGS = {"ids": 0, "positions": 0, "targets": -100, "is_token": False}
