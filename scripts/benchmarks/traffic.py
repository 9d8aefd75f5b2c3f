"""What one decoder layer's forward and backward move through the GPU's memory, by operation; needs no GPU.

The layer is traced on the meta device at Mixtral's real size, on the way that a Hopper GPU takes: every operation's
bytes and floating-point operations follow from the sizes of its tensors. Times are arithmetic: an operation takes as
long as its products at a rate that a GPU reaches, or as its bytes do, whichever is longer.
"""

import argparse
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._tracing import Sum, Trace
from train.config.lora import LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig
from train.lora import products
from train.model import attention, mixtral
from train.model.attention import Conversations

console = Console(width=120)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set."""
    parser.add_argument("--tokens", type=int, default=4096, help="of the packed row, one conversation (4096)")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters (0)")
    parser.add_argument("--checkpointing", choices=("none", "attention", "full"), default="none")
    parser.add_argument("--tflops", type=float, default=600, help="TFLOP/s that products reach (600, an H100)")
    parser.add_argument("--bandwidth", type=float, default=2.4, help="TB/s that memory reaches (2.4, an H100)")
    parser.add_argument("--least", type=float, default=0.05, help="GB that an operation must move to be listed (0.05)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Traces, prints, and returns the figures."""
    trace = trace_layer(options.tokens, options.lora_rank, options.dropout, options.checkpointing)
    _print(trace, options)
    figures: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(options).items()}}
    for phase in ("forward", "backward"):
        products_of, others = totals(trace, phase)
        figures[phase] = {"products": _record(products_of), "others": _record(others)}
    return figures


def trace_layer(tokens: int, lora_rank: int, dropout: float, checkpointing: str) -> Trace:
    """The second of two layers, so that its input needs a gradient as in all but the first."""
    config = TrainConfig(
        model=ModelConfig(architecture=ArchitectureConfig(num_hidden_layers=1)),
        lora=LoraConfig(rank=lora_rank, alpha=2 * lora_rank, dropout=dropout),
        activation_checkpointing=checkpointing,
    )
    with torch.device("meta"):
        model = mixtral.build(config).train().model
        x = torch.empty(1, tokens, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.arange(tokens)[None]
    conversations = Conversations(torch.arange(tokens))
    conversations.bounds = conversations.bounds.to("meta")
    rotary = model.rotary_emb(x, positions)
    trace = Trace()
    with _as_on_hopper(), trace:
        trace.phase = "forward"
        out = model.layers[0](x, position_embeddings=rotary, conversations=conversations)
        trace.phase = "backward"
        torch.autograd.backward(out, torch.empty_like(out))
    return trace


def _as_on_hopper() -> Any:
    """The layer takes the ways that it takes on a Hopper GPU."""
    stack = mock.patch.multiple(products, way=lambda x, sizes: products.AllExperts)
    flash = mock.patch.multiple(attention, _in_flash_attention=lambda query: True)
    from contextlib import ExitStack

    both = ExitStack()
    both.enter_context(stack)
    both.enter_context(flash)
    return both


def totals(trace: Trace, phase: str) -> tuple[Sum, Sum]:
    """Of matrix products and attention, and of all else."""
    found = (Sum(), Sum())
    for (of_phase, _, _), sums in trace.counted.items():
        if of_phase == phase:
            for one in sums:
                which = 0 if one.flops else 1
                found = (found[0] + one, found[1]) if which == 0 else (found[0], found[1] + one)
    return found


def _record(total: Sum) -> dict[str, Any]:
    return {"kernels": total.kernels, "gigabytes": total.moved / 1e9, "tflop": total.flops / 1e12}


def _print(trace: Trace, options: argparse.Namespace) -> None:
    for phase in ("forward", "backward"):
        table = Table("operation", "largest tensor", "kernels", "GB read", "GB written", "TFLOP", "ms", title=phase)
        rows = []
        for (of_phase, name, shape), sums in trace.counted.items():
            if of_phase == phase:
                total = sum(sums, Sum())
                ms = sum(one.seconds(options.tflops * 1e12, options.bandwidth * 1e12) for one in sums) * 1e3
                rows.append((total, name, shape, ms))
        for total, name, shape, ms in sorted(rows, key=lambda row: -row[0].moved):
            if total.moved >= options.least * 1e9:
                gigabytes = (f"{total.read / 1e9:.2f}", f"{total.written / 1e9:.2f}")
                table.add_row(name, str(list(shape)), str(total.kernels), *gigabytes, f"{total.flops / 1e12:.2f}", f"{ms:.2f}")
        console.print(table)
        of_products, others = totals(trace, phase)
        console.print(f"{phase}: products and attention {of_products.moved / 1e9:.2f} GB in {of_products.kernels} kernels, all else {others.moved / 1e9:.2f} GB in {others.kernels}")
