"""The work of a step, against what torch counts of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.schema import IGNORE_INDEX
from tests.support.counting import OF_MATRICES, counted_work
from tests.support.nano import LARGER, LENGTHS, losses, nano, nano_config, packed
from train.lora import attach
from train.model import mixtral, work
from train.model.loss import MixtralWithLoss


@pytest.mark.parametrize(
    "lora",
    [
        {"attention": ["q_proj"]},
        {"attention": ["v_proj", "o_proj"], "projections": ["down_proj"]},
        {"router": "trained"},
        {"method": "none"},
    ],
    ids=str,
)
def test_it_is_the_work_of_the_matrices_of_what_trains(lora: dict[str, object]) -> None:
    """The scores of attention are left out: its blocks hold pairs that no conversation sees."""
    causal_lm = mixtral.build(nano_config(architecture=LARGER, **lora)).train()
    batch = packed(torch.randint(3, 400, (sum(LENGTHS),)))
    module = MixtralWithLoss(causal_lm, with_router_loss=True)

    def once() -> None:
        losses(module, batch)[0].backward()

    counted = counted_work(once)
    trained = {name: tuple(parameter.shape) for name, parameter in attach.trainable(causal_lm)}
    of_step = work.of_training(causal_lm.config.to_dict(), trained)
    supervised = int((batch.targets != IGNORE_INDEX).sum())
    assert of_step.flops(batch.ids.numel(), 0, supervised) == sum(counted.get(op, 0) for op in OF_MATRICES)


def test_each_token_attends_to_those_before_it_in_its_conversation() -> None:
    batch = packed(torch.randint(3, 400, (sum(LENGTHS),)))
    assert batch.pairs == sum(length * (length + 1) // 2 for length in LENGTHS)
    q, k, v = (torch.randn(1, 4, 70, 16, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        ((q @ k.mT) @ v).sum().backward()
    sizes = nano("float32").config.to_dict() | {"num_hidden_layers": 1}
    assert work.of_frozen(sizes).per_pair * 70 * 70 == counter.get_total_flops()  # 4 heads of 16


def test_mixtral_with_nothing_trained_takes_what_the_roofline_counts() -> None:
    sizes = mixtral_sizes()
    needed = work.of_frozen(sizes).flops(4096, 4096 * 4097 / 2, 4096)
    assert needed == pytest.approx(222e12, rel=5e-3)


def mixtral_sizes() -> dict[str, int]:
    """Of Mixtral-8x7B's config.json."""
    return {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    }
