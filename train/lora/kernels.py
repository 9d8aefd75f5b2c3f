"""The Triton kernels behind the operators of `elementwise.py`, a function for each, of the same name; for GPUs.

Each reads what it needs once and writes its results once. Rows are contiguous. A block of columns belongs to a row, so
neither the number of rows nor the routing makes Triton compile anew.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Columns that a program of a kernel takes at once: with its four warps, 16 bytes a thread in half precision."""


def _wide(tensor: torch.Tensor) -> Any:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def swiglu(both: torch.Tensor) -> torch.Tensor:
    rows, size = len(both), both.shape[1] // 2
    out = both.new_empty(rows, size)
    with torch.cuda.device_of(both):
        _swiglu[rows, triton.cdiv(size, BLOCK)](both, out, size, BLOCK, _wide(both))
    return out


@triton.jit
def _swiglu(both, out, size: tl.constexpr, block: tl.constexpr, wide: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    gate = tl.load(both + row * 2 * size + column, inside).to(wide)
    up = tl.load(both + row * 2 * size + size + column, inside).to(wide)
    tl.store(out + row * size + column, gate * tl.sigmoid(gate) * up, inside)


def swiglu_backward(both: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    rows, size = d.shape
    d_both = torch.empty_like(both)
    with torch.cuda.device_of(both):
        _swiglu_backward[rows, triton.cdiv(size, BLOCK)](both, d, d_both, size, BLOCK, _wide(both))
    return d_both


@triton.jit
def _swiglu_backward(both, d, d_both, size: tl.constexpr, block: tl.constexpr, wide: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    gate = tl.load(both + row * 2 * size + column, inside).to(wide)
    up = tl.load(both + row * 2 * size + size + column, inside).to(wide)
    of_out = tl.load(d + row * size + column, inside).to(wide)
    share = tl.sigmoid(gate)
    activated = gate * share
    tl.store(d_both + row * 2 * size + column, of_out * up * (share + activated * (1 - share)), inside)
    tl.store(d_both + row * 2 * size + size + column, of_out * activated, inside)
    tl.store(d + row * size + column, activated * up, inside)


def weighted_sum(y_PH: torch.Tensor, row_of_Tk: torch.Tensor, weights_Tk: torch.Tensor | None) -> torch.Tensor:
    (tokens, k), size = row_of_Tk.shape, y_PH.shape[1]
    out_TH = y_PH.new_empty(tokens, size)
    weighted = weights_Tk is not None
    weights = weights_Tk.contiguous() if weights_Tk is not None else row_of_Tk  # not read without weights
    with torch.cuda.device_of(y_PH):
        grid = (tokens, triton.cdiv(size, BLOCK))
        _weighted_sum[grid](y_PH, row_of_Tk, weights, out_TH, k, size, weighted, BLOCK, _wide(y_PH))
    return out_TH


@triton.jit
def _weighted_sum(
    y,
    row_of,
    weights,
    out,
    k: tl.constexpr,
    size: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    total = tl.zeros([block], wide)
    for choice in tl.static_range(k):
        row = tl.load(row_of + token * k + choice)
        term = tl.load(y + row * size + column, inside).to(wide)
        if weighted:
            term *= tl.load(weights + token * k + choice).to(wide)
        total += term
    tl.store(out + token * size + column, total, inside)


def weighted_sum_backward(
    d_TH: torch.Tensor, y_PH: torch.Tensor, row_of_Tk: torch.Tensor, token_P: torch.Tensor, weights_Tk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    (tokens, k), size = row_of_Tk.shape, y_PH.shape[1]
    assert len(y_PH) == tokens * k  # rows that only fill, which there are on the CPU alone, would not be written
    d_PH, weights = torch.empty_like(y_PH), weights_Tk.contiguous()
    d_weights = torch.empty_like(weights)
    with torch.cuda.device_of(y_PH):
        arguments = (d_TH.contiguous(), y_PH, row_of_Tk, weights, d_PH, d_weights)
        _weighted_sum_backward[(tokens,)](*arguments, k, size, BLOCK, _wide(y_PH))
    return d_PH, d_weights


@triton.jit
def _weighted_sum_backward(
    d,
    y,
    row_of,
    weights,
    d_rows,
    d_weights,
    k: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for choice in tl.static_range(k):
        row = tl.load(row_of + token * k + choice)
        weight = tl.load(weights + token * k + choice).to(wide)
        products = tl.zeros([block], wide)
        for start in range(0, size, block):  # the token's gradient is still in the cache at its second choice
            column = start + tl.arange(0, block)
            inside = column < size
            of_token = tl.load(d + token * size + column, inside, 0.0).to(wide)
            products += of_token * tl.load(y + row * size + column, inside, 0.0).to(wide)
            tl.store(d_rows + row * size + column, weight * of_token, inside)
        tl.store(d_weights + token * k + choice, tl.sum(products))


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    (*positions, width), tokens = cos.shape, q.shape[0] * q.shape[1]
    sizes = (q.shape[2], k.shape[2], width // 2)
    blocks = [triton.next_power_of_2(size) for size in sizes]
    with torch.cuda.device_of(q):
        tensors = (q, k, cos.contiguous(), sin.contiguous(), out_q, out_k)
        _rotary[(tokens,)](*tensors, math.prod(positions), *sizes, *blocks, -1 if back else 1, _wide(q))
    return out_q, out_k


@triton.jit(do_not_specialize=["positions"])
def _rotary(
    q,
    k,
    cos,
    sin,
    out_q,
    out_k,
    positions,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    half: tl.constexpr,
    heads_block: tl.constexpr,
    key_heads_block: tl.constexpr,
    half_block: tl.constexpr,
    way: tl.constexpr,
    wide: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, half_block)
    angles = (token % positions) * 2 * half + column  # rows may share their positions
    of_cos = tl.load(cos + angles, column < half).to(wide)[None, :]
    of_sin = tl.load(sin + angles, column < half).to(wide)[None, :] * way
    _turn(q, out_q, token, of_cos, of_sin, heads, heads_block, half, half_block, wide)
    _turn(k, out_k, token, of_cos, of_sin, key_heads, key_heads_block, half, half_block, wide)


@triton.jit
def _turn(
    x,
    out,
    token,
    cos,
    sin,
    heads: tl.constexpr,
    heads_block: tl.constexpr,
    half: tl.constexpr,
    half_block: tl.constexpr,
    wide: tl.constexpr,
):
    head, column = tl.arange(0, heads_block)[:, None], tl.arange(0, half_block)[None, :]
    inside = (head < heads) & (column < half)
    place = (token * heads + head) * 2 * half + column
    one = tl.load(x + place, inside).to(wide)
    other = tl.load(x + place + half, inside).to(wide)
    tl.store(out + place, one * cos - other * sin, inside)
    tl.store(out + place + half, other * cos + one * sin, inside)
