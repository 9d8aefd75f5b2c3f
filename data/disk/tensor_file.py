"""Safetensors on disk: their headers, and files that are written one tensor after the other.

The tensors of a file never have to be in memory together. The format is an 8-byte little-endian length, a JSON header
that gives each tensor's dtype, shape and byte range, and the bytes (github.com/huggingface/safetensors).
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from configs.program.errors import one_line
from data.disk.files import BLOCK_BYTES
from data.disk.formats import sizes
from data.disk.formats.json_text import parse_json
from data.disk.formats.regular import UnreadableError, open_regular, read_at_most

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""What safetensors calls the dtypes that are stored; only tests store the last."""


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
        """Ends the complete file; returns the hash of its bytes, the same as that of `data.disk.files.file_hash`."""
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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: dtype as safetensors writes it (`BF16`), shape, and where its bytes lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def fill(out: torch.Tensor, file: Path, begin: int) -> None:
    """Fills a contiguous tensor on the CPU with a file's bytes from `begin` on.

    Not through a map of the file, whose pages would count as this process's, and for which it would wait with Python's
    lock held; and by blocks, so that a slow disk is seen to give something.

    Raises:
        OSError: the file can't be read.
        UnreadableError: it is not a regular file, or too short.
    """
    rest = out.flatten().view(torch.uint8).numpy().data
    with open_regular(file, linked=True) as stream:
        stream.seek(begin)
        while rest:
            if not (got := stream.readinto(rest[:BLOCK_BYTES])):  # type: ignore[attr-defined]  # unbuffered
                raise UnreadableError("it has become shorter")
            rest = rest[got:]


def header(tensors: Iterable[tuple[str, str, Iterable[int], int]]) -> bytes:
    """The head of a safetensors file that holds these in this order: name, dtype (`BF16`), shape, bytes of each."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, size in tensors:
        begin, end = end, end + size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of eight bytes
    return struct.pack("<Q", len(text)) + text


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file in the order of their bytes.

    The library safetensors opens it first. What that refuses is refused: offsets that overlap, leave gaps or don't fit
    dtype and shape, a file that is cut short or goes on.

    Raises:
        UnreadableError: it is not a safetensors file, or damaged.
    """
    with open_regular(file, linked=True) as stream:
        try:
            with safe_open(file, "np"):
                pass
        except (OSError, SafetensorError) as error:
            raise UnreadableError(one_line(error)) from error
        (length,) = struct.unpack("<Q", read_at_most(stream, 8))
        if length > sizes.HEADER:
            raise UnreadableError(f"its header is larger than {sizes.HEADER >> 20} MiB")
        header = parse_json(read_at_most(stream, length), dict[str, Any])
    start = 8 + length
    tensors = [
        StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, *(start + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    # The library lets a size of more than 63 bits pass if another is 0.
    if odd := next((tensor for tensor in tensors if max(tensor.shape, default=0) >= 1 << 63), None):
        raise UnreadableError(f"the shape {list(odd.shape)} of {odd.name} is out of bounds")
    return sorted(tensors, key=lambda tensor: tensor.begin)
