"""Any slice of any parameter, whatever the files call it and whatever their dtype."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from configs.program.errors import UserError
from data.disk.loading import parameters
from data.disk.loading.parameters import Parameters
from data.disk.weights import StoredWeights
from tests.support.stored import CONFIG, saved


def of(directory: Path) -> Parameters:
    return Parameters(StoredWeights(directory, "base=here"), CONFIG)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("how", [{}, {"save_original_format": False}, {"max_shard_size": "4KB"}], ids=str)
def test_a_slice_is_these_numbers_of_the_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, how: dict[str, object]
) -> None:
    model = saved(tmp_path, dtype, **how)
    found = of(tmp_path)
    draw = random.Random(0)
    for block in (40, 1 << 20):  # blocks that end within a matrix, and that are larger than any
        monkeypatch.setattr(parameters, "BLOCK", block)
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            for _ in range(4):
                start, stop = sorted(draw.choices(range(len(flat) + 1), k=2))
                for into in (dtype, torch.float32, torch.bfloat16):
                    out = torch.full((stop - start,), torch.nan, dtype=into)
                    sizes = list(found.read(name, start, out))
                    assert torch.equal(out, flat[start:stop].to(into))
                    assert sum(sizes) == (stop - start) * dtype.itemsize == found.size(name, start, stop)
                    assert max(sizes, default=0) <= block
                blocks = [(at, held.clone()) for at, held in found.blocks(name, start, stop)]
                assert torch.equal(torch.cat([held for _, held in blocks] or [flat[:0]]), flat[start:stop])
                assert all(torch.equal(held, flat[at : at + len(held)]) for at, held in blocks)


def test_a_tensor_by_two_names_is_refused_and_one_of_no_mixtral_is_left_out(tmp_path: Path) -> None:
    saved(tmp_path, torch.float32)
    file = tmp_path / "model.safetensors"
    stored = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(stored, file, metadata={"format": "pt"})
    of(tmp_path)
    stored["model.layers.1.mlp.experts.down_proj"] = torch.zeros(3, 16, 23)
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^base=here: its tensor .*experts\.\d\.w2\.weight is there twice"):
        of(tmp_path)


def test_a_file_that_is_cut_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    saved(tmp_path, torch.float32)
    found = of(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)

    def read() -> None:
        for name, parameter in MixtralForCausalLM(CONFIG).named_parameters():
            list(found.read(name, 0, torch.empty(parameter.numel())))

    with pytest.raises(UserError, match=r"^base=here: its model\.safetensors can't be read \(it has become shorter\)"):
        read()
    file.unlink()
    with pytest.raises(UserError, match=r"^base=here: its model\.safetensors can't be read \(No such file"):
        read()
