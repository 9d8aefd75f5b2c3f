"""Which way the products of a block go."""

from typing import Any

import pytest
import torch

from train.lora import products


@pytest.mark.parametrize(
    ("dtype", "capability", "has"),
    [
        (torch.bfloat16, None, False),  # no CUDA device
        (torch.bfloat16, (8, 0), False),
        (torch.bfloat16, (8, 9), False),
        (torch.bfloat16, (9, 0), True),
        (torch.bfloat16, (10, 3), True),
        (torch.bfloat16, (12, 0), False),
        (torch.float16, (9, 0), False),
        (torch.float32, (9, 0), False),
    ],
)
def test_the_grouped_product_is_used_where_torch_has_a_kernel_for_it(
    dtype: torch.dtype, capability: tuple[int, int] | None, has: bool
) -> None:
    assert products.has_grouped_kernel(dtype, capability) == has


@pytest.mark.parametrize("capability", [(9, 0), (9, 4), (9, 5), (10, 0)])  # (9, 4) is an MI300
def test_amds_gpus_have_none_whatever_number_they_are_given(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    assert not products.has_grouped_kernel(torch.bfloat16, capability)


@pytest.mark.parametrize(
    ("dtype", "sizes", "expected"),
    [
        (torch.bfloat16, (16, 24), products.AllExperts),
        (torch.bfloat16, (16, 20), products.OneExpert),  # 40 bytes
        (torch.float32, (16, 20), products.AllExperts),
        (torch.float32, (18, 20), products.OneExpert),  # 72 bytes
    ],
)
def test_the_grouped_product_gets_rows_of_whole_16_bytes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: tuple[int, ...], expected: Any
) -> None:
    x = torch.empty(2, 16, dtype=dtype)
    assert products.way(x, sizes) is products.OneExpert
    monkeypatch.setattr(products, "has_grouped_kernel", lambda dtype, capability: True)
    assert products.way(x, sizes) is expected


def test_the_grouped_product_is_tried_once_and_a_loop_takes_its_place_if_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    products.works.cache_clear()
    assert products.works(torch.device("cpu"))  # torch has a fallback there
    assert not capsys.readouterr().err

    def fails(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    grouped_mm = products.F.grouped_mm

    def of_one_expert(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """Right for equal matrices alone."""
        return grouped_mm(x, weight if weight.dim() == 2 else weight[:1].expand_as(weight).contiguous(), offs=offs)

    def without_a_single_row(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """A kernel that leaves out what fills no tile."""
        out = grouped_mm(x, weight, offs=offs)
        out[: 1 if weight.dim() == 3 else None] *= weight.dim() == 2
        return out

    for stand_in, reason in (
        (fails, "no kernel image is available"),
        (of_one_expert, "other numbers"),
        (without_a_single_row, "other numbers"),
    ):
        products.works.cache_clear()
        monkeypatch.setattr(products.F, "grouped_mm", stand_in)
        monkeypatch.setattr(products, "has_grouped_kernel", lambda dtype, capability: True)
        x = torch.zeros(4, 16, dtype=torch.bfloat16)
        assert products.way(x, (16,)) is products.way(x, (16,)) is products.OneExpert
        told = " ".join(capsys.readouterr().err.split())
        assert told.count("grouped product doesn't work here") == 1
        assert reason in told
    products.works.cache_clear()
