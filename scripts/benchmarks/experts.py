"""One MoE block: its adapters split, against PEFT's target_parameters and against the frozen block without any.

Forward and backward of the block alone, bfloat16, the same tokens and the same routing: `ours` with adapters on both
projections, `frozen` the same block without (the floor), `peft` transformers' own grouped experts in PEFT's wrapper.
The routing is drawn again for every repetition, as it changes in every training step. The kinds take turns.
"""

import argparse
import copy
import os
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.harness.peak import peak_flops, wait
from train.config.lora import EXPERT_TARGETS
from train.engine.cpu import keep_freed_memory
from train.lora import factors, split_experts

console = Console(width=120)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set."""
    on_cuda = torch.cuda.is_available()
    hidden, intermediate = (4096, 14336) if on_cuda else (1024, 3584)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_cuda else "cpu")
    parser.add_argument("--hidden", type=int, default=hidden, help=f"({hidden}; 4,096 on CUDA)")
    parser.add_argument("--intermediate", type=int, default=intermediate, help=f"({intermediate}; 14,336 on CUDA)")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096 if on_cuda else 1024)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15, help="timed repetitions of each kind (15)")
    parser.add_argument("--warmup", type=int, default=8, help="repetitions before them, not timed (8)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the figures."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    blocks = _blocks(options)
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    peaks, errors = [], []
    for number in range(options.warmup + options.steps):
        x = torch.randn(1, options.tokens, options.hidden, dtype=torch.bfloat16, device=options.device)
        outputs = {}
        for name in sorted(blocks, reverse=bool(number % 2)):
            outputs[name], took = _forward_backward(blocks[name], x)
            if number >= options.warmup:
                seconds[name].append(took)
        errors.append(float((outputs["ours"] - outputs["peft"]).norm() / outputs["peft"].norm()))
        if number >= options.warmup:
            peaks.append(peak_flops(options.device, torch.bfloat16))
    memory = {name: _peak_mib(block, options) for name, block in blocks.items()} if options.device == "cuda" else {}
    needed = 2 * 2 * options.tokens * 2 * 3 * options.hidden * options.intermediate
    pairs = list(zip(seconds["ours"], seconds["peft"], seconds["frozen"], peaks, strict=True))
    figures = {
        "settings": {key: str(value) for key, value in vars(options).items()},
        "seconds": seconds,
        "median_ms": {name: 1e3 * statistics.median(took) for name, took in seconds.items()},
        "speedup_over_peft": statistics.median(peft / ours for ours, peft, _, _ in pairs),
        "over_the_frozen_floor": statistics.median(ours / frozen for ours, _, frozen, _ in pairs),
        "matrix_product_peak_gflops": statistics.median(peaks) / 1e9,
        "share_of_peak": statistics.median(needed / ours / peak for ours, _, _, peak in pairs),
        "largest_difference_from_peft": max(errors),
        "memory_above_model_mib": memory,
    }
    _print(figures)
    return figures


def _blocks(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The three, with the same weights and factors."""
    config = MixtralConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_local_experts=options.experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(options.device):
        stock = MixtralSparseMoeBlock(config).to(torch.bfloat16)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.02)
    stock.requires_grad_(False)
    ours, frozen = copy.deepcopy(stock), copy.deepcopy(stock)
    for block in (ours, frozen):
        block.experts.config = copy.deepcopy(config)
        block.experts.config._experts_implementation = split_experts.IMPLEMENTATION
    ranks = [[options.lora_rank] * options.experts]
    scaling = factors.Scaling(2 * options.lora_rank)
    factors.attach(ours, ranks=ranks, projections=EXPERT_TARGETS, scaling=scaling)
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in EXPERT_TARGETS],
    )
    peft = get_peft_model(stock, lora, autocast_adapter_dtype=False)
    for projection in EXPERT_TARGETS:
        for letter in "AB":
            factor = getattr(ours.experts, f"{projection}_lora_{letter}").data
            nn.init.normal_(factor, std=0.02)
            inner = ".base_layer" if projection == "gate_up_proj" else ""
            theirs = peft.get_parameter(f"base_model.model.experts{inner}.lora_{letter}.default.weight")
            theirs.data.copy_(
                factor if letter == "A" else factor.unflatten(0, (options.experts, -1)).permute(2, 1, 0).flatten(1)
            )
    return {"ours": ours, "peft": peft, "frozen": frozen}


def _forward_backward(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The output, and the seconds that it and the gradients took."""
    x = x.clone().requires_grad_()
    wait(x.device.type)
    started = time.perf_counter()
    out = block(x)
    out.backward(torch.ones_like(out))
    wait(x.device.type)
    took = time.perf_counter() - started
    for parameter in block.parameters():
        parameter.grad = None
    return out.detach().float(), took


def _peak_mib(block: nn.Module, options: argparse.Namespace) -> float:
    """Peak memory on CUDA above the three blocks."""
    x = torch.randn(1, options.tokens, options.hidden, dtype=torch.bfloat16, device=options.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _forward_backward(block, x)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _print(figures: dict[str, Any]) -> None:
    table = Table("", "ours", "PEFT", "frozen block", title="One MoE block, forward and backward")
    median = figures["median_ms"]
    table.add_row("ms (median)", *(f"{median[name]:,.1f}" for name in ("ours", "peft", "frozen")))
    ratio = (1, 1 / figures["speedup_over_peft"], figures["over_the_frozen_floor"])
    table.add_row("ours is", "", f"{1 / ratio[1]:.2f} times as fast", f"{ratio[2]:.2f} of its time")
    if memory := figures["memory_above_model_mib"]:
        table.add_row("MiB on top", *(f"{memory[name]:,.0f}" for name in ("ours", "peft", "frozen")))
    console.print(table)
    share, peak = figures["share_of_peak"], figures["matrix_product_peak_gflops"]
    console.print(f"{share:.1%} of the matrix-product peak, {peak:,.0f} GFLOP/s, without counting adapters")
