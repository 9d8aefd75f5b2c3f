"""A Mixtral on disk: which bytes of its files are which part of which parameter of transformers' model.

Files hold the experts in Mixtral's original names, a matrix each: `block_sparse_moe.experts.3.w1.weight` (gate), `w3`
(up) and `w2` (down). transformers' model holds them in two parameters, `mlp.experts.gate_up_proj` [E, 2I, H], w1 above
w3, and `down_proj` [E, H, I]; it can write those to files too. Both forms are read here, as pieces: ranges of bytes
that are one matrix in the original names.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk.tensor_file import StoredTensor
from data.disk.weights import REMEDY, StoredWeights

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

MOE = re.compile(r"(model\.layers\.\d+)\.(?:block_sparse_moe|mlp)\.(.+)")
EXPERT = re.compile(r"experts\.(\d+)\.(w[123])\.weight")


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor in Mixtral's original names."""

    stored: StoredTensor
    """Its original name, dtype, shape, and where its bytes lie."""
    parameter: str
    """The parameter of transformers' model that it is part of."""
    expert: int | None
    """The expert of that parameter; None where it is the whole."""
    rows: slice
    """The rows of that expert, or of the whole."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in torch."""
        return TORCH_DTYPES[self.stored.dtype]

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.stored.end - self.stored.begin

    def read(self) -> torch.Tensor:
        """The tensor."""
        content = torch.empty(self.size, dtype=torch.uint8)
        with self.stored.file.open("rb", buffering=0) as file:
            file.seek(self.stored.begin)
            got = file.readinto(content.numpy().data)
        assert got == self.size, self.stored
        return content.view(self.dtype).view(self.stored.shape)


def pieces(weights: StoredWeights, architecture: MixtralConfig, named: str) -> list[Piece]:
    """All pieces, in the order of the files and of the bytes in them.

    Raises:
        UserError: a tensor is quantised, missing, or not of this architecture.
    """
    found: list[Piece] = []
    for tensor in sorted(weights.tensors.values(), key=lambda tensor: (tensor.file, tensor.begin)):
        if tensor.dtype not in TORCH_DTYPES:
            raise UserError(
                f"{named}: its tensor {tensor.name} is stored as {tensor.dtype}; name a base in bfloat16, float16 or "
                f"float32"
            )
        found += _pieces_of(tensor, architecture)
    with torch.device("meta"):
        wanted = {name: parameter.numel() for name, parameter in MixtralForCausalLM(architecture).named_parameters()}
    for piece in found:
        if piece.parameter not in wanted:
            raise UserError(f"{named}: its tensor {piece.stored.name} is none of a Mixtral's; {REMEDY}")
        wanted[piece.parameter] -= math.prod(piece.stored.shape)
    if incomplete := [name for name, left in wanted.items() if left]:
        raise UserError(f"{named}: its tensor {incomplete[0]} is missing or of another size; {REMEDY}")
    return found


def _pieces_of(tensor: StoredTensor, architecture: MixtralConfig) -> Iterator[Piece]:
    moe = MOE.fullmatch(tensor.name)
    if moe is None:
        yield Piece(tensor, tensor.name, None, slice(None))
        return
    layer, rest = moe.groups()
    inner = architecture.intermediate_size
    places = {  # where each matrix of an expert lies in the model's parameters
        "w1": ("gate_up_proj", slice(0, inner)),
        "w3": ("gate_up_proj", slice(inner, 2 * inner)),
        "w2": ("down_proj", slice(0, architecture.hidden_size)),
    }
    if expert := EXPERT.fullmatch(rest):
        projection, rows = places[expert[2]]
        original = replace(tensor, name=f"{layer}.block_sparse_moe.{rest}")
        yield Piece(original, f"{layer}.mlp.experts.{projection}", int(expert[1]), rows)
    elif rest in ("experts.gate_up_proj", "experts.down_proj"):
        experts, height, width = tensor.shape
        row_bytes = (tensor.end - tensor.begin) // (experts * height)
        for number in range(experts):
            for name, (projection, rows) in places.items():
                if rest.endswith(projection):
                    begin = tensor.begin + (number * height + rows.start) * row_bytes
                    original = StoredTensor(
                        f"{layer}.block_sparse_moe.experts.{number}.{name}.weight",
                        tensor.dtype,
                        (rows.stop - rows.start, width),
                        tensor.file,
                        begin,
                        begin + (rows.stop - rows.start) * row_bytes,
                    )
                    yield Piece(original, f"{layer}.mlp.{rest}", number, rows)
    else:
        yield Piece(replace(tensor, name=f"{layer}.block_sparse_moe.{rest}"), f"{layer}.mlp.{rest}", None, slice(None))


STORED_MOE = re.compile(r"(model\.layers\.\d+)\.mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)")


def stored_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in Mixtral's original names that a parameter of transformers' model stands for.

    `gate_up_proj` [E, 2I, H] holds each expert's w1 (gate) above its w3 (up), `down_proj` [E, H, I] its w2.
    """
    moe = STORED_MOE.fullmatch(name)
    if moe is None:
        yield name, tensor
        return
    block = f"{moe[1]}.block_sparse_moe"
    if moe[2] == "gate.weight":
        yield f"{block}.gate.weight", tensor
        return
    names = ("w1", "w3") if moe[2] == "experts.gate_up_proj" else ("w2",)
    for number, expert in enumerate(tensor):
        for part, rows in zip(names, expert.chunk(len(names)), strict=True):
            yield f"{block}.experts.{number}.{part}.weight", rows
