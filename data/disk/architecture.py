"""Is there a Mixtral? A base's config.json, read without any code of the base's own, and refused before any weight is
read if it is not a Mixtral that this project can compute with."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from huggingface_hub.errors import StrictDataclassError
from msgspec import Meta
from transformers import MixtralConfig

from configs.program.errors import UserError, one_line
from data.disk.formats import sizes
from data.disk.formats.json_text import read_json, shaped
from data.disk.formats.regular import UnreadableError
from data.disk.weights import REMEDY, local_directory, pinned

CONFIG = "config.json"

CODE = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "auto_map",
    "custom_pipelines",
    "configuration_files",
    "sub_configs",
    "transformers_weights",
    "distributed_config",
    "fusion_config",
)
"""Settings of a config.json that choose which code computes, or which file has the weights, some of them by downloading
it. Our own settings decide that, so these are never read nor written."""

Id = Annotated[int, Meta(ge=0, lt=1 << 24)]
Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Number = Annotated[int, Meta(ge=1, le=1024)]
Share = Annotated[float, Meta(ge=0, le=1)]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]


Angle = Annotated[float, Meta(gt=0, le=1e12)]


class Rope(TypedDict, total=False):
    """What may be said of rotary positions, whatever their kind; which kinds there are, transformers knows."""

    rope_type: str
    type: str
    rope_theta: Angle
    factor: Angle
    original_max_position_embeddings: Annotated[int, Meta(ge=1, le=1 << 31)]
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)]
    attention_factor: Angle | None
    beta_fast: Angle | None
    beta_slow: Angle | None
    mscale: float | None
    mscale_all_dim: float | None
    truncate: bool
    low_freq_factor: Angle
    high_freq_factor: Angle
    short_factor: list[Angle]
    long_factor: list[Angle]


class Architecture(TypedDict, total=False):
    """What a config.json may say of the Mixtral that it describes; nothing else decides what is computed.

    The bounds are far above any Mixtral. Below them, a model without weights is built in seconds.
    """

    vocab_size: Size
    hidden_size: Annotated[int, Meta(ge=1, le=1 << 17)]
    intermediate_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    num_hidden_layers: Number
    num_attention_heads: Number
    num_key_value_heads: Number | None
    head_dim: Annotated[int, Meta(ge=1, le=1 << 13)] | None
    hidden_act: str
    max_position_embeddings: Annotated[int, Meta(ge=1, le=1 << 31)]
    initializer_range: Share
    rms_norm_eps: Share
    use_cache: bool
    pad_token_id: Id | None
    bos_token_id: Id | None
    eos_token_id: Id | list[Id] | None
    tie_word_embeddings: bool
    sliding_window: Annotated[int, Meta(ge=1, le=1 << 31)] | None
    attention_dropout: Share
    num_experts_per_tok: Number
    num_local_experts: Number
    output_router_logits: bool
    router_aux_loss_coef: float
    router_jitter_noise: Share
    rope_parameters: Rope | None
    rope_scaling: Rope | None
    rope_theta: Angle


class Described(TypedDict, total=False):
    """What a config.json may say beside that, and has to say in this form, as stock transformers reads it too."""

    dtype: Dtype | None
    torch_dtype: Dtype | None
    id2label: dict[str, str] | None
    label2id: dict[str, int] | None


QUANTISATIONS = ("quantization_config", "compression_config")
"""Where a config.json says that its weights are quantised; today's name is the first."""

UNREADABLE = (
    OSError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
"""What transformers raises for a config.json with values of other kinds than it expects."""

LONGEST_METHOD = 40
"""Characters of a method's name that a sentence quotes."""


def find_mixtral(source: str, revision: str | None, named: str) -> tuple[str | None, MixtralConfig]:
    """The commit and the configuration of the Mixtral in a directory or on the hub; errors begin with `named`.

    All that is read of a hub's model after this is read of that commit. A directory keeps the revision that is given.

    Raises:
        UserError: there is none, it is another model's or damaged, or the weights are quantised.
    """
    if source.startswith(("/", ".")) and not Path(source).is_dir():
        raise UserError(f"{named}: there is no such directory; {REMEDY}")
    revision = pinned(source, revision, named)
    return revision, read_architecture(source, revision, named)


def read_architecture(source: str, revision: str | None, named: str) -> MixtralConfig:
    """The configuration of the Mixtral in a directory or on the hub; errors begin with `named`.

    Raises:
        UserError: there is none, it is another model's or damaged, or the weights are quantised.
    """
    settings = read_settings(local_directory(source, revision, named, [CONFIG]), named)
    try:
        return MixtralConfig.from_dict(
            {name: settings[name] for name in Architecture.__annotations__ if name in settings}
        )
    except UNREADABLE as error:
        raise UserError(f"{named}: no model can be loaded from there ({one_line(error)}); {REMEDY}") from error


def read_settings(directory: Path, named: str) -> dict[str, Any]:
    """The settings of the config.json in a Mixtral's directory; errors begin with `named`.

    Raises:
        UserError: as for `read_architecture`.
    """
    settings = read_json(directory / CONFIG, dict[str, Any], named, REMEDY, largest=sizes.SETTINGS)
    check_kind(settings, named)
    try:
        shaped(settings, Described)
        _check_sizes(shaped(settings, Architecture))
    except UnreadableError as error:
        raise UserError(f"{named}: its {CONFIG} doesn't describe a Mixtral ({error}); {REMEDY}") from error
    return settings


def _check_sizes(sizes: Architecture) -> None:
    """Raises `UnreadableError` for sizes that don't fit each other."""
    hidden, heads = sizes.get("hidden_size", 4096), sizes.get("num_attention_heads", 32)
    groups = sizes.get("num_key_value_heads", 8) or heads
    width = sizes.get("head_dim") or hidden // heads
    experts, chosen = sizes.get("num_local_experts", 8), sizes.get("num_experts_per_tok", 2)
    if sizes.get("head_dim") is None and hidden % heads:
        raise UnreadableError(f"hidden_size: {hidden} is not a multiple of the {heads} num_attention_heads")
    if heads % groups:
        raise UnreadableError(f"num_attention_heads: {heads} is not a multiple of the {groups} num_key_value_heads")
    if width % 2:
        raise UnreadableError(f"head_dim: {width} is odd, and rotary positions turn pairs of numbers")
    if chosen > experts:
        raise UnreadableError(f"num_experts_per_tok: {chosen} can't be chosen from {experts} num_local_experts")


def check_kind(settings: dict[str, Any], named: str) -> None:
    """Raises `UserError` if a config.json is another model's, or says that the weights are quantised."""
    if (kind := settings.get("model_type")) != "mixtral":
        article = "an" if str(kind)[:1].lower() in [*"aeiou"] else "a"
        raise UserError(f"{named}: it is {article} {str(kind)[:LONGEST_METHOD]} model; {REMEDY}")
    for field in QUANTISATIONS:
        if (found := settings.get(field)) not in (None, {}):
            raise UserError(
                f"{named}: it is quantised ({_method(found)}, says {field} in its config.json), and weights are read "
                f"in bfloat16, float16 and float32 alone; name the model that it was quantised from"
            )


def _method(quantisation: object) -> str:
    """The name of a quantisation method, as its settings give it; those of bitsandbytes had none for a long time."""
    if not isinstance(quantisation, dict):
        return "by an unknown method"
    if method := quantisation.get("quant_method"):
        return str(method)[:LONGEST_METHOD]
    by_bits = any(quantisation.get(name) for name in ("load_in_4bit", "load_in_8bit"))
    return "bitsandbytes" if by_bits else "by an unknown method"


def exported(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json for weights that we write: without the names of other code, without the
    quantisation that the weights no longer have, and with the cache, which only training switches off."""
    kept = {name: value for name, value in settings.items() if name not in (*CODE, *QUANTISATIONS)}
    return {**kept, "use_cache": True} if "use_cache" in kept else kept
