"""Saved adapters in stock PEFT: the same layout, the same logits, the same gradients."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from tests.support.nano import nano_config, save, trained_nano
from train.config.lora import EXPERT_TARGETS
from train.lora import attach, factors
from train.lora.files import peft_files


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"attention": []},
        {"projections": ["gate_up_proj"]},
        {"projections": ["down_proj"], "attention": ["q_proj", "v_proj"]},
        {"projections": []},
    ],
    ids=["all", "experts-only", "gate-up-only", "down-and-two-attention", "attention-only"],
)
def test_a_saved_adapter_gives_the_same_logits_in_stock_peft(tmp_path: Path, lora: dict[str, list[str]]) -> None:
    config = nano_config(**lora)
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)

    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), autocast_adapter_dtype=False).eval()
    ids = torch.randint(3, 500, (2, 25), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs, without = adapted(ids).logits, stock(ids).logits, base(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (ours - without).abs().max() > 0.01


def test_the_layout_is_that_of_pefts_own_delta_weight(tmp_path: Path) -> None:
    """Expert by expert: PEFT's W' - W must be s · B_e A_e of the same expert, not of a neighbour."""
    config = nano_config(attention=[])
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), autocast_adapter_dtype=False)

    seen = 0
    for wrapper in stock.modules():
        if not hasattr(wrapper, "parameter_name"):
            continue
        delta = wrapper.get_delta_weight("default")
        owner = next(name for name, module in stock.named_modules() if module is wrapper)
        layer = int(owner.split(".layers.")[1].split(".")[0])
        ours = adapted.model.layers[layer].mlp.experts
        A, B = (getattr(ours, f"{wrapper.parameter_name}_lora_{letter}").unflatten(0, (4, 4)) for letter in "AB")
        for expert in range(4):
            torch.testing.assert_close(delta[expert], 2.0 * B[expert].T @ A[expert], rtol=1e-10, atol=1e-10)
            seen += 1
    assert seen == 2 * 2 * 4  # layers × projections × experts


def test_keys_and_shapes_are_those_that_stock_peft_writes(tmp_path: Path) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    ours = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    stock = get_peft_model(
        base,
        PeftConfig(
            r=4,
            lora_alpha=8,
            target_modules=list(config.lora.attention),
            target_parameters=[f"mlp.experts.{name}" for name in EXPERT_TARGETS],
        ),
    )
    assert ours == {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(stock).items()}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_gradients_are_those_of_stock_peft(tmp_path: Path) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    stock = PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=False, is_trainable=True)
    ids = torch.randint(3, 500, (2, 25), generator=torch.Generator().manual_seed(1))
    for trained in (adapted, stock):
        trained(input_ids=ids, labels=ids).loss.backward()

    theirs = {n.replace(".default.", "."): p.grad for n, p in stock.named_parameters() if p.requires_grad}
    gradients = {name: factor.grad for name, factor in attach.trainable(adapted)}
    ours = peft_files.to_peft(config.lora, gradients, factors.adapters(adapted))
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-9, atol=1e-11)
