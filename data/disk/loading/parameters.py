"""The parameters of transformers' Mixtral, read from the model's files in slices."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MixtralConfig

from configs.program.errors import UserError
from data.disk.formats.regular import UnreadableError
from data.disk.mixtral_files import Piece, check_shapes, pieces
from data.disk.tensor_file import fill
from data.disk.weights import REMEDY, StoredWeights

BLOCK = 16 << 20
"""Bytes that are read at a time, and that lie in memory beside what they are read for."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Numbers of a parameter that lie one after the other in a file."""

    start: int
    stop: int
    """Which numbers of the parameter, counted through its rows."""
    dtype: torch.dtype
    file: Path
    begin: int
    """The byte of the file at which they begin."""


class Parameters:
    """A model's parameters by their names in transformers, known by the headers of its files.

    Numbers of a parameter are counted through its rows: those of `gate_up_proj` [E, 2I, H] are w1 of expert 0, w3 of
    expert 0, w1 of expert 1, …
    """

    def __init__(self, weights: StoredWeights, architecture: MixtralConfig):
        """Finds where each parameter lies.

        Raises:
            UserError: a tensor is missing, there twice, quantised or of another shape.
        """
        check_shapes(weights, architecture)
        self._named = weights.named
        self._runs: dict[str, list[_Run]] = {}
        for piece in pieces(weights, architecture, others=True):
            self._runs.setdefault(piece.parameter, []).append(_run(piece))
        for runs in self._runs.values():
            runs.sort(key=lambda run: run.start)

    def size(self, name: str, start: int, stop: int) -> int:
        """Bytes in the files of the numbers `start` to `stop` of a parameter."""
        return sum((b - a) * run.dtype.itemsize for run, a, b in self._within(name, start, stop))

    def blocks(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The numbers `start` to `stop` of a parameter, in order, at most `BLOCK` bytes at a time.

        Yields:
            The offset of the first number, and the numbers: flat, in the file's dtype, on the CPU. They last until the
            next block is asked for.

        Raises:
            UserError: a file can't be read.
        """
        buffer = torch.empty(BLOCK, dtype=torch.uint8)
        for run, first, last in self._within(name, start, stop):
            step = BLOCK // run.dtype.itemsize
            for at in range(first, last, step):
                block = buffer[: min(step, last - at) * run.dtype.itemsize].view(run.dtype)
                self._fill(run, at, block)
                yield at, block

    def read(self, name: str, start: int, out: torch.Tensor) -> Iterator[int]:
        """Fills `out`, flat, of any dtype and on any device, with the numbers of a parameter from `start` on.

        What lies in a file as it is wanted goes there without a copy.

        Yields:
            The bytes of each block that was read.

        Raises:
            UserError: a file can't be read.
        """
        stop = start + out.numel()
        if out.device.type == "cpu" and all(run.dtype == out.dtype for run, *_ in self._within(name, start, stop)):
            step = BLOCK // out.element_size()
            for run, first, last in self._within(name, start, stop):
                for at in range(first, last, step):
                    block = out[at - start : min(at + step, last) - start]
                    self._fill(run, at, block)
                    yield block.nbytes
            return
        for at, block in self.blocks(name, start, stop):
            out[at - start : at - start + block.numel()].copy_(block)
            yield block.nbytes

    def _within(self, name: str, start: int, stop: int) -> Iterator[tuple[_Run, int, int]]:
        """The runs that have some of these numbers, and which."""
        for run in self._runs[name]:
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                yield run, first, last

    def _fill(self, run: _Run, at: int, block: torch.Tensor) -> None:
        """Reads the numbers from `at` on."""
        try:
            fill(block, run.file, run.begin + (at - run.start) * run.dtype.itemsize)
        except (UnreadableError, OSError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self._named}: its {run.file.name} can't be read ({said}); {REMEDY}") from error


def _run(piece: Piece) -> _Run:
    """Where the numbers of a piece lie in their parameter."""
    start = 0
    if piece.expert is not None:
        height, width = piece.stored.shape
        start = (piece.expert * piece.matrices * height + piece.rows.start) * width
    stop = start + math.prod(piece.stored.shape)
    return _Run(start, stop, piece.dtype, piece.stored.file, piece.stored.begin)
