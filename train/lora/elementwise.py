"""What a block computes element by element, as operators of torch (`torch.ops.openhermes`), on CUDA one kernel each.

On the CPU they are plain torch, whose passes find a group's rows in the caches. On a GPU every pass goes through the
memory, and in plain torch these passes would take as long as half of the matrix products. So there an operator is a
Triton kernel, of `kernels.py`. Triton comes with torch's builds for GPUs, and needs a C compiler; if it doesn't work,
the operators are plain torch there too.

Shapes: T tokens, k experts per token, P rows (token-expert pairs sorted by expert, and filling), H hidden, I
intermediate. Sums and products are in float32 at least, whatever is read and written.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from configs.program.errors import one_line, say

_library = torch.library.Library("openhermes", "FRAGMENT")


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def operator(
    schema: str, *, shapes: Callable[..., Any], on_cuda: Callable[..., Any] | None = None
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Makes an operator of a function in plain torch; autograd knows nothing of it.

    Args:
        schema: its arguments and results.
        shapes: gives the results on the meta device.
        on_cuda: stands in for plain torch on CUDA; the function of the same name in `kernels.py` unless given.
    """

    def define(plain: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        name = plain.__name__

        def in_triton(*arguments: Any) -> Any:
            kernels = _kernels()
            function: Callable[..., Any] = plain if kernels is None else getattr(kernels, name)
            return function(*arguments)

        _library.define(name + schema)
        for device, function in (("CPU", plain), ("Meta", shapes), ("CUDA", on_cuda or in_triton)):
            _library.impl(name, function, device)
        made: Callable[Arguments, Result] = getattr(torch.ops.openhermes, name)
        return made

    return define


@functools.cache
def _kernels() -> Any:
    """The module `kernels`, once one of them has run on this GPU; None if none can."""
    try:
        from train.lora import kernels

        kernels.swiglu(torch.zeros(1, 16, device="cuda"))
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, a linker or a driver makes of it
        say("train", f"Triton doesn't work here ({one_line(error)}); training goes on without its kernels, more slowly")
        return None
    return kernels


def wide(dtype: torch.dtype) -> torch.dtype:
    """That of sums and products."""
    return torch.promote_types(dtype, torch.float32)


@operator("(Tensor both) -> Tensor", shapes=lambda both: both.new_empty(len(both), both.shape[1] // 2))
def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, [rows, I], of [rows, 2I]."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@operator("(Tensor both, Tensor(a!) d) -> Tensor", shapes=lambda both, d: torch.empty_like(both))
def swiglu_backward(both: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """The gradient of gate and up, [rows, 2I], for the gradient d of `swiglu`, [rows, I]; d then holds the output of
    `swiglu`, which is needed next, and else would be one more tensor."""
    d_both = torch.empty_like(both)
    (gate, up), (d_gate, d_up) = both.chunk(2, dim=-1), d_both.chunk(2, dim=-1)
    activated = F.silu(gate)
    torch.mul(d, activated, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=d_gate)
    torch.mul(activated, up, out=d)
    return d_both


def _of_tokens(y_PH: torch.Tensor, row_of_Tk: torch.Tensor, weights_Tk: torch.Tensor | None) -> torch.Tensor:
    return y_PH.new_empty(len(row_of_Tk), y_PH.shape[1])


@operator("(Tensor y_PH, Tensor row_of_Tk, Tensor? weights_Tk) -> Tensor", shapes=_of_tokens)
def weighted_sum(y_PH: torch.Tensor, row_of_Tk: torch.Tensor, weights_Tk: torch.Tensor | None) -> torch.Tensor:
    """[T, H], for each token its rows times their weights, or without weights. They are added in the order of the
    token's choices, so every run gives the same bits; scattering with atomic additions would not on CUDA."""
    # index_select copies whole rows, where y[rows] goes element by element, slower on the CPU
    choices = (y_PH.index_select(0, row_T) for row_T in row_of_Tk.unbind(1))
    if weights_Tk is None:
        terms = (y_TH.to(wide(y_TH.dtype)) for y_TH in choices)
    else:
        terms = (y_TH * weight_T1 for y_TH, weight_T1 in zip(choices, weights_Tk.unsqueeze(-1).unbind(1), strict=True))
    return functools.reduce(torch.add, terms).to(y_PH.dtype)


@operator(
    "(Tensor d_TH, Tensor y_PH, Tensor row_of_Tk, Tensor token_P, Tensor weights_Tk) -> (Tensor, Tensor)",
    shapes=lambda d, y, row_of, token, weights: (torch.empty_like(y), torch.empty_like(weights)),
)
def weighted_sum_backward(
    d_TH: torch.Tensor, y_PH: torch.Tensor, row_of_Tk: torch.Tensor, token_P: torch.Tensor, weights_Tk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the rows, [P, H], and of the weights, [T, k], for the gradient of `weighted_sum`."""
    d_wide_TH = d_TH.to(wide(d_TH.dtype))
    of_weights = [(d_wide_TH * y_PH.index_select(0, row_T)).sum(dim=-1) for row_T in row_of_Tk.unbind(1)]
    weight_P = weights_Tk.new_zeros(len(token_P))  # 0 where a row only fills
    weight_P[row_of_Tk] = weights_Tk
    d_PH = (d_TH.index_select(0, token_P) * weight_P.unsqueeze(-1)).to(y_PH.dtype)
    return d_PH, torch.stack(of_weights, dim=1).to(weights_Tk.dtype)
