"""Whether a merged checkpoint is base + adapter: its tensors bit by bit, and its logits against stock PEFT's.

The logits are computed with a layer in memory at a time: transformers' own model is built without weights, and each
layer's are read when the forward comes to it and dropped when it leaves. So a model of any size can be verified where
it could be merged.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

from configs.errors import UserError
from configs.weights import StoredWeights
from data.conversion import to_conversation
from data.schema import Conversation
from data.sources import RawRow
from data.template import UNK, ChatTokenizer
from inference.adapter import Adapter
from inference.checkpoint import Piece, pieces

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
PROMPTS = 8
"""Conversations of the sample dataset on which logits are compared, half of each of its files."""

PRODUCTS = 7
"""Matrix products one after the other in a layer: q and k, v, o, router, gate and up, down, and the sum's weights."""


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
        targeted = piece.parameter in adapter.updates
        if targeted and adapter.changes(piece.parameter, piece.expert, piece.rows):
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

    The measure is the median over positions of |merged - unmerged| / |unmerged|: the median, because a router that
    stands between two experts may fall to either side by rounding alone.
    """
    from peft import PeftModel

    dtype = max(parts, key=lambda piece: piece.size).dtype
    architecture = AutoConfig.from_pretrained(directory)
    conversations = sample_conversations()
    merged_parts = pieces(StoredWeights(directory, "merged"), architecture, "merged")
    merged = logits(stream(bare(architecture, dtype), merged_parts), tokenizer, conversations)
    model = bare(architecture, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers 5.23 by an old name
        stock = PeftModel.from_pretrained(model, str(adapter.directory), low_cpu_mem_usage=True).eval()
    stream(model, parts, adapter)
    unmerged = logits(stock, tokenizer, conversations)
    without = logits(stream(bare(architecture, dtype), parts), tokenizer, conversations)

    limit = torch.finfo(dtype).eps / 2 * math.sqrt(PRODUCTS * architecture.num_hidden_layers)
    result = {
        "positions": len(merged),
        "logits_relative_difference": _median_difference(merged, unmerged),
        "logits_relative_difference_allowed": limit,
        "logits_relative_effect_of_the_adapter": _median_difference(without, unmerged),
        "same_likeliest_token": float((merged.argmax(-1) == unmerged.argmax(-1)).float().mean()),
    }
    if not result["logits_relative_difference"] <= limit:
        raise VerificationError(
            f"the merged model's logits differ from those of base and adapter by "
            f"{result['logits_relative_difference']:.2e}, and rounding explains {limit:.2e}"
        )
    return result


def _median_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())


def sample_conversations() -> list[Conversation]:
    """Some conversations of the dataset that ships with the project."""
    found = []
    for name in ("general.jsonl", "identity.jsonl"):
        lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines()[: PROMPTS // 2]
        rows = [to_conversation(RawRow(json.loads(line), name, "line", 0), "instruction") for line in lines]
        found += [row for row in rows if isinstance(row, Conversation)]
    return found


def logits(model: nn.Module, tokenizer: ChatTokenizer, conversations: list[Conversation]) -> torch.Tensor:
    """[positions, vocabulary] in float32, of all tokens of the conversations in one forward."""
    rows = [conversation.ids for conversation in tokenizer.encode_batch(conversations)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [UNK] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()


def bare(architecture: MixtralConfig, dtype: torch.dtype) -> MixtralForCausalLM:
    """A Mixtral without weights."""
    with torch.device("meta"):
        model = MixtralForCausalLM(architecture).to(dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(architecture)  # wavelengths are computed and not stored
    return model


def stream(model: MixtralForCausalLM, parts: list[Piece], adapter: Adapter | None = None) -> MixtralForCausalLM:
    """Lets the model's forward read each layer's weights as it comes to it, and drop them as it leaves.

    Where PEFT has wrapped modules of the model, their factors are read from the adapter.
    """
    of: dict[str, list[Piece]] = {}
    for piece in parts:
        of.setdefault(piece.parameter, []).append(piece)

    def fill(prefix: str, unit: nn.Module) -> None:
        for name, parameter in list(unit.named_parameters()):
            place = f"{prefix}.{name}"
            if adapter is not None and (".lora_" in place or ".modules_to_save." in place):
                key = f"base_model.model.{place.replace('.modules_to_save', '').replace('.default', '')}"
                _assign(unit, name, adapter.tensor(key).to(parameter.dtype))
            else:
                pieces_here = of[place.replace(".base_layer", "").replace(".original_module", "")]
                _assign(unit, name, _assembled(pieces_here, parameter))

    def empty(unit: nn.Module, *_: Any) -> None:
        for name, parameter in list(unit.named_parameters()):
            _assign(unit, name, parameter.data.to("meta"))

    layers = [f"model.layers.{place}" for place in range(model.config.num_hidden_layers)]
    for prefix in ("model.embed_tokens", *layers, "model.norm", "lm_head"):
        unit = model.get_submodule(prefix)
        unit.register_forward_pre_hook(lambda unit, _, prefix=prefix: fill(prefix, unit))
        unit.register_forward_hook(empty)
    return model


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
