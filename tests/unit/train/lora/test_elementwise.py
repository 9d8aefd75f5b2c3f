"""The operators of a block against autograd in float64: in plain torch, and as the Triton kernels of GPUs, which
Triton's interpreter runs on the CPU. Where Triton is, they are also compiled for the GPUs that training is for."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.experts import routed
from train.lora import elementwise

TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module with the functions."""
    if request.param == "torch":
        yield elementwise
        return
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield imported_anew("train.lora.kernels")
    sys.modules.pop("train.lora.kernels", None)


def imported_anew(name: str) -> ModuleType:
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def near(ours: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((ours.double() - exact).norm() <= TOLERANCES[ours.dtype] * exact.norm())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [24, 1030])  # less than a kernel's block, and a little more
def test_swiglu_and_its_backward(implementation: Any, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    both, d = torch.randn(5, 2 * size).to(dtype), torch.randn(5, size).to(dtype)
    exact_both = both.to(torch.float64, copy=True).requires_grad_()
    gate, up = exact_both.chunk(2, dim=-1)
    exact = F.silu(gate) * up
    exact.backward(d.double())
    assert exact_both.grad is not None
    assert near(implementation.swiglu(both), exact.detach())
    assert near(implementation.swiglu_backward(both, d), exact_both.grad)
    assert near(d, exact.detach())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [24, 1030])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_the_weighted_sum_of_tokens_rows_and_its_backward(
    implementation: Any, dtype: torch.dtype, size: int, weights_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens, k = 7, 2
    row_of_Tk = torch.randperm(tokens * k).view(tokens, k)
    token_P = torch.empty(tokens * k, dtype=torch.int64)
    token_P[row_of_Tk.flatten()] = torch.arange(tokens).repeat_interleave(k)
    _, weights = routed(tokens, 4)
    weights = weights.to(weights_dtype)
    y, d = torch.randn(tokens * k, size).to(dtype), torch.randn(tokens, size).to(dtype)
    exact_y, exact_weights = (t.to(torch.float64, copy=True).requires_grad_() for t in (y, weights))
    exact = (exact_y[row_of_Tk] * exact_weights.unsqueeze(-1)).sum(1)
    exact.backward(d.double())
    assert near(implementation.weighted_sum(y, row_of_Tk, weights), exact.detach())
    assert near(implementation.weighted_sum(y, row_of_Tk, None), y.double()[row_of_Tk].sum(1))
    found = implementation.weighted_sum_backward(d, y, row_of_Tk, token_P, weights)
    for ours, theirs in zip(found, (exact_y.grad, exact_weights.grad), strict=True):
        assert theirs is not None
        assert near(ours, theirs)


def test_on_the_meta_device_results_have_the_same_shapes() -> None:
    """By which traffic is counted."""
    both, d = torch.randn(6, 8).bfloat16(), torch.randn(6, 4).bfloat16()
    row_of_Tk, token_P = torch.arange(6).view(3, 2), torch.arange(6) // 2
    y, d_TH, weights = torch.randn(6, 5), torch.randn(3, 5), torch.rand(3, 2)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (elementwise.swiglu, (both,)),
        (elementwise.swiglu_backward, (both, d)),
        (elementwise.weighted_sum, (y, row_of_Tk, weights)),
        (elementwise.weighted_sum, (y, row_of_Tk, None)),
        (elementwise.weighted_sum_backward, (d_TH, y, row_of_Tk, token_P, weights)),
    ]
    for operator, arguments in calls:
        here = operator(*arguments)
        there = operator(*(None if argument is None else argument.to("meta") for argument in arguments))
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (here, there)), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_where_triton_does_not_work_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "train.lora.kernels", None)
    elementwise._kernels.cache_clear()
    try:
        assert elementwise._kernels() is None
        assert elementwise._kernels() is None
    finally:
        elementwise._kernels.cache_clear()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("train: Triton doesn't work here (")


TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_compile_for_the_gpus_that_training_is_for(
    monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype
) -> None:
    """To the GPU's own code at Mixtral's size, without one; it was not run."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels: Any = imported_anew("train.lora.kernels")
    wide = kernels._wide(torch.empty(0, dtype=dtype))
    given = {"k": 2, "size": 14336, "weighted": True, "block": kernels.BLOCK, "wide": wide}
    for kernel in (kernels._swiglu, kernels._swiglu_backward, kernels._weighted_sum, kernels._weighted_sum_backward):
        names = kernel.arg_names
        types = {"row_of": "*i64", "weights": "*fp32", "d_weights": "*fp32"}
        signature = {name: "constexpr" if name in given else types.get(name, f"*{TYPES[dtype]}") for name in names}
        constants = {name: given[name] for name in names if name in given}
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"], kernel
