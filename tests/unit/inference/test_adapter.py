"""The fold against stock PEFT's own delta weights; every way in which an adapter and a base don't fit."""

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralForCausalLM

from configs.program.errors import UserError
from data.disk.adapter_directory import CONFIG, WEIGHTS
from data.disk.weights import StoredWeights
from inference.adapter import Adapter
from inference.config import InferenceConfig
from inference.load import find_adapter, find_base, fold
from tests.support.adapters import ATTENTION, EXPERTS, KINDS, architecture, make_adapter, make_base


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
    name, matrix = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.block_sparse_moe.experts.3.{}.weight"
    whole, original = dict(fold(copy.deepcopy(base), adapter).named_parameters()), dict(base.named_parameters())
    for matrix_name, first, rows in (("w1", 0, slice(0, 20)), ("w3", 48, slice(20, 48))):
        here = slice(first + rows.start, first + rows.stop)
        part = original[name].data[3, here].clone()
        adapter.fold(matrix.format(matrix_name), part, rows)
        torch.testing.assert_close(part, whole[name].data[3, here], rtol=0, atol=1e-7)


def test_experts_without_training_are_known(tmp_path: Path) -> None:
    base = make_base()
    stock = make_adapter(tmp_path, base, **KINDS["experts-only"])
    for module in stock.modules():
        if isinstance(module, LoraLayer):
            module.lora_B["default"].weight.data.unflatten(1, (-1, 4))[:, :, 2] = 0
    stock.save_pretrained(str(tmp_path))
    adapter = Adapter(tmp_path, base.config)
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    assert [adapter.changes(name.format(expert)) for expert in range(4)] == [True, True, False, True]


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
        ({"lora_alpha": float("nan")}, "it holds NaN"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    base = make_base()
    make_adapter(tmp_path, base, **KINDS["all"])
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match="adapter=") as refused:
        Adapter(tmp_path, base.config)
    assert named in str(refused.value)


@pytest.mark.parametrize("receipt", ["", "[]", '{"base": 5}'])
def test_a_receipt_that_is_none_is_refused(tmp_path: Path, receipt: str) -> None:
    base = make_base()
    make_adapter(tmp_path, base, **KINDS["attention-only"])
    (tmp_path / "receipt.json").write_text(receipt)
    with pytest.raises(UserError, match=r"its receipt\.json can't be read .*; give the adapter as it was written"):
        _ = Adapter(tmp_path, base.config).trained_on


@pytest.mark.parametrize("receipt", ['{"base": {}}', '{"base": {"fingerprint": null}}'])
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
    adapter.check_base(StoredWeights(tmp_path / "base", "base=base"))
    assert len(StoredWeights(tmp_path / "in-parts", "base").files) > 3
    adapter.check_base(StoredWeights(tmp_path / "in-parts", "base=in-parts"))
    with pytest.raises(UserError, match=rf"^base=other: .* base.fingerprint .* is {trained_on[:16]}"):
        adapter.check_base(StoredWeights(tmp_path / "other", "base=other"))


# Every update is used exactly once


def told_or_equal(directory: Path, base: MixtralForCausalLM, stock: nn.Module) -> str | None:
    """Folds the adapter, and compares logits with stock PEFT's unmerged; the sentence where it is refused."""
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    try:
        folded = fold(copy.deepcopy(base), Adapter(directory, base.config))
    except UserError as refused:
        return str(refused)
    with torch.no_grad():
        torch.testing.assert_close(folded(ids).logits, stock(ids).logits, rtol=1e-9, atol=1e-9)
    return None


MODULES = [*ATTENTION, "lm_head", "embed_tokens"]
PARAMETERS = [*EXPERTS, "mlp.gate.weight", "lm_head.weight", "self_attn.q_proj.weight"]
SAVED = ["lm_head", "embed_tokens", "gate", "norm", "input_layernorm", "self_attn", "mlp", "experts", "layers.0"]
PATTERNS = [r".*\.[qv]_proj", "all-linear", r".*(lm_head|k_proj)", r"model\.embed_tokens"]


def drawn(seed: int) -> tuple[dict[str, Any], bool]:
    """Settings of PEFT, and whether the base is tied."""
    dice = random.Random(seed)
    settings: dict[str, Any] = {"r": dice.choice([1, 2, 4]), "lora_alpha": dice.choice([1, 8, 13])}
    settings["target_modules"] = dice.sample(MODULES, dice.randint(1, 4))
    if dice.random() < 0.2:
        settings["target_modules"] = dice.choice(PATTERNS)
    if dice.random() < 0.4:
        settings["target_parameters"] = dice.sample(PARAMETERS, dice.randint(1, 2))
    if dice.random() < 0.3:
        settings["modules_to_save"] = dice.sample(SAVED, dice.randint(1, 2))
    if dice.random() < 0.3:
        settings["use_rslora"] = True
    if dice.random() < 0.3:
        settings["rank_pattern"] = {dice.choice(MODULES): dice.choice([1, 3, 5])}
    if dice.random() < 0.3:
        settings["alpha_pattern"] = {dice.choice(MODULES): dice.choice([2, 5.5])}
    return settings, dice.random() < 0.4


@pytest.mark.parametrize("seeds", [range(start, start + 12) for start in range(0, 60, 12)])
def test_random_settings_fold_as_stock_peft_computes_or_are_refused_by_name(tmp_path: Path, seeds: range) -> None:
    same = 0
    for seed in seeds:
        settings, tied = drawn(seed)
        base = make_base(torch.float64, tie_word_embeddings=tied)
        directory = tmp_path / str(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                stock = make_adapter(directory, base, **settings)
        except (ValueError, TypeError, KeyError):  # PEFT's own refusals, as of a layer that is targeted twice
            continue
        told = told_or_equal(directory, base, stock)
        same += told is None
        if told is not None:
            of_tied = tied and ("lm_head.weight" in told or "embed_tokens.weight" in told)
            assert of_tied or "in two ways" in told or "under no such name" in told, (seed, settings, told)
    assert same >= 2


TIED: dict[str, dict[str, Any]] = {
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head-parameter": {"target_modules": [], "target_parameters": ["lm_head.weight"]},
    "head-module": {"target_modules": ["lm_head"]},
    "embedding-module": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", TIED)
def test_an_update_of_a_tensor_that_is_two_parameters_is_refused(tmp_path: Path, kind: str) -> None:
    """Folded it would be lost, or land in head and embedding both."""
    base = make_base(tie_word_embeddings=True)
    make_adapter(tmp_path, base, **TIED[kind])
    with pytest.raises(UserError, match=r"which is one tensor with .* in this base.*give fold=false"):
        fold(base, Adapter(tmp_path, base.config))


def test_parameters_that_share_their_memory_are_refused_whatever_the_configuration_says(tmp_path: Path) -> None:
    base = make_base()
    make_adapter(tmp_path, base, target_modules=["q_proj"])
    adapter = Adapter(tmp_path, base.config)
    attention = base.model.layers[0].self_attn
    attention.o_proj.weight = nn.Parameter(attention.q_proj.weight.data)
    with pytest.raises(UserError, match=r"self_attn\.q_proj\.weight, which shares its memory"):
        fold(base, adapter)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("other", [False, True])
def test_the_layer_that_stock_peft_stores_beside_its_factors_is_the_base(
    tmp_path: Path, layer: str, other: bool
) -> None:
    """It is the base's own as a rule; where it is another, stock PEFT takes it, and so does the fold."""
    base = make_base(torch.float64)
    make_adapter(tmp_path, base, target_modules=["q_proj", layer])
    stored = load_file(tmp_path / WEIGHTS)
    (beside,) = [key for key in stored if "base_layer" in key]
    if other:
        save_file(stored | {beside: stored[beside] + 1}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), autocast_adapter_dtype=False).eval()
    assert told_or_equal(tmp_path, base, stock) is None
    del stored[beside]  # as other programs write it
    save_file(stored, tmp_path / WEIGHTS, metadata={"format": "pt"})
    Adapter(tmp_path, base.config).check_foldable()


def test_a_parameter_that_is_changed_in_two_ways_is_refused(tmp_path: Path) -> None:
    base = make_base()
    make_adapter(tmp_path, base, target_modules=[], modules_to_save=["mlp"], target_parameters=EXPERTS[1:])
    with pytest.raises(UserError, match="so it can't be folded or merged; give fold=false"):
        fold(base, Adapter(tmp_path, base.config))


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"lora_alpha": None}, "says lora_alpha=null, and PEFT needs a number"),
        ({"lora_alpha": "16"}, "says lora_alpha=16, and PEFT needs a number"),
        ({"lora_alpha": True}, "says lora_alpha=True, and PEFT needs a number"),
        ({"r": None}, "says r=null, and PEFT needs a whole number above 0"),
        ({"r": 2.0}, "says r=2.0, and PEFT needs a whole number above 0"),
        ({"r": 0}, "says r=0, and PEFT needs a whole number above 0"),
        ({"use_rslora": "false"}, "says use_rslora=false, and PEFT needs true or false"),
        ({"rank_pattern": {"q_proj": "2"}}, "PEFT needs names with whole numbers above 0"),
        ({"rank_pattern": {"q_proj": 0}}, "PEFT needs names with whole numbers above 0"),
        ({"alpha_pattern": {"q_proj": None}}, "PEFT needs names with numbers"),
        ({"alpha_pattern": 5}, "PEFT needs names with numbers"),
        ({"target_modules": {"a": 1}}, "PEFT needs a list of at most 10,000 names, or a pattern"),
        ({"modules_to_save": "lm_head"}, "PEFT needs a list of at most 10,000 names"),
        ({"layers_to_transform": ["1"]}, "PEFT needs whole numbers"),
        ({"base_model_name_or_path": 5}, "PEFT needs a path or hub id"),
        ({"base_model_name_or_path": "x" * 5000}, "PEFT needs a path or hub id"),
        ({"lora_alpha": 10**400}, "adapter_config.json"),
        ({"lora_alpha": 1e300}, "the scale "),
    ],
)
def test_a_value_that_peft_cannot_compute_with_is_refused(tmp_path: Path, changes: dict[str, Any], needed: str) -> None:
    base = make_base()
    make_adapter(tmp_path, base, target_modules=["q_proj"])
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match="adapter=") as refused:
        Adapter(tmp_path, base.config)
    assert needed in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lm_head"])
def test_numbers_that_are_not_finite_are_refused_before_the_base_is_read(
    tmp_path: Path, value: float, part: str
) -> None:
    base = make_base()
    make_adapter(tmp_path, base, target_modules=["o_proj"], modules_to_save=["lm_head"])
    stored = load_file(tmp_path / WEIGHTS)
    key = next(key for key in stored if part in key)
    stored[key][-1, -1] = value
    save_file(stored, tmp_path / WEIGHTS, metadata={"format": "pt"})
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    asked = InferenceConfig(base=str(tmp_path / "base"), adapter=str(tmp_path), check_base=False)
    with pytest.raises(UserError, match=rf"its tensor {key} holds numbers that are not finite"):
        find_adapter(asked, find_base(asked))


def test_a_sum_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Each number is, and their product is beyond the dtype."""
    base = make_base(torch.float16)
    make_adapter(tmp_path, base, target_modules=["q_proj"])
    stored = load_file(tmp_path / WEIGHTS)
    save_file({key: tensor * 0 + 200 for key, tensor in stored.items()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"what it makes of .*q_proj\.weight is not finite in torch\.float16"):
        fold(base, Adapter(tmp_path, base.config))
