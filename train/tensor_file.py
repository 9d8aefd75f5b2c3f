"""Safetensors written one tensor after the other: what is written never has to be in memory together."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import xxhash

from configs.weights import header

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""What safetensors calls the dtypes that are stored; the last is the tests'."""


class TensorFile:
    """A file whose tensors are known by name, dtype and shape before the first of them is written."""

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]):
        """Writes the head; the tensors follow in this order.

        Raises:
            OSError: the file can't be written.
        """
        sizes = [(name, dtype, shape, math.prod(shape) * dtype.itemsize) for name, dtype, shape in tensors]
        self._path, self._hash = path, xxhash.xxh3_128()
        self._left: Iterator[tuple[str, torch.dtype, tuple[int, ...], int]] = iter(sizes)
        head = header((name, NAMES[dtype], shape, size) for name, dtype, shape, size in sizes)
        self._file = path.open("wb", buffering=0)
        self._put(memoryview(head))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor, on the CPU."""
        expected, dtype, shape, _ = next(self._left)
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, shape)
        self._put(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> str:
        """Ends the file, which is complete then; returns the hash of its bytes, that of `configs.weights.file_hash`."""
        assert next(self._left, None) is None, self._path
        self._file.close()
        return self._hash.hexdigest()

    def _put(self, view: memoryview) -> None:
        self._hash.update(view)
        try:
            while len(view):
                view = view[self._file.write(view) :]
        except OSError:
            self._file.close()
            raise
