"""A Mixtral on disk: Mixtral's names and matrices in files ↔ the parameters of transformers' model.

Files hold the experts in Mixtral's original names, a matrix each: `block_sparse_moe.experts.3.w1.weight` (gate), `w3`
(up) and `w2` (down). transformers' model holds them in two parameters, `mlp.experts.gate_up_proj` [E, 2I, H], w1 above
w3, and `down_proj` [E, H, I]; it can write those to files too. Both forms are read here, as pieces: ranges of bytes
that are one matrix in the original names. `stored_parts` goes the other way, from a parameter to what files hold.
"""

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError, one_line
from data.disk.adapter_directory import CONFIG as ADAPTER
from data.disk.tensor_file import StoredTensor, fill
from data.disk.weights import REMEDY, StoredWeights

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

IN_BLOCK = re.compile(r"(model\.layers\.\d+)\.(?:block_sparse_moe|mlp)\.(.+)")
"""The name of a layer, and a name within its block of experts: in files, or in the model."""

EXPERT = re.compile(r"experts\.(\d+)\.(w[123])\.weight")
"""The number of an expert and one of its matrices, in a name within the block."""

MATRICES = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}
"""Which matrices of each expert a parameter of the model holds, one above the other in equal parts."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor in Mixtral's original names."""

    stored: StoredTensor
    """Its original name, dtype, shape, and where its bytes lie."""
    parameter: str
    """The parameter of transformers' model that it is part of."""
    expert: int | None
    """The expert of that parameter; None if it is all of the parameter."""
    rows: slice
    """The rows of that expert, or of the parameter."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in torch."""
        return TORCH_DTYPES[self.stored.dtype]

    @property
    def matrices(self) -> int:
        """How many matrices of each expert the parameter holds."""
        in_block = IN_BLOCK.fullmatch(self.parameter)
        return len(MATRICES.get(in_block[2], ("",))) if in_block else 1

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.stored.end - self.stored.begin

    def read(self) -> torch.Tensor:
        """The tensor."""
        content = torch.empty(self.size, dtype=torch.uint8)
        fill(content, self.stored.file, self.stored.begin)
        return content.view(self.dtype).view(self.stored.shape)


def pieces(weights: StoredWeights, architecture: MixtralConfig, *, others: bool = False) -> list[Piece]:
    """All pieces, in the order of the files and of the bytes in them.

    With `others`, tensors that are not a Mixtral's may be there too; they are left out.

    Raises:
        UserError: a tensor is quantised, missing, there twice, or not of this architecture.
    """
    named = weights.named
    tensors = _tensors(architecture)
    parts = {name: shape for _, of_tensor in tensors.values() for name, shape in of_tensor.items()}
    shapes = {name: shape for name, (shape, _) in tensors.items()} | parts
    stored = sorted(weights.tensors.values(), key=lambda tensor: (tensor.file, tensor.begin))
    if others:
        stored = [tensor for tensor in stored if original_name(tensor.name) in shapes]
    for tensor in stored:
        if tensor.dtype not in TORCH_DTYPES:
            raise UserError(
                f"{named}: its tensor {tensor.name} is stored as {tensor.dtype}; name a base in bfloat16, float16 or "
                f"float32"
            )
    found: dict[str, Piece] = {}
    for tensor in stored:
        shape = shapes.get(original_name(tensor.name))
        if shape is None:
            raise UserError(f"{named}: its tensor {tensor.name} is not one of a Mixtral's; {REMEDY}")
        if shape != tensor.shape:
            raise UserError(f"{named}: its tensor {tensor.name} is missing or of another size; {REMEDY}")
        for piece in _pieces_of(tensor):
            if piece.stored.name in found:
                raise UserError(f"{named}: its tensor {piece.stored.name} is there twice, by two names; {REMEDY}")
            found[piece.stored.name] = piece
    if missing := [name for name in parts if name not in found]:
        raise UserError(f"{named}: its tensor {missing[0]} is missing or of another size; {REMEDY}")
    return list(found.values())


def check_shapes(weights: StoredWeights, architecture: MixtralConfig) -> None:
    """Raises `UserError` unless each tensor of this architecture is in the files; others may be there too.

    transformers would allocate what is missing first, however much a config.json asks for.
    """
    held = {original_name(tensor.name): tensor for tensor in weights.tensors.values()}
    for whole, (shape, parts) in _tensors(architecture).items():
        for name, wanted in ({whole: shape} if whole in held else parts).items():
            if name not in held:
                raise UserError(f"{weights.named}: its tensor {name} is missing; {REMEDY}")
            if held[name].shape != wanted:
                raise UserError(
                    f"{weights.named}: its tensor {held[name].name} is {list(held[name].shape)}, and its config.json "
                    f"asks for {list(wanted)}; {REMEDY}"
                )


def _tensors(architecture: MixtralConfig) -> dict[str, tuple[torch.Size, dict[str, torch.Size]]]:
    """The tensors of a Mixtral by the names that files give them: the shape of each, and of the parts that may be there
    in its place."""
    with torch.device("meta"):
        parameters = dict(MixtralForCausalLM(architecture).named_parameters())
    return {
        original_name(name): (parameter.shape, {part: tensor.shape for part, tensor in stored_parts(name, parameter)})
        for name, parameter in parameters.items()
    }


def _pieces_of(tensor: StoredTensor) -> Iterator[Piece]:
    """The matrices in a stored tensor of the right shape."""
    in_block = IN_BLOCK.fullmatch(tensor.name)
    layer, inner = in_block.groups() if in_block else ("", "")
    if inner in MATRICES:
        experts, height, width = tensor.shape
        height //= len(MATRICES[inner])
        size = (tensor.end - tensor.begin) // (experts * len(MATRICES[inner]))
        for index, (number, matrix) in enumerate(itertools.product(range(experts), MATRICES[inner])):
            name = original_name(f"{layer}.mlp.experts.{number}.{matrix}.weight")
            begin = tensor.begin + index * size
            stored = StoredTensor(name, tensor.dtype, (height, width), tensor.file, begin, begin + size)
            yield Piece(stored, f"{layer}.mlp.{inner}", number, _rows(matrix, height))
        return
    yield Piece(replace(tensor, name=original_name(tensor.name)), *parameter_of(tensor.name, tensor.shape[0]))


def parameter_of(name: str, height: int) -> tuple[str, int | None, slice]:
    """The parameter of transformers' model that a matrix of files lies in, its expert, and its rows of that expert.

    `name` is that of a matrix, not of all experts' together, and `height` its number of rows.
    """
    in_block = IN_BLOCK.fullmatch(name)
    if in_block is None:
        return name, None, slice(None)
    expert = EXPERT.fullmatch(in_block[2])
    if expert is None:
        return f"{in_block[1]}.mlp.{in_block[2]}", None, slice(None)
    parameter = next(parameter for parameter, matrices in MATRICES.items() if expert[2] in matrices)
    return f"{in_block[1]}.mlp.{parameter}", int(expert[1]), _rows(expert[2], height)


def _rows(matrix: str, height: int) -> slice:
    """The rows of a matrix among those of its expert in the model's parameter."""
    return slice(height, 2 * height) if matrix == "w3" else slice(0, height)


def stored_parts(parameter: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of files, by Mixtral's original names, that a parameter of transformers' model stands for."""
    in_block = IN_BLOCK.fullmatch(parameter)
    matrices = MATRICES.get(in_block[2], ()) if in_block else ()
    if not matrices:
        yield original_name(parameter), tensor
        return
    block = parameter.rpartition(".")[0]
    for number, expert in enumerate(tensor):
        for matrix, rows in zip(matrices, expert.chunk(len(matrices)), strict=True):
            yield original_name(f"{block}.{number}.{matrix}.weight"), rows


def original_name(name: str) -> str:
    """A name as Mixtral's files have it: they call a layer's block of experts `block_sparse_moe`, the model `mlp`."""
    in_block = IN_BLOCK.fullmatch(name)
    return name if in_block is None else f"{in_block[1]}.block_sparse_moe.{in_block[2]}"


def load_mixtral(directory: Path, architecture: MixtralConfig, named: str, **how: Any) -> MixtralForCausalLM:
    """transformers' model with the weights of a directory, all of them from its safetensors; errors begin with `named`.

    `how` goes to `from_pretrained`: the dtype, the device, the attention.

    Raises:
        UserError: the weights can't be read, or one is missing.
    """
    from transformers.utils import logging

    # transformers would follow an index out of the directory, allocate whatever is missing, and load an adapter
    # that it finds there.
    check_shapes(StoredWeights(directory, named), architecture)
    if (directory / ADAPTER).exists():
        raise UserError(f"{named}: beside its weights lies an {ADAPTER}; move the adapter into a directory of its own")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model, loading = MixtralForCausalLM.from_pretrained(
            directory,
            config=architecture,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            generation_config=GenerationConfig.from_model_config(architecture),  # its file is not read
            **how,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{named}: no model can be loaded from there ({one_line(error)}); {REMEDY}") from error
    # transformers fills what a checkpoint lacks with random numbers and goes on.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{named}: its tensor {missing[0]} is missing; {REMEDY}")
    return model
