"""Base model and adapter directory → a model that is ready to generate.

`data.disk.adapter_directory` says what training hands over.
"""

import warnings
from collections import Counter
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from configs.program import gpus
from configs.program.checks import choice
from configs.program.errors import UserError, say
from data.disk import hub, nf4
from data.disk.adapter_directory import CONFIG, RECEIPT, public
from data.disk.adapter_directory import FILES as ADAPTER_FILES
from data.disk.architecture import find_mixtral
from data.disk.formats import sizes
from data.disk.loading.layers import quantise
from data.disk.loading.model import load_model, spread_over, whole_on
from data.disk.mixtral_files import load_mixtral, stored_parts
from data.disk.plain_text import json_if_readable, member
from data.disk.weights import StoredWeights, local_directory
from data.template import ChatTokenizer
from data.vocabulary import EMBEDDED, has_tokenizer
from inference import four_bits
from inference.adapter import Adapter, is_finite, read_settings
from inference.config import InferenceConfig
from inference.peft_layers import peft_settings
from inference.unfused import by_its_names, unfuse

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Base:
    """The base model; of its files, config.json alone is read before they are asked for."""

    source: str
    revision: str | None
    """The commit, if the model is on the hub."""
    named: str
    """How errors call it."""
    architecture: MixtralConfig
    adapter: Path | None = None
    """The directory of the adapter that is to be used with it."""

    @cached_property
    def directory(self) -> Path:
        """Its directory, downloaded if need be.

        Raises:
            UserError: the hub doesn't give it.
        """
        return local_directory(self.source, self.revision, self.named)

    @cached_property
    def weights(self) -> StoredWeights:
        """Its weights by their headers, which are read once.

        Raises:
            UserError: as for `directory`, or the directory holds no weights in safetensors.
        """
        return StoredWeights(self.directory, self.named)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and the tokenizer that it was trained with."""

    model: PreTrainedModel
    tokenizer: ChatTokenizer


def load(config: InferenceConfig) -> Loaded:
    """Loads the base, folds the adapter into its weights in place, and puts it on the device.

    Folded in, the adapter costs nothing per token. Whatever can be refused after reading headers is refused before the
    weights are loaded.

    Raises:
        UserError: the adapter directory or the base can't be used, or the two do not belong together.
    """
    base = find_base(config)
    adapter = None if config.adapter is None else find_adapter(config, base)
    tokenizer = load_tokenizer(base)
    model: PreTrainedModel = load_base(base, config)
    if adapter is not None:
        model = add_adapter(model, adapter, config)
    return Loaded(model.eval(), tokenizer)


def add_adapter(model: MixtralForCausalLM, adapter: Adapter, config: InferenceConfig) -> PreTrainedModel:
    """The model with the adapter: folded into its weights, or in layers of its own, as `fold` and `weights` say."""
    if config.weights == nf4.FORM:
        return fold(model, adapter, but=four_bits.keep_apart(model, adapter))
    return fold(model, adapter) if config.fold else keep_apart(model, adapter, autocast_adapter_dtype=False)


def adapter_directory(config: InferenceConfig) -> Path | None:
    """The directory of the adapter, downloaded if it is on the hub; None if there is to be none.

    Raises:
        UserError: there is no such directory, and the hub doesn't give it.
    """
    if config.adapter is None or Path(config.adapter).is_dir():
        return None if config.adapter is None else Path(config.adapter)
    repository = hub.find("model", config.adapter, config.adapter_revision, f"adapter={config.adapter}")
    return repository.fetch(hub.matching(repository.files(), ADAPTER_FILES))


def find_base(config: InferenceConfig) -> Base:
    """The base that the configuration names, or else the adapter.

    Raises:
        UserError: nothing names one, it is not a Mixtral, or a quantised one.
    """
    adapter = adapter_directory(config)
    settings = {} if adapter is None else read_settings(adapter)
    source, revision, named = config.base, config.revision, f"base={config.base}"
    if source is None:
        source = settings.get("base_model_name_or_path")
        if not source or adapter is None:
            raise UserError(
                f"base: the adapter {config.adapter} names no base model; give it, as in base=path/to/model"
            )
        revision, named = revision or settings.get("revision"), f"base: the adapter names {source}"
        source = find_named(source, adapter)
    if (Path(source) / CONFIG).is_file():
        raise UserError(f"{named}: it is an adapter; give it as adapter={source}")
    revision, architecture = find_mixtral(source, revision, named)
    return Base(source, revision, named, architecture, adapter)


def find_named(source: str, adapter: Path) -> str:
    """The directory that an adapter calls by this name, as it was called when it was trained: from here, by the path in
    its receipt, or from a directory above it. What is not a directory is a hub id."""
    path = member(json_if_readable(adapter / RECEIPT, sizes.RECORD), "base").get("path")
    noted = [Path(path)] if isinstance(path, str) and public(path) == source else []
    above = (parent / source for parent in adapter.resolve().parents)
    return next((str(path) for path in (Path(source), *noted, *above) if path.is_dir()), source)


def find_adapter(config: InferenceConfig, base: Base) -> Adapter:
    """The adapter, checked against the base: keys, shapes, numbers, and the fingerprint in its receipt."""
    assert base.adapter is not None
    adapter = Adapter(base.adapter, base.architecture)
    if config.fold or config.task == "merge" or config.weights == nf4.FORM:
        adapter.check_foldable()
    adapter.check_numbers()
    if (form := adapter.trained_in) != config.weights:
        here = f"here the base is in {config.weights}"
        say("inference", f"adapter={config.adapter}: it was trained on a base in {form}; {here}")
    if config.check_base and adapter.trained_on is not None:
        adapter.check_base(base.weights)
    return adapter


def load_base(base: Base, config: InferenceConfig) -> MixtralForCausalLM:
    """The base with its weights; on CUDA spread over the GPUs if one is too small."""
    gpus.check(config.device, "device")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    device_map: Any = config.device_map if on_cuda else None
    dtype = choose_dtype(config.dtype, on_cuda)
    if device_map == "auto" and (gpu := one_gpu(_bytes(base, dtype, config.weights), _free_bytes())) is not None:
        device_map = {"": gpu}
    elif config.weights == nf4.FORM and device_map is not None:
        device_map = _in_four_bits(device_map, base, dtype)
    if isinstance(device_map, str):  # spread over what there is, as transformers does it
        model = load_mixtral(base.directory, base.architecture, base.named, dtype=dtype, device_map=device_map)
    else:
        devices = {"": "cpu"} if device_map is None else device_map
        first = torch.device(next(iter(devices.values())))
        if config.weights == nf4.FORM:
            nf4.check_kernels("weights=nf4", first)
        how: dict[str, Any] = {"dtype": dtype, "device": first, "weights_in": config.weights, "shows_progress": True}
        allocate = whole_on(first) if len(devices) == 1 else spread_over(devices)
        model = load_model(base.directory, base.architecture, base.named, allocate, **how)
        if config.weights == nf4.FORM:
            four_bits.prepare(model)
        if len(devices) > 1:
            four_bits.dispatch(model, devices)
    # The settings of a request decide alone: those that the base recommends would be mixed into them.
    model.generation_config = GenerationConfig()
    return model


def _in_four_bits(device_map: str, base: Base, dtype: torch.dtype) -> dict[str, Any]:
    """The device of each part of a base in four bits: of what accelerate's words for it mean, those that name GPUs."""
    if device_map.startswith("cuda:"):
        return {"": device_map}
    choice("device_map", device_map, "auto", "balanced", "sequential", "cuda:0")
    allowed = [int(0.8 * free) for free in _free_bytes()]
    devices = four_bits.layout(_on_meta(base, dtype, nf4.FORM), allowed, in_turn=device_map == "sequential")
    if devices is None:
        raise UserError(
            f"weights=nf4: the base takes {_bytes(base, dtype, nf4.FORM) / 1e9:.0f} GB in whole layers, and the "
            f"{len(allowed)} GPUs here have room for {sum(allowed) / 1e9:.0f}; free some memory, or use more GPUs"
        )
    return devices


def one_gpu(needed: int, free: list[int]) -> int | None:
    """The GPU with the most free memory, if the model fits there and leaves a fifth of it free to work with; else None.

    In a model that is spread, each token goes through the GPUs one after another, and `batching=continuous` takes
    only one device.

    Args:
        needed: bytes of the weights.
        free: of each GPU, in bytes.
    """
    best = max(range(len(free)), key=free.__getitem__)
    return best if needed <= 0.8 * free[best] else None


def is_spread(model: PreTrainedModel) -> bool:
    """Whether the layers lie on more than one device."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def _on_meta(base: Base, dtype: torch.dtype, weights: str) -> MixtralForCausalLM:
    with torch.device("meta"):
        model = MixtralForCausalLM(base.architecture).to(dtype)
        if weights == nf4.FORM:
            quantise(model, base.named)
    return model


def _bytes(base: Base, dtype: torch.dtype, weights: str) -> int:
    return sum(parameter.nbytes for parameter in _on_meta(base, dtype, weights).parameters())


def _free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]


def choose_dtype(asked: str, on_cuda: bool) -> torch.dtype:
    """`auto` is bfloat16, in which Mixtral was trained; float16 on GPUs without bfloat16 (before Ampere)."""
    if asked != "auto":
        return DTYPES[asked]
    if on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


@torch.no_grad()
def fold(model: MixtralForCausalLM, adapter: Adapter, but: Collection[str] = ()) -> MixtralForCausalLM:
    """Adds the adapter to the model's own weights, block by block, except to the matrices `but`.

    Raises:
        UserError: the adapter can't be added to single parameters, or to one that is shared or was left on disk, or
            a folded weight is not finite.
    """
    adapter.check_foldable()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders = Counter(map(_storage, parameters.values()))
    left = set(adapter.updates).difference(but)
    for name, parameter in parameters.items():
        if nf4.is_quantised(parameter):
            continue
        changed = {matrix: part for matrix, part in stored_parts(name, parameter.data) if matrix in left}
        if not changed:
            continue
        if parameter.is_meta:
            raise UserError(
                f"adapter={adapter.directory}: the base does not fit into this machine's memory, so the adapter can't "
                f"be folded into it; merge first, with task=merge output=…, and give the result as base="
            )
        if holders[_storage(parameter)] > 1:
            raise UserError(
                f"adapter={adapter.directory}: it changes {name}, which shares its memory with another parameter of "
                f"this base; give fold=false, which leaves it to stock PEFT"
            )
        for matrix, part in changed.items():
            adapter.fold(matrix, part)
        left -= changed.keys()
        if not is_finite(parameter.data):
            raise UserError(
                f"adapter={adapter.directory}: what it makes of {name} is not finite in {parameter.dtype}, as after a "
                f"training that diverged; give an earlier checkpoint, or train again"
            )
    assert not left, left
    return model


def _storage(parameter: torch.Tensor) -> tuple[torch.device, int]:
    """The same for two parameters that are one tensor."""
    return parameter.device, id(parameter) if parameter.is_meta else parameter.data_ptr()


def keep_apart(model: MixtralForCausalLM, adapter: Adapter, **how: Any) -> PreTrainedModel:
    """The model within stock PEFT's layers, which add the adapter's products in every forward: slower.

    `how` goes to `PeftModel.from_pretrained`.
    """
    from peft import LoraConfig, PeftModel

    how["config"] = LoraConfig(**peft_settings(adapter.settings))  # as it was checked
    if adapter.is_unfused:
        unfuse(model)
    with warnings.catch_warnings(), by_its_names(model) if adapter.is_unfused else nullcontext():
        # PEFT 0.21 asks transformers 5.23 for a property by its old name.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
        return PeftModel.from_pretrained(model, str(adapter.directory), **how)


def load_tokenizer(base: Base) -> ChatTokenizer:
    """The base's tokenizer, or the embedded Mixtral vocabulary if a local base has none.

    Raises:
        UserError: it is not Mixtral's, or the base has no embedding for some of its pieces.
    """
    has_none = Path(base.source).is_dir() and not has_tokenizer(Path(base.source))
    tokenizer = ChatTokenizer.load(EMBEDDED if has_none else base.source, revision=base.revision, setting="base")
    if base.architecture.vocab_size < len(tokenizer.pieces):
        raise UserError(
            f"{base.named}: its vocabulary has {base.architecture.vocab_size:,} pieces, and the tokenizer's has "
            f"{len(tokenizer.pieces):,}; name a base with the vocabulary of Mixtral-8x7B"
        )
    return tokenizer
