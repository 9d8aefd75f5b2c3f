"""Whether a merged checkpoint is base + adapter: its tensors bit by bit, and its logits against stock PEFT's.

The logits are computed with a layer in memory at a time: transformers' own model is built without weights, and each
layer's are read when the forward comes to it and dropped when it leaves. So a model of any size can be verified where
it could be merged.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

from configs.errors import UserError
from configs.weights import StoredWeights
from data.schema import Conversation, Message
from data.template import UNK, ChatTokenizer
from inference.adapter import Adapter, Whole
from inference.checkpoint import Piece, pieces

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
PROMPTS = 8
"""Conversations of the sample dataset on which logits are compared, half of each of its files."""


class VerificationError(RuntimeError):
    """What was written is not base + adapter."""


def verify(directory: Path, parts: list[Piece], adapter: Adapter, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Compares the merged model in `directory` with base and adapter; returns what was measured.

    Raises:
        VerificationError: a tensor or the logits are not what they must be.
        UserError: the adapter's change to a tensor is lost in rounding.
    """
    return {**compare_tensors(directory, parts, adapter), **compare_logits(directory, parts, adapter, tokenizer)}


def compare_tensors(directory: Path, parts: list[Piece], adapter: Adapter) -> dict[str, Any]:
    """Every tensor that the adapter adds to must have changed, and every other be the same to the last bit.

    The merged files are read with the library safetensors, and not by what wrote them.
    """
    changed, identical, smallest = 0, 0, 1.0
    stored: dict[str, Any] = {}
    for piece in parts:
        file = piece.stored.file.name
        if file not in stored:
            stored = {file: safe_open(directory / file, "pt")}
        name = piece.stored.name
        before, after = piece.read(), stored[file].get_tensor(name)
        if before.shape != after.shape or before.dtype != after.dtype:
            raise VerificationError(f"{name} was {before.dtype} {list(before.shape)}; merged it is not")
        bits = {2: torch.int16, 4: torch.int32}[before.element_size()]
        different = int((before.view(bits) != after.view(bits)).sum())
        update = adapter.updates.get(piece.parameter)
        if isinstance(update, Whole):
            if not torch.equal(after, adapter.tensor(update.key).to(after.dtype)):
                raise VerificationError(f"{name} is not the tensor that the adapter holds")
            changed += 1
        elif update is not None and adapter.changes(piece.parameter, piece.expert, piece.rows):
            if different == 0:
                raise UserError(
                    f"adapter={adapter.directory}: what it adds to {name} is lost in rounding to {before.dtype}, so a "
                    f"merged model would be the base; use the adapter unmerged, or train it further"
                )
            changed, smallest = changed + 1, min(smallest, different / before.numel())
        elif different:
            raise VerificationError(f"{name} changed, and the adapter adds nothing to it")
        else:
            identical += 1
    return {"tensors_changed": changed, "smallest_changed_share": smallest, "tensors_bit_identical": identical}


def compare_logits(directory: Path, parts: list[Piece], adapter: Adapter, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """The merged model's logits on real prompts must be those of base and adapter in stock PEFT, within rounding.

    What rounding does is measured: exact logits come from base and adapter unmerged in the next wider dtype, and the
    merged model must be as near to them as base and adapter unmerged in their own dtype are, within a factor of 2.
    A difference is the median over positions of |logits - exact| / |exact|: the median, because a router that stands
    between two experts may fall to either side by rounding alone.
    """
    dtype = max(parts, key=lambda piece: piece.size).dtype
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    architecture = AutoConfig.from_pretrained(directory)
    conversations = sample_conversations()
    merged_parts = pieces(StoredWeights(directory, "merged"), architecture, "merged")

    def computed(parts: list[Piece], dtype: torch.dtype, adapter: Adapter | None = None) -> torch.Tensor:
        return logits(streamed(architecture, dtype, parts, adapter), tokenizer, conversations)

    merged = computed(merged_parts, dtype)
    exact, unmerged = computed(parts, wider, adapter), computed(parts, dtype, adapter)
    result = {
        "positions": len(merged),
        "logits_difference": _median_difference(merged, exact),
        "logits_difference_unmerged": _median_difference(unmerged, exact),
        "logits_difference_without_adapter": _median_difference(computed(parts, dtype), exact),
        "same_likeliest_token": float((merged.argmax(-1) == exact.argmax(-1)).double().mean()),
    }
    if not result["logits_difference"] <= 2 * result["logits_difference_unmerged"]:
        raise VerificationError(
            f"the merged model's logits differ from those of base and adapter by {result['logits_difference']:.2e}, "
            f"and rounding explains {result['logits_difference_unmerged']:.2e}"
        )
    return result


def _median_difference(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((ours - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


def sample_conversations() -> list[Conversation]:
    """Some conversations of the dataset that ships with the project."""
    found = []
    for name in ("general.jsonl", "identity.jsonl"):
        lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines()[: PROMPTS // 2]
        for row in map(json.loads, lines):
            found.append(Conversation((Message("user", row["instruction"]), Message("assistant", row["output"]))))
    return found


def logits(model: nn.Module, tokenizer: ChatTokenizer, conversations: list[Conversation]) -> torch.Tensor:
    """[positions, vocabulary] in float64, of all tokens of the conversations in one forward."""
    rows = [tokenizer.encode(conversation).ids for conversation in conversations]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [UNK] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].double()


def streamed(
    architecture: MixtralConfig, dtype: torch.dtype, parts: list[Piece], adapter: Adapter | None = None
) -> nn.Module:
    """transformers' Mixtral, in stock PEFT's wrapping where there is an adapter, whose forward reads each layer's
    weights as it comes to it and drops them as it leaves."""
    with torch.device("meta"):
        model = MixtralForCausalLM(architecture).to(dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(architecture)  # wavelengths are computed and not stored
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    whole = model if adapter is None else _wrapped(model, adapter)
    of: dict[str, list[Piece]] = {}
    for piece in parts:
        of.setdefault(piece.parameter, []).append(piece)

    def fill(prefix: str, unit: nn.Module) -> None:
        for name, parameter in list(unit.named_parameters()):
            place = f"{prefix}.{name}"
            if adapter is not None and (".lora_" in place or ".modules_to_save." in place):
                key = f"base_model.model.{place.replace('.modules_to_save', '').replace('.default', '')}"
                # PEFT computes with float32 factors beside a 16-bit base.
                to = torch.promote_types(dtype, torch.float32) if ".lora_" in place else dtype
                _assign(unit, name, adapter.tensor(key).to(to))
            else:
                pieces_here = of[place.replace(".base_layer", "").replace(".original_module", "")]
                _assign(unit, name, _assembled(pieces_here, parameter))

    def empty(unit: nn.Module, *_: Any) -> None:
        for name, parameter in list(unit.named_parameters()):
            _assign(unit, name, parameter.data.to("meta"))

    layers = [f"model.layers.{place}" for place in range(architecture.num_hidden_layers)]
    for prefix in ("model.embed_tokens", *layers, "model.norm", "lm_head"):
        unit = model.get_submodule(prefix)
        unit.register_forward_pre_hook(lambda unit, _, prefix=prefix: fill(prefix, unit))
        unit.register_forward_hook(empty)
    return whole


def _wrapped(model: MixtralForCausalLM, adapter: Adapter) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers 5.23 by an old name
        return PeftModel.from_pretrained(model, str(adapter.directory), low_cpu_mem_usage=True).eval()


def _assign(unit: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(unit.get_submodule(path), last, nn.Parameter(tensor, requires_grad=False))


def _assembled(parts: list[Piece], parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of that shape and dtype from its pieces."""
    if parts[0].expert is None:
        return parts[0].read().to(parameter.dtype)
    whole = torch.empty(parameter.shape, dtype=parameter.dtype)
    for piece in parts:
        whole[piece.expert, piece.rows] = piece.read()
    return whole
