"""What makes the host wait for a GPU: operations whose answer it needs before it can give out more work."""

import torch

from tests.support.counting import Calls
from tests.support.experts import all_in_one_product
from tests.support.nano import LARGER, LENGTHS, nano_config, packed
from train.model import mixtral
from train.model.loss import Extents, MixtralWithLoss

WAITING = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "unique_consecutive"}
"""Beside copies to the host, which the CPU can't show."""


def test_a_forward_and_backward_ask_for_nothing(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Once the host has looked at the rows; with the ways of GPUs where a CPU has them too."""
    config = nano_config(architecture=LARGER)
    module = MixtralWithLoss(mixtral.build(config).train(), with_router_loss=True)
    batch = packed(torch.randint(3, 400, (sum(LENGTHS),)))
    extents = Extents.of(batch.positions, batch.targets, batch.is_token)
    extents.conversations.blocks()  # flash attention has none
    monkeypatch.setattr("train.model.head.is_on_cpu", lambda tensor: False)
    with all_in_one_product():
        for _ in range(2):
            with Calls() as calls:
                cross_entropy, balance = module(batch.ids, batch.positions, batch.targets, batch.is_token, extents)
                (cross_entropy + balance).backward()
    assert {name for name in WAITING if calls.of[name]} == set()
