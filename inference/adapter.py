"""An adapter directory: which of the base's parameters it changes, and by what.

Stock PEFT says what a configuration means: it is applied to a base without weights, and names, shapes and scalings
are read off the layers that this makes. So targets by list or pattern, ranks and alphas by pattern, rank-stabilised
scaling and modules that are stored whole mean here what they mean there. The sums are our own: PEFT rounds a delta
before it adds it, and holds a second copy of every expert while it does.

PEFT's files hold the factors of all experts in two matrices: A [E·r, in] with the expert slowest, and B [out, r·E] with
the expert fastest.
"""

import hashlib
import json
import math
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MixtralConfig, MixtralForCausalLM

from configs.errors import UserError, one_line
from configs.weights import StoredWeights

CONFIG, WEIGHTS, RECEIPT = "adapter_config.json", "adapter_model.safetensors", "receipt.json"

UNDERSTOOD = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "modules_to_save",
}
"""Settings that decide what an adapter adds, all of which PEFT's layers show."""

IRRELEVANT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Settings that only training or other settings look at."""

INITS_THAT_LEAVE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights`; the others train against a changed base, which is not the one that is here."""

BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""Elements of a weight that are summed at a time: float32 copies that stay in a core's cache, or in a GPU's memory."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W becomes W + scaling · B A; for a parameter of several experts, each expert's W by its own factors."""

    A: str
    B: str
    scaling: float
    experts: int | None
    """Their number where the parameter is [E, out, in]; None for a matrix."""


@dataclass(frozen=True, slots=True)
class Whole:
    """W becomes the stored tensor."""

    key: str


class Adapter:
    """An adapter's updates by the names that the base's parameters have in transformers' model."""

    def __init__(self, directory: Path, architecture: MixtralConfig):
        """Reads the configuration and the headers, and checks them against the architecture of the base.

        Raises:
            UserError: a setting is not understood, or names or shapes are not those that the configuration asks of
                this base.
        """
        self.directory = directory
        self.settings = read_settings(directory)
        self.updates, expected = _updates(directory, self.settings, architecture)
        try:
            with safe_open(directory / WEIGHTS, "pt") as stored:
                found = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118 - it is no dict
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"adapter={directory}: its {WEIGHTS} is damaged ({one_line(error)}); give the adapter as it was written"
            ) from error
        remedy = "give the base it was trained on, and the adapter as it was written"
        for key in sorted(expected | found, key=lambda key: (key in found, key)):
            if key not in found:
                raise UserError(f"adapter={directory}: its tensor {key} is missing; {remedy}")
            if key not in expected:
                raise UserError(f"adapter={directory}: its tensor {key} is unknown; {remedy}")
            if found[key] != expected[key]:
                raise UserError(
                    f"adapter={directory}: its tensor {key} is {list(found[key])}, and this base takes "
                    f"{list(expected[key])}; {remedy}"
                )
        self._cached = lru_cache(maxsize=16)(self.tensor)  # experts of a layer come one after the other

    @property
    def receipt(self) -> dict[str, Any]:
        """What training wrote beside the adapter; empty where it wrote nothing."""
        return read_json(self.directory / RECEIPT)

    @property
    def trained_on(self) -> str | None:
        """The fingerprint of the base's weights in the receipt; None where there is none."""
        base = self.receipt.get("base")
        named = base.get("fingerprint") if isinstance(base, dict) else None
        return None if named is None else str(named)

    def check_base(self, weights: StoredWeights, named: str) -> None:
        """Raises `UserError` where the receipt says that the adapter was trained on other weights."""
        trained_on = self.trained_on
        if trained_on is not None and trained_on != weights.fingerprint:
            raise UserError(
                f"{named}: its fingerprint is {weights.fingerprint[:16]}…, and base.fingerprint in the adapter's "
                f"{RECEIPT} is {trained_on[:16]}…: the adapter was trained on other weights; give those, or "
                f"check_base=false to use these all the same"
            )

    def factors(self, parameter: str, expert: int | None) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [r, in] and B [out, r] as stored, and the scaling, of a parameter or of one of its experts."""
        update = self.updates[parameter]
        assert isinstance(update, LowRank)
        A, B = self._cached(update.A), self._cached(update.B)
        if update.experts is not None:
            A = A.unflatten(0, (update.experts, -1))[expert]
            B = B.unflatten(1, (-1, update.experts))[:, :, expert]
        return A, B, update.scaling

    def changes(self, parameter: str, expert: int | None, rows: slice = slice(None)) -> bool:
        """Whether the factors add anything there: those of experts that were not trained are zeros."""
        A, B, scaling = self.factors(parameter, expert)
        return bool((scaling * A.abs().amax(1) * B[rows].abs().amax(0)).any())

    def fold(self, parameter: str, weight: torch.Tensor, expert: int | None = None, rows: slice = slice(None)) -> None:
        """Updates `weight` in place: the parameter, or one expert of it, or some of its rows [out, in].

        The sum is made in float32 and rounded to the weight's dtype once.
        """
        update = self.updates[parameter]
        if isinstance(update, Whole):
            weight.copy_(self._cached(update.key)[rows])
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


def read_json(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none, or something else, or of another hash than is asked for."""
    try:
        content = path.read_bytes()
        value = json.loads(content)
    except (OSError, ValueError):
        return {}
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        return {}
    return value if isinstance(value, dict) else {}


def read_settings(directory: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter directory.

    Raises:
        UserError: the directory is not one of an adapter, or a setting of it is not understood here.
    """
    remedy = "give the directory adapter/ of a training run"
    if (directory / "config.json").is_file():
        raise UserError(f"adapter={directory}: it is a whole model; give it as base={directory}, without an adapter")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"adapter={directory}: it is no adapter directory, {name} is missing; {remedy}")
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"adapter={directory}: its {CONFIG} is not JSON ({error}); {remedy}") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise UserError(f"adapter={directory}: its {CONFIG} says peft_type {kind}, not LORA; {remedy}")
    odd = [name for name, value in settings.items() if name not in UNDERSTOOD | IRRELEVANT and value not in _NOTHING]
    if settings.get("init_lora_weights") not in INITS_THAT_LEAVE_THE_BASE:
        odd.append("init_lora_weights")
    if odd:
        value = settings[odd[0]]
        raise UserError(
            f"adapter={directory}: its {CONFIG} says {odd[0]}={value}, which is not known here; "
            f"use PEFT itself to merge it, and give the result as base="
        )
    return settings


_NOTHING: tuple[object, ...] = (None, False, "none", {}, [])


def _updates(
    directory: Path, settings: dict[str, Any], architecture: MixtralConfig
) -> tuple[dict[str, LowRank | Whole], dict[str, tuple[int, ...]]]:
    """The updates by parameter, and the keys and shapes that PEFT expects in the file."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    known = {name: value for name, value in settings.items() if name in UNDERSTOOD and value is not None}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is refused by the comparison of keys and shapes
            bare = MixtralForCausalLM(architecture)
            adapted = get_peft_model(bare, LoraConfig(**known), low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
        raise UserError(
            f"adapter={directory}: its {CONFIG} does not fit this base ({one_line(error)}); "
            f"give the base it was trained on"
        ) from error
    updates: dict[str, LowRank | Whole] = {}
    for name, module in adapted.named_modules():
        place = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, ModulesToSaveWrapper):
            for parameter, _ in module.original_module.named_parameters():
                updates[f"{place}.{parameter}"] = Whole(f"{name}.{parameter}")
        elif isinstance(module, LoraLayer):
            if not isinstance(module, (Linear, ParamWrapper)):
                raise UserError(
                    f"adapter={directory}: its {CONFIG} targets {place}, a {type(module).__name__}, which is not known "
                    f"here; use PEFT itself to merge it, and give the result as base="
                )
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            if not math.isfinite(module.scaling["default"]):
                raise UserError(
                    f"adapter={directory}: its {CONFIG} gives {place} the scale {module.scaling['default']}; give the "
                    f"adapter as it was written"
                )
            several = isinstance(module, ParamWrapper) and module.get_param().dim() == 3
            updates[f"{place}.{parameter}"] = LowRank(
                f"{name}.lora_A.weight",
                f"{name}.lora_B.weight",
                module.scaling["default"],
                module.num_experts if several else None,
            )
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return updates, {key: tuple(tensor.shape) for key, tensor in expected.items()}
