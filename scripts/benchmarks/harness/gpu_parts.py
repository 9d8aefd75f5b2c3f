"""What `benchmark.py gpu` measures in processes of its own: python -m benchmarks.harness.gpu_parts PART SETTINGS

A process each, so that one that fails, or leaves a GPU in no state to go on, ends nothing else. SETTINGS are the fields
of `Settings` as JSON; the last line of the output is the figures as JSON, or {"out_of_memory": true}.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.harness.peak import peak_flops, wait
from benchmarks.harness.trainers import resident_mib
from train.config.engine import DeepSpeedConfig, HardwareConfig
from train.config.lora import EXPERT_TARGETS, LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of every part."""

    device: str
    """`cuda` or `cpu`."""
    sizes: dict[str, int]
    """Those of the architecture; `num_hidden_layers` are as many as fit."""
    dataset: str
    """Rows that were prepared."""
    seconds: float
    """Seconds that measuring may take once everything is there."""
    tokens: list[int]
    """Numbers of tokens at which the grouped product and the loop are compared."""
    new_tokens: int
    """Tokens to generate."""
    stage: int = 2
    """ZeRO's."""

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(architecture=ArchitectureConfig(**self.sizes))


class Clock:
    """Repeats something until its time is over, and at least three times."""

    def __init__(self, settings: Settings):
        self._device, self._until = settings.device, time.perf_counter() + settings.seconds

    def median(self, run: Callable[[], Any]) -> float:
        """Seconds, of the repetitions after the first."""
        took: list[float] = []
        while len(took) < 4 or (time.perf_counter() < self._until and len(took) < 30):
            wait(self._device)
            started = time.perf_counter()
            run()
            wait(self._device)
            took.append(time.perf_counter() - started)
        return statistics.median(took[1:])


def ways(settings: Settings) -> dict[str, Any]:
    """A block by the grouped product and by the loop over experts, forward and backward."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from train.lora import factors, products, split_experts

    sizes = ("hidden_size", "intermediate_size", "num_local_experts")
    config = MixtralConfig(**{name: value for name, value in settings.sizes.items() if name in sizes})
    config._experts_implementation = split_experts.IMPLEMENTATION
    with torch.device(settings.device):
        block = MixtralSparseMoeBlock(config).to(torch.bfloat16)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02).requires_grad_(False)
    ranks, scaling = [[16] * config.num_local_experts], factors.Scaling(32)
    factors.attach(block, ranks=ranks, projections=EXPERT_TARGETS, scaling=scaling)
    figures: dict[str, Any] = {}
    for tokens in settings.tokens:
        shape = (1, tokens, config.hidden_size)
        x = torch.randn(shape, dtype=torch.bfloat16, device=settings.device, requires_grad=True)

        def run(x: torch.Tensor = x) -> None:
            block(x).sum().backward()

        chosen = products.way(x[0], (config.hidden_size, config.intermediate_size)).__name__
        of_tokens: dict[str, Any] = {"chosen": chosen}
        for way in (products.AllExperts, products.OneExpert):
            with mock.patch.object(products, "way", lambda x, sizes, way=way: way):
                of_tokens[f"{way.__name__}_ms"] = 1e3 * Clock(settings).median(run)
        figures[str(tokens)] = of_tokens
    return figures


def step(settings: Settings) -> dict[str, Any]:
    """A training step of as many layers, on prepared rows: its rate, and its memory by what takes it."""
    from benchmarks.step import needed_flops
    from data.prepared.dataset import PreparedDataset
    from data.schema import IGNORE_INDEX
    from train.engine.engine import Engine
    from train.engine.processes import join_processes
    from train.loop import step
    from train.model.loss import MixtralWithLoss
    from train.model.mixtral import build

    config = TrainConfig(
        dataset=settings.dataset,
        global_batch=1,
        router_aux_loss=0.02,
        activation_checkpointing="none",
        model=settings.model,
        lora=LoraConfig(),
        deepspeed=DeepSpeedConfig(
            stage=settings.stage, persistence_threshold=20_000_000, max_live_parameters=4_000_000_000
        ),
        hardware=HardwareConfig(device=settings.device, threads=1),
    )
    table = PreparedDataset(settings.dataset).train
    processes = join_processes(config.hardware)
    memory = Memory(settings.device)
    with torch.device(processes.device):
        model = build(config)
    memory.note("weights and factors")
    batch = config.batch(processes.count)
    trainer = Engine(MixtralWithLoss(model, with_router_loss=True), config, batch, processes)
    trainer.train()
    memory.note("engine: masters and buffers")
    cross_entropy, balance = trainer.forward(table.batch([0]))
    memory.note("kept by the forward")
    trainer.backward(cross_entropy / 1000 + balance)
    memory.note("gradients and moments")
    trainer.step(1e-4)
    memory.note("gradients and moments")

    numbers = iter(range(1, 10_000))

    def run() -> None:
        number = next(numbers)
        step(trainer, [table.batch([number % len(table)])], number, 1e-4, config)

    seconds = Clock(settings).median(run)
    rows = [table[index] for index in range(len(table))]
    supervised = [sum(label != IGNORE_INDEX for label in row.labels) for row in rows]
    sizes = model.config.to_dict()
    each = [needed_flops(sizes, row.lengths, trained) for row, trained in zip(rows, supervised, strict=True)]
    needed = statistics.mean(each)
    peak = peak_flops(settings.device, torch.bfloat16)
    return {
        "layers": settings.sizes["num_hidden_layers"],
        "seconds": seconds,
        "tokens_per_second": table.seq_len / seconds,
        "matrix_product_peak_tflops": peak / 1e12,
        "share_of_peak": needed / seconds / peak,
        "memory_gb": memory.parts | {"peak": memory.peak()},
    }


class Memory:
    """What is held, by what took it: allocated on CUDA, resident on the CPU."""

    def __init__(self, device: str):
        self._on_cuda = device == "cuda"
        self._before = self._held()
        self.parts: dict[str, float] = {}
        """GB."""

    def _held(self) -> float:
        return torch.cuda.memory_allocated() / 1e9 if self._on_cuda else resident_mib("VmRSS") * 2**20 / 1e9

    def note(self, part: str) -> None:
        """What came since the last note is that part's."""
        now = self._held()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._before
        self._before = now

    def peak(self) -> float:
        """GB."""
        return torch.cuda.max_memory_allocated() / 1e9 if self._on_cuda else resident_mib("VmHWM") * 2**20 / 1e9


def generate(settings: Settings) -> dict[str, Any]:
    """Tokens that one prompt is answered with, by the model as inference has it once the adapter is folded in."""
    from transformers import GenerationConfig

    from train.model.mixtral import random_base

    config = settings.model
    config.attention = "sdpa"
    with torch.device(settings.device):
        model = random_base(config).eval()
    model.set_experts_implementation("grouped_mm")
    prompt = torch.randint(3, 1000, (1, 32), device=settings.device)
    length = {"max_new_tokens": settings.new_tokens, "min_new_tokens": settings.new_tokens}
    how = GenerationConfig(**length, do_sample=False, pad_token_id=0)

    def run() -> None:
        with torch.no_grad():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=how)

    seconds = Clock(settings).median(run)
    return {
        "layers": settings.sizes["num_hidden_layers"],
        "seconds": seconds,
        "tokens_per_second": settings.new_tokens / seconds,
    }


if __name__ == "__main__":
    part, given = sys.argv[1:]
    try:
        figures = {"ways": ways, "step": step, "generate": generate}[part](Settings(**json.loads(given)))
    except torch.OutOfMemoryError:
        figures = {"out_of_memory": True}
    print(json.dumps(figures), flush=True)
