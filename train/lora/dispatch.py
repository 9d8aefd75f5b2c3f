"""Tokens to experts: rows sorted by expert, and products over them, grouped or expert by expert.

Shapes: E experts, T tokens, k experts per token, P rows (token-expert pairs sorted by expert).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

ROW_MULTIPLE = 32
"""What an expert's rows are filled up to on the CPU in half precision.

oneDNN generates code for every new matrix height, which takes longer than a small product, and routing gives every
expert another height in every step. Filled up, heights repeat and the code comes from its cache; the price is at most
31 idle rows per expert.
"""


def in_one_product(x: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Whether all experts go through torch's grouped product together, else one after another; the product needs rows
    of whole 16 bytes."""
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
    return has_grouped_kernel(x.dtype, capability) and all(size * x.dtype.itemsize % 16 == 0 for size in sizes)


def has_grouped_kernel(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether torch has a kernel for the grouped product; `capability` is that of a CUDA device, None for another.

    It has one for bfloat16 on Hopper and on data-centre Blackwell. Elsewhere `F.grouped_mm` asks the device for the
    groups' ends and loops over them in every call; our own loop asks once in a forward and once in a backward.
    """
    return dtype == torch.bfloat16 and capability is not None and capability[0] in (9, 10)


def row_multiple(x: torch.Tensor) -> int:
    """What the number of an expert's rows is filled up to."""
    return ROW_MULTIPLE if x.device.type == "cpu" and x.dtype.itemsize == 2 else 1


@dataclass(frozen=True, slots=True)
class Routed:
    """Where each token-expert pair stands when the pairs are sorted by expert: found once per block.

    top_k_index   | 1 0 | 0 2 |             tokens 0 and 1 of E = 3 experts; here filled up to multiples of 2 rows
    pair_P        | 1 2 | 0 - | 3 - |       the pair of each row, expert by expert; - is filling
    token_P       | 0 1 | 0 - | 1 - |       its token
    row_of_Tk     | 2 0 | 1 4 |

    The shapes are those of any routing of so many tokens. Where activations are computed again, a token that stands
    between two experts may fall to another one than before; the backward must then see that routing and no other, so
    what it needs comes from `tensors`, saved with the activations that belong to it.
    """

    row_of_Tk: torch.Tensor
    pair_P: torch.Tensor
    """With room for as many filling rows as there can be."""
    ends_E: torch.Tensor
    """Where the rows of each expert end, filling included."""
    in_one_product: bool
    token_P: torch.Tensor

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], in_one_product: bool) -> "Routed":
        """Of what `tensors` gave."""
        row_of_Tk, pair_P, ends_E = tensors
        return cls(row_of_Tk, pair_P, ends_E, in_one_product, pair_P // row_of_Tk.shape[1])

    @classmethod
    def found(cls, top_k_index: torch.Tensor, experts: int, in_one_product: bool, multiple: int) -> "Routed":
        """Of the routers' choices, each expert's rows filled up to a multiple."""
        device = top_k_index.device
        expert_S, order_S = top_k_index.flatten().sort(stable=True)
        # not bincount, which makes a CUDA device tell the host the largest expert first
        stops_E = torch.searchsorted(expert_S, torch.arange(experts, device=device), right=True)
        counts_E = stops_E.diff(prepend=stops_E.new_zeros(1))
        room_E = (counts_E + multiple - 1) // multiple * multiple
        spare_E = room_E - counts_E
        row_S = torch.arange(len(order_S), device=device) + (spare_E.cumsum(0) - spare_E)[expert_S]
        row_of_Tk = torch.empty_like(order_S)
        row_of_Tk[order_S] = row_S
        # Filling rows repeat the first pair: numbers like any other, which nothing reads and whose gradient is 0.
        pair_P = order_S.new_zeros(len(order_S) + experts * (multiple - 1))
        pair_P[row_S] = order_S
        return cls.of((row_of_Tk.view(top_k_index.shape), pair_P, room_E.cumsum(0)), in_one_product)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that the backward needs to know of the routing."""
        return self.row_of_Tk, self.pair_P, self.ends_E

    def groups(self) -> Iterator["Group"]:
        """All rows as one group, or those of each expert that has any."""
        if self.in_one_product:
            unused_E11 = (self.ends_E.diff(prepend=self.ends_E.new_zeros(1)) == 0).view(-1, 1, 1)
            yield Group(slice(None), slice(None), self.ends_E.to(torch.int32), unused_E11)
            return
        start = 0
        for expert, end in enumerate(self.ends_E.tolist()):
            if end > start:
                yield Group(slice(start, end), expert)
            start = end

    def room(self, like: torch.Tensor, size: int) -> torch.Tensor:
        """Uninitialised rows of that size, as many as any routing of so many tokens fills: tensors of other sizes in
        every step would break glibc's heap into pieces."""
        return like.new_empty(0 if self.in_one_product else len(self.pair_P), size)

    def choices(self, y_PH: torch.Tensor) -> Iterator[torch.Tensor]:
        """[T, H], the rows of the tokens' first choices, then of the second, …: they are added in this order, so
        every run gives the same bits; scattering with atomic additions would not on CUDA."""
        # index_select copies whole rows, where y[rows] goes element by element, slower on the CPU
        return (y_PH.index_select(0, row_T) for row_T in self.row_of_Tk.unbind(1))


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that one matrix product serves: those of one expert, or of all through torch's grouped product."""

    rows: slice
    expert: Any
    """An index into [E, …]: one expert, or all."""
    ends_E: torch.Tensor | None = None
    """Of all experts: int32, where the rows of each end."""
    unused_E11: torch.Tensor | None = None
    """Of all experts: those without rows."""

    def times(self, x: torch.Tensor, weight: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
        """x W, [rows, out]. `weight` is [in, out] of the expert, or [E, in, out]; one expert's product is written into
        its part of `room`, where that is given."""
        if self.ends_E is not None:
            return F.grouped_mm(x, weight, offs=self.ends_E)
        return x @ weight if room is None else torch.mm(x, weight, out=self.part(room, weight.shape[-1]))

    def part(self, room: torch.Tensor, width: int) -> torch.Tensor:
        """[rows, width], contiguous, of a room for the rows of all experts that is at least as wide."""
        rows = room[self.rows]
        return rows if rows.shape[1] == width else rows.flatten()[: len(rows) * width].view(-1, width)

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """yᵀ x, [out, in] or [E, out, in]: the gradient of a weight, zeros for experts without rows.

        On some GPUs torch's grouped product leaves arbitrary numbers for a group without rows (pytorch issue 172439).
        """
        if self.ends_E is None:
            return y.T @ x
        assert self.unused_E11 is not None
        return F.grouped_mm(y.T, x, offs=self.ends_E).masked_fill_(self.unused_E11, 0)

    def add(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """total += x W, in place; on one expert in one pass over the total."""
        if self.ends_E is None:
            torch.addmm(total, x, weight, out=total)
        else:
            total += F.grouped_mm(x, weight, offs=self.ends_E)
