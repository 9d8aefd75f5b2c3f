"""The model of a run on the meta device, where tensors have shapes and no numbers, and what a plan needs of it.

It is made by the code that makes training's, so its adapters, their ranks and a quantised base have the same shapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk import nf4
from data.disk.architecture import read_architecture
from data.disk.loading.layers import quantise
from train.config.model import ModelConfig
from train.config.train import TrainConfig
from train.lora import attach
from train.model import mixtral


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter."""

    elements: int
    """As ZeRO counts them: a quantised weight has its bytes."""
    bytes: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that ZeRO-3 makes whole together: those of a module, a whole attention or MoE block."""

    layer: int | None
    """None before the first and after the last layer."""
    experts: bool
    """Whether it is a MoE block."""
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What follows from base and adapters, whatever the batch and the machine."""

    config: MixtralConfig
    itemsize: int
    """Bytes of an activation's element."""
    units: tuple[Unit, ...]
    """In the order of the forward."""
    base_parameters: int
    quantised: bool

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters."""
        return [tensor for unit in self.units for tensor in unit.tensors]

    @property
    def bytes(self) -> int:
        """Of all parameters, the trained ones as well."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def trained(self) -> int:
        """Elements that train."""
        return sum(tensor.elements for tensor in self.tensors if tensor.trained)

    @property
    def trains_all(self) -> bool:
        """Whether the base trains as well, as with `lora=none`."""
        return all(tensor.trained for tensor in self.tensors)

    @property
    def head_width(self) -> int:
        """Of an attention head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def expert_ranks(self) -> int:
        """All ranks of a block's experts on one projection, the average over projections and layers."""
        low = sum(tensor.elements for unit in self.units if unit.experts for tensor in unit.tensors if tensor.trained)
        if self.trains_all or not low:
            return 0
        widths = 2 * self.config.hidden_size + 3 * self.config.intermediate_size
        return round(low / (widths * self.config.num_hidden_layers))

    @property
    def attention_rank(self) -> int:
        """Of the adapters on attention, the average over its four projections."""
        low = sum(
            tensor.elements
            for unit in self.units
            if unit.layer is not None and not unit.experts
            for tensor in unit.tensors
            if tensor.trained
        )
        if self.trains_all or not low:
            return 0
        config = self.config
        keys = config.num_key_value_heads * self.head_width
        widths = 2 * (2 * config.hidden_size) + 2 * (config.hidden_size + keys)
        return max(1, round(low / (widths * config.num_hidden_layers)))


def planned_base(config: ModelConfig) -> MixtralForCausalLM:
    """The base of a run, on the current default device: the meta device, for a plan.

    The architecture is that of `model.path` if that is a directory, else `model.architecture`: no hub is asked.

    Raises:
        UserError: there is no Mixtral at `model.path`.
    """
    if config.path is None or not Path(config.path).is_dir():
        return mixtral.random_base(config)
    try:
        architecture = read_architecture(config.path, None, f"model.path={config.path}")
        return MixtralForCausalLM._from_config(architecture, dtype=mixtral.DTYPES[config.dtype])
    except UserError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"model.path={config.path}: it is not a Mixtral's directory; name one with config.json"
        ) from error


def planned_model(config: TrainConfig) -> tuple[MixtralForCausalLM, int]:
    """Base and adapters on the meta device, and the parameters of the base alone.

    Raises:
        UserError: something is wrong with base or adapters.
    """
    with torch.device("meta"):
        model = planned_base(config.model)
        base_parameters = sum(parameter.numel() for parameter in model.parameters())
        if config.lora.method != "none":
            attach.add_adapters(model, config.lora)
        if config.model.weights == nf4.FORM:
            quantise(model, f"model.weights={nf4.FORM}")
    return model, base_parameters


def sizes_of(config: TrainConfig) -> Sizes:
    """Those of the run.

    Raises:
        UserError: something is wrong with base or adapters.
    """
    model, base_parameters = planned_model(config)
    return Sizes(
        config=model.config,
        itemsize=mixtral.DTYPES[config.model.dtype].itemsize,
        units=tuple(_units(model)),
        base_parameters=base_parameters,
        quantised=config.model.weights == nf4.FORM,
    )


def _units(model: MixtralForCausalLM) -> Iterator[Unit]:
    yield from _of(model.model.embed_tokens, None)
    for number, layer in enumerate(model.model.layers):
        yield from _of(layer.input_layernorm, number)
        yield Unit(number, False, tuple(map(_tensor, layer.self_attn.parameters())))
        yield from _of(layer.post_attention_layernorm, number)
        yield Unit(number, True, tuple(map(_tensor, layer.mlp.parameters())))
    yield from _of(model.model.norm, None)
    yield from _of(model.lm_head, None)


def _of(module: nn.Module, layer: int | None) -> Iterator[Unit]:
    for child in module.modules():
        if own := tuple(map(_tensor, child.parameters(recurse=False))):
            yield Unit(layer, False, own)


def _tensor(parameter: nn.Parameter) -> Tensor:
    return Tensor(parameter.numel(), parameter.nbytes, parameter.requires_grad)
