"""Adapter and base become one model, or one sentence says why not."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from configs.program.errors import UserError
from inference.adapter import Adapter
from inference.config import InferenceConfig
from inference.load import choose_dtype, find_base, fold, is_spread, load, one_gpu
from tests.support.nano import nano_config, save, trained_nano


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter for it, and the adapted model's logits before anything was saved."""
    config = nano_config(architecture={"vocab_size": 32_000})
    base, adapted = trained_nano(config)
    (tmp_path / "adapter").mkdir()
    save(tmp_path / "adapter", config, adapted)
    base.float().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        return tmp_path / "base", tmp_path / "adapter", adapted(prompt()).logits


def prompt() -> torch.Tensor:
    return torch.randint(3, 500, (1, 20), generator=torch.Generator().manual_seed(0))


def asked(base: Path, adapter: Path) -> InferenceConfig:
    return InferenceConfig(base=str(base), adapter=str(adapter), prompt="hello", dtype="float32", device="cpu")


def edit_adapter(adapter: Path, edit) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_the_folded_model_is_the_trained_one(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, logits = saved
    loaded = load(asked(base, adapter))
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(prompt()).logits.double(), logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_base_in_four_bits_is_taken_with_one_line(
    saved: tuple[Path, Path, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter, _ = saved
    (adapter / "receipt.json").write_text(json.dumps({"base": {"weights": "nf4"}}))
    load(asked(base, adapter))
    said = [line for line in capfd.readouterr().err.splitlines() if "nf4" in line]
    assert said == [f"inference: adapter={adapter}: it was trained on a base in nf4; here the base is in bf16"]


def test_a_pickled_base_is_told_how_to_be_converted(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, _ = saved
    (base / "training_args.bin").touch()
    weights = base / "model.safetensors"
    torch.save(load_file(weights), base / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"its weights are pickled \(pytorch_model\.bin\).* python -c \"from "):
        load(asked(base, adapter))


@pytest.mark.parametrize("given", ["relative", "absolute"])
def test_the_base_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """By the name that the adapter has for it, in which no private path is."""
    top, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    config = nano_config()
    base, adapted = trained_nano(config)
    for directory in (top / "runs" / "mine" / "adapter", elsewhere):
        directory.mkdir(parents=True)
    base.float().save_pretrained(top / "runs" / "base" / "model")
    monkeypatch.chdir(top)
    config.model.path = "runs/base/model" if given == "relative" else str(top / "runs" / "base" / "model")
    adapter = top / "runs" / "mine" / "adapter"
    save(adapter, config, adapted)
    (adapter / "receipt.json").write_text(json.dumps({"base": {"path": config.model.path}}))
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == ("runs/base/model" if given == "relative" else "model")
    for place, path in ((top, "runs/mine/adapter"), (elsewhere, str(adapter))):
        monkeypatch.chdir(place)
        found = find_base(InferenceConfig(adapter=path, prompt="hello"))
        assert found.directory.resolve() == top / "runs" / "base" / "model"


@pytest.mark.parametrize(
    ("free", "gpu"),
    [([141, 141], 0), ([60, 141, 120], 1), ([80, 80, 80], None), ([110, 100], None), ([120], 0)],
)
def test_a_model_goes_onto_one_gpu_where_it_fits(free: list[int], gpu: int | None) -> None:
    """Mixtral's 93 GB, with room to work; else it is spread."""
    assert one_gpu(93 * 10**9, [gigabytes * 10**9 for gigabytes in free]) == gpu


def test_a_model_is_spread_where_its_layers_lie_on_several_devices(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, _ = saved
    model = load(asked(base, adapter)).model
    for places, spread in (
        ({"": 0}, False),
        ({"model": 0, "lm_head": 1}, True),
        ({"model": 0, "lm_head": "cpu"}, True),
    ):
        model.hf_device_map = places
        assert is_spread(model) == spread


def test_a_missing_tensor_is_named(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, _ = saved
    key = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    edit_adapter(adapter, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=f"{key} is missing"):
        load(asked(base, adapter))


def test_a_renamed_tensor_is_named(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, _ = saved
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_adapter(adapter, lambda tensors: tensors.update({"base_model.model.model.layers.9.x": tensors.pop(key)}))
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight is missing"):
        load(asked(base, adapter))


def test_an_adapter_of_another_size_is_refused(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, _ = saved
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_adapter(adapter, lambda tensors: tensors.update({key: copy.deepcopy(tensors[key][:, :16]).contiguous()}))
    with pytest.raises(UserError, match=rf"{key} is \[4, 16\], and this base takes \[4, 32\]"):
        load(asked(base, adapter))


def test_another_kind_of_model_is_refused(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, _ = saved
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    with pytest.raises(UserError, match="it is a llama model"):
        load(asked(base, adapter))


def test_a_base_without_weights_is_refused(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, adapter, _ = saved
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"base={base}: its model.safetensors is missing"):
        load(asked(base, adapter))


def test_a_model_that_is_left_on_disk_is_not_folded(saved: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    """As accelerate leaves what does not fit: there is nothing to add to, so that is told, and what to do."""
    base, adapter, _ = saved
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    where = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = MixtralForCausalLM.from_pretrained(base, device_map=where, offload_folder=tmp_path / "offload")
    with pytest.raises(UserError, match=r"merge first, with task=merge"):
        fold(model, Adapter(adapter, model.config))


@pytest.mark.parametrize(
    ("asked", "on_cuda", "knows_bfloat16", "chosen"),
    [
        ("auto", False, False, torch.bfloat16),
        ("auto", True, True, torch.bfloat16),
        ("auto", True, False, torch.float16),
        ("float32", True, False, torch.float32),
        ("bfloat16", True, False, torch.bfloat16),
    ],
)
def test_the_dtype_is_the_machines(
    monkeypatch: pytest.MonkeyPatch, asked: str, on_cuda: bool, knows_bfloat16: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: knows_bfloat16)
    assert choose_dtype(asked, on_cuda) == chosen
