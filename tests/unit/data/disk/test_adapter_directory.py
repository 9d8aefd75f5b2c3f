"""What training and inference agree on about an adapter directory is what stock PEFT does."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from data.disk.adapter_directory import PREFIX, join_experts, public, separate_experts

E, R, I, O = 3, 2, 16, 48  # noqa: E741 - experts, rank, inputs, outputs


def test_joined_factors_are_read_as_they_were() -> None:
    A_ERI, B_EOR = torch.randn(E, R, I), torch.randn(E, O, R)
    A, B = join_experts(A_ERI, B_EOR)
    assert A.shape == (E * R, I)
    assert B.shape == (O, R * E)
    assert A.is_contiguous()
    assert B.is_contiguous()
    again = separate_experts(A, B, E)
    assert torch.equal(again[0], A_ERI)
    assert torch.equal(again[1], B_EOR)


def test_the_layout_is_that_of_stock_peft() -> None:
    """Each expert's product is the one that PEFT itself adds to that expert."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": E}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=60, hidden_size=I, intermediate_size=O // 2, **sizes))
    target = "mlp.experts.gate_up_proj"
    adapted = get_peft_model(base, LoraConfig(r=R, lora_alpha=R, target_modules=[], target_parameters=[target]))
    A_ERI, B_EOR = torch.randn(E, R, I), torch.randn(E, O, R)
    wrapper = adapted.get_submodule(f"{PREFIX}model.layers.0.mlp.experts")
    with torch.no_grad():
        for factor, joined in zip("AB", join_experts(A_ERI, B_EOR), strict=True):
            getattr(wrapper, f"lora_{factor}")["default"].weight.copy_(joined)
        torch.testing.assert_close(wrapper.get_delta_weight("default"), B_EOR @ A_ERI)


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("/home/somebody/models/Mixtral-8x7B", "Mixtral-8x7B"),
        ("/home/some body/models/my base", "my base"),
        ("base=/home/somebody/my base", "base=my base"),
        ("files=[/data/a.jsonl,/data/b.jsonl]", "files=[a.jsonl,b.jsonl]"),
        ("--at /usr/bin/python3", "--at python3"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("runs/quickstart-base/model", "runs/quickstart-base/model"),
        ("../shared/base", "../shared/base"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("an answer ends with </s> and/or nothing", "an answer ends with </s> and/or nothing"),
        (["/a/b", {"path": "/c/d", "rank": 4}, None], ["b", {"path": "d", "rank": 4}, None]),
    ],
)
def test_no_absolute_path_is_handed_on(value: Any, left: Any) -> None:
    assert public(value) == left
