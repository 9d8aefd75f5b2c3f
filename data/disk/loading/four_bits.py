"""The bytes of parameters in four bits, quantised from the files: any of them, without the weights of the others."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data.disk import nf4
from data.disk.loading.parameters import Parameters

AT_ONCE = 1 << 20
"""Weights that are quantised at a time, whole blocks: they and their float32 copies lie in memory meanwhile."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes of a quantised parameter from `start` on, to be filled into `out`.

    A parameter is one matrix after another, each its packed weights and then its scales. A byte of either needs the
    block of weights that it comes from; so a process that holds the scales of a matrix alone reads all of its weights.
    """

    parameters: Parameters
    name: str
    matrix: int
    """Weights of a matrix."""
    start: int
    out: torch.Tensor

    @property
    def size(self) -> int:
        """Bytes of the files that are to be read."""
        return sum(self.parameters.size(self.name, first, last) for _, first, last in self._needed())

    def read(self, dtype: torch.dtype, device: torch.device) -> Iterator[int]:
        """Fills `out` with what weights of that dtype are quantised to, on that device.

        Yields:
            The bytes of each block that was read.

        Raises:
            UserError: a file can't be read.
        """
        buffer = torch.empty(AT_ONCE, dtype=dtype)
        for index, first, last in self._needed():
            for at in range(first, last, AT_ONCE):
                weights = buffer[: min(AT_ONCE, last - at)]
                yield from self.parameters.read(self.name, at, weights)
                self._keep(nf4.quantised(weights.to(device)), index, at - index * self.matrix, len(weights))

    def _needed(self) -> Iterator[tuple[int, int, int]]:
        """The number of each matrix, and the weights whose blocks `out` has bytes of, counted through the parameter."""
        size, packed = nf4.size(self.matrix), self.matrix // 2
        stop = self.start + self.out.numel()
        for index in range(self.start // size, -(-stop // size)):
            first, last = max(self.start - index * size, 0), min(stop - index * size, size)
            of_packed = [(2 * first, 2 * min(last, packed))] if first < packed else []
            of_scales = [((max(first, packed) - packed) * 16, (last - packed) * 16)] if last > packed else []
            for begin, end in _joined([_whole_blocks(*weights) for weights in (*of_packed, *of_scales)]):
                yield index, index * self.matrix + begin, index * self.matrix + end

    def _keep(self, content: torch.Tensor, index: int, at: int, weights: int) -> None:
        """Copies what `out` wants of a quantised part of a matrix, which begins at its weight `at`."""
        of_matrix = index * nf4.size(self.matrix) - self.start
        for part, offset in (
            (content[: weights // 2], of_matrix + at // 2),
            (content[weights // 2 :], of_matrix + self.matrix // 2 + at // 16),
        ):
            first, last = max(offset, 0), min(offset + len(part), self.out.numel())
            if first < last:
                self.out[first:last].copy_(part[first - offset : last - offset])


def _whole_blocks(first: int, last: int) -> tuple[int, int]:
    return first // nf4.BLOCK * nf4.BLOCK, -(-last // nf4.BLOCK) * nf4.BLOCK


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that overlap as one."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined
