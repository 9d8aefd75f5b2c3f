"""Adapters that name each expert's w1, w2 and w3, against the logits of the transformers and PEFT that wrote them.

tests/support/adapters_of_transformers_4.json holds what transformers 4.57.6 and PEFT 0.18.1 made of nine settings: the
configuration and keys that they wrote, and the logits of the last position in float64. Base and factors are computed
from their names, by `numbers`.
"""

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk.adapter_directory import CONFIG, WEIGHTS
from data.disk.mixtral_files import pieces, stored_parts
from data.disk.weights import StoredWeights
from inference.adapter import Adapter
from inference.load import fold, keep_apart
from inference.merging.merge import write_weights
from inference.merging.verify import compare_tensors, streamed

GOLDEN = json.loads((Path(__file__).parents[2] / "support" / "adapters_of_transformers_4.json").read_text())
IDS = torch.tensor(GOLDEN["ids"])


def numbers(name: str, shape: Any) -> torch.Tensor:
    n = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(n * n * 0.37 + zlib.crc32(name.encode()) % 1000).view(shape) * 0.4


@pytest.fixture(scope="module")
def base() -> MixtralForCausalLM:
    model = MixtralForCausalLM(MixtralConfig(**GOLDEN["sizes"])).double().eval()
    model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        for original, part in stored_parts(name, parameter.data):
            part.copy_(numbers(original, part.shape))
    return model


@pytest.fixture(params=GOLDEN["kinds"])
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return GOLDEN["kinds"][request.param]


@pytest.fixture
def adapter(tmp_path: Path, kind: dict[str, Any]) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / CONFIG).write_text(json.dumps(kind["config"]))
    save_file({key: numbers(key, shape) for key, shape in kind["tensors"].items()}, directory / WEIGHTS)
    return directory


def assert_logits(model: Any, expected: list[float], rtol: float = 1e-7) -> None:
    with torch.no_grad():
        ours = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits[0, -1].double()
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=rtol)


def test_the_base_is_that_of_the_golden_file(base: MixtralForCausalLM) -> None:
    assert_logits(base, GOLDEN["base"])


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "apart"])
def test_the_logits_are_those_of_transformers_4(
    base: MixtralForCausalLM, kind: dict[str, Any], adapter: Path, folded: bool
) -> None:
    read, model = Adapter(adapter, base.config), copy.deepcopy(base)
    apart = {"autocast_adapter_dtype": False}
    assert_logits(fold(model, read) if folded else keep_apart(model, read, **apart).eval(), kind["logits"])


def test_what_is_merged_and_what_proves_it_have_these_logits(
    base: MixtralForCausalLM, kind: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    """The proof is stock PEFT's layers with one expert in memory at a time."""
    copy.deepcopy(base).float().save_pretrained(tmp_path / "base")
    read, parts = Adapter(adapter, base.config), pieces(StoredWeights(tmp_path / "base", "base"), base.config)
    assert_logits(streamed(base.config, torch.float64, parts, read), kind["logits"], 1e-5)
    merged = tmp_path / "merged"
    merged.mkdir()
    write_weights(merged, parts, read)
    assert compare_tensors(merged, parts, read)["tensors_changed"] > 0
    assert_logits(
        streamed(base.config, torch.float64, pieces(StoredWeights(merged, ""), base.config)), kind["logits"], 1e-5
    )


def test_unfusing_takes_the_weights_and_copies_none(base: MixtralForCausalLM, tmp_path: Path) -> None:
    kind = GOLDEN["kinds"]["attention-and-experts"]
    (tmp_path / CONFIG).write_text(json.dumps(kind["config"]))
    save_file({key: numbers(key, shape) for key, shape in kind["tensors"].items()}, tmp_path / WEIGHTS)
    model = copy.deepcopy(base)
    held = model.model.layers[1].mlp.experts.gate_up_proj
    apart = keep_apart(model, Adapter(tmp_path, base.config))
    w3 = apart.get_parameter("base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.base_layer.weight")
    assert w3.data_ptr() == held[2, 24:].data_ptr()
    assert model.config.model_type == "mixtral"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t, k: t.pop(k), "its tensor {key} is missing; "),
        (lambda t, k: t.update({k.replace("ts.2", "ts.3"): t[k].clone()}), r"experts\.3\.w2\.lora_A\S+ is unknown; "),
        (lambda t, k: t.update({k: t[k][:1]}), r"its tensor {key} is \[1, 24\], and this base takes \[2, 24\]; "),
    ],
    ids=["missing", "unknown", "shape"],
)  # fmt: skip
def test_every_key_and_shape_is_compared(base: MixtralForCausalLM, tmp_path: Path, change: Any, told: str) -> None:
    kind = GOLDEN["kinds"]["attention-and-experts"]
    key = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w2.lora_A.weight"
    tensors = {name: numbers(name, shape) for name, shape in kind["tensors"].items()}
    change(tensors, key)
    (tmp_path / CONFIG).write_text(json.dumps(kind["config"]))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=f"^adapter=.*{told.format(key=key.replace('.', '[.]'))}"):
        Adapter(tmp_path, base.config)
