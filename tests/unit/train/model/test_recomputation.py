"""Whatever is computed again in the backward, the gradients are the same, and the experts' half is where told."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils import checkpoint
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from configs.program.errors import UserError
from tests.support.nano import nano_config
from train.config.train import TrainConfig
from train.lora import attach
from train.model import mixtral


def gradients(what: str, dropout: float) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Of a forward and a backward, and how often routers and attention ran."""
    config = nano_config(dropout=dropout)
    config.activation_checkpointing = what
    torch.manual_seed(0)
    adapted = mixtral.build(config).train()
    for _, factor in attach.trainable(adapted):
        nn.init.normal_(factor, std=0.2)
    ran: Counter[str] = Counter()
    for name, module in adapted.named_modules():
        if isinstance(module, MixtralTopKRouter) or name.endswith("self_attn"):
            module.register_forward_pre_hook(lambda module, _: ran.update([type(module).__name__]))
    ids = torch.randint(3, 500, (2, 25))
    torch.manual_seed(1)
    out = adapted(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
    assert len(out.router_logits) == 2
    out.loss.backward()
    return {name: factor.grad for name, factor in attach.trainable(adapted)}, ran


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("what", ["attention", "full"])
def test_gradients_are_those_without_recomputation(what: str, dropout: float) -> None:
    kept, ran_once = gradients("none", dropout)
    ours, ran = gradients(what, dropout)
    assert ran_once == {"MixtralTopKRouter": 2, "Attention": 2}
    assert ran == {"MixtralTopKRouter": 4 if what == "full" else 2, "Attention": 4}
    for name, gradient in kept.items():
        assert torch.equal(ours[name], gradient), name


@pytest.mark.parametrize("what", ["attention", "full"])
def test_random_states_are_kept_only_where_something_is_drawn(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the host waits for each."""
    kept = []
    monkeypatch.setattr(checkpoint, "get_device_states", lambda *given: kept.append(1) or ([], []))
    monkeypatch.setattr(torch, "get_rng_state", lambda get=torch.get_rng_state: kept.append(1) or get())
    gradients(what, 0.0)
    assert not kept
    gradients(what, 0.5)
    assert kept


def test_in_evaluation_nothing_changes() -> None:
    config = nano_config()
    outputs = []
    for what in ("none", "attention"):
        config.activation_checkpointing = what
        ids = torch.randint(3, 500, (1, 30), generator=torch.Generator().manual_seed(1))
        outputs.append(mixtral.build(config).eval()(ids).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("given", "meant"),
    [(True, "full"), (False, "none"), ("True", "full"), ("false", "none"), ("attention", "attention")],
)
def test_true_and_false_are_still_understood(given: str, meant: str) -> None:
    assert TrainConfig(activation_checkpointing=given).activation_checkpointing == meant


def test_another_word_is_refused() -> None:
    with pytest.raises(UserError, match=r"^activation_checkpointing=experts: there is no such choice"):
        TrainConfig(activation_checkpointing="experts").check()
