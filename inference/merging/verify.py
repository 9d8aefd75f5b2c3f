"""Whether a merged checkpoint is base + adapter: its tensors bit by bit, and its logits against stock PEFT's.

The logits are computed with the matrices of one expert in memory at a time: transformers' own model is built without
weights, and each module's are read when the forward comes to it and dropped when it leaves. So a machine that can merge
a model can verify it too, whatever its size.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError, VerificationError
from data.disk import nf4
from data.disk.adapter_directory import PREFIX
from data.disk.architecture import read_architecture
from data.disk.loading.layers import EXPERTS, LINEAR
from data.disk.mixtral_files import Piece, pieces
from data.disk.weights import StoredWeights
from data.schema import Conversation, Message
from data.template import UNK, ChatTokenizer
from inference.adapter import Adapter
from inference.load import keep_apart
from inference.peft_layers import LowRank, Replacement
from inference.unfused import BLOCK

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
REMEDY = "nothing was kept; merge again, and report it if it happens again"
"""What to do when a merge is not what it has to be."""
PROMPTS = 8
"""Conversations of the sample dataset on which logits are compared, half of each of its files."""


def verify(directory: Path, parts: list[Piece], adapter: Adapter, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Compares the merged model in `directory` with base and adapter; returns what was measured.

    Raises:
        VerificationError: a tensor or the logits are not what they must be.
        UserError: the adapter's change to a tensor is lost in rounding, or not finite.
    """
    return {**compare_tensors(directory, parts, adapter), **compare_logits(directory, parts, adapter, tokenizer)}


def compare_tensors(directory: Path, parts: list[Piece], adapter: Adapter) -> dict[str, Any]:
    """Every tensor that the adapter changes must have changed, and every other must be the same to the last bit.

    The merged files are read with the library safetensors, which shares no code with what wrote them.
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
            raise VerificationError(
                f"{name}: it is {after.dtype} {list(after.shape)} after merging, and {before.dtype} "
                f"{list(before.shape)} in the base; {REMEDY}"
            )
        bits = {2: torch.int16, 4: torch.int32}[before.element_size()]
        different = int((before.view(bits) != after.view(bits)).sum())
        update = adapter.updates.get(name)
        if update is not None and not after.isfinite().all():
            raise UserError(
                f"adapter={adapter.directory}: what it makes of {name} is not finite, as after a training that "
                f"diverged; give an earlier checkpoint, or train again"
            )
        adds = isinstance(update, LowRank) and adapter.changes(name)
        replacement = None if update is None else adapter.stored(name)
        if replacement is not None and not adds:
            if not torch.equal(after, replacement.to(after.dtype)):
                raise VerificationError(_differs(name, after, replacement.to(after.dtype), "in the adapter"))
            changed += 1
        elif adds:
            if different == 0:
                raise UserError(
                    f"adapter={adapter.directory}: what it adds to {name} is lost in rounding to {before.dtype}, so a "
                    f"merged model would be the base; use the adapter unmerged, or train it further"
                )
            changed, smallest = changed + 1, min(smallest, different / before.numel())
        elif different:
            raise VerificationError(_differs(name, after, before, "in the base, to which the adapter adds nothing"))
        else:
            identical += 1
    return {"tensors_changed": changed, "smallest_changed_share": smallest, "tensors_bit_identical": identical}


def _differs(name: str, merged: torch.Tensor, wanted: torch.Tensor, whose: str) -> str:
    """Says where a merged tensor is another than it has to be, the first number that differs."""
    indices = (merged != wanted).nonzero()  # none if they differ in the sign of a zero
    index = tuple(indices[0].tolist()) if len(indices) else (0,) * merged.dim()
    numbers = f"at {list(index)} it is {merged[index].item()} after merging, and {wanted[index].item()} {whose}"
    return f"{name}: {numbers}; {REMEDY}"


def compare_logits(directory: Path, parts: list[Piece], adapter: Adapter, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """The merged model's logits on real prompts must be those of base and adapter in stock PEFT, within rounding.

    The effect of rounding is measured: exact logits come from base and adapter unmerged in the next wider dtype, and
    the merged model must be as near to them as base and adapter unmerged in their own dtype are, within a factor of 2.
    A difference is the median over positions of |logits - exact| / |exact|: the median, because rounding alone may
    decide a router's choice between two experts that are nearly equal.

    If the adapter was trained on the base in four bits, it is also measured how far the merged model is from that.
    """
    dtype = max(parts, key=lambda piece: piece.size).dtype
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    architecture = read_architecture(str(directory), None, "merged")
    conversations = sample_conversations()

    def computed(parts: list[Piece], dtype: torch.dtype, adapter: Adapter | None = None) -> torch.Tensor:
        return logits(streamed(architecture, dtype, parts, adapter), tokenizer, conversations)

    exact = computed(parts, wider, adapter)
    merged = computed(pieces(StoredWeights(directory, "merged"), architecture), dtype)
    result = {
        "positions": len(merged),
        "logits_difference": _median_difference(merged, exact),
        "logits_difference_unmerged": _median_difference(computed(parts, dtype, adapter), exact),
        "logits_difference_without_adapter": _median_difference(computed(parts, dtype), exact),
        "same_likeliest_token": float((merged.argmax(-1) == exact.argmax(-1)).double().mean()),
    }
    if adapter.trained_in == nf4.FORM:
        trained = computed([as_trained(piece) for piece in parts], wider, adapter)
        result["logits_difference_from_training"] = _median_difference(merged, trained)
    if not result["logits_difference"] <= 2 * result["logits_difference_unmerged"]:
        raise VerificationError(
            f"output: the merged model's logits differ from those of base and adapter by "
            f"{result['logits_difference']:.2e}, and rounding explains {result['logits_difference_unmerged']:.2e}; "
            f"{REMEDY}"
        )
    return result


class InFourBits(Piece):
    """A matrix as training held it."""

    def read(self) -> torch.Tensor:
        """What four bits leave of it, in float32."""
        tensor = super().read()
        return nf4.dequantised(nf4.quantised(tensor), tensor.shape, torch.float32)


def as_trained(piece: Piece) -> Piece:
    """A piece as training in four bits held it: attention and experts changed, all else as it is."""
    quantised = EXPERTS.search(piece.parameter) or LINEAR.search(piece.parameter.removesuffix(".weight"))
    return InFourBits(piece.stored, piece.parameter, piece.expert, piece.rows) if quantised else piece


def _median_difference(ours: torch.Tensor, exact: torch.Tensor) -> float:
    pairs = ((row.double(), right.double()) for row, right in zip(ours, exact, strict=True))
    return float(torch.stack([(row - right).norm() / right.norm() for row, right in pairs]).median())


def sample_conversations() -> list[Conversation]:
    """Some conversations of the dataset that ships with the project."""
    found = []
    for name in ("general.jsonl", "identity.jsonl"):
        lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines()[: PROMPTS // 2]
        for row in map(json.loads, lines):
            found.append(Conversation((Message("user", row["instruction"]), Message("assistant", row["output"]))))
    return found


def logits(model: nn.Module, tokenizer: ChatTokenizer, conversations: list[Conversation]) -> torch.Tensor:
    """The logits of all tokens of the conversations, in one forward: [positions, vocabulary]."""
    rows = [tokenizer.encode(conversation).ids for conversation in conversations]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [UNK] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def streamed(
    architecture: MixtralConfig, dtype: torch.dtype, parts: list[Piece], adapter: Adapter | None = None
) -> nn.Module:
    """transformers' Mixtral, in stock PEFT's wrapping if there is an adapter, whose forward reads the weights of each
    layer, and of each expert, when it comes to them, and drops them when it leaves."""
    with torch.device("meta"):
        model = MixtralForCausalLM(architecture).to(dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(architecture)  # wavelengths are computed, not stored
    model.set_experts_implementation("eager")  # one expert after the other
    wrapped = model if adapter is None else keep_apart(model, adapter, low_cpu_mem_usage=True).eval()
    unfused = adapter is not None and adapter.is_unfused
    layers = [f"model.layers.{index}" for index in range(architecture.num_hidden_layers)]
    experts = [f"{layer}.{BLOCK}.experts.{e}" for layer in layers for e in range(architecture.num_local_experts)]
    units = ["model.embed_tokens", *layers, *(experts if unfused else []), "model.norm", "lm_head"]
    of: dict[str, list[Piece]] = {}
    for piece in parts:
        of.setdefault(piece.stored.name if unfused else piece.parameter, []).append(piece)
    if architecture.tie_word_embeddings:
        of["lm_head.weight"] = of["model.embed_tokens.weight"]

    def fill(prefix: str, unit: nn.Module) -> None:
        within = [f"{other}." for other in units if other.startswith(f"{prefix}.")]
        for name, parameter in list(unit.named_parameters()):
            path = f"{prefix}.{name}"
            if any(path.startswith(other) for other in within):
                continue
            stored = path.replace(".base_layer", "").replace(".original_module", "")
            key = f"{PREFIX}{path.replace('.modules_to_save', '').replace('.default', '')}"
            if adapter is not None and key in adapter.keys and ".original_module." not in path:
                # PEFT computes with float32 factors beside a 16-bit base.
                to = torch.promote_types(dtype, torch.float32) if ".lora_" in path else dtype
                _assign(unit, name, adapter.tensor(key).to(to))
            elif unfused or of[stored][0].expert is None:
                _assign(unit, name, of[stored][0].read().to(parameter.dtype))

    def empty(unit: nn.Module, *_: Any) -> None:
        for name, parameter in list(unit.named_parameters()):
            _assign(unit, name, parameter.data.to("meta"))

    for prefix in units:
        unit = model.get_submodule(prefix)
        unit.register_forward_pre_hook(lambda unit, _, prefix=prefix: fill(prefix, unit))
        unit.register_forward_hook(empty)
    for prefix in [] if unfused else layers:
        if adapter is not None and isinstance(
            adapter.updates.get(f"{prefix}.{BLOCK}.experts.0.w1.weight"), Replacement
        ):
            continue  # the adapter holds them all
        _one_by_one(model.get_submodule(f"{prefix}.mlp.experts"), f"{prefix}.mlp.experts", of)
    return wrapped


def _assign(unit: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(unit.get_submodule(path), last, nn.Parameter(tensor, requires_grad=False))


def _one_by_one(experts: nn.Module, path: str, of: dict[str, list[Piece]]) -> None:
    """Lets a layer's experts, or PEFT's wrapping of them, compute with one expert's matrices in memory at a time.

    transformers' own forward asks for them by the expert's number. PEFT's forward, which adds the adapter to all of
    them first, is left out; its factors are added to the one matrix that is asked for.
    """
    from peft.tuners.lora.layer import ParamWrapper

    wrappers: dict[str, ParamWrapper] = {}
    bare = experts
    while isinstance(bare, ParamWrapper):
        wrappers[bare.parameter_name] = bare
        bare = bare.base_layer
    with torch.device("meta"):
        computing = type(bare)(bare.config)
    for name, parameter in list(computing.named_parameters()):
        delattr(computing, name)
        matrices = Matrices(
            of[f"{path}.{name}"], parameter.shape[1:], bare.get_parameter(name).dtype, wrappers.get(name)
        )
        setattr(computing, name, matrices)
    experts.forward = computing.forward


class Matrices:
    """A parameter [E, out, in] of which one expert's matrix is in memory at a time, with what PEFT adds to it."""

    def __init__(self, parts: list[Piece], shape: torch.Size, dtype: torch.dtype, wrapper: Any):
        self._parts = parts
        self._shape = shape
        self._dtype = dtype
        self._wrapper = wrapper

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        """The matrix of that expert, [out, in]."""
        matrix = torch.empty(self._shape, dtype=self._dtype)
        for piece in self._parts:
            if piece.expert == expert:
                matrix[piece.rows] = piece.read()
        if self._wrapper is not None:
            left, right, scaling = self._wrapper.get_delta_factors("default")
            matrix[None].baddbmm_(left[expert, None], right[expert, None], alpha=scaling)
        return matrix
