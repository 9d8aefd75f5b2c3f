"""A whole model on disk as transformers writes it, one parameter at a time: per-expert names, files of 5 GB."""

import copy
import json
import math
from pathlib import Path

import torch
from transformers import MixtralForCausalLM

from data.disk.mixtral_files import stored_parts
from data.disk.tensor_file import TensorFile
from data.disk.weights import INDEX, SINGLE
from data.template import ChatTokenizer

LARGEST_FILE = 5_000_000_000
"""Bytes after which the next file begins."""

Shape = tuple[int, ...]


class ModelFiles:
    """The files of one model, whose parameters are written in the order in which they were announced."""

    def __init__(self, directory: Path, shapes: dict[str, Shape], dtype: torch.dtype):
        """Divides the parameters among files, by transformers' names and full shapes; writes nothing yet."""
        self._directory, self._shapes, self._dtype = directory, shapes, dtype
        self._files: list[dict[str, Shape]] = [{}]
        self._file_of: dict[str, int] = {}
        size = 0
        for name, shape in shapes.items():
            own = math.prod(shape) * dtype.itemsize
            if size and size + own > LARGEST_FILE:
                self._files.append({})
                size = 0
            self._files[-1] |= {
                stored: tuple(part.shape) for stored, part in stored_parts(name, torch.empty(shape, device="meta"))
            }
            self._file_of[name] = len(self._files) - 1
            size += own
        self._open: TensorFile | None = None
        self._number = -1

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next parameter, in its full shape and on the CPU."""
        if self._file_of[name] != self._number:
            self._close()
            self._number += 1
            entries = [(stored, self._dtype, shape) for stored, shape in self._files[self._number].items()]
            self._open = TensorFile(self._directory / self._name(self._number), entries)
        assert self._open is not None
        for stored, part in stored_parts(name, tensor.to(self._dtype)):
            self._open.write(stored, part)

    def finish(self, model: MixtralForCausalLM, base: str | None = None) -> None:
        """Ends the last file; writes the index if there are several, the configuration and the tokenizer.

        `base` is the model that training started from; if it is a directory, the tokenizer's SentencePiece model is
        taken from there.
        """
        self._close()
        if len(self._files) > 1:
            total = sum(math.prod(shape) * self._dtype.itemsize for shape in self._shapes.values())
            names = {stored: self._name(number) for number, file in enumerate(self._files) for stored in file}
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        architecture = copy.deepcopy(model.config)
        architecture.use_cache = True  # only training computes without it
        architecture.architectures, architecture.dtype = [type(model).__name__], str(self._dtype).removeprefix("torch.")
        architecture.save_pretrained(self._directory)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(self._directory)
        ChatTokenizer.load().save(self._directory, Path(base) if base and Path(base).is_dir() else None)

    def _name(self, number: int) -> str:
        count = len(self._files)
        return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
