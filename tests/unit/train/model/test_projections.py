"""Attention's projections against PEFT's own modules, and against float64."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from data.disk import nf4
from data.disk.loading.layers import QuantisedLinear
from tests.support.nano import nano_config
from train.lora import attach
from train.model import mixtral, projections

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}
TOKENS = 40


def attention(dtype: torch.dtype, **lora: Any) -> tuple[projections.Attention, dict[str, Any]]:
    """That of a layer, with adapters that are not zero, and what it is called with beside its input."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = mixtral.build(nano_config(architecture=sizes, **lora)).to(dtype).train()
    for _, factor in attach.trainable(model):
        nn.init.normal_(factor, std=0.2)
    positions = torch.arange(TOKENS)[None]
    angles = model.model.rotary_emb(torch.empty(0, dtype=dtype), positions)
    module = model.model.layers[0].self_attn
    assert type(module) is projections.Attention
    return module, {"position_embeddings": angles, "attention_mask": None, "position_ids": positions}


def results(module: nn.Module, x: torch.Tensor, others: dict[str, Any]) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of all that trains."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # for dropout
    out, _ = module(x, **others)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters() if parameter.requires_grad)]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def stock(module: projections.Attention) -> nn.Module:
    """transformers' attention, which calls PEFT's modules."""
    theirs = copy.deepcopy(module)
    theirs.__class__ = MixtralAttention
    return theirs


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


CASES = {
    "all": {},
    "dropout": {"dropout": 0.4},
    "some": {"attention": ["q_proj", "v_proj"]},
    "some-dropout": {"attention": ["k_proj", "o_proj"], "dropout": 0.4},
    "rank-stabilised": {"rank_stabilised": True, "rank": 3},
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lora", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_pefts_modules(dtype: torch.dtype, lora: dict[str, Any]) -> None:
    module, others = attention(dtype, **lora)
    x = torch.randn(1, TOKENS, 64, dtype=dtype)
    ours, theirs = results(copy.deepcopy(module), x, others), results(stock(module), x, others)
    assert len(ours) == 2 + 2 * len(lora.get("attention", ["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert max(map(relative, ours, theirs)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES)
def test_in_bfloat16_less_is_rounded_than_by_pefts_modules(lora: dict[str, Any]) -> None:
    module, others = attention(torch.bfloat16, **lora)
    x = torch.randn(1, TOKENS, 64, dtype=torch.bfloat16)
    wide = others | {"position_embeddings": tuple(angles.double() for angles in others["position_embeddings"])}
    exact = results(stock(module).double(), x.double(), wide)
    ours, theirs = (results(one, x, others) for one in (copy.deepcopy(module), stock(module)))
    assert all(one.dtype == torch.bfloat16 for one in ours)
    errors = [[relative(a, b) for a, b in zip(each, exact, strict=True)] for each in (ours, theirs)]
    assert max(errors[0]) <= 2**-4
    assert sum(errors[0]) <= sum(errors[1])


@pytest.mark.parametrize("lora", [{}, {"method": "none"}, {"dropout": 0.4}], ids=["frozen", "trained", "evaluated"])
def test_what_trains_gets_its_gradient_and_evaluation_drops_nothing(lora: dict[str, Any]) -> None:
    if lora.get("method") == "none":
        module, others = attention(torch.float64, **lora)
        assert all(parameter.requires_grad for parameter in module.parameters())
    else:
        module, others = attention(torch.float64, **lora)
        module.eval()
    x = torch.randn(1, TOKENS, 64, dtype=torch.float64)
    ours, theirs = results(copy.deepcopy(module), x, others), results(stock(module), x, others)
    assert max(map(relative, ours, theirs)) <= 1e-12


def test_gradients_by_differences() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (2, 4), (6, 2), (3, 4), (1, 4), (3, 1))]
    x, dropped = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def project(x: torch.Tensor, dropped: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one, other = (*factors[:3], None), (*factors[3:], dropped)
        out: tuple[torch.Tensor, ...] = projections._Projections.apply([(6, 4), (3, 4)], [2.0, 0.5], x, *one, *other)
        return out

    for number in range(2):  # all train; and the weights are frozen
        factors = [tensor.requires_grad_(number == 0 or index % 3 > 0) for index, tensor in enumerate(tensors)]
        assert torch.autograd.gradcheck(project, (x, dropped, *factors))
    assert torch.autograd.gradcheck(project, (x.detach(), dropped.detach(), *factors))


def test_a_base_in_four_bits_gives_what_its_layers_give() -> None:
    pytest.importorskip("bitsandbytes")
    module, others = attention(torch.float32)
    for name in "qkvo":
        base = module.get_submodule(f"{name}_proj.base_layer")
        base.__class__, content = QuantisedLinear, nf4.quantised(base.weight.detach())
        base.weight = nn.Parameter(content, requires_grad=False)
    x = torch.randn(1, TOKENS, 64)
    ours, theirs = results(copy.deepcopy(module), x, others), results(stock(module), x, others)
    assert max(map(relative, ours, theirs)) <= 2e-6


def test_what_is_kept_of_parameters_is_the_parameters() -> None:
    """A view or a copy of one would keep what ZeRO-3 gathered."""
    module, _ = attention(torch.float32)
    x = torch.randn(TOKENS, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = projections.project(x, (module.q_proj, module.k_proj, module.v_proj))
    assert len(y) == 3
    own = {parameter.data_ptr() for parameter in module.parameters()}
    of_parameters = [tensor for tensor in kept if tensor.data_ptr() in own]
    assert len(of_parameters) == 9
    assert all(isinstance(tensor, nn.Parameter) for tensor in of_parameters)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + TOKENS * 3 * 4 + sum(p.numel() for p in of_parameters)
