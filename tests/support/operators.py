"""Checks of the operators of `train/lora/elementwise.py` and `train/model/rotary.py` against autograd in float64,
whatever implements them.

    TRITON_INTERPRET=1 python -m tests.support.operators

runs the Triton kernels on the CPU, in Triton's interpreter, which has to be asked for before anything imports Triton.
"""

import importlib
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

from tests.support.experts import routed

TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}
SIZES = (24, 1030)  # less than a kernel's block, and a little more
WIDTHS = (16, 12)  # of heads; half of it is a power of two or not


def _check(ours: torch.Tensor, exact: torch.Tensor | None) -> None:
    assert exact is not None
    assert (ours.cpu().double() - exact).norm() <= TOLERANCES[ours.dtype] * exact.norm()


def check_swiglu(implementation: Any, dtype: torch.dtype, size: int, device: str = "cpu") -> None:
    torch.manual_seed(0)
    both, d = torch.randn(5, 2 * size).to(dtype), torch.randn(5, size).to(dtype)
    exact_both = both.to(torch.float64, copy=True).requires_grad_()
    gate, up = exact_both.chunk(2, dim=-1)
    exact = F.silu(gate) * up
    exact.backward(d.double())
    both, d = both.to(device), d.to(device)
    _check(implementation.swiglu(both), exact.detach())
    _check(implementation.swiglu_backward(both, d), exact_both.grad)
    _check(d, exact.detach())


def check_weighted_sum(
    implementation: Any, dtype: torch.dtype, size: int, weights_dtype: torch.dtype, device: str = "cpu"
) -> None:
    torch.manual_seed(0)
    tokens, k = 7, 2
    row_of_Tk = torch.randperm(tokens * k).view(tokens, k)
    token_P = torch.empty(tokens * k, dtype=torch.int64)
    token_P[row_of_Tk.flatten()] = torch.arange(tokens).repeat_interleave(k)
    weights = routed(tokens, 4)[1].to(weights_dtype)
    y, d = torch.randn(tokens * k, size).to(dtype), torch.randn(tokens, size).to(dtype)
    exact_y, exact_weights = (tensor.to(torch.float64, copy=True).requires_grad_() for tensor in (y, weights))
    exact = (exact_y[row_of_Tk] * exact_weights.unsqueeze(-1)).sum(1)
    exact.backward(d.double())
    exact_plain = y.double()[row_of_Tk].sum(1)
    y, d, row_of_Tk, token_P, weights = (tensor.to(device) for tensor in (y, d, row_of_Tk, token_P, weights))
    _check(implementation.weighted_sum(y, row_of_Tk, weights), exact.detach())
    _check(implementation.weighted_sum(y, row_of_Tk, None), exact_plain)
    d_PH, d_weights = implementation.weighted_sum_backward(d, y, row_of_Tk, token_P, weights)
    _check(d_PH, exact_y.grad)
    _check(d_weights, exact_weights.grad)


def check_rotary(implementation: Any, dtype: torch.dtype, width: int, position_rows: int, device: str = "cpu") -> None:
    """Against transformers', which is of another layout."""
    torch.manual_seed(0)
    rows, length = 2, 5
    q, k, dq, dk = (torch.randn(rows, length, heads, width).to(dtype) for heads in (6, 3, 6, 3))
    angles = torch.randn(position_rows, length, width // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    exact_q, exact_k = (tensor.to(torch.float64, copy=True).requires_grad_() for tensor in (q, k))
    exact = apply_rotary_pos_emb(exact_q, exact_k, cos.double(), sin.double(), unsqueeze_dim=2)
    torch.autograd.backward(exact, (dq.double(), dk.double()))
    q, k, dq, dk, cos, sin = (tensor.to(device) for tensor in (q, k, dq, dk, cos, sin))
    for ours, theirs in zip(implementation.rotary(q, k, cos, sin, False), exact, strict=True):
        _check(ours, theirs.detach())
    for ours, theirs in zip(implementation.rotary(dq, dk, cos, sin, True), (exact_q, exact_k), strict=True):
        _check(ours, theirs.grad)


if __name__ == "__main__":
    kernels = importlib.import_module("train.lora.kernels")
    for dtype, size in itertools.product(TOLERANCES, SIZES):
        check_swiglu(kernels, dtype, size)
        for weights_dtype in {torch.float32, dtype}:
            check_weighted_sum(kernels, dtype, size, weights_dtype)
    for dtype, width, position_rows in itertools.product(TOLERANCES, WIDTHS, (1, 2)):
        check_rotary(kernels, dtype, width, position_rows)
