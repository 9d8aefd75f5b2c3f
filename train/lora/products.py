"""Matrix products over rows that are sorted by expert, in one of two ways: `OneExpert` after another, or `AllExperts`
in torch's grouped product. `Group` is what they have in common; `way` chooses.

The two differ in the products with factors as well. One expert's rows meet its own factors alone. With all experts'
rows at once, a grouped product could not add to what is there: it would write a second tensor as large as the output,
to be read again by an addition. So all rows meet all factors in one plain product, which can add, and what does not
belong to a row's expert is multiplied by 0. That is E times the arithmetic of the factors, and still less time than the
memory takes to bring the rows, up to ranks of about 64.

Shapes: E experts, P rows (token-expert pairs sorted by expert), r LoRA rank, R all ranks of a block one after another.
"""

import functools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from configs.program.console import console
from configs.program.errors import one_line
from train.lora.dispatch import Routed
from train.lora.factors import Adapter


def way(x: torch.Tensor, sizes: Sequence[int]) -> type["Group"]:
    """The way for rows like `x`, [rows, in], with matrices of these sizes.

    The grouped product needs a kernel, and rows of whole 16 bytes.
    """
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
    aligned = all(size * x.dtype.itemsize % 16 == 0 for size in sizes)
    return AllExperts if aligned and has_grouped_kernel(x.dtype, capability) and works(x.device) else OneExpert


def has_grouped_kernel(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether torch has a kernel for the grouped product; `capability` is that of a CUDA device, None for another.

    It has one for bfloat16 on Hopper and on data-centre Blackwell. Elsewhere `F.grouped_mm` asks the device for the
    groups' ends and loops over them in every call; our own loop asks once in a forward and once in a backward. AMD's
    GPUs are among the rest, although ROCm's torch calls them CUDA devices and gives some of them Hopper's 9.
    """
    return dtype == torch.bfloat16 and capability is not None and capability[0] in (9, 10) and torch.version.hip is None


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the grouped product in bfloat16 gives what a loop gives on a device; asked once, at the first forward.

    If it doesn't, one line says so, and the loop over the experts is taken.
    """
    try:
        right = all(map(torch.equal, _trial(AllExperts, device), _trial(OneExpert, device)))
        reason = "" if right else "it gives other numbers than a plain product"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        right, reason = False, one_line(error)
    if not right and os.environ.get("RANK", "0") == "0":
        console.print(f"torch's grouped product doesn't work here ({reason}); a loop over the experts takes its place")
    return right


@torch.no_grad()
def _trial(way: type["Group"], device: torch.device) -> list[torch.Tensor]:
    """All products of a block, on whole numbers that are small enough to have no rounding; of four experts, one has a
    single row and one has none."""
    index = torch.tensor([[2], [0], [3], [2]] + [[3], [2]] * 14, device=device)
    routed = Routed.from_choices(index, 4, 1)

    def numbers(*shape: int, differ: int) -> torch.Tensor:
        every = torch.arange(math.prod(shape), device=device) % differ - differ // 2
        return every.view(shape).to(torch.bfloat16)

    x, dy, weight = numbers(32, 16, differ=5), numbers(32, 24, differ=3), numbers(4, 24, 16, differ=7)
    y, dx, d_weight = way.buffer(routed, x, 24), way.buffer(routed, x, 16), torch.zeros_like(weight)
    for group in way.of(routed):
        group.times(x[group.rows], weight[group.experts].mT, y)
        group.times(dy[group.rows], weight[group.experts], dx)
        d_weight[group.experts] = group.outer(dy[group.rows], x[group.rows])
    return [y.tensor, dx.tensor, d_weight]


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
    def rows_of_factors(self, adapter: Adapter) -> slice:
        """Among the R, those that the rows are multiplied with; none if the experts have no adapter."""

    @abstractmethod
    def scale(self, adapter: Adapter, low: torch.Tensor) -> torch.Tensor:
        """Multiplies the product of the rows and those rows of a factor by s in place, [rows, r]: by 0 where the row of
        the factor belongs to another expert."""

    @abstractmethod
    def times(self, x: torch.Tensor, weight: torch.Tensor, into: Buffer) -> torch.Tensor:
        """x W, [rows, out], which then is in the group's part of the buffer.

        `weight` is [in, out], or [E, in, out] with a matrix for each expert of the group.
        """

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

    def rows_of_factors(self, adapter: Adapter) -> slice:
        return adapter.rows[self.experts]

    def scale(self, adapter: Adapter, low: torch.Tensor) -> torch.Tensor:
        return low.mul_(adapter.scales[self.experts])

    def times(self, x: torch.Tensor, weight: torch.Tensor, into: Buffer) -> torch.Tensor:
        return torch.mm(x, weight, out=self.part(into.tensor, weight.shape[1]))

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.T @ x


@dataclass(frozen=True)
class AllExperts(Group):
    """All rows, in torch's grouped product: the host waits for nothing."""

    ends_E: torch.Tensor
    """int32, the end of each expert's rows."""
    expert_P: torch.Tensor
    """The expert of each row."""
    unused_E11: torch.Tensor
    """bool, the experts without rows."""

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
        expert_P = torch.bucketize(torch.arange(len(routed.pair_P), device=ends_E.device), ends_E, right=True)
        yield AllExperts(ends_E.to(torch.int32), expert_P, unused_E.view(-1, 1, 1))

    def rows_of_factors(self, adapter: Adapter) -> slice:
        return slice(0, sum(adapter.ranks))

    def scale(self, adapter: Adapter, low: torch.Tensor) -> torch.Tensor:
        return low.mul_(adapter.shares(low.device).index_select(0, self.expert_P))

    def times(self, x: torch.Tensor, weight: torch.Tensor, into: Buffer) -> torch.Tensor:
        into.tensor = F.grouped_mm(x, weight, offs=self.ends_E) if weight.dim() == 3 else x @ weight
        return into.tensor

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # On some GPUs the grouped product leaves arbitrary numbers for a group without rows (pytorch issue 172439).
        return F.grouped_mm(y.T, x, offs=self.ends_E).masked_fill_(self.unused_E11, 0)
