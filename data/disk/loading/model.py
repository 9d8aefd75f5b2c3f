"""transformers' Mixtral with the weights of its files, each parameter in the memory that it is given."""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from configs.program.errors import UserError
from data.disk import nf4
from data.disk.adapter_directory import CONFIG as ADAPTER
from data.disk.loading.four_bits import Slice
from data.disk.loading.layers import quantise
from data.disk.loading.parameters import Parameters
from data.disk.loading.progress import progress
from data.disk.weights import StoredWeights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Allocate = Callable[[str, torch.Tensor], tuple[nn.Parameter, list[tuple[int, torch.Tensor]]]]
"""Allocates a parameter, given its name and one on the meta device. Returns the new parameter, and its ranges that this
process holds: of each, its offset in the flattened parameter, and a flat tensor to read it into."""


def whole_on(device: torch.device) -> Allocate:
    """Allocates each parameter whole on a device."""

    def allocate(name: str, parameter: torch.Tensor) -> tuple[nn.Parameter, list[tuple[int, torch.Tensor]]]:
        data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        return nn.Parameter(data, requires_grad=parameter.requires_grad), [(0, data.view(-1))]

    return allocate


def spread_over(devices: Mapping[str, int | str]) -> Allocate:
    """Allocates each parameter whole on the device of the part of the model that it is in, by the part's name."""

    def allocate(name: str, parameter: torch.Tensor) -> tuple[nn.Parameter, list[tuple[int, torch.Tensor]]]:
        (device,) = (device for part, device in devices.items() if f"{name}.".startswith(f"{part}."))
        return whole_on(torch.device(device))(name, parameter)

    return allocate


def load_model(
    directory: Path,
    architecture: MixtralConfig,
    named: str,
    allocate: Allocate,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "sdpa",
    weights_in: str = nf4.UNQUANTISED,
    shows_progress: bool = False,
) -> MixtralForCausalLM:
    """The model of a directory; errors begin with `named`.

    Beside what `allocate` allocates, no more is held than a block of `data.disk.loading.parameters`, or what
    `data.disk.loading.four_bits` quantises at a time.

    Args:
        directory: of the safetensors.
        architecture: what its config.json says.
        named: how errors call it.
        allocate: allocates each parameter.
        dtype: of the parameters, whatever that of the files is.
        device: of what is not a parameter; weights are quantised there, too.
        attention: transformers' name of it.
        weights_in: `bf16` leaves them in `dtype`; `nf4` has those of attention and experts in four bits, and frozen.
        shows_progress: whether a bar is shown meanwhile, if stderr is a terminal.

    Raises:
        UserError: the weights can't be read or quantised; or one is missing, there twice or of another size.
        ImportError: the package of the attention is not installed.
    """
    weights = StoredWeights(directory, named)
    if (directory / ADAPTER).exists():
        raise UserError(f"{named}: beside its weights lies an {ADAPTER}; move the adapter into a directory of its own")
    architecture = copy.deepcopy(architecture)
    architecture.name_or_path = str(directory)
    if architecture.tie_word_embeddings and not _same(weights, architecture):
        architecture.tie_word_embeddings = False  # the head in the files is one of its own
    parameters = Parameters(weights, architecture)
    with torch.device("meta"):
        model = MixtralForCausalLM._from_config(architecture, dtype=dtype, attn_implementation=attention)
    matrices = {name: parameter.shape[-2:].numel() for name, parameter in model.named_parameters()}
    if weights_in == nf4.FORM:
        quantise(model, named)
    # Its only buffers: they are computed, not read.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    slices: list[tuple[int, Iterator[int]]] = []
    for name, parameter in list(model.named_parameters()):
        made, parts = allocate(name, parameter)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made)
        for start, out in parts:
            if nf4.is_quantised(made):
                packed = Slice(parameters, name, matrices[name], start, out)
                slices.append((packed.size, packed.read(dtype, device)))
            else:
                size = parameters.size(name, start, start + out.numel())
                slices.append((size, parameters.read(name, start, out)))
    model.tie_weights()
    size = sum(size for size, _ in slices)
    with progress("Reading the base", size, shown=shows_progress) as advance, torch.no_grad():
        for _, sizes in slices:
            for size in sizes:
                advance(size)
    return model.eval()


def _same(weights: StoredWeights, architecture: MixtralConfig) -> bool:
    """Whether the files have no head, or one that is the embedding, as the architecture says that it is."""
    if HEAD not in weights.tensors:
        return True
    untied = copy.deepcopy(architecture)
    untied.tie_word_embeddings = False
    parameters = Parameters(weights, untied)
    both = (parameters.blocks(name, 0, untied.vocab_size * untied.hidden_size) for name in (EMBEDDING, HEAD))
    return all(torch.equal(one.float(), other.float()) for (_, one), (_, other) in zip(*both, strict=True))
