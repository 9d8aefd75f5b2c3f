"""The contract between training and inference: what an adapter directory holds.

    adapter_config.json        PEFT's settings of the adapter
    adapter_model.safetensors  its tensors, by PEFT's names
    receipt.json               what training recorded, `base.fingerprint` among it
    train_config.yaml          the settings of the training run
    README.md, tokenizer…      a card, and the tokenizer with the chat template, so that it can be handed on alone

PEFT stores the factors of all experts of a layer in two matrices: A [E·r, in], in which the expert varies slowest, and
B [out, r·E], in which it varies fastest. `join_experts` and `separate_experts` convert between these and one pair of
factors for each expert.

PEFT takes most of its settings unchecked, and fails on them late, or computes with another value than the file says.
`check_settings` refuses what is not understood here.

Letters in names of tensors: E experts, r rank, I inputs, O outputs.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypedDict

import torch

from configs.program.errors import UserError
from data.disk.formats import sizes
from data.disk.formats.json_text import read_json
from data.disk.formats.regular import UnreadableError
from data.disk.nf4 import UNQUANTISED
from data.disk.tensor_file import StoredTensor, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECEIPT = "receipt.json"
TRAIN_CONFIG = "train_config.yaml"
PER_EXPERT = "per_expert"
"""The directory within it that holds the same adapter with a name for each expert's matrices."""
EVALUATION, SCORES = "evaluation", "results.json"
"""The directory beside it with what `python -m inference task=evaluate` measured, and the file in that with scores."""
FILES = (CONFIG, WEIGHTS, RECEIPT, TRAIN_CONFIG)
"""All that is read of an adapter."""

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""

UNDERSTOOD = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
}
"""Settings that decide what an adapter adds, all of which PEFT's layers show."""

IRRELEVANT = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
"""Settings that only training or other settings look at."""

INITS_THAT_LEAVE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights`; the others train against a changed base, and the base here is the original one."""

NOTHING: tuple[object, ...] = (None, False, "none", {}, [])
"""Values of a setting that is not used."""

LONGEST_NAME, LONGEST_PART = 1024, 255
"""Characters of the longest path or hub id that may name a base, and bytes between its slashes."""

LONGEST_QUOTE = 100
"""Characters of a value that a sentence quotes."""

MOST_NAMES, LONGEST_PATTERN = 10_000, 4096
"""How many names or patterns a setting may have, and their characters: PEFT compares each with every module."""

MOST_SECONDS = 10.0
"""Seconds of processor time that PEFT may take to find what a configuration targets; a pattern can keep it busy
for ever."""

DTYPES = ("F64", "F32", "F16", "BF16")
"""What an adapter's tensors may be stored as."""


class TrainedOn(TypedDict, total=False):
    """What a receipt says of the base."""

    fingerprint: str | None
    weights: str
    """The form in which they were held, `bf16` or `nf4`; absent from receipts that are older than the choice."""


class Receipt(TypedDict, total=False):
    """What is relied on in a receipt.json; the rest only describes, and is taken over as far as it can be read."""

    base: TrainedOn


ABSOLUTE = re.compile(r"(?<![\w.:/~<])/(?:[^/\s,\]]+/)*([^/\s,\]]+)")
"""An absolute path in a text; its last part."""


def trained_in(base: Mapping[str, Any]) -> str:
    """The form in which training held the base, by `base` of a receipt."""
    return str(base.get("weights", UNQUANTISED))


def join_experts(A_ErI: torch.Tensor, B_EOr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's two matrices, A [E·r, I] and B [O, r·E], of the factors of all experts at one rank."""
    return A_ErI.flatten(0, 1).contiguous(), B_EOr.permute(1, 2, 0).flatten(1).contiguous()


def separate_experts(A: torch.Tensor, B: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of each expert, A [E, r, I] and B [E, O, r], as views of PEFT's two matrices."""
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def read_settings(directory: Path, named: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter directory, checked; errors begin with `named`.

    Raises:
        UserError: it can't be read, or as for `check_settings`.
    """
    remedy = "give the directory adapter/ of a training run"
    settings = read_json(directory / CONFIG, dict[str, Any], named, remedy, largest=sizes.SETTINGS)
    return check_settings(settings, named)


def read_shapes(directory: Path, named: str) -> dict[str, StoredTensor]:
    """What the weights of an adapter directory hold, by their keys; errors begin with `named`.

    Raises:
        UserError: they can't be read, or are not floating-point numbers.
    """
    remedy = "give the adapter as it was written"
    try:
        tensors = {tensor.name: tensor for tensor in read_header(directory / WEIGHTS)}
    except UnreadableError as error:
        raise UserError(f"{named}: its {WEIGHTS} is damaged ({error}); {remedy}") from error
    for tensor in tensors.values():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{named}: its tensor {tensor.name} is stored as {tensor.dtype}; {remedy}")
    return tensors


def public(value: Any) -> Any:
    """The same without absolute paths, which reveal a machine and its users: of each, only the last part is left.

    In what is handed on, a base's directory is called as it was given if that was relative, and else by its own name.
    """
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    before, _, path = value.partition("=") if "=/" in value else ("", "", value)
    if path.startswith("/"):  # all of it is the path, with its spaces
        return f"{before}={PurePath(path).name}" if before else PurePath(path).name
    return ABSOLUTE.sub(r"\1", value)


def check_settings(settings: object, named: str) -> dict[str, Any]:
    """The settings of a parsed adapter_config.json; errors begin with `named`.

    Raises:
        UserError: it is not a LoRA adapter's, or a setting is not understood here, or of a kind that PEFT can't use.
    """
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA" or not isinstance(settings, dict):
        raise UserError(
            f"{named}: its {CONFIG} says peft_type {kind}, not LORA; give the directory adapter/ of a training run"
        )
    odd = [name for name, value in settings.items() if name not in UNDERSTOOD | IRRELEVANT and value not in NOTHING]
    if settings.get("init_lora_weights") not in INITS_THAT_LEAVE_THE_BASE:
        odd.append("init_lora_weights")
    if odd:
        raise UserError(
            f"{named}: its {CONFIG} says {odd[0]}={_quoted(settings[odd[0]])}, which is not known here; use PEFT "
            f"itself to merge it, and name the result as the base"
        )
    for name, (fits, what) in KINDS.items():
        if name in settings and not fits(settings[name]):
            raise UserError(
                f"{named}: its {CONFIG} says {name}={_quoted(settings[name])}, and PEFT needs {what} there; give the "
                f"adapter as it was written"
            )
    return settings


def _quoted(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}…"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_PATTERN


def _can_be_a_path(text: str) -> bool:
    return len(text) <= LONGEST_NAME and all(len(part.encode()) <= LONGEST_PART for part in text.split("/"))


def _map_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    """Whether a value is null, or an object whose values fit."""
    return lambda value: (
        value is None
        or (
            (isinstance(value, dict) and len(value) <= MOST_NAMES and all(map(_is_text, value)))
            and all(map(fits, value.values()))
        )
    )


def _list_of(fits: Callable[[object], bool], *, or_one: bool) -> Callable[[object], bool]:
    """Whether a value is null, or a list whose items fit, or one that fits by itself."""
    return lambda value: (
        value is None
        or (isinstance(value, list) and len(value) <= MOST_NAMES and all(map(fits, value)))
        or (or_one and fits(value))
    )


_TEXTS = _list_of(_is_text, or_one=False), f"a list of at most {MOST_NAMES:,} names"
_PATTERN = _list_of(_is_text, or_one=True), f"a list of at most {MOST_NAMES:,} names, or a pattern"

KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a number"),
    "use_rslora": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "rank_pattern": (_map_of(_is_rank), "names with whole numbers above 0"),
    "alpha_pattern": (_map_of(_is_number), "names with numbers"),
    "target_modules": _PATTERN,
    "exclude_modules": _PATTERN,
    "target_parameters": _TEXTS,
    "modules_to_save": _TEXTS,
    "layers_pattern": _PATTERN,
    "layers_to_transform": (_list_of(_is_layer, or_one=True), "whole numbers"),
    "base_model_name_or_path": (
        lambda value: value is None or (isinstance(value, str) and _can_be_a_path(value)),
        f"a path or hub id of at most {LONGEST_NAME} characters",
    ),
    "revision": (lambda value: value is None or isinstance(value, str), "a text"),
}
"""What the value of a setting has to be, and how an error says so."""
