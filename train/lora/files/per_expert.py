"""An adapter that names each expert's w1, w2 and w3 → the factors of the experts' projections.

There w1 (gate) and w3 (up) have factors of their own; here gate_up_proj has one A for both. If theirs are the same, as
in what we export, they are that A; else they stand one below the other, at the sum of their ranks, and B is
block-diagonal. An expert whose rank is larger here keeps its fresh rows of A, with zeros in B: it adds what it did.

Letters in names of tensors: r rank, I inputs, O outputs, R all ranks of a block one after another.
"""

import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from configs.program.errors import UserError
from data.disk.adapter_directory import PREFIX
from data.disk.mixtral_files import MATRICES, original_name
from train.config.lora import LoraConfig
from train.lora.factors import Adapter, Scaling

BLOCK = ".block_sparse_moe."


@dataclass(frozen=True, slots=True)
class Factors:
    """A [r, I] and B [O, r], the scale in B."""

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        """r."""
        return len(self.A)


def names_experts(keys: Iterable[str]) -> bool:
    """Whether an adapter has these names."""
    return any(BLOCK in key for key in keys)


def read(
    named: str,
    stored: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    adapters: dict[str, dict[str, Adapter]],
    lora: LoraConfig,
) -> dict[str, torch.Tensor]:
    """The parameters of the experts' adapters and the routers, by our names.

    Args:
        named: how errors begin.
        stored: the tensors of the adapter; those that are used are taken out.
        wanted: the trained parameters before training.
        adapters: those of the model's experts.
        lora: the settings.

    Raises:
        UserError: an expert's rank there is larger than here, or the router has low-rank factors and is frozen here.
    """
    reader = _Reader(named, stored, Scaling(lora.alpha, lora.rank_stabilised))
    adapted = [adapter for of_block in adapters.values() for adapter in of_block.values()]
    found: dict[str, torch.Tensor] = {}
    needed: dict[tuple[str, str], list[int]] = {}
    for block, projection in itertools.product(adapters, lora.projections if adapted else []):
        names = [f"{block}.{projection}_lora_{letter}" for letter in "AB"]
        # a block may have none, and is filled up with zeros in what we export
        adapter = adapters[block].get(projection) or replace(adapted[0], ranks=(0,) * len(adapted[0].ranks))
        like = next(f"{other}.{projection}_lora_" for other, of_block in adapters.items() if projection in of_block)
        sizes = (wanted[f"{like}B"].shape[1], wanted[f"{like}A"].shape[1])
        theirs = [reader.projection(block, projection, expert, sizes) for expert in range(len(adapter.ranks))]
        needed[block, projection] = [factors.rank for factors in theirs]
        if projection in adapters[block] and all(map(operator.le, needed[block, projection], adapter.ranks)):
            A_RI, B_RO = wanted[names[0]].clone(), torch.zeros_like(wanted[names[1]])
            for factors, rows, scale in zip(theirs, adapter.rows, adapter.scales, strict=True):
                if factors.rank:
                    A_RI[rows][: factors.rank] = factors.A
                    B_RO[rows][: factors.rank] = factors.B.T / scale
            found |= dict(zip(names, (A_RI, B_RO), strict=True))
    _check_ranks(named, needed, adapters)
    return found | _routers(reader, wanted)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes factors out of an adapter's tensors."""

    named: str
    stored: dict[str, torch.Tensor]
    scaling: Scaling

    def projection(self, block: str, projection: str, expert: int, sizes: tuple[int, int]) -> Factors:
        """The factors of an expert's projection of these sizes (out, in), out of those of its matrices."""
        matrices = MATRICES[f"experts.{projection}"]
        height = sizes[0] // len(matrices)
        parts = [self.layer(original_name(f"{block}.{expert}.{m}"), (height, sizes[1])) for m in matrices]
        if all(part.rank and torch.equal(part.A, parts[0].A) for part in parts):
            joined = Factors(parts[0].A, torch.cat([part.B for part in parts]))
        else:
            joined = Factors(torch.cat([part.A for part in parts]), torch.block_diag(*(part.B for part in parts)))
        used = (joined.A != 0).any(1) | (joined.B != 0).any(0)  # zeros in both fill up a rank, and would never move
        return Factors(joined.A[used], joined.B[:, used])

    def layer(self, name: str, sizes: tuple[int, int]) -> Factors:
        """The factors of a layer of these sizes (out, in), of rank 0 if there are none; in float32 or wider."""
        keys = [f"{PREFIX}{name}.lora_{letter}.weight" for letter in "AB"]
        if not all(key in self.stored for key in keys):
            return Factors(torch.zeros(0, sizes[1]), torch.zeros(sizes[0], 0))
        A, B = (self.stored.pop(key) for key in keys)
        for key, tensor, shape in ((keys[0], A, (len(A), sizes[1])), (keys[1], B, (sizes[0], len(A)))):
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"{self.named}: its tensor {key} is {list(tensor.shape)}, not {list(shape)}; give an adapter of "
                    f"this base, as it was written"
                )
        B = B.to(torch.promote_types(B.dtype, torch.float32))
        return Factors(A.to(B.dtype), B * self.scaling(len(A)))


def _check_ranks(named: str, needed: dict[tuple[str, str], list[int]], adapters: dict[str, dict[str, Adapter]]) -> None:
    """Raises `UserError` if an expert's factors don't fit into the rank that it has here."""
    for (block, projection), ranks in needed.items():
        adapter = adapters[block].get(projection)
        for expert, rank in enumerate(ranks):
            ours = adapter.ranks[expert] if adapter else 0
            if rank > ours:
                own = ", since w1 and w3 have factors of their own," if projection == "gate_up_proj" else ""
                largest = ",".join(str(max(of_expert)) for of_expert in zip(*needed.values(), strict=True))
                raise UserError(
                    f"{named}: its expert {expert} needs{own} rank {rank} in {block}.{projection}, and the settings "
                    f"give {ours}; give 'lora.expert_ranks=[{largest}]'"
                )


def _routers(reader: _Reader, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The routers' weights: stored in full, or the base's and low-rank factors."""
    routers = [name for name in wanted if name.endswith(".mlp.gate.weight")]
    low_rank = sorted(key for key in reader.stored if f"{BLOCK}gate.lora_A." in key)
    if low_rank and not routers:
        raise UserError(
            f"{reader.named}: its tensor {low_rank[0]} is a low-rank factor of a router, and training holds routers "
            f"whole; give lora.router=trained, which starts from their sum"
        )
    found = {}
    for router in routers:
        base = wanted[router]
        if (key := f"{PREFIX}{original_name(router)}") in reader.stored:
            found[router] = reader.stored.pop(key)
            continue
        factors = reader.layer(original_name(router.removesuffix(".weight")), (base.shape[0], base.shape[1]))
        found[router] = (base + factors.B @ factors.A).to(base.dtype)
    return found
