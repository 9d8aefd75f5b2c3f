"""`lora.start`: an adapter that training begins from, and how far training has moved from it."""

from pathlib import Path

import torch
from transformers import MixtralForCausalLM

from configs.program.console import console
from configs.program.errors import UserError, one_line
from data.disk.adapter_directory import RECEIPT, WEIGHTS, trained_in
from data.disk.formats import sizes
from data.disk.plain_text import json_if_readable, member
from train.config.lora import LoraConfig
from train.config.train import TrainConfig
from train.engine.zero import gathered_whole
from train.lora import factors
from train.lora.attach import trainable
from train.lora.files import peft_files
from train.lora.proof import Movement, movements


def check_is_there(config: LoraConfig) -> None:
    """Raises `UserError` if `lora.start` names no adapter; whether its shape fits is known with the model."""
    if config.start is not None and config.method == "lora" and not (Path(config.start) / WEIGHTS).is_file():
        raise UserError(
            f"lora.start={config.start}: it is not an adapter directory, {WEIGHTS} is missing; name one that "
            f"training wrote"
        )


def other_form(config: TrainConfig) -> str | None:
    """A sentence if the adapter `lora.start` was trained on the base in another form than it will be here, or None."""
    if config.lora.start is None or config.lora.method == "none":
        return None
    base = member(json_if_readable(Path(config.lora.start) / RECEIPT, sizes.RECORD), "base")
    before, now = trained_in(base), config.model.weights
    return None if before == now else f"lora.start={config.lora.start}: trained on a base in {before}, goes on in {now}"


def start_from(model: MixtralForCausalLM, config: LoraConfig) -> None:
    """Sets the adapters that `model` has to the numbers in the directory `lora.start`, if that is given; collective.

    Raises:
        UserError: there is no adapter of this shape.
    """
    if config.start is None or config.method == "none":
        return
    parameters: dict[str, torch.Tensor] = dict(trainable(model))
    with gathered_whole(parameters.values()), torch.no_grad():
        tensors = peft_files.read(Path(config.start), parameters, factors.adapters(model), config)
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def movements_of(config: TrainConfig, model: MixtralForCausalLM, tensors: dict[str, torch.Tensor]) -> list[Movement]:
    """How far the experts' adapters are from where the run began, whether it was resumed since or not.

    An empty list if that can't be found out, for example because `lora.start` can't be read any more: what was learned
    is worth saving without it.
    """
    try:
        start = None
        if config.lora.start is not None:
            start = peft_files.read(Path(config.lora.start), tensors, factors.adapters(model), config.lora)
            start = {name: tensor.to(model.dtype) for name, tensor in start.items()}  # as training began from them
        return movements(model, tensors, start)
    except Exception as error:
        message = f"{one_line(error)}. How far the experts' adapters have moved is not known."
        console.print(message, soft_wrap=True)
        return []
