"""Any bytes of a base in four bits are those of the whole, quantised; of the files no more is read than they take."""

import copy
import random
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk import nf4
from data.disk.loading import four_bits
from data.disk.loading.four_bits import Slice
from data.disk.loading.layers import QuantisedLinear, quantise
from data.disk.loading.model import load_model, whole_on
from data.disk.loading.parameters import Parameters
from data.disk.weights import StoredWeights
from tests.support.stored import CONFIG

CPU = torch.device("cpu")
BLOCKS = MixtralConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=34,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=3,
)


def saved(directory: Path, **how: object) -> MixtralForCausalLM:
    torch.manual_seed(0)
    model = MixtralForCausalLM._from_config(copy.deepcopy(BLOCKS), dtype=torch.float32)
    model.save_pretrained(directory, **how)
    return model


@pytest.mark.parametrize("how", [{}, {"save_original_format": False}], ids=str)
@pytest.mark.parametrize("at_once", [320, 1 << 20])
def test_a_slice_has_the_bytes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, object], at_once: int
) -> None:
    monkeypatch.setattr(four_bits, "AT_ONCE", at_once)
    model = saved(tmp_path, **how)
    parameters = Parameters(StoredWeights(tmp_path, "base=here"), model.config)
    weights = dict(model.named_parameters())
    matrices = {name: tensor.shape[-2:].numel() for name, tensor in weights.items()}
    quantise(model.bfloat16(), "base=here")
    draw = random.Random(0)
    packed = [(name, tensor.flatten()) for name, tensor in model.named_parameters() if nf4.is_quantised(tensor)]
    assert len(packed) == 6
    for name, whole in packed:
        for start, stop in [(0, len(whole)), *(sorted(draw.choices(range(len(whole) + 1), k=2)) for _ in range(5))]:
            of_slice = Slice(parameters, name, matrices[name], start, torch.zeros(stop - start, dtype=torch.uint8))
            read = sum(of_slice.read(torch.bfloat16, CPU))
            assert torch.equal(of_slice.out, whole[start:stop])
            assert read == of_slice.size <= weights[name].numel() * 4


def test_bytes_take_the_blocks_that_they_are_of(tmp_path: Path) -> None:
    model = saved(tmp_path)
    parameters = Parameters(StoredWeights(tmp_path, "base=here"), model.config)
    name, matrix = "model.layers.0.mlp.experts.down_proj", 32 * 34

    def read(start: int, stop: int) -> int:
        return Slice(parameters, name, matrix, start, torch.zeros(stop - start, dtype=torch.uint8)).size // 4

    assert read(0, 1) == read(0, 32) == 64
    assert read(31, 33) == 128
    scales = matrix // 2
    assert read(scales + 3, scales + 5) == 128
    assert (
        read(nf4.size(matrix) - 1, nf4.size(matrix) + 1) == 128
    )  # the last block of one expert, the first of the next
    assert read(0, nf4.size(matrix)) == matrix  # not once for the weights and once for the scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_loaded_model_is_the_quantised_one(tmp_path: Path, dtype: torch.dtype) -> None:
    architecture = saved(tmp_path).config
    how = {"dtype": dtype, "device": CPU}
    whole = load_model(tmp_path, architecture, "base=here", whole_on(CPU), **how)
    quantise(whole, "base=here")
    held: list[int] = []

    def place(name: str, parameter: torch.Tensor) -> object:
        made = whole_on(CPU)(name, parameter)
        held.append(made[0].nbytes)
        return made

    ours = load_model(tmp_path, architecture, "base=here", place, **how, weights_in="nf4")
    parameters = dict(ours.named_parameters())
    assert all(torch.equal(parameters.pop(name), tensor) for name, tensor in whole.named_parameters())
    assert not parameters
    assert sum(isinstance(module, QuantisedLinear) for module in ours.modules()) == 4
    assert sum(held) == sum(parameter.nbytes for parameter in whole.parameters())  # room for the bytes, and no more
    assert ours.dtype == dtype


def test_sizes_of_no_whole_blocks_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MixtralForCausalLM._from_config(CONFIG, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^base=here: model\.layers\.0\..* nf4 \(\[.* not whole blocks of 64\); use"):
        load_model(tmp_path, CONFIG, "base=here", whole_on(CPU), dtype=torch.float32, device=CPU, weights_in="nf4")
