"""The loss against transformers' own, and packed conversations against each conversation alone."""

import pytest
import torch
from torch.nn import functional as F

from data.prepared.dataset import Batch
from data.schema import IGNORE_INDEX
from tests.support.nano import LENGTHS, losses, nano, packed
from train.lora import attach
from train.model.loss import MixtralWithLoss


def test_a_packed_row_has_the_summed_loss_of_its_conversations_alone() -> None:
    torch.manual_seed(0)
    causal_lm = nano("float32").eval()
    ids = torch.randint(3, 400, (sum(LENGTHS),))
    batch = packed(ids)
    together, balance = losses(MixtralWithLoss(causal_lm, with_router_loss=True), batch)

    alone, start = 0.0, 0
    for length in LENGTHS:
        piece = slice(start, start + length)
        logits = causal_lm(batch.ids[:, piece], use_cache=False).logits[0]
        alone += float(F.cross_entropy(logits, batch.targets[0, piece], reduction="sum").detach())
        start += length
    assert float(together.detach()) == pytest.approx(alone, rel=1e-5)

    # The load-balancing loss is transformers' own on the tokens that are not padding.
    stock = causal_lm(
        batch.ids[:, : sum(LENGTHS)],
        position_ids=batch.positions[:, : sum(LENGTHS)],
        output_router_logits=True,
        use_cache=False,
    )
    assert float(balance.detach()) == pytest.approx(float(stock.aux_loss.detach()), rel=1e-5)


@pytest.mark.parametrize("conversation", [0, 1, 2])
def test_a_conversation_does_not_see_its_neighbours_not_by_one_bit(conversation: int) -> None:
    """In bfloat16, the dtype of training.

    Other tokens in one conversation change how many rows each expert's product has, and with it, in float32, the order
    in which the BLAS adds a row's terms; bfloat16's products give each row the same bits at any size.
    """
    causal_lm = nano("bfloat16").eval()
    generator = torch.Generator().manual_seed(conversation)
    starts = [0, LENGTHS[0], LENGTHS[0] + LENGTHS[1], sum(LENGTHS)]
    inside = slice(starts[conversation], starts[conversation + 1])
    outside = torch.ones(sum(LENGTHS), dtype=torch.bool)
    outside[inside] = False
    moved = 0.0
    for _ in range(20):
        ids = torch.randint(3, 400, (sum(LENGTHS),), generator=generator)
        changed = ids.clone()
        changed[inside] = torch.randint(3, 400, (LENGTHS[conversation],), generator=generator)
        with torch.no_grad():
            logits, other = (
                causal_lm(packed(x).ids, position_ids=packed(x).positions, use_cache=False).logits[0, : sum(LENGTHS)]
                for x in (ids, changed)
            )
        assert torch.equal(logits[outside], other[outside])
        moved = max(moved, float((logits[inside] - other[inside]).abs().max()))
    assert moved > 0.1  # the change itself is seen


def test_isolation_in_float32() -> None:
    torch.manual_seed(0)
    causal_lm = nano("float32").eval()
    ids = torch.randint(3, 400, (sum(LENGTHS),))
    changed = ids.clone()
    changed[70:107] = torch.randint(3, 400, (37,))
    with torch.no_grad():
        logits, other = (
            causal_lm(packed(x).ids, position_ids=packed(x).positions, use_cache=False).logits[0]
            for x in (ids, changed)
        )
    torch.testing.assert_close(logits[:70], other[:70], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[107:128], other[107:128], rtol=1e-5, atol=1e-5)


def test_a_blank_micro_batch_has_loss_zero_and_finite_gradients() -> None:
    causal_lm = nano("float32")
    blank = Batch(
        ids=torch.zeros(1, 16, dtype=torch.long),
        positions=torch.arange(16)[None],
        targets=torch.full((1, 16), IGNORE_INDEX),
        is_token=torch.zeros(1, 16, dtype=torch.bool),
    )
    cross_entropy, balance = losses(MixtralWithLoss(causal_lm, with_router_loss=True), blank)
    assert cross_entropy == 0
    (cross_entropy + 0.0 * balance).backward()
    gradients = [factor.grad for _, factor in attach.trainable(causal_lm)]
    assert all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_the_router_loss_reaches_the_adapters_below_under_activation_checkpointing() -> None:
    """The router is frozen, but what feeds it is not: with the recorded logits detached this gradient would be lost."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        causal_lm = nano("float32").train()
        if checkpointing:
            causal_lm.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        batch = packed(torch.randint(3, 400, (sum(LENGTHS),)))
        _, balance = losses(MixtralWithLoss(causal_lm, with_router_loss=True), batch)
        balance.backward()
        factor = causal_lm.model.layers[0].mlp.experts.down_proj_lora_B
        assert factor.grad is not None
        gradients.append(factor.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_evaluation_leaves_the_router_loss_out() -> None:
    torch.manual_seed(0)
    module = MixtralWithLoss(nano("float32"), with_router_loss=True)
    batch = packed(torch.randint(3, 400, (sum(LENGTHS),)))
    with torch.no_grad():
        (trained, balance), (evaluated, left_out) = losses(module.train(), batch), losses(module.eval(), batch)
    assert trained == evaluated
    assert balance > 0
    assert left_out == 0
