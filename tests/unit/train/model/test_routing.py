"""What is told of the routers, against transformers' own auxiliary loss and against counting."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data.schema import IGNORE_INDEX
from train.model.routing import Routing

LAYERS, EXPERTS, K = 3, 5, 2


def routing(tokens: int = 60, padding: int = 7) -> tuple[Routing, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    logits = [torch.randn(tokens, EXPERTS) for _ in range(LAYERS)]
    is_token = torch.arange(tokens) < tokens - padding
    targets = torch.full((tokens,), IGNORE_INDEX)
    made = Routing.of(tuple(logits), K, torch.arange(tokens), targets, is_token)
    return made, logits, is_token


def test_the_auxiliary_loss_of_a_layer_is_transformers_own() -> None:
    made, logits, is_token = routing()
    for layer, ours in enumerate(made.record()["load_balancing_loss_by_layer"]):
        theirs = load_balancing_loss_func((logits[layer],), EXPERTS, K, is_token[None])
        assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_load_and_entropy_by_counting() -> None:
    made, logits, is_token = routing()
    record = made.record()
    for layer in range(LAYERS):
        counts, entropy = [0] * EXPERTS, 0.0
        for token in range(int(is_token.sum())):
            p = logits[layer][token].softmax(-1).tolist()
            entropy -= sum(x * math.log(x) for x in p)
            for expert in sorted(range(EXPERTS), key=lambda e, p=p: -p[e])[:K]:
                counts[expert] += 1
        assert record["expert_load"][layer] == pytest.approx([c / sum(counts) for c in counts], abs=1e-6)
        assert record["router_entropy"][layer] == pytest.approx(entropy / int(is_token.sum()), rel=1e-5)


def test_parts_add_up_and_survive_the_way_over_processes() -> None:
    made, *_ = routing()
    twice = made + Routing.from_list(made.to_list(), made.load_LE.shape)
    assert torch.equal(twice.load_LE, 2 * made.load_LE)
    assert twice.record() == made.record()
    assert Routing.none(made.load_LE.shape).record()["unused_experts"] == [
        [x, e] for x in range(LAYERS) for e in range(EXPERTS)
    ]


def test_tokens_that_reach_the_loss() -> None:
    """Two conversations; the first has its second position supervised, the other none."""
    positions = torch.tensor([0, 1, 2, 0, 1])
    targets = torch.tensor([IGNORE_INDEX, 9, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX])
    logits = torch.eye(5) * 9  # token t chooses expert t
    made = Routing.of((logits, logits), 1, positions, targets, torch.ones(5, dtype=torch.bool))
    assert made.reaching_LE.tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
