"""Mixtral's names and matrices in files are the parameters of transformers' model, in both directions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk.mixtral_files import pieces, stored_parts
from data.disk.weights import StoredWeights

CONFIG = MixtralConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=3,
)


@pytest.fixture
def model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(CONFIG)


@pytest.mark.parametrize("original", [True, False], ids=["Mixtral's names", "transformers' names"])
def test_a_piece_is_these_rows_of_this_expert_of_a_parameter(
    model: MixtralForCausalLM, tmp_path: Path, original: bool
) -> None:
    model.save_pretrained(tmp_path, save_original_format=original)
    names_in_file = load_file(tmp_path / "model.safetensors").keys()
    assert ("model.layers.1.block_sparse_moe.experts.2.w3.weight" in names_in_file) == original
    found = pieces(StoredWeights(tmp_path, "base"), CONFIG)
    parameters = dict(model.named_parameters())
    left = {name: parameter.numel() for name, parameter in parameters.items()}
    for piece in found:
        parameter = parameters[piece.parameter]
        matrix = parameter if piece.expert is None else parameter[piece.expert]
        assert torch.equal(piece.read(), matrix[piece.rows])
        left[piece.parameter] -= piece.read().numel()
    assert set(left.values()) == {0}
    stored = [name for name, parameter in parameters.items() for name, _ in stored_parts(name, parameter)]
    assert sorted(piece.stored.name for piece in found) == sorted(stored)


W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
IN_ONE = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        (W1, torch.zeros(16, 24), f"{W1} is missing or of another size"),  # as many numbers, but transposed
        (W1, torch.tensor(1.0), f"{W1} is missing or of another size"),
        (W1, None, f"{W1} is missing or of another size"),
        (W1, torch.zeros(24, 16).to(torch.float8_e4m3fn), f"{W1} is stored as F8_E4M3"),
        (W1.replace("2.w1", "3.w1"), torch.zeros(24, 16), r"experts\.3\.w1\.weight is not one of a Mixtral's"),
        (W1.replace("layers.1", "layers.2"), torch.zeros(24, 16), r"layers\.2\..* is not one of a Mixtral's"),
        (IN_ONE, torch.zeros(3, 16, 24), r"experts\.\d\.w2\.weight is there twice"),
        (IN_ONE, torch.zeros(3, 24), f"{IN_ONE} is missing or of another size"),
        (IN_ONE, torch.zeros(0, 16, 24), f"{IN_ONE} is missing or of another size"),
        (IN_ONE.replace("layers.1", "layers.2"), torch.zeros(3, 24), r"layers\.2\..* is not one of a Mixtral's"),
    ],
)
def test_what_is_no_mixtral_of_these_sizes_is_refused_by_name(
    model: MixtralForCausalLM, tmp_path: Path, name: str, tensor: torch.Tensor | None, told: str
) -> None:
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if tensor is None:
        del stored[name]
    else:
        stored[name] = tensor
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"^base=here: its tensor .*{told}"):
        pieces(StoredWeights(tmp_path, "base=here"), CONFIG)
