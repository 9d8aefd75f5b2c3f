"""Is there a Mixtral? A base's config.json, read without any code of the base's own, and refused before any weight is
read if it is not a Mixtral that this project can compute with."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MixtralConfig

from configs.program.errors import UserError, one_line
from data.disk.weights import REMEDY, local_directory, pinned

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
)
"""Settings of a config.json that choose which code computes, some of them by downloading it. Our own settings decide
that, so these are never read."""

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
    try:
        settings, _ = MixtralConfig.get_config_dict(local_directory(source, revision, named, ["config.json"]))
        if not isinstance(settings, dict):
            raise ValueError("its config.json holds no settings")
        check_kind(settings, named)
        return MixtralConfig.from_dict({name: value for name, value in settings.items() if name not in CODE})
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{named}: no model can be loaded from there ({one_line(error)}); {REMEDY}") from error


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
