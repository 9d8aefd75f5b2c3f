"""Adapters on disk: PEFT's format, out and in, and an export with a name for each expert's w1, w2 and w3.

PEFT wraps one parameter per layer of wrapping: gate_up_proj is the inner wrapper (its keys say base_layer) and
down_proj the outer, where both are targeted. It stores the factors of all experts in two matrices: A with the expert
slowest, [E·R, in], and B with the expert fastest, [out, R·E].

PEFT knows one rank R and one scale for all experts. Where ours differ, ranks are filled up with zeros, and B carries
what an expert's scale is more than that of R.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configs.program.errors import UserError, one_line
from data.disk.adapter_directory import CONFIG, check_settings
from data.disk.tensor_file import TensorFile
from train.config.lora import LoraConfig
from train.config.model import ModelConfig
from train.lora.factors import Adapter, Scaling

WEIGHTS = "adapter_model.safetensors"

Adapters = dict[str, dict[str, Adapter]]
"""By the name of the `MixtralExperts`, then by projection, as `expert_lora.adapters` gives them."""


def write(
    directory: Path, model: ModelConfig, lora: LoraConfig, tensors: dict[str, torch.Tensor], adapters: Adapters
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does; stock PEFT loads them.

    Args:
        directory: exists.
        model: names the base.
        lora: says what is adapted.
        tensors: the trained parameters, whole, by our names.
        adapters: those of the model's experts.
    """
    _write_tensors(directory / WEIGHTS, to_peft(lora, tensors, adapters))
    of_experts = [f"mlp.experts.{projection}" for projection in lora.projections]
    _write_settings(
        directory,
        model,
        lora,
        adapters,
        target_modules=list(lora.attention),
        target_parameters=of_experts if _largest(adapters) else None,
    )


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file. Unlike the library's own function it says in an `OSError` why it can't be written."""
    file = TensorFile(path, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
    for name, tensor in tensors.items():
        file.write(name, tensor)
    file.close()


def _write_settings(
    directory: Path,
    model: ModelConfig,
    lora: LoraConfig,
    adapters: Adapters,
    *,
    target_modules: list[str],
    target_parameters: list[str] | None = None,
) -> None:
    """adapter_config.json, the same bytes for the same settings."""
    from peft import LoraConfig as PeftConfig

    # A local base is named by its whole path, so that the adapter finds it from any working directory.
    local = model.path is not None and Path(model.path).is_dir()
    largest = _largest(adapters)
    config = PeftConfig(
        base_model_name_or_path=str(Path(str(model.path)).resolve()) if local else model.path,
        revision=model.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=largest or lora.rank,
        rank_pattern=dict.fromkeys(lora.attention, lora.rank) if largest not in (0, lora.rank) else {},
        lora_alpha=lora.alpha,
        use_rslora=lora.rank_stabilised,
        target_modules=target_modules,
        target_parameters=target_parameters,
        modules_to_save=["gate"] if lora.router == "trained" else None,
    )
    config.target_modules = sorted(target_modules)  # PEFT makes a set of them, in an order that varies
    config.save_pretrained(str(directory))


def to_peft(lora: LoraConfig, tensors: dict[str, torch.Tensor], adapters: Adapters) -> dict[str, torch.Tensor]:
    """PEFT's keys and matrices for the trained parameters."""
    stored = {
        _plain_key(name): tensor.contiguous() for name, tensor in tensors.items() if not _block_of(name, adapters)
    }
    for block, projection, A_ErI, B_EOr in _whole_factors(lora, tensors, adapters):
        stored[_key(block, projection, "A", lora)] = A_ErI.flatten(0, 1).contiguous()
        stored[_key(block, projection, "B", lora)] = B_EOr.permute(1, 2, 0).flatten(1).contiguous()
    return stored


def _plain_key(name: str) -> str:
    return f"base_model.model.{name.replace('.default.', '.')}"


def _key(block: str, projection: str, letter: str, lora: LoraConfig) -> str:
    inner = ".base_layer" if projection == "gate_up_proj" and "down_proj" in lora.projections else ""
    return f"base_model.model.{block}{inner}.lora_{letter}.weight"


def _block_of(name: str, adapters: Adapters) -> str | None:
    block = name.rpartition(".")[0]
    return block if block in adapters else None


def _largest(adapters: Adapters) -> int:
    return max((rank for of_block in adapters.values() for a in of_block.values() for rank in a.ranks), default=0)


def _whole_factors(
    lora: LoraConfig, tensors: dict[str, torch.Tensor], adapters: Adapters
) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """Block, projection, A [E, R, in] and B [E, out, R] with all experts of all blocks at one rank and one scale."""
    largest = _largest(adapters)
    like = next((block for block, of_block in adapters.items() if of_block), None)
    if like is None:
        return
    for projection in lora.projections:
        experts = len(adapters[like][projection].ranks)
        size_in = tensors[f"{like}.{projection}_lora_A"].shape[-1]
        size_out = tensors[f"{like}.{projection}_lora_B"].shape[-1]
        dtype = tensors[f"{like}.{projection}_lora_A"].dtype
        for block, of_block in adapters.items():
            A_ErI = torch.zeros(experts, largest, size_in, dtype=dtype)
            B_EOr = torch.zeros(experts, size_out, largest, dtype=dtype)
            if adapter := of_block.get(projection):
                extra = _extra_scales(adapter, lora, largest)
                if any(scale not in (0, 1) for scale in extra):
                    B_EOr = B_EOr.float()  # the narrower dtype would round the product
                for expert, (rows, rank) in enumerate(zip(adapter.rows, adapter.ranks, strict=True)):
                    A_ErI[expert, :rank] = tensors[f"{block}.{projection}_lora_A"][rows]
                    B_EOr[expert, :, :rank] = tensors[f"{block}.{projection}_lora_B"][rows].T
                    B_EOr[expert] *= extra[expert]
            yield block, projection, A_ErI, B_EOr


def _extra_scales(adapter: Adapter, lora: LoraConfig, largest: int) -> list[float]:
    """What each expert's scale is of the one that PEFT gives all: that of the largest rank."""
    common = Scaling(lora.alpha, lora.rank_stabilised)(largest)
    return [scale / common for scale in adapter.scales]


def write_per_expert(
    directory: Path, model: ModelConfig, lora: LoraConfig, tensors: dict[str, torch.Tensor], adapters: Adapters
) -> None:
    """Writes the same adapter with a key for each expert's w1 (gate), w3 (up) and w2 (down), as Mixtral's own files
    name its weights; all at one rank. The arguments are those of `write`."""
    stored = {
        _plain_key(name): tensor.contiguous() for name, tensor in tensors.items() if not _block_of(name, adapters)
    }
    for block, projection, A_ErI, B_EOr in _whole_factors(lora, tensors, adapters):
        names = ("w1", "w3") if projection == "gate_up_proj" else ("w2",)
        prefix = f"base_model.model.{block.replace('.mlp.experts', '.block_sparse_moe.experts')}"
        for expert, (A_rI, B_Or) in enumerate(zip(A_ErI, B_EOr, strict=True)):
            for name, part in zip(names, B_Or.chunk(len(names)), strict=True):
                stored[f"{prefix}.{expert}.{name}.lora_A.weight"] = A_rI.clone()
                stored[f"{prefix}.{expert}.{name}.lora_B.weight"] = part.contiguous()
    stored = {key.replace(".mlp.gate.", ".block_sparse_moe.gate."): tensor for key, tensor in stored.items()}
    _write_tensors(directory / WEIGHTS, stored)
    of_experts = [name for name in ("w1", "w2", "w3") if any(f".{name}.lora_A" in key for key in stored)]
    _write_settings(directory, model, lora, adapters, target_modules=[*lora.attention, *of_experts])


def read(
    directory: Path, wanted: dict[str, torch.Tensor], adapters: Adapters, lora: LoraConfig
) -> dict[str, torch.Tensor]:
    """The trained parameters by our names, out of what `write` wrote for the same settings.

    Args:
        directory: of the adapter.
        wanted: the trained parameters, for their names and shapes.
        adapters: those of the model's experts.
        lora: the settings.

    Raises:
        UserError: files, keys, shapes, ranks or scaling are not those that the settings ask for; it names the first.
    """
    named = f"lora.start={directory}"
    try:
        settings = json.loads((directory / CONFIG).read_text())
        stored = load_file(directory / WEIGHTS)
        if not isinstance(settings, dict):
            raise ValueError(f"{CONFIG} holds no settings")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{named}: it is no adapter directory ({one_line(error)}); name one that training wrote"
        ) from error
    settings = check_settings(settings, named)
    largest = _largest(adapters) or lora.rank
    asked = {"r": largest, "lora_alpha": lora.alpha, "use_rslora": lora.rank_stabilised}
    for name, value in asked.items():
        if settings.get(name) != value:
            raise UserError(f"{named}: its {name} is {settings.get(name)}, the settings ask for {value}; give the same")
    # Ranks by pattern show in the shapes; a scale by pattern shows nowhere else.
    if scales := settings.get("alpha_pattern"):
        raise UserError(
            f"{named}: its alpha_pattern is {scales}, and training knows one alpha for all; give an adapter without it"
        )
    check_keys(named, stored, {key: tuple(t.shape) for key, t in to_peft(lora, wanted, adapters).items()})
    for key, tensor in stored.items():
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            raise UserError(
                f"{named}: its tensor {key} holds numbers that are not finite, as of a training that diverged; give an "
                f"earlier checkpoint"
            )
    found = {name: stored[_plain_key(name)] for name in wanted if not _block_of(name, adapters)}
    adapted = [adapter for of_block in adapters.values() for adapter in of_block.values()]
    for block, of_block in adapters.items():
        for projection, letter in itertools.product(lora.projections if adapted else [], "AB"):
            adapter = of_block.get(projection) or replace(adapted[0], ranks=(0,) * len(adapted[0].ranks))
            key, experts = _key(block, projection, letter, lora), len(adapter.ranks)
            matrix = stored[key]
            is_a = letter == "A"
            by_expert = (
                matrix.unflatten(0, (experts, -1)) if is_a else matrix.unflatten(1, (-1, experts)).permute(2, 1, 0)
            )
            for expert, (rows_RX, rank) in enumerate(zip(by_expert, adapter.ranks, strict=True)):
                _check_rank(f"{named}: its tensor {key}", rows_RX, expert, rank, exactly=is_a)
            if (name := f"{block}.{projection}_lora_{letter}") in wanted:
                extra = [1.0] * experts if is_a else _extra_scales(adapter, lora, largest)
                parts = zip(by_expert, adapter.ranks, extra, strict=True)
                found[name] = torch.cat([rows_RX[:rank] / scale for rows_RX, rank, scale in parts if rank])
    return found


def _check_rank(named: str, rows_RX: torch.Tensor, expert: int, rank: int, *, exactly: bool) -> None:
    """Raises `UserError` where an expert's stored factor has numbers beyond the rank, which would be lost, or, for A,
    zeros within it, which would never move: with them and B's zeros neither has a gradient."""
    used = (rows_RX != 0).any(dim=1).nonzero()
    stored = int(used.max()) + 1 if len(used) else 0
    if stored > rank or (exactly and stored < rank):
        raise UserError(
            f"{named} has rank {stored} for expert {expert}, the settings ask for {rank}; give the same lora.experts "
            f"and lora.expert_ranks"
        )


def check_keys(named: str, stored: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises `UserError`, which begins with `named`, for the first key that is missing, unknown or of another shape."""
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    remedy = "give the adapter as it was written, with the settings it was trained with"
    if missing and unknown:
        raise UserError(f"{named}: its tensor {missing[0]} is missing, and {unknown[0]} is unknown; {remedy}")
    if missing or unknown:
        state = "is missing" if missing else "is unknown"
        raise UserError(f"{named}: its tensor {(missing or unknown)[0]} {state}; {remedy}")
    for key, shape in expected.items():
        if tuple(stored[key].shape) != shape:
            raise UserError(f"{named}: its tensor {key} is {list(stored[key].shape)}, not {list(shape)}; {remedy}")
