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
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, MixtralForCausalLM

from configs.errors import UserError, one_line
from data.template import EMBEDDED, ChatTokenizer, has_tokenizer
from inference.config import InferenceConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and the tokenizer that it was trained with."""

    model: MixtralForCausalLM
    tokenizer: ChatTokenizer


def load(config: InferenceConfig) -> Loaded:
    """Loads the base, folds the adapter into its weights, and puts it on the device.

    Folded in, the adapter costs nothing per token; in bfloat16 the sum is rounded once to the base's dtype.

    Raises:
        UserError: the adapter directory or the base is not one, or the two do not belong together.
    """
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    adapter = None if config.adapter is None else Path(config.adapter)
    base, revision, named = base_of(config, adapter)
    tokenizer = load_tokenizer(base, revision)
    model = load_base(base, revision, named, config)
    if adapter is not None:
        model = fold(model, adapter)
    return Loaded(model.eval(), tokenizer)


def base_of(config: InferenceConfig, adapter: Path | None) -> tuple[str, str | None, str]:
    """The base's place and revision, as given or as the adapter names them, and how errors call it."""
    settings = {} if adapter is None else read_adapter_config(adapter)
    if config.base is not None:
        return config.base, config.revision, f"base={config.base}"
    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(f"base: the adapter {adapter} names no base model; give it, as in base=path/to/model")
    return str(base), config.revision or settings.get("revision"), f"base: the adapter names {base}"


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter directory."""
    remedy = "give the directory adapter/ of a training run"
    if (adapter / "config.json").is_file():
        raise UserError(f"adapter={adapter}: it is a whole model; give it as base={adapter}, without an adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise UserError(f"adapter={adapter}: it is no adapter directory, {name} is missing; {remedy}")
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"adapter={adapter}: its adapter_config.json is not JSON ({error}); {remedy}") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise UserError(f"adapter={adapter}: its adapter_config.json says peft_type {kind}, not LORA; {remedy}")
    return settings


def load_base(base: str, revision: str | None, named: str, config: InferenceConfig) -> MixtralForCausalLM:
    """The Mixtral in a directory or on the hub, in safetensors; on CUDA spread over the GPUs where one is too small."""
    remedy = "give base= with a Mixtral's directory, or a hub id that can be reached"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA GPU here; use device=cpu")
    if (Path(base) / "adapter_config.json").is_file():
        raise UserError(f"{named}: it is an adapter; give it as adapter={base}")
    if base.startswith(("/", ".")) and not Path(base).is_dir():
        raise UserError(f"{named}: there is no such directory; {remedy}")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    try:
        architecture = AutoConfig.from_pretrained(base, revision=revision)
        if architecture.model_type != "mixtral":
            raise UserError(f"{named}: it is a {architecture.model_type} model; {remedy}")
        model, loading = MixtralForCausalLM.from_pretrained(
            base,
            revision=revision,
            dtype=DTYPES[config.dtype],
            use_safetensors=True,
            device_map="auto" if on_cuda else None,
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{named}: no model can be loaded from there ({one_line(error)}); {remedy}") from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{named}: its tensor {missing[0]} is missing; {remedy}")
    return model


def fold(model: MixtralForCausalLM, adapter: Path) -> MixtralForCausalLM:
    """Adds the adapter's products to the base's weights.

    Raises:
        UserError: keys or shapes of the adapter are not those that its configuration asks of this base.
    """
    from peft import PeftModel

    # PEFT 0.21 asks transformers 5.23 for a property by its old name.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
            found = set(stored.keys())
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = one_line(error, -1)  # the last line says which tensor
        raise UserError(
            f"adapter={adapter}: it does not fit this base, or is damaged ({reason}); give the base it was trained on"
        ) from error
    # PEFT only warns of keys that are missing or left over; an adapter that is half applied answers wrongly.
    expected = {name.replace(".default.", ".") for name, _ in adapted.named_parameters() if ".lora_" in name}
    if odd := sorted(expected ^ found):
        state = "is missing" if odd[0] in expected else "is unknown"
        raise UserError(f"adapter={adapter}: its tensor {odd[0]} {state}; give the adapter as training wrote it")
    return adapted.merge_and_unload()


def load_tokenizer(base: str, revision: str | None) -> ChatTokenizer:
    """The base's tokenizer, or the embedded Mixtral vocabulary where a local base has none."""
    has_none = Path(base).is_dir() and not has_tokenizer(Path(base))
    return ChatTokenizer.load(EMBEDDED if has_none else base, revision=revision, setting="base")
