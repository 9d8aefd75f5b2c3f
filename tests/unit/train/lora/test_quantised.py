"""Training on a base in four bits is training on a base that holds the dequantised weights, to the last bit."""

import copy

import pytest
import torch
from transformers import MixtralForCausalLM

from configs.program.errors import UserError
from data.disk.loading.layers import quantise
from tests.support.experts import all_in_one_product
from tests.support.nano import LENGTHS, NANO, losses, packed
from tests.support.quantised import pair
from train.config.lora import EXPERT_TARGETS
from train.config.model import ArchitectureConfig, ModelConfig
from train.lora import attach
from train.model import mixtral
from train.model.loss import MixtralWithLoss

ROW = packed(torch.randint(3, 400, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)))


def numbers(model: MixtralForCausalLM) -> dict[str, torch.Tensor]:
    """The losses of a row, and every gradient of them."""
    torch.manual_seed(0)
    module = MixtralWithLoss(model.train(), with_router_loss=True)
    cross_entropy, balance = losses(module, ROW)
    (cross_entropy / 50 + balance).backward()
    gradients = {name: parameter.grad for name, parameter in attach.trainable(model)}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    return {"cross-entropy": cross_entropy, "balance": balance, **gradients}


def assert_the_same(models: tuple[MixtralForCausalLM, MixtralForCausalLM]) -> None:
    of_quantised, of_whole = (numbers(model) for model in models)
    assert of_quantised.keys() == of_whole.keys()
    assert len(of_whole) > 20
    for name, number in of_whole.items():
        assert torch.equal(of_quantised[name], number), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_losses_and_gradients_are_those_of_the_dequantised_base(dtype: str, checkpointing: str) -> None:
    assert_the_same(pair(dtype, checkpointing))


def test_dropout_and_trained_routers_too() -> None:
    assert_the_same(pair("float32", dropout=0.2, router="trained"))


def test_all_experts_in_one_product_too() -> None:
    with all_in_one_product():
        assert_the_same(pair("bfloat16"))


def test_what_is_quantised_is_attention_and_experts_and_nothing_else() -> None:
    quantised, _ = pair("bfloat16")
    held = {name for name, parameter in quantised.named_parameters() if parameter.dtype == torch.uint8}
    attention = {f"self_attn.{letter}_proj.base_layer.weight" for letter in "qkvo"}
    experts = {f"mlp.experts.{projection}" for projection in EXPERT_TARGETS}
    assert held == {f"model.layers.{layer}.{name}" for layer in range(2) for name in attention | experts}
    assert not any(quantised.get_parameter(name).requires_grad for name in held)


def test_nothing_dequantised_is_kept_for_the_backward() -> None:
    quantised, whole = pair("float32")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses(MixtralWithLoss(quantised.train(), with_router_loss=False), ROW)
    held = {name for name, parameter in quantised.named_parameters() if parameter.dtype == torch.uint8}
    of_base = [whole.get_parameter(name) for name in held]
    matrices = {values(matrix) for weight in of_base for matrix in (weight, *(weight if weight.dim() == 3 else ()))}
    packed_ones = {tensor.data_ptr() for tensor in kept if tensor.dtype == torch.uint8}
    assert len(packed_ones) == len(held)
    assert not [tensor.shape for tensor in kept if tensor.is_floating_point() and values(tensor) in matrices]


def values(tensor: torch.Tensor) -> tuple[int, float, float]:
    """The same for two tensors with the same numbers, however they are laid out."""
    exact = tensor.detach().double()
    return tensor.numel(), float(exact.min()), float(f"{float(exact.square().sum()):.10g}")


def test_mixtral_8x7b_takes_less_than_27_gb() -> None:
    with torch.device("meta"):
        model = mixtral.random_base(ModelConfig())
        before = sum(parameter.nbytes for parameter in model.parameters())
        quantise(copy.copy(model), "model.weights=nf4")
    after = sum(parameter.nbytes for parameter in model.parameters())
    assert after < 27e9
    assert after / before < 0.29


def test_sizes_of_no_whole_blocks_are_refused_by_name() -> None:
    odd = {"hidden_size": 12, "intermediate_size": 5, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = ArchitectureConfig(**(NANO | odd))
    with pytest.raises(UserError, match=r"^model\.weights=nf4: model\.layers\.0\..* not whole blocks of 64\); use"):
        quantise(mixtral.random_base(ModelConfig(architecture=sizes)), "model.weights=nf4")
