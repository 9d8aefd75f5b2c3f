"""What one decoder layer's forward and backward move through a GPU's memory, by operation; needs no GPU.

The layer is traced on the meta device at Mixtral's real size, on the way that a Hopper GPU takes: bytes and
floating-point operations follow from the sizes of the tensors. The times are arithmetic too: an operation takes as long
as its arithmetic at the rate that products reach, or as its bytes at the rate that memory reaches, whichever is longer.
"""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.tracing import Sum, Trace
from train.config.lora import LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig
from train.lora import products
from train.model import attention, mixtral
from train.model.attention import Conversations

PHASES = ("forward", "backward")
console = Console(width=120)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set."""
    parser.add_argument("--tokens", type=int, default=4096, help="of the packed row, one conversation (4096)")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters (0)")
    parser.add_argument("--checkpointing", choices=("none", "attention", "full"), default="none")
    parser.add_argument("--tflops", type=float, default=600, help="TFLOP/s that products reach (600, an H100)")
    parser.add_argument("--bandwidth", type=float, default=2.4, help="TB/s that memory reaches (2.4, an H100)")
    parser.add_argument("--least", type=float, default=0.05, help="GB that operations must move to be listed (0.05)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Traces, prints, and returns the figures."""
    trace = trace_layer(options.tokens, options.lora_rank, options.dropout, options.checkpointing)
    figures: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(options).items()}}
    for phase in PHASES:
        figures[phase] = {name: record(of, options) for name, of in totals(trace, phase).items()}
        _print(trace, phase, options, figures[phase])
    beside = sum(figures[phase]["beside products"]["gigabytes"] for phase in PHASES)
    ms = sum(of["ms"] for phase in PHASES for of in figures[phase].values())
    figures |= {"beside_products_gigabytes": beside, "layer_ms": ms}
    console.print(f"Beside products and attention the layer moves {beside:.2f} GB, and takes {ms:.1f} ms in all")
    return figures


def trace_layer(tokens: int, lora_rank: int, dropout: float, checkpointing: str) -> Trace:
    """A layer whose input needs a gradient, as that of all but the first does."""
    config = TrainConfig(
        model=ModelConfig(architecture=ArchitectureConfig(num_hidden_layers=1)),
        lora=LoraConfig(rank=lora_rank, alpha=2 * lora_rank, dropout=dropout),
        activation_checkpointing=checkpointing,
    )
    conversations = Conversations(torch.arange(tokens))
    with torch.device("meta"):
        model = mixtral.build(config).train().model
        x = torch.empty(1, tokens, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        rotary = model.rotary_emb(x, torch.arange(tokens)[None])
    conversations.bounds = conversations.bounds.to("meta")
    trace = Trace()
    with _as_on_hopper(), trace:
        trace.phase = "forward"
        # by name, as the model calls its layers
        others = {"attention_mask": None, "position_embeddings": rotary, "conversations": conversations}
        out = model.layers[0](x, **others)
        trace.phase = "backward"
        torch.autograd.backward(out, torch.empty_like(out))
    return trace


def kept_by_a_layer(tokens: int) -> int:
    """Bytes that a layer keeps for its backward, without its weights."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trace_layer(tokens, 16, 0.0, "none")
    return sum(kept.values())


def expected(tokens: int, layers: int, tflops: float, bandwidth: float) -> dict[str, float]:
    """What a step of one row takes on one GPU by arithmetic, and what share of the products' rate is needed work."""
    from benchmarks.step import needed_flops

    options = argparse.Namespace(tflops=tflops, bandwidth=bandwidth)
    trace = trace_layer(tokens, 16, 0.0, "none")
    ms = sum(milliseconds(each, options) for phase in PHASES for each in totals(trace, phase).values())
    sizes = asdict(ArchitectureConfig(num_hidden_layers=layers))
    head = 2 * 2 * sizes["hidden_size"] * sizes["vocab_size"] * tokens
    seconds = layers * ms / 1e3 + head / (tflops * 1e12)
    needed = needed_flops(sizes, [tokens], tokens)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "share_of_peak": needed / seconds / (tflops * 1e12),
    }


@contextlib.contextmanager
def _as_on_hopper() -> Iterator[None]:
    """Within it the layer goes the ways that are chosen on a Hopper GPU."""
    with (
        mock.patch.object(products, "way", lambda x, sizes: products.AllExperts),
        mock.patch.object(attention, "_in_flash_attention", lambda query: True),
    ):
        yield


def totals(trace: Trace, phase: str) -> dict[str, list[Sum]]:
    """The operations of a phase: matrix products and attention, and all else."""
    of_phase = [one for (where, _, _), each in trace.counted.items() if where == phase for one in each]
    return {
        "products": [one for one in of_phase if one.flops],
        "beside products": [one for one in of_phase if not one.flops],
    }


def milliseconds(each: list[Sum], options: argparse.Namespace) -> float:
    """That operations take, by arithmetic."""
    return 1e3 * sum(one.seconds(options.tflops * 1e12, options.bandwidth * 1e12) for one in each)


def record(each: list[Sum], options: argparse.Namespace) -> dict[str, Any]:
    """The sums, fit for JSON."""
    total = sum(each, Sum())
    figures = {"kernels": total.kernels, "gigabytes": total.moved / 1e9, "tflop": total.flops / 1e12}
    return figures | {"ms": milliseconds(each, options)}


def _print(trace: Trace, phase: str, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    table = Table("operation", "largest tensor", title=phase)
    for name in ("kernels", "GB read", "GB written", "TFLOP", "ms"):
        table.add_column(name, justify="right")
    rows = [(name, shape, each) for (where, name, shape), each in trace.counted.items() if where == phase]
    for name, shape, each in sorted(rows, key=lambda row: -sum(row[2], Sum()).moved):
        total = sum(each, Sum())
        if total.moved >= options.least * 1e9:
            numbers = (total.read / 1e9, total.written / 1e9, total.flops / 1e12, milliseconds(each, options))
            table.add_row(name, str(list(shape)), str(total.kernels), *(f"{number:.2f}" for number in numbers))
    for name, of in figures.items():
        moved = f"{of['gigabytes']:.2f} GB in all"
        table.add_row(name, moved, str(of["kernels"]), "", "", f"{of['tflop']:.2f}", f"{of['ms']:.2f}")
    console.print(table)
