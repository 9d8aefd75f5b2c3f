"""The operators of a block against autograd in float64: in plain torch, and as the Triton kernels of GPUs, which
Triton's interpreter runs on the CPU. Where Triton is, they are also compiled for the GPUs that training is for."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.operators import SIZES, TOLERANCES, check_swiglu, check_weighted_sum
from train.lora import elementwise


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", SIZES)
def test_swiglu_and_its_backward(dtype: torch.dtype, size: int) -> None:
    check_swiglu(elementwise, dtype, size)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_the_weighted_sum_of_tokens_rows_and_its_backward(
    dtype: torch.dtype, size: int, weights_dtype: torch.dtype
) -> None:
    check_weighted_sum(elementwise, dtype, size, weights_dtype)


def test_the_kernels_give_the_same_in_tritons_interpreter(project_root: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.support.operators"]
    done = subprocess.run(
        command,
        cwd=project_root,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


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

    from train.lora import kernels

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # it asks for one or the other
    wide = kernels._wide(torch.empty(0, dtype=dtype))
    given: dict[str, Any] = {"k": 2, "size": 14336, "weighted": True, "block": kernels.BLOCK, "wide": wide}
    given |= {"heads": 32, "key_heads": 8, "half": 64, "heads_block": 32, "key_heads_block": 8, "half_block": 64}
    given |= {"way": -1}
    of_both = (kernels._swiglu, kernels._swiglu_backward, kernels._rotary)
    for kernel in (*of_both, kernels._weighted_sum, kernels._weighted_sum_backward):
        names = kernel.arg_names
        types = {"row_of": "*i64", "weights": "*fp32", "d_weights": "*fp32", "positions": "i32"}
        signature = {name: "constexpr" if name in given else types.get(name, f"*{TYPES[dtype]}") for name in names}
        constants = {name: given[name] for name in names if name in given}
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"], kernel
