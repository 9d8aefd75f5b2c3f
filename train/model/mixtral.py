"""Mixtral with its adapters; decides which parameters train."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk import nf4
from data.disk.architecture import find_mixtral
from data.disk.loading.layers import quantise
from data.disk.loading.model import Place, load_model, whole_on
from data.disk.weights import REMEDY, local_directory
from train.config.model import VOCABULARY, ModelConfig
from train.config.train import TrainConfig
from train.lora import split_experts
from train.lora.attach import add_adapters
from train.model import attention, norm, projections, recomputation

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CPU = torch.device("cpu")


def build(
    config: TrainConfig, place: Place | None = None, *, device: torch.device = CPU, is_main: bool = False
) -> MixtralForCausalLM:
    """The base model with adapters attached and everything else frozen, or with everything trainable.

    For `task=profile` the base alone. The seed decides random bases and initial adapters, the same on every process.

    Args:
        config: the settings.
        place: where the weights of a stored base go; whole onto the device unless given.
        device: where the process computes.
        is_main: whether this process shows how far it has read.

    Raises:
        UserError: there is no Mixtral at `model.path`, or it can't be quantised as `model.weights` says.
    """
    torch.manual_seed(config.seed)
    if config.model.weights == nf4.FORM:
        nf4.check_kernels("model.weights=nf4", device)
    shows_progress = is_main and config.logging.progress
    if config.model.path is None:
        model = random_base(config.model)
        if config.model.weights == nf4.FORM:
            quantise(model, "model.weights=nf4")
    else:
        model = pretrained(config.model, place, device=device, shows_progress=shows_progress)
    model.config.use_cache = False
    norm.replace(model)
    projections.replace(model)
    if config.lora.method == "none" or config.task == "profile":
        model.set_experts_implementation(split_experts.IMPLEMENTATION)  # the plain grouped products, without adapters
    else:
        torch.manual_seed(config.seed)  # again: a random base has drawn some
        add_adapters(model, config.lora)
    recomputation.enable(model, config.activation_checkpointing, dropout=config.lora.dropout)
    return model


def random_base(config: ModelConfig) -> MixtralForCausalLM:
    """A random Mixtral of the configured architecture.

    Raises:
        UserError: the package that `model.attention` asks for is not installed.
    """
    sizes = asdict(config.architecture)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    architecture = MixtralConfig(**sizes, rope_parameters=rope, sliding_window=None, bos_token_id=1, eos_token_id=2)
    architecture._attn_implementation = config.attention
    with _attention_of(config):
        return MixtralForCausalLM._from_config(architecture, dtype=DTYPES[config.dtype])


@contextlib.contextmanager
def _attention_of(config: ModelConfig) -> Iterator[None]:
    """Within it, a model is made with the attention of the settings."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"model.attention={config.attention}: the package for it is not installed; install flash-attn, or use sdpa"
        ) from error


def pretrained(
    config: ModelConfig, place: Place | None = None, *, device: torch.device = CPU, shows_progress: bool = False
) -> MixtralForCausalLM:
    """The Mixtral at `model.path`, a directory or a hub id; its weights go where `build` says."""
    assert config.path is not None
    named = f"model.path={config.path}"
    revision, architecture = find_mixtral(config.path, config.revision, named)
    if architecture.hidden_act != "silu":  # the experts' own backward is that of Mixtral's activation
        raise UserError(f"{named}: its experts use {architecture.hidden_act}, Mixtral's use silu; {REMEDY}")
    if config.attention == attention.IMPLEMENTATION:
        for name, unable in (("sliding_window", "looks back without limit"), ("attention_dropout", "drops nothing")):
            if value := getattr(architecture, name):
                raise UserError(
                    f"model.attention={config.attention}: it {unable}, and the base's {name} is {value}; use "
                    f"model.attention=sdpa"
                )
    with _attention_of(config):
        return load_model(
            local_directory(config.path, revision, named),
            architecture,
            named,
            place or whole_on(device),
            dtype=DTYPES[config.dtype],
            device=device,
            attention=config.attention,
            weights_in=config.weights,
            shows_progress=shows_progress,
        )


def check_embeddings(architecture: MixtralConfig, named: str) -> None:
    """Raises `UserError` if a base has fewer embeddings than a dataset has ids; it is called as in `named`."""
    if architecture.vocab_size < VOCABULARY:
        raise UserError(
            f"{named}: its vocabulary has {architecture.vocab_size:,} pieces, and the dataset's has {VOCABULARY:,}; "
            f"name a base with the vocabulary of Mixtral-8x7B"
        )
