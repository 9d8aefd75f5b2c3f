"""A base in four bits and an adapter beside it: rounding to four bits would lose what the adapter adds.

Attention and experts hold NF4, and add the adapter's products in every forward. What the base keeps in 16 bits takes
its part of the adapter in, as in 16 bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from configs.program.errors import UserError
from data.disk import nf4
from data.disk.loading.layers import QuantisedLinear
from data.disk.mixtral_files import original_name
from inference.adapter import Adapter
from inference.peft_layers import LowRank


class Added:
    """What an adapter adds to the product of one matrix: s · B (A x), summed in the dtype of x."""

    def __init__(self, adapter: Adapter, matrix: str, like: torch.Tensor, dtype: torch.dtype):
        """Takes the factors from the adapter's file to the device of `like`.

        Raises:
            UserError: the adapter has another matrix in its place.
        """
        if not isinstance(adapter.updates[matrix], LowRank) or adapter.stored(matrix) is not None:
            raise UserError(
                f"adapter={adapter.directory}: it has a {matrix} of its own, which four bits would change; use "
                f"weights=bf16"
            )
        A, B, self.scaling = adapter.factors(matrix)
        self.A, self.B = (factor.to(like.device, dtype).contiguous() for factor in (A, B))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        return F.linear(F.linear(x, self.A) * self.scaling, self.B)


class AdaptedLinear(QuantisedLinear):
    """A linear layer of attention with what the adapter adds."""

    added: Added | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        out = super().forward(input)
        return out if self.added is None else out + self.added(input)


class AdaptedExperts(MixtralExperts):
    """A block's experts, dequantised one after the other, with what the adapter adds to w1, w2 and w3 of each."""

    added: dict[str, Added]
    """By the expert's number and the matrix: `3.w1`."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] → [T, H]; `top_k_index` and `top_k_weights` are [T, k]."""
        out_TH = torch.zeros_like(hidden_states)
        up_and_gate = torch.Size([2 * self.intermediate_dim, self.hidden_dim])
        for expert in top_k_index.unique().tolist():
            tokens, choices = (top_k_index == expert).nonzero(as_tuple=True)
            x = hidden_states[tokens]
            both = F.linear(x, nf4.dequantised(self.gate_up_proj[expert], up_and_gate, x.dtype))
            gate, up = both.chunk(2, dim=-1)
            activated = self.act_fn(self._sum(gate, f"{expert}.w1", x)) * self._sum(up, f"{expert}.w3", x)
            down = nf4.dequantised(
                self.down_proj[expert], torch.Size([self.hidden_dim, self.intermediate_dim]), x.dtype
            )
            y = self._sum(F.linear(activated, down), f"{expert}.w2", activated)
            out_TH.index_add_(0, tokens, (y * top_k_weights[tokens, choices, None]).to(out_TH.dtype))
        return out_TH

    def _sum(self, product: torch.Tensor, matrix: str, x: torch.Tensor) -> torch.Tensor:
        added = self.added.get(matrix)
        return product if added is None else product + added(x)


def layout(model: MixtralForCausalLM, allowed: list[int], *, in_turn: bool) -> dict[str, int] | None:
    """Which GPU holds which part of a model, by the parts' names; None if they have no room for it.

    Layers stay whole, so that only the residual stream goes from one GPU to the next.

    Args:
        model: in four bits, on the meta device.
        allowed: bytes of each GPU that weights may take.
        in_turn: whether one GPU after the other is filled; else each has as much as the others.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    memory, whole = dict(enumerate(allowed)), ["MixtralDecoderLayer"]
    if not in_turn:
        memory = get_balanced_memory(model, dict(memory), no_split_module_classes=whole)
    found: dict[str, int] = infer_auto_device_map(model, memory, no_split_module_classes=whole)
    return found if {"cpu", "disk"}.isdisjoint(found.values()) else None


def dispatch(model: MixtralForCausalLM, devices: dict[str, Any]) -> None:
    """Lets a model compute whose parts lie on these devices: what goes from one to the next is copied there."""
    from accelerate import dispatch_model

    dispatch_model(model, devices, skip_keys=model._skip_keys_device_placement, force_hooks=True)


def prepare(model: MixtralForCausalLM) -> None:
    """Lets a model that was loaded in four bits compute, without an adapter yet."""
    for module in model.modules():
        if type(module) is QuantisedLinear:
            module.__class__ = AdaptedLinear
        elif type(module) is MixtralExperts:
            module.__class__ = AdaptedExperts
            module.added = {}


def keep_apart(model: MixtralForCausalLM, adapter: Adapter) -> set[str]:
    """Puts the adapter beside all that is held in four bits; returns the matrices that it adds to, by original names.

    Raises:
        UserError: the adapter has another matrix in the place of one.
    """
    kept = set()
    for name, module in model.named_modules():
        for matrix, weight in _quantised(name, module):
            if matrix not in adapter.updates:
                continue
            added = Added(adapter, matrix, weight, model.dtype)
            if isinstance(module, AdaptedExperts):
                module.added[matrix.rpartition(".experts.")[2].removesuffix(".weight")] = added
            else:
                module.added = added
            kept.add(matrix)
    return kept


def _quantised(name: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of a module that are in four bits, by the names that files give them, and what holds each."""
    if isinstance(module, AdaptedLinear):
        yield f"{name}.weight", module.weight
    elif isinstance(module, AdaptedExperts):
        for expert in range(module.num_experts):
            for matrix, weight in (("w1", module.gate_up_proj), ("w3", module.gate_up_proj), ("w2", module.down_proj)):
                yield original_name(f"{name}.{expert}.{matrix}.weight"), weight
