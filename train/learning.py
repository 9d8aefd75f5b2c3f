"""Proof that experts learn: a gradient for each at the first step, and how far each has moved at the end."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.expert_lora import Adapter, expert_modules


class ExpertNotLearningError(RuntimeError):
    """A targeted expert whose tokens reach the loss got no gradient."""


class FirstGradients:
    """Watches the experts' factors B through the backward of the first step.

    At first B is zero, and with it the gradient of A; that of B is zero only where something between it and the loss is
    cut off.
    """

    def __init__(self, model: nn.Module):
        """Begins to watch."""
        self._places: list[tuple[int, str, Adapter]] = []
        self._alive: list[torch.Tensor] = []
        self._hooks = []
        for layer, experts in enumerate(expert_modules(model).values()):
            for projection, adapter in getattr(experts, "lora", {}).items():
                factor = getattr(experts, f"{projection}_lora_B")
                alive_E = torch.zeros(sum(rank > 0 for rank in adapter.ranks), dtype=torch.bool)
                self._hooks.append(factor.register_hook(lambda gradient, alive_E=alive_E: _mark(alive_E, gradient)))
                self._places.append((layer, projection, adapter))
                self._alive.append(alive_E)

    def found(self) -> list[float]:
        """1 for each factor and expert that got a gradient on this process, 0 for the others. Ends watching."""
        for hook in self._hooks:
            hook.remove()
        return torch.cat([*self._alive, torch.zeros(0, dtype=torch.bool)]).double().tolist()

    def check(self, found: list[float], reaching_LE: torch.Tensor) -> None:
        """Compares what was found, summed over the processes, with the tokens of each expert that reach the loss.

        Raises:
            ExpertNotLearningError: an expert has such tokens, and no gradient.
        """
        numbers = iter(found)
        for layer, projection, adapter in self._places:
            for expert, rank in enumerate(adapter.ranks):
                if not rank:
                    continue
                alive, tokens = next(numbers) > 0, int(reaching_LE[layer, expert])
                if tokens and not alive:
                    raise ExpertNotLearningError(
                        f"layer {layer}, expert {expert}: {tokens:,} tokens of the first step reach the loss through "
                        f"it, and its adapter on {projection} got no gradient"
                    )


def _mark(alive_E: torch.Tensor, gradient: torch.Tensor) -> None:
    alive_E |= (gradient.detach().flatten(1) != 0).any(dim=1).cpu()


@dataclass(frozen=True, slots=True)
class Movement:
    """How far the adapters of one projection of one layer have moved."""

    layer: int
    projection: str
    ranks: tuple[int, ...]
    """Of each expert's adapter."""
    norms_E: list[float]
    """‖s_e · B_e A_e‖ (Frobenius) for each expert: what the adapter adds to its weight, 0 at the start."""

    def record(self) -> dict[str, Any]:
        """For the receipt."""
        return {"layer": self.layer, "projection": self.projection, "ranks": self.ranks, "norms": self.norms_E}


def movements(model: nn.Module, tensors: dict[str, torch.Tensor]) -> list[Movement]:
    """The movement of every expert's adapter; `tensors` are the trained parameters, whole, by our names."""
    moved = []
    for layer, (name, experts) in enumerate(expert_modules(model).items()):
        for projection, adapter in getattr(experts, "lora", {}).items():
            A_ErI = tensors[f"{name}.{projection}_lora_A"].float()
            B_EOr = tensors[f"{name}.{projection}_lora_B"].float()
            # ‖BA‖² = tr(Bᵀ B · A Aᵀ): [r, r] matrices instead of a whole weight
            squares_E = ((B_EOr.mT @ B_EOr) * (A_ErI @ A_ErI.mT)).sum(dim=(1, 2)).clamp(min=0)
            stored = squares_E.sqrt().tolist()
            norms_E = [stored[adapter.places[e]] * scale if scale else 0.0 for e, scale in enumerate(adapter.scales)]
            moved.append(Movement(layer, projection, adapter.ranks, [float(f"{norm:.4g}") for norm in norms_E]))
    return moved
