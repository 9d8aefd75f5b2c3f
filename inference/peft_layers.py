"""The layers that stock PEFT makes of an adapter's configuration, and what each of them changes."""

import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError, one_line
from data.disk.adapter_directory import CONFIG, MOST_SECONDS, PREFIX, UNDERSTOOD
from data.disk.architecture import UNREADABLE
from data.disk.formats.time_limit import TooLongError, at_most
from inference.unfused import by_its_names, unfuse

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
"""The parameters that PEFT stores in full beside an adapter that targets them, and loads from there."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W becomes W + scaling · B A, each of a matrix or of some rows of it."""

    A: str
    B: str
    scaling: float
    experts: int | None
    """Their number if the file holds the factors of all experts in one; None for the factors of one matrix."""
    transposed: bool = False
    """Whether the file holds the factors of the transpose, as PEFT does for embeddings."""
    base: str | None = None
    """The tensor of the file that replaces W first, if PEFT stored the layer beside its factors."""
    expert: int | None = None
    """The expert whose factors these are; None if `experts` is."""
    rows: slice = field(default_factory=lambda: slice(None))
    """The rows of W among those that the factors are for."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the file that it uses."""
        return (self.A, self.B) if self.base is None else (self.A, self.B, self.base)


@dataclass(frozen=True, slots=True)
class Replacement:
    """W becomes the stored tensor, or part of it."""

    key: str
    expert: int | None = None
    """The expert whose matrix it is; None if the tensor is a matrix."""
    rows: slice = field(default_factory=lambda: slice(None))
    """The rows of W among those of the stored matrix."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the file that it uses."""
        return (self.key,)


def peft_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What PEFT is given of an adapter's settings: those that decide what it adds."""
    return {name: value for name, value in settings.items() if name in UNDERSTOOD and value is not None}


class Layers:
    """The layers that stock PEFT makes of a configuration, on a base without weights."""

    def __init__(self, directory: Path, settings: dict[str, Any], architecture: MixtralConfig, *, unfused: bool):
        """Applies the configuration, and reads names, shapes and scalings off the layers.

        `unfused` says that the adapter names each expert's matrices; see `inference.unfused`.

        Raises:
            UserError: PEFT refuses the configuration on this base.
        """
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        self._directory = directory
        self.updates: dict[str, LowRank | Replacement] = {}
        """By the parameter's name in the model, as transformers holds it, or unfused."""
        self.obstacle: str | None = None
        """Why these updates can't be added to the parameters; None if they can."""

        try:
            with torch.device("meta"), warnings.catch_warnings(), at_most(MOST_SECONDS):
                warnings.simplefilter("ignore")  # the comparison of keys and shapes refuses what PEFT warns of
                bare = MixtralForCausalLM(architecture)
                if unfused:
                    unfuse(bare)
                parameters = dict(bare.named_parameters(remove_duplicate=False))
                with by_its_names(bare) if unfused else nullcontext():
                    adapted = get_peft_model(bare, LoraConfig(**peft_settings(settings)), low_cpu_mem_usage=True)
        except (*UNREADABLE, RuntimeError, re.error, TooLongError) as error:
            raise UserError(
                f"adapter={directory}: its {CONFIG} does not fit this base ({one_line(error)}); "
                f"give the base it was trained on"
            ) from error
        self.parameters: dict[str, torch.Tensor] = parameters
        """Those of the model, without numbers."""
        self.shared = {
            name: others
            for name, parameter in parameters.items()
            if (others := [o for o, other in parameters.items() if other is parameter and o != name])
        }
        """The parameters that share their tensor with others, and those others."""
        for name, module in adapted.named_modules():
            self._read(name, module)
        for parameter in self.updates:
            if parameter not in parameters:
                self._hinder(f"it changes {parameter}, which the base holds under no such name")
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        self.expected = {key: tuple(tensor.shape) for key, tensor in expected.items()}
        """The keys of the file, and the shapes of their tensors."""
        self.beside = {
            key: (parameter, tuple(tensor.shape))
            for key, tensor in adapted.state_dict().items()
            if (parameter := key.removeprefix(PREFIX).replace(".base_layer", "")) in EMBEDDINGS
        }
        """The keys of embeddings that may be in the file too, with their parameters and shapes."""

    def _read(self, name: str, module: nn.Module) -> None:
        """Notes what a module of PEFT's model changes."""
        from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
        from peft.utils import ModulesToSaveWrapper

        target = name.removeprefix(PREFIX).replace(".base_layer", "")
        if isinstance(module, ModulesToSaveWrapper):
            for parameter, _ in module.original_module.named_parameters():
                self._note(f"{target}.{parameter}", Replacement(f"{name}.{parameter}"))
            return
        if not isinstance(module, LoraLayer):
            return
        if not isinstance(module, (Embedding, Linear, ParamWrapper)):
            self._hinder(f"its {CONFIG} targets {target}, a {type(module).__name__}, which is not known here")
            return
        parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        scaling = module.scaling["default"]
        if not abs(scaling) <= torch.finfo(torch.float32).max:  # NaN too
            raise UserError(
                f"adapter={self._directory}: its {CONFIG} gives {target} the scale {scaling}; give the adapter as it "
                f"was written"
            )
        several = isinstance(module, ParamWrapper) and module.get_param().dim() == 3
        of_embedding = isinstance(module, Embedding)
        A, B = (f"{name}.lora_embedding_{x}" if of_embedding else f"{name}.lora_{x}.weight" for x in "AB")
        update = LowRank(A, B, scaling, module.num_experts if several else None, transposed=of_embedding)
        self._note(f"{target}.{parameter}", update)

    def _note(self, parameter: str, update: LowRank | Replacement) -> None:
        if parameter in self.updates:
            self._hinder(f"it changes {parameter} in two ways")
        self.updates[parameter] = update

    def _hinder(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle
