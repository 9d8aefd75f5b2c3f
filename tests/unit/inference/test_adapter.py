"""The fold against stock PEFT's own delta weights; every way in which an adapter and a base don't fit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from configs.adapter_settings import CONFIG
from configs.errors import UserError
from configs.weights import StoredWeights
from inference.adapter import Adapter
from inference.load import fold

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "experts-only": {"target_modules": [], "target_parameters": EXPERTS},
    "gate-up-only": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "down-only": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
    "attention-only": {"target_modules": ATTENTION},
    "attention-by-pattern": {"target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
    "rank-stabilised": {"target_modules": ATTENTION, "target_parameters": EXPERTS, "use_rslora": True},
    "ranks-by-pattern": {
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 40},
    },
    "low-rank-router": {"target_modules": ATTENTION, "target_parameters": ["mlp.gate.weight", *EXPERTS]},
    "trained-router": {"target_modules": ATTENTION, "modules_to_save": ["gate"]},
    "trained-head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
}


def architecture(**sizes: int) -> MixtralConfig:
    wanted = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    return MixtralConfig(**wanted | sizes)


def make_base(dtype: torch.dtype = torch.float32, **sizes: int) -> MixtralForCausalLM:
    torch.manual_seed(0)
    base = MixtralForCausalLM(architecture(**sizes)).to(dtype).eval()
    base.set_experts_implementation("eager")
    return base


def make_adapter(directory: Path, base: MixtralForCausalLM, **kind: Any) -> PeftModel:
    """Stock PEFT's own adapter with factors that are not zero, saved by stock PEFT; the model that it belongs to."""
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=12, **kind), autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(directory))
    return adapted.eval()


def edit_config(directory: Path, **changes: Any) -> None:
    settings = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(settings | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fold_is_stock_pefts_own_sum_in_float64(tmp_path: Path, kind: str) -> None:
    base = make_base()
    stock = make_adapter(tmp_path, base, **KINDS[kind]).double()
    folded = fold(copy.deepcopy(base).double(), Adapter(tmp_path, base.config))
    weights = dict(folded.named_parameters())
    seen = set()
    for name, module in stock.named_modules():
        if isinstance(module, LoraLayer):
            place = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = f"{place}.{getattr(module, 'parameter_name', 'weight')}"
            original = dict(base.named_parameters())[parameter].double()
            expected = original + module.get_delta_weight("default")
            torch.testing.assert_close(weights[parameter].data, expected.data, rtol=1e-12, atol=1e-12)
            assert not torch.equal(weights[parameter].data, original.data)
            seen.add(parameter)
    for name, parameter in base.named_parameters():
        if name not in seen and ".gate." not in name and "lm_head" not in name:
            assert torch.equal(weights[name], parameter.double()), name
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(folded(ids).logits, stock(ids).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """The result is the float64 sum rounded to the base's dtype, but for sums that lie on the edge between two."""
    base = make_base(dtype, hidden_size=256, intermediate_size=512)
    make_adapter(tmp_path, base, **KINDS["all"])
    adapter = Adapter(tmp_path, base.config)
    exact = dict(fold(copy.deepcopy(base).double(), adapter).named_parameters())
    differ = total = 0
    for name, weight in fold(base, adapter).named_parameters():
        assert weight.dtype == dtype
        differ += int((weight != exact[name].to(dtype)).sum())
        total += weight.numel()
        spacing = torch.finfo(dtype).eps * exact[name].abs() + torch.finfo(dtype).tiny
        assert bool(((weight.double() - exact[name]).abs() <= 0.501 * spacing).all()), name
    assert differ <= 1e-3 * total


def test_the_fold_takes_no_second_copy(tmp_path: Path) -> None:
    base = make_base()
    make_adapter(tmp_path, base, **KINDS["all"])
    before = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    fold(base, Adapter(tmp_path, base.config))
    assert {name: parameter.data_ptr() for name, parameter in base.named_parameters()} == before


def test_some_rows_of_one_expert_are_those_of_the_whole(tmp_path: Path) -> None:
    """How a merge folds w1 and w3, which lie in one parameter of the model."""
    base = make_base()
    make_adapter(tmp_path, base, **KINDS["all"])
    adapter = Adapter(tmp_path, base.config)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole, original = dict(fold(copy.deepcopy(base), adapter).named_parameters()), dict(base.named_parameters())
    for rows in (slice(0, 48), slice(48, 96)):
        part = original[name].data[3, rows].clone()
        adapter.fold(name, part, 3, rows)
        torch.testing.assert_close(part, whole[name].data[3, rows], rtol=0, atol=1e-7)


def test_experts_without_training_are_known(tmp_path: Path) -> None:
    base = make_base()
    stock = make_adapter(tmp_path, base, **KINDS["experts-only"])
    for module in stock.modules():
        if isinstance(module, LoraLayer):
            module.lora_B["default"].weight.data.unflatten(1, (-1, 4))[:, :, 2] = 0
    stock.save_pretrained(str(tmp_path))
    adapter = Adapter(tmp_path, base.config)
    name = "model.layers.0.mlp.experts.down_proj"
    assert [adapter.changes(name, expert) for expert in range(4)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias=all"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"next_years_idea": 3}, "next_years_idea=3"),
        ({"target_modules": ["embed_tokens"], "target_parameters": None}, "embed_tokens"),
        ({"target_modules": ["no_such"], "target_parameters": None}, "no_such"),
        ({"target_modules": "("}, "unterminated"),
        ({"rank_pattern": 5}, "adapter_config.json"),
        ({"r": 10**9}, "[4000000000, 32]"),
        ({"lora_alpha": float("nan")}, "the scale nan"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    base = make_base()
    make_adapter(tmp_path, base, **KINDS["all"])
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match="adapter=") as refused:
        Adapter(tmp_path, base.config)
    assert named in str(refused.value)


@pytest.mark.parametrize("receipt", ["", "[]", '{"base": 5}', '{"base": {}}', '{"base": {"fingerprint": null}}'])
def test_a_receipt_that_names_no_base_binds_to_none(tmp_path: Path, receipt: str) -> None:
    base = make_base()
    make_adapter(tmp_path, base, **KINDS["attention-only"])
    (tmp_path / "receipt.json").write_text(receipt)
    assert Adapter(tmp_path, base.config).trained_on is None


@pytest.mark.parametrize(
    "sizes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"hidden_size": 16}, {"num_local_experts": 8}]
)
def test_a_base_of_another_size_is_refused_with_the_tensor(tmp_path: Path, sizes: dict[str, int]) -> None:
    make_adapter(tmp_path, make_base(), **KINDS["all"])
    with pytest.raises(UserError, match=r"its tensor base_model\S+ (is missing|is unknown|is \[)"):
        Adapter(tmp_path, architecture(**sizes))


def test_other_weights_of_the_same_shape_are_refused(tmp_path: Path) -> None:
    base = make_base()
    make_adapter(tmp_path / "adapter", base, **KINDS["all"])
    base.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "in-parts", max_shard_size="50KB")
    base.lm_head.weight.data[-1, -1] += 1
    base.save_pretrained(tmp_path / "other")
    trained_on = StoredWeights(tmp_path / "base", "base").fingerprint
    (tmp_path / "adapter" / "receipt.json").write_text(json.dumps({"base": {"fingerprint": trained_on}}))
    adapter = Adapter(tmp_path / "adapter", base.config)
    adapter.check_base(StoredWeights(tmp_path / "base", "base=base"), "base=base")
    assert len(StoredWeights(tmp_path / "in-parts", "base").files) > 3
    adapter.check_base(StoredWeights(tmp_path / "in-parts", "base=in-parts"), "base=in-parts")
    with pytest.raises(UserError, match=rf"^base=other: .* base.fingerprint .* is {trained_on[:16]}"):
        adapter.check_base(StoredWeights(tmp_path / "other", "base=other"), "base=other")
