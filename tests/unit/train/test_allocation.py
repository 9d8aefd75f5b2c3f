"""Experts and ranks, as told and from a measured load."""

import json
from pathlib import Path

import pytest

from configs.errors import UserError
from train.allocation import expert_ranks
from train.config import LoraConfig

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
    for budget in range(8, 200):
        spent = COST * sum(map(sum, ranks(experts="by_load", load=load, budget=budget * COST)))
        assert budget - 8 < spent / COST <= budget


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
