"""Which bases are taken: whole ones, of the right kind."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from configs.program.errors import UserError
from tests.support.nano import nano_config
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig
from train.model import mixtral


@pytest.fixture
def base(tmp_path: Path) -> Path:
    mixtral.random_base(nano_config().model).save_pretrained(tmp_path)
    return tmp_path


def load(base: Path) -> None:
    mixtral.pretrained(ModelConfig(path=str(base), dtype="float32"))


def test_a_whole_base_loads(base: Path) -> None:
    load(base)


def test_a_base_that_lacks_a_tensor_is_refused_by_its_name(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        load(base)


def test_a_damaged_file_is_refused(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"model.path={base}: its model.safetensors can.t be read"):
        load(base)


def test_another_kind_of_model_is_refused(base: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    with pytest.raises(UserError, match="it is a llama model"):
        load(base)


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 4096), ("attention_dropout", 0.1)])
def test_packed_attention_refuses_a_base_with_what_it_does_not_know(base: Path, name: str, value: float) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {name: value}))
    with pytest.raises(UserError, match=rf"model\.attention=packed: .* {name} is {value}; use model\.attention=sdpa"):
        load(base)
    mixtral.pretrained(ModelConfig(path=str(base), dtype="float32", attention="sdpa"))


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is here")
@pytest.mark.parametrize("kind", ["stored", "random"])
def test_attention_without_its_package_is_refused(base: Path, kind: str) -> None:
    config = nano_config().model
    config.attention = "flash_attention_2"
    config.path = str(base) if kind == "stored" else None
    with pytest.raises(UserError, match=r"^model\.attention=flash_attention_2: the package for it is not installed"):
        (mixtral.pretrained if kind == "stored" else mixtral.random_base)(config)


def test_weights_in_a_pickle_are_not_opened(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"model.path={base}: its weights are pickled"):
        load(base)


@pytest.mark.parametrize("kind", ["mixtral", "another"])
def test_code_that_comes_with_a_base_is_not_run(base: Path, kind: str) -> None:
    settings = json.loads((base / "config.json").read_text())
    of_its_own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (base / "config.json").write_text(json.dumps(settings | {"model_type": kind, "auto_map": of_its_own}))
    (base / "own.py").write_text(f"from pathlib import Path\nPath({str(base / 'it_ran')!r}).touch()\n")
    with contextlib.nullcontext() if kind == "mixtral" else pytest.raises(UserError, match=f"model.path={base}"):
        load(base)
    assert not (base / "it_ran").exists()


def test_the_defaults_are_mixtral_8x7b() -> None:
    with torch.device("meta"):
        full = mixtral.random_base(ModelConfig())
    assert sum(parameter.numel() for parameter in full.parameters()) == 46_702_792_704


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=32"),
        ({"hidden_size": 100}, "hidden_size=100"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"vocab_size": 1000}, "vocab_size=1000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], field: str) -> None:
    with pytest.raises(UserError, match=f"model.architecture.{field}"):
        TrainConfig(model=ModelConfig(architecture=ArchitectureConfig(**sizes))).check()
