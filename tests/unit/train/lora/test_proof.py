"""The proof that experts learn: it holds where they do, and names the one that doesn't."""

import pytest
import torch

from data.prepared.dataset import Batch
from tests.support.nano import losses, nano, packed
from train.lora.proof import ExpertNotLearningError, FirstGradients
from train.model.loss import MixtralWithLoss
from train.model.routing import Routing


def first_step(module: MixtralWithLoss, batch: Batch) -> tuple[FirstGradients, list[float], Routing]:
    gradients = FirstGradients(module.causal_lm)
    module.watches_routing = True
    losses(module, batch)[0].backward()
    assert module.routing is not None
    return gradients, gradients.found(), module.routing


def fresh(checkpointing: bool = False) -> MixtralWithLoss:
    torch.manual_seed(0)
    causal_lm = nano("float32").train()
    for name, factor in causal_lm.named_parameters():
        if name.endswith("_lora_B"):
            torch.nn.init.zeros_(factor)
    if checkpointing:
        causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    return MixtralWithLoss(causal_lm, with_router_loss=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_that_learn_pass(checkpointing: bool) -> None:
    gradients, found, routing = first_step(fresh(checkpointing), packed(torch.randint(3, 400, (128,))))
    assert routing.reaching_LE.sum() > 0
    gradients.check(found, routing.reaching_LE)
    # and those that the loss does not reach have none, so the comparison is no tautology
    layers, experts = routing.reaching_LE.shape
    assert found == [
        float(routing.reaching_LE[layer, e] > 0) for layer in range(layers) for _ in range(2) for e in range(experts)
    ]


def test_an_expert_that_is_cut_off_is_named() -> None:
    module = fresh()
    experts = module.causal_lm.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[5] = 0  # its gate and up can change what they like: nothing comes out
    ids = torch.randint(3, 400, (128,))
    gradients, found, routing = first_step(module, packed(ids))
    assert routing.reaching_LE[1, 5] > 0
    with pytest.raises(
        ExpertNotLearningError, match=r"layer 1, expert 5: \d+ tokens of the first step .* gate_up_proj"
    ):
        gradients.check(found, routing.reaching_LE)


def test_a_few_tokens_of_one_conversation_leave_experts_without_and_that_is_no_error() -> None:
    batch = packed(torch.randint(3, 400, (128,)))
    targets = torch.full_like(batch.targets, -100)
    targets[:, 3] = batch.ids[:, 4]
    few = Batch(ids=batch.ids, positions=batch.positions, targets=targets, is_token=batch.is_token)
    gradients, found, routing = first_step(fresh(), few)
    assert 0 < routing.reaching_LE[-1].sum() <= 2
    assert 0.0 in found
    gradients.check(found, routing.reaching_LE)


def test_a_single_token_that_fell_to_another_expert_when_it_was_computed_again_is_no_error() -> None:
    """The routers are noted in the forward, and gradients are those of the recomputation."""
    gradients, found, routing = first_step(fresh(), packed(torch.randint(3, 400, (128,))))
    layers, experts = routing.reaching_LE.shape
    assert len(found) == layers * 2 * experts
    found[:] = [0.0 if index % experts == 3 else alive for index, alive in enumerate(found)]
    routing.reaching_LE[:, 3] = 1
    gradients.check(found, routing.reaching_LE)
    routing.reaching_LE[1, 3] = 2
    with pytest.raises(ExpertNotLearningError, match="layer 1, expert 3: 2 tokens"):
        gradients.check(found, routing.reaching_LE)
