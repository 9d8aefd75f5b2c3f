"""Base model and adapter directory → a model that is ready to generate.

The adapter directory is all that training hands over: PEFT's two files, which stock PEFT reads here as anywhere else.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, MixtralForCausalLM

from configs.errors import UserError
from data.template import EMBEDDED, ChatTokenizer
from inference.config import InferenceConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and the tokenizer that it was trained with."""

    model: MixtralForCausalLM
    tokenizer: ChatTokenizer


def load(config: InferenceConfig) -> Loaded:
    """Loads the base, folds the adapter into its weights, and puts it on the device.

    Folded in, the adapter costs nothing per token. The base's tokenizer is used where it has one.

    Raises:
        UserError: the adapter directory or the base is not one, or the two do not belong together.
    """
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    adapter = None if config.adapter is None else Path(config.adapter)
    base = config.base or base_of(adapter)
    model = load_base(base, config)
    if adapter is not None:
        model = fold(model, adapter)
    return Loaded(model.eval(), load_tokenizer(base))


def base_of(adapter: Path | None) -> str:
    """The base that an adapter names."""
    assert adapter is not None
    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise UserError(f"base: the adapter {adapter} names no base model; give it, as in base=path/to/model")
    return str(base)


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter directory."""
    remedy = "give the directory adapter/ of a training run"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise UserError(f"adapter={adapter}: it is no adapter directory, {name} is missing; {remedy}")
    try:
        settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    except ValueError as error:
        raise UserError(f"adapter={adapter}: its adapter_config.json is not JSON ({error}); {remedy}") from error
    if settings.get("peft_type") != "LORA":
        raise UserError(f"adapter={adapter}: its peft_type is {settings.get('peft_type')}, not LORA; {remedy}")
    return settings


def load_base(base: str, config: InferenceConfig) -> MixtralForCausalLM:
    """The Mixtral in a directory or on the hub, in safetensors; on CUDA spread over the GPUs where one is too small."""
    remedy = "give base= with a Mixtral's directory, or a hub id that can be reached"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA GPU here; use device=cpu")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    try:
        architecture = AutoConfig.from_pretrained(base)
        if architecture.model_type != "mixtral":
            raise UserError(f"base={base}: it is a {architecture.model_type} model; {remedy}")
        return MixtralForCausalLM.from_pretrained(
            base, dtype=DTYPES[config.dtype], use_safetensors=True, device_map="auto" if on_cuda else None
        )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"base={base}: no model can be loaded from there; {remedy}") from error


def fold(model: MixtralForCausalLM, adapter: Path) -> MixtralForCausalLM:
    """Adds the adapter's products to the base's weights.

    Raises:
        UserError: keys or shapes of the adapter are not those that its configuration asks of this base.
    """
    from peft import PeftModel
    from safetensors import safe_open

    # PEFT 0.21 asks transformers 5.23 by a property's old name.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"adapter={adapter}: it does not fit this base ({reason}); give the base it was trained on"
        ) from error
    # PEFT only warns of keys that are missing or left over; an adapter that is half applied answers wrongly.
    expected = {name.replace(".default.", ".") for name, _ in adapted.named_parameters() if ".lora_" in name}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
        found = set(stored.keys())
    if odd := sorted(expected ^ found):
        state = "is missing" if odd[0] in expected else "is unknown"
        raise UserError(f"adapter={adapter}: its tensor {odd[0]} {state}; give the adapter as training wrote it")
    return adapted.merge_and_unload()


def load_tokenizer(base: str) -> ChatTokenizer:
    """The base's tokenizer, or the embedded Mixtral vocabulary where a local base has none."""
    directory = Path(base)
    has_none = directory.is_dir() and not any(
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    )
    return ChatTokenizer.load(EMBEDDED if has_none else base)
