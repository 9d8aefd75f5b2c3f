"""Adapters on disk: PEFT's format, written and read, and an export with a name for each expert's w1, w2 and w3.

PEFT wraps one parameter with each layer of wrapping: if both are targeted, gate_up_proj is the inner wrapper (its keys
say base_layer) and down_proj the outer one. `data.disk.adapter_directory` has the layout of the experts' factors.

PEFT knows one rank R and one scale for all experts. If ours differ, ranks are filled up with zeros, and B is multiplied
by the ratio of the expert's own scale to that of R.

Letters in names of tensors: E experts, R the largest rank, r the rank of one expert, I inputs, O outputs.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from configs.program.errors import UserError
from data.disk.adapter_directory import (
    PREFIX,
    WEIGHTS,
    join_experts,
    public,
    read_settings,
    read_shapes,
    separate_experts,
)
from data.disk.mixtral_files import MATRICES, original_name
from data.disk.tensor_file import TensorFile
from train.config.lora import LoraConfig
from train.config.model import ModelConfig
from train.lora.factors import Adapter, Scaling
from train.lora.files import per_expert

Adapters = dict[str, dict[str, Adapter]]
"""By the name of the `MixtralExperts`, then by projection, as `factors.adapters` gives them."""


def write(
    directory: Path, model: ModelConfig, lora: LoraConfig, tensors: dict[str, torch.Tensor], adapters: Adapters
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does; stock PEFT loads them.

    Args:
        directory: an existing one.
        model: names the base.
        lora: says what is adapted.
        tensors: the trained parameters by our names, in their full shapes.
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
    """Writes a safetensors file; unlike the library's own function, an `OSError` says why it can't be written."""
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
    """Writes adapter_config.json, the same bytes for the same settings."""
    from peft import LoraConfig as PeftConfig

    largest = _largest(adapters)
    config = PeftConfig(
        base_model_name_or_path=public(model.path),
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
        f"{PREFIX}{_plain_name(name)}": tensor.contiguous()
        for name, tensor in tensors.items()
        if not _block_of(name, adapters)
    }
    for block, projection, A_ERI, B_EOR in _padded_factors(lora, tensors, adapters):
        key_A, key_B = _keys(block, projection, lora)
        stored[key_A], stored[key_B] = join_experts(A_ERI, B_EOR)
    return stored


def _plain_name(name: str) -> str:
    """Without the name of the adapter, which PEFT leaves out in files."""
    return name.replace(".default.", ".")


def _keys(block: str, projection: str, lora: LoraConfig) -> tuple[str, str]:
    """The keys of A and B."""
    inner = ".base_layer" if projection == "gate_up_proj" and "down_proj" in lora.projections else ""
    return f"{PREFIX}{block}{inner}.lora_A.weight", f"{PREFIX}{block}{inner}.lora_B.weight"


def _block_of(name: str, adapters: Adapters) -> str | None:
    block = name.rpartition(".")[0]
    return block if block in adapters else None


def _largest(adapters: Adapters) -> int:
    return max((rank for of_block in adapters.values() for a in of_block.values() for rank in a.ranks), default=0)


def _padded_factors(
    lora: LoraConfig, tensors: dict[str, torch.Tensor], adapters: Adapters
) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """Block, projection, A [E, R, I] and B [E, O, R], with all experts of all blocks at one rank and one scale."""
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
            A_ERI = torch.zeros(experts, largest, size_in, dtype=dtype)
            B_EOR = torch.zeros(experts, size_out, largest, dtype=dtype)
            if adapter := of_block.get(projection):
                extra = _extra_scales(adapter, lora, largest)
                if any(scale not in (0, 1) for scale in extra):
                    B_EOR = B_EOR.float()  # the narrower dtype would round the product
                for expert, (rows, rank) in enumerate(zip(adapter.rows, adapter.ranks, strict=True)):
                    A_ERI[expert, :rank] = tensors[f"{block}.{projection}_lora_A"][rows]
                    B_EOR[expert, :, :rank] = tensors[f"{block}.{projection}_lora_B"][rows].T
                    B_EOR[expert] *= extra[expert]
            yield block, projection, A_ERI, B_EOR


def _extra_scales(adapter: Adapter, lora: LoraConfig, largest: int) -> list[float]:
    """The ratio of each expert's scale to the one that PEFT gives all of them, which is that of the largest rank."""
    common = Scaling(lora.alpha, lora.rank_stabilised)(largest)
    return [scale / common for scale in adapter.scales]


def write_per_expert(
    directory: Path, model: ModelConfig, lora: LoraConfig, tensors: dict[str, torch.Tensor], adapters: Adapters
) -> None:
    """Writes the same adapter with a key for each expert's w1 (gate), w3 (up) and w2 (down), as Mixtral's own files
    name its weights; all at one rank. The arguments are those of `write`."""
    stored = {
        f"{PREFIX}{original_name(_plain_name(name))}": tensor.contiguous()
        for name, tensor in tensors.items()
        if not _block_of(name, adapters)
    }
    for block, projection, A_ERI, B_EOR in _padded_factors(lora, tensors, adapters):
        matrices = MATRICES[f"experts.{projection}"]
        for expert, (A_RI, B_OR) in enumerate(zip(A_ERI, B_EOR, strict=True)):
            for matrix, part in zip(matrices, B_OR.chunk(len(matrices)), strict=True):
                name = f"{PREFIX}{original_name(f'{block}.{expert}.{matrix}')}"
                stored[f"{name}.lora_A.weight"] = A_RI.clone()
                stored[f"{name}.lora_B.weight"] = part.contiguous()
    _write_tensors(directory / WEIGHTS, stored)
    of_experts = [name for name in ("w1", "w2", "w3") if any(f".{name}.lora_A" in key for key in stored)]
    _write_settings(directory, model, lora, adapters, target_modules=[*lora.attention, *of_experts])


def read(
    directory: Path, wanted: dict[str, torch.Tensor], adapters: Adapters, lora: LoraConfig
) -> dict[str, torch.Tensor]:
    """The trained parameters by our names, out of what `write` or `write_per_expert` wrote for the same settings, or of
    another adapter that names each expert's matrices.

    Args:
        directory: of the adapter.
        wanted: the trained parameters before training.
        adapters: those of the model's experts.
        lora: the settings.

    Raises:
        UserError: files, keys, shapes, ranks or scaling are not those that the settings ask for; it names the first.
    """
    named = f"lora.start={directory}"
    stored = _read_files(directory, named, adapters, lora)
    for key, tensor in stored.items():
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            raise UserError(
                f"{named}: its tensor {key} holds numbers that are not finite, as after a training that diverged; give "
                f"an earlier checkpoint"
            )
    if per_expert.names_experts(stored):
        found = per_expert.read(named, stored, wanted, adapters, lora)
        left = {name: f"{PREFIX}{_plain_name(name)}" for name in wanted if name not in found}
        check_keys(named, stored, {key: tuple(wanted[name].shape) for name, key in left.items()})
        return found | {name: stored[key] for name, key in left.items()}
    check_keys(named, stored, {key: tuple(t.shape) for key, t in to_peft(lora, wanted, adapters).items()})
    found = {name: stored[f"{PREFIX}{_plain_name(name)}"] for name in wanted if not _block_of(name, adapters)}
    largest = _largest(adapters) or lora.rank
    adapted = [adapter for of_block in adapters.values() for adapter in of_block.values()]
    for block, projection in itertools.product(adapters, lora.projections if adapted else []):
        adapter = adapters[block].get(projection) or replace(adapted[0], ranks=(0,) * len(adapted[0].ranks))
        experts = len(adapter.ranks)
        keys = _keys(block, projection, lora)
        A_ERI, B_EOR = separate_experts(stored[keys[0]], stored[keys[1]], experts)
        scales = [1.0] * experts, _extra_scales(adapter, lora, largest)
        for letter, key, by_expert, extra in zip("AB", keys, (A_ERI, B_EOR.mT), scales, strict=True):
            for expert, (rows_RX, rank) in enumerate(zip(by_expert, adapter.ranks, strict=True)):
                _check_rank(f"{named}: its tensor {key}", rows_RX, expert, rank, exactly=letter == "A")
            if (name := f"{block}.{projection}_lora_{letter}") in wanted:
                parts = zip(by_expert, adapter.ranks, extra, strict=True)
                found[name] = torch.cat([rows_RX[:rank] / scale for rows_RX, rank, scale in parts if rank])
    return found


def _read_files(directory: Path, named: str, adapters: Adapters, lora: LoraConfig) -> dict[str, torch.Tensor]:
    """The tensors of an adapter directory whose settings are those that training asks for."""
    settings = read_settings(directory, named)
    read_shapes(directory, named)
    stored = load_file(directory / WEIGHTS)
    asked = {"lora_alpha": lora.alpha, "use_rslora": lora.rank_stabilised}
    if not per_expert.names_experts(stored):  # there the shapes say it
        asked = {"r": _largest(adapters) or lora.rank, **asked}
    for name, value in asked.items():
        if settings.get(name) != value:
            raise UserError(f"{named}: its {name} is {settings.get(name)}, the settings ask for {value}; give the same")
    # Ranks by pattern show in the shapes; a scale by pattern shows nowhere else.
    if scales := settings.get("alpha_pattern"):
        raise UserError(
            f"{named}: its alpha_pattern is {scales}, and training knows one alpha for all; give an adapter without it"
        )
    return stored


def _check_rank(named: str, rows_RX: torch.Tensor, expert: int, rank: int, *, exactly: bool) -> None:
    """Raises `UserError` if an expert's stored factor has numbers beyond its rank, which would be lost; or, for A, only
    zeros at the end of its rank: with B's zeros, neither would have a gradient, so they would never move."""
    used = (rows_RX != 0).any(dim=1).nonzero()
    stored = int(used.max()) + 1 if len(used) else 0
    if stored > rank or (exactly and stored < rank):
        raise UserError(
            f"{named} has rank {stored} for expert {expert}, the settings ask for {rank}; give the same lora.experts "
            f"and lora.expert_ranks"
        )


def check_keys(named: str, stored: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises `UserError` for the first key that is missing, unknown or of another shape; it begins with `named`."""
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
