"""Four bits: the numbers are those of the paper's sixteen, and the bytes as many as they have to be."""

import pytest
import torch

from configs.program.errors import UserError
from data.disk import nf4

# the sixteen values of appendix E of arXiv:2305.14314, rounded to float32
VALUES = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=torch.float64,
)


def nearest(matrix: torch.Tensor) -> torch.Tensor:
    """Each number's nearest of the sixteen, times the largest of its block: in float64."""
    blocks = matrix.double().view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    indices = (blocks / largest).unsqueeze(-1).sub(VALUES).abs().argmin(-1)
    return (VALUES[indices] * largest).view(matrix.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_becomes_the_nearest_value(dtype: torch.dtype) -> None:
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    content = nf4.quantised(matrix)
    assert content.dtype == torch.uint8
    assert content.shape == (nf4.size(matrix.numel()),)
    assert content.nbytes * 8 / matrix.numel() == 4.5
    exact = nearest(matrix)
    held = nf4.dequantised(content, matrix.shape, torch.float32)
    assert torch.allclose(held.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(nf4.dequantised(content, matrix.shape, torch.bfloat16), held.bfloat16())


def test_bytes_are_read_wherever_they_begin() -> None:
    """What ZeRO gathers need not begin at a multiple of four bytes."""
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    content = nf4.quantised(matrix)
    shifted = torch.cat([content[:1], content])[1:]
    assert shifted.storage_offset() == 1
    held = nf4.dequantised(content, matrix.shape, torch.float32)
    assert torch.equal(nf4.dequantised(shifted, matrix.shape, torch.float32), held)


def test_a_part_of_whole_blocks_is_quantised_as_within_the_whole() -> None:
    matrix = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    content, shape = nf4.quantised(matrix), torch.Size([2, 64])
    for part, rows in ((nf4.quantised(rows), rows) for rows in matrix.split(2)):
        held = nf4.dequantised(part, shape, torch.float32)
        whole = nf4.dequantised(content, matrix.shape, torch.float32)
        assert any(torch.equal(held, piece) for piece in whole.split(2)), rows


def test_what_is_no_whole_block_is_refused() -> None:
    with pytest.raises(ValueError, match="not whole blocks of 64"):
        nf4.quantised(torch.zeros(3, 5))


def test_without_bitsandbytes_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^model\.weights=nf4: it takes bitsandbytes, .*\[nf4\]"):
        nf4.check_available("model.weights=nf4")


def test_without_kernels_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(matrix: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("Could not run 'bitsandbytes::quantize_4bit'\nand much more")

    nf4.check_kernels("model.weights=nf4", torch.device("cpu"))
    monkeypatch.setattr(nf4, "quantised", no_kernel)
    with pytest.raises(UserError, match=r"^model\.weights=nf4: .* work on this cpu .*; use bf16$"):
        nf4.check_kernels("model.weights=nf4", torch.device("cpu"))
