"""Adapters on a whole model."""

import copy

import pytest
import torch
from torch import nn

from tests.support.nano import nano_config
from train.lora import attach
from train.model import mixtral


def test_a_fresh_adapter_changes_nothing() -> None:
    torch.manual_seed(0)
    config = nano_config()
    plain = mixtral.random_base(config.model).eval()
    adapted = copy.deepcopy(plain)
    attach.add_adapters(adapted, config.lora)
    ids = torch.randint(3, 500, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_trains_has_the_dtype_of_the_base(dtype: str) -> None:
    """Mixed dtypes fail under ZeRO-3; float32 masters are DeepSpeed's."""
    config = nano_config(router="trained")
    config.model.dtype = dtype
    adapted = mixtral.random_base(config.model)
    attach.add_adapters(adapted, config.lora)
    assert {parameter.dtype for parameter in adapted.parameters()} == {getattr(torch, dtype)}


def test_dropout_is_the_same_when_activations_are_computed_again() -> None:
    config = nano_config(dropout=0.5)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = mixtral.random_base(config.model).train()
        attach.add_adapters(adapted, config.lora)
        for _, factor in attach.trainable(adapted):
            nn.init.normal_(factor, std=0.2)
        if checkpointing:
            adapted.activation_checkpointing_enable({"use_reentrant": False})
        ids = torch.randint(3, 500, (2, 25))
        torch.manual_seed(1)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: factor.grad for name, factor in attach.trainable(adapted)})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
