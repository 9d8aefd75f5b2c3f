"""RMSNorm against transformers' own."""

import copy
import functools

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from tests.support.nano import nano
from train.model import norm

TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_norm_and_its_gradients_are_transformers(dtype: torch.dtype, trains: bool) -> None:
    check_norm(dtype, trains, "cpu")


def check_norm(dtype: torch.dtype, trains: bool, device: str) -> None:
    torch.manual_seed(0)
    theirs = MixtralRMSNorm(48, eps=1e-2)
    torch.nn.init.normal_(theirs.weight)
    theirs.to(dtype).requires_grad_(trains)
    exact = copy.deepcopy(theirs).double()
    x, d = torch.randn(2, 9, 48).to(dtype), torch.randn(2, 9, 48).to(dtype)
    ours = torch.nn.Sequential(theirs).to(device)
    norm.replace(ours)
    assert type(theirs) is norm.RMSNorm
    results = []
    for forward, module, where in ((ours, ours, device), (functools.partial(exactly, exact), exact, "cpu")):
        given = x.to(where, next(module.parameters()).dtype, copy=True).requires_grad_()
        out = forward(given)
        out.backward(d.to(out))
        found = [out, given.grad, *(parameter.grad for parameter in module.parameters() if trains)]
        results.append([tensor.detach().cpu() for tensor in found if tensor is not None])
    assert len(results[0]) == 2 + trains
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).norm() <= TOLERANCES[dtype] * b.norm()
        assert a.dtype == dtype


def exactly(module: MixtralRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """transformers', without its rounding to float32."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def test_all_norms_of_a_model_are_replaced_and_keep_their_names() -> None:
    built = nano("float32")
    norms = {name: module for name, module in built.named_modules() if isinstance(module, MixtralRMSNorm)}
    assert len(norms) == 2 * 2 + 1
    assert all(type(module) is norm.RMSNorm for module in norms.values())
    assert {f"{name}.weight" for name in norms} <= built.state_dict().keys()
