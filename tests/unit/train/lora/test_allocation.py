"""Experts and ranks, as told and from a measured load."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from configs.program.errors import UserError
from train.config.lora import EXPERT_TARGETS, LoraConfig
from train.lora import factors
from train.lora.allocation import expert_ranks

LOAD = [[700, 200, 100, 0], [250, 250, 250, 250]]
COST = 1000


@pytest.fixture
def load(tmp_path: Path) -> str:
    path = tmp_path / "expert_load.json"
    path.write_text(json.dumps({"tokens_per_expert": LOAD}))
    return str(path)


def ranks(**lora: object) -> list[list[int]]:
    config = LoraConfig(**lora)  # type: ignore[arg-type]
    config.check()
    return expert_ranks(config, 2, 4, COST)


def test_all_a_subset_and_a_rank_for_each() -> None:
    assert ranks(rank=8) == [[8] * 4] * 2
    assert ranks(rank=8, experts=[0, 3]) == [[8, 0, 0, 8]] * 2
    assert ranks(expert_ranks=[4, 0, 2, 1]) == [[4, 0, 2, 1]] * 2
    assert ranks(expert_ranks=[4, 5, 2, 1], experts=[1]) == [[0, 5, 0, 0]] * 2


def test_ranks_in_proportion_to_load_within_the_budget(load: str) -> None:
    given = ranks(experts="by_load", load=load, budget=170 * COST)
    assert given == [[56, 16, 8, 0], [24, 24, 24, 16]]
    assert sum(map(sum, given)) == 168


@given(data=st.data(), by_load=st.sampled_from(["ranks", "experts"]))
def test_any_load_and_budget(data: st.DataObject, by_load: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What trains in the model, not the sum of the ranks alone, stays within the budget and uses it up; who is loaded
    more has no less."""
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    of_layer = st.lists(st.integers(0, 10**9), min_size=experts, max_size=experts).filter(any)
    loads = data.draw(st.lists(of_layer, min_size=layers, max_size=layers))
    per_rank = (4 + 2 * 3) + (3 + 4)  # hidden 4, intermediate 3
    step = 8 if by_load == "ranks" else 5
    budget = data.draw(st.integers(step * per_rank, 60 * step * per_rank))
    path = tmp_path_factory.mktemp("load") / "expert_load.json"
    path.write_text(json.dumps({"tokens_per_expert": loads}))
    config = LoraConfig(experts="by_load", by_load=by_load, load=str(path), budget=budget, rank=5)
    config.check()
    chosen = expert_ranks(config, layers, experts, per_rank)

    sizes = MixtralConfig(hidden_size=4, intermediate_size=3, num_local_experts=experts)
    blocks = nn.ModuleList(MixtralExperts(sizes).requires_grad_(False) for _ in range(layers))
    factors.attach(blocks, ranks=chosen, projections=EXPERT_TARGETS, scaling=factors.Scaling(1))
    spent = sum(parameter.numel() for parameter in blocks.parameters() if parameter.requires_grad)
    assert spent <= budget
    everyone_has_one = by_load == "experts" and all(map(all, chosen))
    assert budget - step * per_rank < spent or everyone_has_one
    share = [[tokens / sum(of_layer) for tokens in of_layer] for of_layer in loads]
    in_order = sorted(zip(itertools.chain(*share), itertools.chain(*chosen), strict=True))
    assert [rank for _, rank in in_order] == sorted(rank for _, rank in in_order)


def test_the_most_loaded_experts_within_the_budget(load: str) -> None:
    assert ranks(experts="by_load", by_load="experts", rank=16, load=load, budget=50 * COST) == [
        [16, 0, 0, 0],
        [16, 16, 0, 0],
    ]


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"experts": [4]}, r"lora\.experts=\[4\]: there is no expert 4; give 0 to 3"),
        ({"experts": "some"}, r"lora\.experts=some: "),
        ({"expert_ranks": [1, 2]}, r"lora\.expert_ranks=\[1, 2\]: the model has 4 experts"),
        ({"experts": "by_load"}, r"lora\.load: "),
        ({"experts": "by_load", "load": "nowhere.json", "budget": 1}, r"lora\.load=nowhere\.json: "),
    ],
)
def test_what_cannot_be_is_refused(lora: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        ranks(**lora)


def test_a_budget_that_buys_nothing_and_another_models_load_are_refused(load: str) -> None:
    with pytest.raises(UserError, match=r"lora\.budget=7999: rank 8 on one expert takes 8,000 parameters"):
        ranks(experts="by_load", load=load, budget=7999)
    with pytest.raises(UserError, match="measured on 2 layers of 4 experts, the model has 3 of 4"):
        expert_ranks(LoraConfig(experts="by_load", load=load, budget=10**6), 3, 4, COST)
