"""An adapter directory: which of the base's parameters it changes, and by what.

Stock PEFT says what a configuration means: it is applied to a base without weights, and names, shapes and scalings
are read off the layers that this makes. So targets by list or pattern, ranks and alphas by pattern, rank-stabilised
scaling and modules that are stored in full mean here what they mean there. The sums are our own: PEFT rounds a delta
before it adds it, and holds a second copy of every expert while it does.
"""

import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError, one_line
from data.disk import adapter_directory
from data.disk.adapter_directory import (
    CONFIG,
    MOST_SECONDS,
    PREFIX,
    RECEIPT,
    UNDERSTOOD,
    WEIGHTS,
    Receipt,
    read_shapes,
    separate_experts,
)
from data.disk.architecture import UNREADABLE
from data.disk.formats.json_text import read_json
from data.disk.formats.time_limit import TooLongError, at_most
from data.disk.weights import StoredWeights

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
"""The parameters that PEFT stores in full beside an adapter that targets them, and loads from there."""

BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""Elements of a weight that are summed at a time: their float32 copies fit a core's cache, or a GPU's memory."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W becomes W + scaling · B A; for a parameter of several experts, each expert's W by its own factors."""

    A: str
    B: str
    scaling: float
    experts: int | None
    """Their number if the parameter is [E, out, in]; None for a matrix."""
    transposed: bool = False
    """Whether the file holds the factors of the transpose, as PEFT does for embeddings."""
    base: str | None = None
    """The tensor of the file that replaces W first, if PEFT stored the layer beside its factors."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the file that it uses."""
        return (self.A, self.B) if self.base is None else (self.A, self.B, self.base)


@dataclass(frozen=True, slots=True)
class Replacement:
    """W becomes the stored tensor."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the file that it uses."""
        return (self.key,)


class Adapter:
    """An adapter's updates by the names that the base's parameters have in transformers' model."""

    def __init__(self, directory: Path, architecture: MixtralConfig):
        """Reads the configuration and the headers, and checks them against the architecture of the base.

        Raises:
            UserError: a setting is not understood, or names or shapes are not those that the configuration makes of
                this base.
        """
        self.directory = directory
        self.settings = read_settings(directory)
        layers = Layers(directory, self.settings, architecture)
        self.keys = self._read_keys(layers.expected, layers.beside)
        self.updates = layers.updates
        for key in self.keys & layers.beside.keys():
            parameter = layers.beside[key][0]
            update = self.updates.get(parameter)
            self.updates[parameter] = replace(update, base=key) if isinstance(update, LowRank) else Replacement(key)
        self._shared = layers.shared
        self._obstacle = layers.obstacle
        self._cached = lru_cache(maxsize=16)(self.tensor)  # experts of a layer come one after the other

    def _read_keys(
        self, expected: dict[str, tuple[int, ...]], beside: dict[str, tuple[str, tuple[int, ...]]]
    ) -> set[str]:
        """The file's keys: those that are expected, and possibly those of embeddings beside them."""
        directory = self.directory
        found = {key: tensor.shape for key, tensor in read_shapes(directory, f"adapter={directory}").items()}
        known = expected | {key: shape for key, (_, shape) in beside.items()}
        remedy = "give the base it was trained on, and the adapter as it was written"
        for key in sorted(expected | found, key=lambda key: (key in found, key)):
            if key not in found:
                raise UserError(f"adapter={directory}: its tensor {key} is missing; {remedy}")
            if key not in known:
                raise UserError(f"adapter={directory}: its tensor {key} is unknown; {remedy}")
            if found[key] != known[key]:
                raise UserError(
                    f"adapter={directory}: its tensor {key} is {list(found[key])}, and this base takes "
                    f"{list(known[key])}; {remedy}"
                )
        return set(found)

    @property
    def receipt(self) -> dict[str, Any]:
        """What training recorded beside the adapter; empty if there is no receipt.

        Raises:
            UserError: there is one that can't be read: nobody could tell whether the base is the right one.
        """
        path, remedy = self.directory / RECEIPT, "give the adapter as it was written, or take the receipt away"
        return dict(read_json(path, Receipt, f"adapter={self.directory}", remedy)) if path.exists() else {}

    @property
    def trained_on(self) -> str | None:
        """The fingerprint of the base's weights in the receipt; None if there is none."""
        base = self.receipt.get("base", {})
        return base.get("fingerprint")

    def check_base(self, weights: StoredWeights) -> None:
        """Raises `UserError` if the receipt says that the adapter was trained on other weights."""
        trained_on = self.trained_on
        if trained_on is not None and trained_on != weights.fingerprint:
            raise UserError(
                f"{weights.named}: its fingerprint is {weights.fingerprint[:16]}…, and base.fingerprint in the "
                f"adapter's {RECEIPT} is {trained_on[:16]}…: the adapter was trained on other weights; give those, or "
                f"check_base=false to use these all the same"
            )

    def check_numbers(self) -> None:
        """Raises `UserError` if a number of the adapter is not finite, as after a training that diverged."""
        for key in sorted(self.keys):
            if not is_finite(self.tensor(key)):
                raise UserError(
                    f"adapter={self.directory}: its tensor {key} holds numbers that are not finite, as of a training "
                    f"that diverged; give an earlier checkpoint, or train again"
                )

    def check_foldable(self) -> None:
        """Raises `UserError` unless each update changes exactly one parameter of the base, and no other update changes
        that one: otherwise folding would lose an update, or change more than was trained."""
        obstacle = self._obstacle
        for parameter, names in self._shared.items():
            if parameter in self.updates:
                obstacle = f"it changes {parameter}, which is one tensor with {' and '.join(names)} in this base"
        uses = Counter(key for update in self.updates.values() for key in update.keys)
        if obstacle is None and (unused := sorted(key for key in self.keys if uses[key] != 1)):
            obstacle = f"its tensor {unused[0]} changes no single parameter"
        if obstacle is not None:
            raise UserError(
                f"adapter={self.directory}: {obstacle}, so it can't be folded or merged; give fold=false, which leaves "
                f"it to stock PEFT, or use PEFT itself to merge it, and give the result as base="
            )

    def factors(self, parameter: str, expert: int | None) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [r, in] and B [out, r] as stored, and the scaling, of a parameter or of one of its experts."""
        update = self.updates[parameter]
        assert isinstance(update, LowRank)
        A, B = self._cached(update.A), self._cached(update.B)
        if update.transposed:
            A, B = B.T, A.T
        if update.experts is not None:
            of_experts = separate_experts(A, B, update.experts)
            A, B = (factors[expert] for factors in of_experts)
        return A, B, update.scaling

    def stored(self, parameter: str, expert: int | None, rows: slice) -> torch.Tensor | None:
        """What the adapter's file has in place of W, before factors are added; None if W is the base's."""
        update = self.updates[parameter]
        key = update.key if isinstance(update, Replacement) else update.base
        if key is None:
            return None
        tensor = self._cached(key)
        return (tensor if expert is None else tensor[expert])[rows]

    def changes(self, parameter: str, expert: int | None, rows: slice = slice(None)) -> bool:
        """Whether the factors add anything to these rows: the factors of untrained experts are zeros."""
        A, B, scaling = self.factors(parameter, expert)
        return bool((scaling * A.abs().amax(1) * B[rows].abs().amax(0)).any())

    def fold(self, parameter: str, weight: torch.Tensor, expert: int | None = None, rows: slice = slice(None)) -> None:
        """Updates `weight` in place: the parameter, or one expert of it, or some of its rows [out, in].

        The sum is made in float32 and rounded to the weight's dtype once.
        """
        update = self.updates[parameter]
        if (stored := self.stored(parameter, expert, rows)) is not None:
            weight.copy_(stored)
        if isinstance(update, Replacement):
            return
        if update.experts is not None and expert is None:
            for number, matrix in enumerate(weight):
                self.fold(parameter, matrix, number, rows)
            return
        A, B, scaling = self.factors(parameter, expert)
        exact = torch.promote_types(weight.dtype, torch.float32)
        A, B = A.to(weight.device, exact), B[rows].to(weight.device, exact).contiguous()
        step = max(1, BLOCK.get(weight.device.type, BLOCK["cuda"]) // weight.shape[1])
        for weight_block, B_block in zip(weight.split(step), B.split(step), strict=True):
            add_product(weight_block, B_block, A, scaling)

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of the file as it is stored."""
        with safe_open(self.directory / WEIGHTS, "pt") as stored:
            return stored.get_tensor(key)


def add_product(weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, scaling: float) -> None:
    """`weight += scaling · B A` in place, summed in the dtype of the factors and rounded once."""
    weight.copy_(torch.addmm(weight.to(A.dtype), B, A, alpha=scaling))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of its numbers are finite; makes no copy of them."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def read_settings(directory: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter directory.

    Raises:
        UserError: the directory holds no adapter, or one of its settings is not understood here.
    """
    remedy = "give the directory adapter/ of a training run"
    if (directory / "config.json").is_file():
        raise UserError(f"adapter={directory}: it is a whole model; give it as base={directory}, without an adapter")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"adapter={directory}: it is no adapter directory, {name} is missing; {remedy}")
    return adapter_directory.read_settings(directory, f"adapter={directory}")


def peft_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What PEFT is told of an adapter's settings: those that decide what it adds."""
    return {name: value for name, value in settings.items() if name in UNDERSTOOD and value is not None}


class Layers:
    """The layers that stock PEFT makes of a configuration, on a base without weights."""

    def __init__(self, directory: Path, settings: dict[str, Any], architecture: MixtralConfig):
        """Applies the configuration, and reads names, shapes and scalings off the layers.

        Raises:
            UserError: PEFT refuses the configuration on this base.
        """
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        self._directory = directory
        self.updates: dict[str, LowRank | Replacement] = {}
        """By the parameter's name in transformers' model."""
        self.obstacle: str | None = None
        """Why these updates can't be added to the parameters; None if they can."""

        try:
            with torch.device("meta"), warnings.catch_warnings(), at_most(MOST_SECONDS):
                warnings.simplefilter("ignore")  # the comparison of keys and shapes refuses what PEFT warns of
                bare = MixtralForCausalLM(architecture)
                parameters = dict(bare.named_parameters(remove_duplicate=False))
                adapted = get_peft_model(bare, LoraConfig(**peft_settings(settings)), low_cpu_mem_usage=True)
        except (*UNREADABLE, RuntimeError, re.error, TooLongError) as error:
            raise UserError(
                f"adapter={directory}: its {CONFIG} does not fit this base ({one_line(error)}); "
                f"give the base it was trained on"
            ) from error
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
        if not math.isfinite(scaling):
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
