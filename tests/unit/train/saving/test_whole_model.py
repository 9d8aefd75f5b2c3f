"""Whole models, written one parameter at a time, are those that transformers writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from data.disk.weights import StoredWeights
from train.config.model import ArchitectureConfig, ModelConfig
from train.model import mixtral
from train.saving import whole_model
from train.saving.whole_model import ModelFiles

SIZES = ArchitectureConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)


@pytest.mark.parametrize("largest", [whole_model.LARGEST_FILE, 300_000], ids=["one file", "several"])
def test_names_and_bits_are_those_of_save_pretrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(whole_model, "LARGEST_FILE", largest)
    torch.manual_seed(0)
    built = mixtral.random_base(ModelConfig(architecture=SIZES))
    built.save_pretrained(tmp_path / "theirs")
    parameters = dict(built.named_parameters())
    (tmp_path / "ours").mkdir()
    files = ModelFiles(tmp_path / "ours", {name: tuple(p.shape) for name, p in parameters.items()}, torch.bfloat16)
    for name, parameter in parameters.items():
        files.write(name, parameter.detach().float())
    built.config.use_cache = False  # as in training
    files.finish(built)
    built.config.use_cache = True

    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = {
        name: tensor for file in (tmp_path / "ours").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (largest == 300_000)
    if largest == 300_000:
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == theirs.keys()
    named = [StoredWeights(tmp_path / which, which) for which in ("ours", "theirs")]
    assert named[0].fingerprint == named[1].fingerprint

    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("ours", "theirs")]
    assert configs[0] == configs[1]
    assert configs[0]["use_cache"] is True
    assert (tmp_path / "ours" / "tokenizer.model").is_file()
    loaded, info = MixtralForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), built.parameters(), strict=True))
