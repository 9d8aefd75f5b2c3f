"""An adapter that goes on from one form of the base to another."""

import json
from pathlib import Path

import pytest

from train.config.lora import LoraConfig
from train.config.model import ModelConfig
from train.config.train import TrainConfig
from train.saving.starting_point import other_form


@pytest.mark.parametrize(
    ("base", "now", "said"),
    [
        ({"weights": "nf4"}, "bf16", "trained on a base in nf4, goes on in bf16"),
        ({"weights": "bf16"}, "nf4", "trained on a base in bf16, goes on in nf4"),
        ({}, "nf4", "trained on a base in bf16, goes on in nf4"),
        ({}, "bf16", None),
        ({"weights": "nf4"}, "nf4", None),
    ],
)
def test_another_form_of_the_base_is_told_in_one_line(
    tmp_path: Path, base: dict[str, str], now: str, said: str | None
) -> None:
    (tmp_path / "receipt.json").write_text(json.dumps({"base": base}))
    config = TrainConfig(model=ModelConfig(weights=now), lora=LoraConfig(start=str(tmp_path)))
    assert other_form(config) == (said and f"lora.start={tmp_path}: {said}")
    config.lora.start = None
    assert other_form(config) is None
