"""Matrix products over rows that are sorted by expert, in one of two ways: `OneExpert` after another, or `AllExperts`
in torch's grouped product. `Group` is what they have in common; `way` chooses.

Shapes: E experts, P rows (token-expert pairs sorted by expert), r LoRA rank, R all ranks of a block one after another,
Q the largest rank, filled up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from train.lora.dispatch import Routed
from train.lora.factors import Adapter


def way(x: torch.Tensor, sizes: Sequence[int]) -> type["Group"]:
    """The way for rows like `x`, [rows, in], with matrices of these sizes.

    The grouped product needs a kernel, and rows of whole 16 bytes.
    """
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
    aligned = all(size * x.dtype.itemsize % 16 == 0 for size in sizes)
    return AllExperts if aligned and has_grouped_kernel(x.dtype, capability) else OneExpert


def has_grouped_kernel(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether torch has a kernel for the grouped product; `capability` is that of a CUDA device, None for another.

    It has one for bfloat16 on Hopper and on data-centre Blackwell. Elsewhere `F.grouped_mm` asks the device for the
    groups' ends and loops over them in every call; our own loop asks once in a forward and once in a backward. AMD's
    GPUs are among the rest, although ROCm's torch calls them CUDA devices and gives some of them Hopper's 9.
    """
    return dtype == torch.bfloat16 and capability is not None and capability[0] in (9, 10) and torch.version.hip is None


# Tuning for the CPU: a GPU would need neither filled rows nor tensors of one size.

ROW_MULTIPLE = 32
"""What an expert's rows are filled up to on the CPU in half precision.

oneDNN generates code for every new matrix height, which takes longer than a small product, and routing gives every
expert another height in every step. Filled up, heights repeat and the code comes from its cache; the price is at most
31 idle rows per expert.
"""


@dataclass(slots=True)
class Buffer:
    """Rows of one width for all experts, which the groups fill.

    `OneExpert` writes into one tensor that is as long as any routing of as many tokens needs: tensors of other sizes in
    every step would break glibc's heap into pieces. It also gives what is kept for the backward the same shape for
    every routing. `AllExperts` has nothing to put together, so its buffer is the result itself.
    """

    tensor: torch.Tensor


# The two ways


class Factors(NamedTuple):
    """The factors of a group's experts."""

    scale: Any
    """s, a number; or [P, 1], that of each row."""
    A: torch.Tensor
    """[r, in], or [E, Q, in] of all experts."""
    B: torch.Tensor
    """[r, out], or [E, Q, out]."""


class Group(ABC):
    """Rows that one matrix product serves, with what their experts have of weights, factors and gradients."""

    rows: slice
    """Among the P."""
    experts: Any
    """An index into [E, …]: one expert, or all."""

    @staticmethod
    @abstractmethod
    def row_multiple(x: torch.Tensor) -> int:
        """What each expert's rows are filled up to."""

    @staticmethod
    @abstractmethod
    def buffer(routed: Routed, like: torch.Tensor, width: int) -> Buffer:
        """An uninitialised one, with the dtype and device of `like`."""

    @staticmethod
    @abstractmethod
    def of(routed: Routed) -> Iterator["Group"]:
        """All rows, in groups."""

    @abstractmethod
    def factors(self, adapter: Adapter, A_RI: torch.Tensor, B_RO: torch.Tensor) -> Factors | None:
        """Those of the group's experts, out of a block's; None if they have no adapter."""

    @abstractmethod
    def put(self, adapter: Adapter, gradient: torch.Tensor, into: torch.Tensor) -> None:
        """Writes the gradient of an A or B of `factors` into that of the block, [R, …]."""

    @abstractmethod
    def times(self, x: torch.Tensor, weight: torch.Tensor, into: Buffer | None = None) -> torch.Tensor:
        """x W, [rows, out], which then is in the group's part of the buffer; `weight` is [in, out] or [E, in, out]."""

    @abstractmethod
    def add(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """total += x W, in place."""

    @abstractmethod
    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """yᵀ x, [out, in] or [E, out, in]: the gradient of a weight, zeros for experts without rows."""

    def part(self, tensor: torch.Tensor, width: int) -> torch.Tensor:
        """The group's part of a buffer that may be wider: [rows, width], contiguous."""
        rows = tensor[self.rows]
        return rows if rows.shape[1] == width else rows.flatten()[: len(rows) * width].view(-1, width)


@dataclass(frozen=True)
class OneExpert(Group):
    """The rows of one expert; the way of the CPU, and of GPUs without a grouped kernel."""

    rows: slice
    experts: int

    @staticmethod
    def row_multiple(x: torch.Tensor) -> int:
        return ROW_MULTIPLE if x.device.type == "cpu" and x.dtype.itemsize == 2 else 1

    @staticmethod
    def buffer(routed: Routed, like: torch.Tensor, width: int) -> Buffer:
        return Buffer(like.new_empty(len(routed.pair_P), width))

    @staticmethod
    def of(routed: Routed) -> Iterator[Group]:
        """One group for each expert that has rows. The device is asked for the experts' ends once."""
        start = 0
        for expert, end in enumerate(routed.ends_E.tolist()):
            if end > start:
                yield OneExpert(slice(start, end), expert)
            start = end

    def factors(self, adapter: Adapter, A_RI: torch.Tensor, B_RO: torch.Tensor) -> Factors | None:
        if not adapter.ranks[self.experts]:
            return None
        rows = adapter.rows[self.experts]
        return Factors(adapter.scales[self.experts], A_RI[rows], B_RO[rows])

    def put(self, adapter: Adapter, gradient: torch.Tensor, into: torch.Tensor) -> None:
        into[adapter.rows[self.experts]] = gradient

    def times(self, x: torch.Tensor, weight: torch.Tensor, into: Buffer | None = None) -> torch.Tensor:
        return x @ weight if into is None else torch.mm(x, weight, out=self.part(into.tensor, weight.shape[1]))

    def add(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        torch.addmm(total, x, weight, out=total)  # in one pass over the total

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.T @ x


@dataclass(frozen=True)
class AllExperts(Group):
    """All rows, in torch's grouped product: the host waits for nothing."""

    ends_E: torch.Tensor
    """int32, the end of each expert's rows."""
    unused_E11: torch.Tensor
    """bool, the experts without rows."""
    row_count: int
    """P."""

    rows = slice(None)
    experts = slice(None)

    @staticmethod
    def row_multiple(x: torch.Tensor) -> int:
        return 1

    @staticmethod
    def buffer(routed: Routed, like: torch.Tensor, width: int) -> Buffer:
        return Buffer(like.new_empty(0, width))

    @staticmethod
    def of(routed: Routed) -> Iterator[Group]:
        """One group."""
        ends_E = routed.ends_E
        unused_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        yield AllExperts(ends_E.to(torch.int32), unused_E.view(-1, 1, 1), len(routed.pair_P))

    def factors(self, adapter: Adapter, A_RI: torch.Tensor, B_RO: torch.Tensor) -> Factors:
        A, B = adapter.filled(A_RI), adapter.filled(B_RO)
        # The factors of an expert without an adapter are zeros, whatever they are scaled by.
        scales = {scale for scale in adapter.scales if scale}
        if len(scales) == 1:
            return Factors(scales.pop(), A, B)
        expert_P = torch.bucketize(torch.arange(self.row_count, device=A.device), self.ends_E, right=True)
        return Factors(adapter.scales_on(A.device)[expert_P].unsqueeze(-1), A, B)

    def put(self, adapter: Adapter, gradient: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(adapter.unfilled(gradient))

    def times(self, x: torch.Tensor, weight: torch.Tensor, into: Buffer | None = None) -> torch.Tensor:
        y = F.grouped_mm(x, weight, offs=self.ends_E)
        if into is not None:
            into.tensor = y
        return y

    def add(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        total += F.grouped_mm(x, weight, offs=self.ends_E)

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # On some GPUs the grouped product leaves arbitrary numbers for a group without rows (pytorch issue 172439).
        return F.grouped_mm(y.T, x, offs=self.ends_E).masked_fill_(self.unused_E11, 0)
