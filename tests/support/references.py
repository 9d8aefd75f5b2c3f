"""What attention, head and norm are compared with, on the CPU and on CUDA."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from train.model import norm
from train.model.head import CrossEntropyHead

NORM_TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}


def positions_of(lengths: list[int]) -> torch.Tensor:
    """[T] positions that begin again with each conversation."""
    return torch.cat([torch.arange(length) for length in lengths])


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """[1, T, N, D] by scaled_dot_product_attention with the [T, T] mask of the conversations."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (number[:, None] == number[None]).tril()
    group = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3).transpose(1, 2)


def chunked(hidden: torch.Tensor, weight: nn.Parameter, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies, by the head that works in chunks."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = weight
    return CrossEntropyHead(linear)(hidden, targets)


def whole(hidden: torch.Tensor, weight: nn.Parameter, targets: torch.Tensor) -> torch.Tensor:
    """The same, by torch from all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")


def check_norm(dtype: torch.dtype, trains: bool, device: str) -> None:
    """Asserts that the norm and its gradients are transformers', computed in float64."""
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
        assert (a.double() - b).norm() <= NORM_TOLERANCES[dtype] * b.norm()
        assert a.dtype == dtype


def exactly(module: MixtralRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """transformers', without its rounding to float32."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
