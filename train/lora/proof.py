"""Proof that experts learn: a gradient for each at the first step, and how far each has moved at the end."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.lora.factors import Adapter, adapters

FEWEST = 2
"""The fewest tokens that prove something. If activations are computed again for the backward, a single one that stands
between two experts may fall to the other: the expert that was noted then has no gradient, and nothing is wrong."""


class ExpertNotLearningError(RuntimeError):
    """A targeted expert whose tokens reach the loss got no gradient."""


class FirstGradients:
    """Watches the experts' factors B through the backward of the first step.

    At first B is zero, and with it the gradient of A. The gradient of B is zero only if something between it and the
    loss is cut off.
    """

    def __init__(self, model: nn.Module):
        """Begins to watch."""
        self._factors: list[tuple[int, str, Adapter]] = []
        self._alive: list[torch.Tensor] = []
        self._hooks = []
        for layer, (block, of_block) in enumerate(adapters(model).items()):
            for projection, adapter in of_block.items():
                factor = model.get_parameter(f"{block}.{projection}_lora_B")
                alive_R = torch.zeros(sum(adapter.ranks), dtype=torch.bool)
                self._hooks.append(factor.register_hook(lambda gradient, alive_R=alive_R: _mark(alive_R, gradient)))
                self._factors.append((layer, projection, adapter))
                self._alive.append(alive_R)

    def found(self) -> list[float]:
        """1 for each factor and expert that got a gradient on this process, 0 for the others. Ends watching."""
        for hook in self._hooks:
            hook.remove()
        return [
            float(alive_R[rows].any())
            for (_, _, adapter), alive_R in zip(self._factors, self._alive, strict=True)
            for rows in adapter.rows
        ]

    def check(self, found: list[float], reaching_LE: torch.Tensor) -> None:
        """Compares what was found, summed over the processes, with the tokens of each expert that reach the loss.

        Raises:
            ExpertNotLearningError: an expert has `FEWEST` such tokens or more, and no gradient.
        """
        numbers = iter(found)
        for layer, projection, adapter in self._factors:
            for expert, rank in enumerate(adapter.ranks):
                alive, tokens = next(numbers) > 0, int(reaching_LE[layer, expert])
                if rank and tokens >= FEWEST and not alive:
                    raise ExpertNotLearningError(
                        f"layer {layer}, expert {expert}: {tokens:,} tokens of the first step reach the loss through "
                        f"it, and its adapter on {projection} got no gradient"
                    )


def _mark(alive_R: torch.Tensor, gradient: torch.Tensor) -> None:
    alive_R |= (gradient.detach() != 0).any(dim=1).cpu()


@dataclass(frozen=True, slots=True)
class Movement:
    """How far the adapters of one projection of one layer have moved."""

    layer: int
    projection: str
    ranks: tuple[int, ...]
    """The norms of each expert's adapter."""
    norms_E: list[float]
    """‖s_e · (B_e A_e − B₀ A₀)‖ (Frobenius) for each expert: how far what its adapter adds to the base's weight is from
    its beginning. A fresh one begins at 0."""

    def record(self) -> dict[str, Any]:
        """The fields of the receipt."""
        return {"layer": self.layer, "projection": self.projection, "ranks": self.ranks, "norms": self.norms_E}


def movements(
    model: nn.Module, tensors: dict[str, torch.Tensor], start: dict[str, torch.Tensor] | None = None
) -> list[Movement]:
    """The movement of every expert's adapter.

    Args:
        model: holds the adapters.
        tensors: the trained parameters, whole, by our names.
        start: those that training began from, if they were not fresh.
    """
    moved = []
    for layer, (block, of_block) in enumerate(adapters(model).items()):
        for projection, adapter in of_block.items():
            names = [f"{block}.{projection}_lora_{letter}" for letter in "AB"]
            A_RI, B_RO = (tensors[name].float() for name in names)
            began = [start[name].float() for name in names] if start is not None else None
            norms_E = []
            for rows, scale in zip(adapter.rows, adapter.scales, strict=True):
                A, B = A_RI[rows], B_RO[rows]
                if began is not None:
                    A0, B0 = (factor[rows] for factor in began)
                    # BA − B₀A₀ = B(A − A₀) + (B − B₀)A₀ is one product of twice the rank, exact where little has moved
                    A, B = torch.cat([A - A0, A0]), torch.cat([B, B - B0])
                # ‖BA‖² = tr(Bᵀ B · A Aᵀ): [r, r] matrices instead of a whole weight
                norms_E.append(scale * float(((B @ B.T) * (A @ A.T)).sum().clamp(min=0).sqrt()))
            moved.append(Movement(layer, projection, adapter.ranks, [float(f"{norm:.4g}") for norm in norms_E]))
    return moved
