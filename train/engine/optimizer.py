"""AdamW over what trains."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from configs.program.errors import UserError
from train.config.train import TrainConfig
from train.engine.zero import whole_shape
from train.lora.attach import trainable


class SkippableAdamW(torch.optim.AdamW):
    """AdamW that can skip a step: in float32 without ZeRO, DeepSpeed takes every one, whatever the gradients are."""

    _skips = False

    @contextlib.contextmanager
    def skipping(self) -> Iterator[None]:
        """Within it, `step` changes nothing."""
        self._skips = True
        try:
            yield
        finally:
            self._skips = False

    def step(self, closure: Any = None) -> Any:
        """One step, or none."""
        return None if self._skips else super().step(closure)


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of a model's trained parameters, by torch's fused kernel.

    In float32 without ZeRO it can skip a step that is not finite; everywhere else DeepSpeed does.

    Its rate is 0 until a step sets it: DeepSpeed's stage 0 takes a step of its own to allocate the moments.

    Raises:
        UserError: nothing in the model trains.
    """
    kind = SkippableAdamW if config.model.dtype == "float32" and config.deepspeed.stage == 0 else torch.optim.AdamW
    return kind(
        parameter_groups(model, config.optim.weight_decay),
        lr=0.0,
        betas=(config.optim.betas[0], config.optim.betas[1]),
        eps=config.optim.eps,
        fused=True,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters, those of one dimension (norms) without weight decay.

    Raises:
        UserError: nothing in the model trains.
    """
    trained = list(trainable(model))
    if not trained:
        raise UserError("lora: nothing in the model trains; name targets in lora.attention or lora.projections")
    is_vector = {name: len(whole_shape(parameter)) == 1 for name, parameter in trained}
    groups = [
        {"params": [parameter for name, parameter in trained if not is_vector[name]], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trained if is_vector[name]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
