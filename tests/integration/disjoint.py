"""Training in which the routers of each process choose experts that no other process has; see test_experts.py.

The settings are those of `python -m train`. Process 0 uses experts 0 and 1 alone, process 1 experts 2 and 3; the others
get no token anywhere.
"""

import os

import torch
from torch import nn
from transformers.models.mixtral import modeling_mixtral

from train import program

CHOSEN = 2 * int(os.environ.get("RANK", "0"))


def route(
    module: nn.Module, arguments: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Two experts of this process far ahead of the others."""
    logits, _, index = output
    logits = logits + 30.0 * torch.nn.functional.one_hot(index.new_tensor([CHOSEN, CHOSEN + 1]), logits.shape[-1]).sum(
        0
    )
    weights, index = logits.float().softmax(-1).topk(2, dim=-1)
    return logits, weights, index


built = modeling_mixtral.MixtralTopKRouter.__init__


def hooked(router: nn.Module, config: object) -> None:
    built(router, config)
    router.register_forward_hook(route)


modeling_mixtral.MixtralTopKRouter.__init__ = hooked
program.main()
