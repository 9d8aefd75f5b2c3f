"""Rotary embedding against transformers' in float64."""

import pytest
import torch

from tests.support.operators import TOLERANCES, WIDTHS, check_rotary
from train.model import rotary


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("position_rows", [1, 2])
def test_queries_and_keys_are_turned_as_transformers_turns_them(
    dtype: torch.dtype, width: int, position_rows: int
) -> None:
    check_rotary(rotary, dtype, width, position_rows)


def test_the_gradient_is_the_turn_back() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    angles = torch.randn(1, 3, 4, dtype=torch.float64).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(rotary.rotate, (q, k, angles.cos(), angles.sin()))


def test_on_the_meta_device_results_have_the_same_shapes() -> None:
    q, k, angles = torch.empty(2, 3, 4, 8), torch.empty(2, 3, 2, 8), torch.empty(1, 3, 8)
    here = rotary.rotary(q, k, angles, angles, False)
    there = rotary.rotary(*(tensor.to("meta") for tensor in (q, k, angles, angles)), False)
    assert [(one.shape, one.dtype) for one in here] == [(one.shape, one.dtype) for one in there]
