"""One training process of `benchmark.py step`: ours or TRL's, made to take its steps one at a time, on demand.

    python -m benchmarks.harness.trainers ours|trl SETTINGS      (SETTINGS: the fields of `Settings` as JSON)

The process answers on its standard output in lines of JSON: one when the trainer is ready, one for each line `step` on
its standard input, one with its peak memory when the input ends. So the two can take turns on the same machine, and
the memory of each is its own.
"""

import gc
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.program.console import quiet_libraries

STATUS = Path("/proc/self/status")
ROUTER_AUX_LOSS = 0.001
"""The router loss's weight in SFTTrainer, which takes it from transformers' Mixtral configuration."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of both trainers."""

    model: str
    """The base model's directory."""
    dataset: str
    """The prepared dataset's directory."""
    lora_rank: int
    dtype: str
    """`bfloat16` or `float32`."""
    rows_per_step: int
    """Packed rows of one micro-batch, which is one step."""
    device: str
    """`cpu` or `cuda`."""
    threads: int
    checkpointing: bool
    stage: int
    """Our ZeRO stage."""
    weights: str = "bf16"
    """How ours holds the base: `bf16` or `nf4`."""
    compiled: bool = False
    """Whether torch compiles norms and rotary embedding of ours."""

    def order(self, rows: int) -> list[int]:
        """The order in which rows are taken: shuffled, because packing puts long conversations first."""
        return random.Random(0).sample(range(rows), rows)


def resident_mib(field: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


class Memory:
    """Peak memory above the loaded model: resident on the CPU, allocated on CUDA."""

    def __init__(self, model: Any, device: str):
        """Starts the count; the whole model is loaded by now, and all libraries are imported."""
        self._on_cuda = device == "cuda"
        for parameter in model.parameters():
            parameter.sum()  # weights that are memory-mapped become resident when they are touched
        gc.collect()
        if self._on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
            self._start = resident_mib("VmRSS")

    def peak_mib(self) -> float:
        """The peak so far, above the start."""
        if self._on_cuda:
            import torch

            return torch.cuda.max_memory_allocated() / 2**20 - self._start
        return resident_mib("VmHWM") - self._start


class Turns:
    """The other end of the line."""

    def __init__(self, memory: Memory, at_the_end: Any = dict):
        # What libraries print must not mix with the answers.
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._memory = memory
        self._at_the_end = at_the_end
        self._started = 0.0

    def answer(self, **values: Any) -> None:
        """Sends a line."""
        self._answers.write(json.dumps(values) + "\n")

    def wait(self) -> bool:
        """Waits for the next turn; False if there is none."""
        if not sys.stdin.readline():
            peak = self._memory.peak_mib()
            self.answer(peak_mib=peak, **self._at_the_end())
            return False
        self._started = time.perf_counter()
        return True

    def done(self, **values: Any) -> None:
        """Ends a turn."""
        self.answer(seconds=time.perf_counter() - self._started, **values)


def ours(settings: Settings) -> None:
    """The step of `python -m train`, on one process."""
    import deepspeed  # noqa: F401 - so that its memory is not counted
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralRotaryEmbedding

    from benchmarks.harness.peak import wait
    from data.prepared.dataset import PreparedDataset
    from train.config.engine import DeepSpeedConfig, HardwareConfig
    from train.config.lora import LoraConfig
    from train.config.model import ModelConfig
    from train.config.train import TrainConfig
    from train.engine import engine
    from train.engine.processes import join_processes
    from train.engine.shards import allocator_for
    from train.loop import step
    from train.model.loss import MixtralWithLoss
    from train.model.mixtral import build

    config = TrainConfig(
        dataset=settings.dataset,
        global_batch=settings.rows_per_step,
        micro_batch=settings.rows_per_step,
        router_aux_loss=ROUTER_AUX_LOSS,
        activation_checkpointing="full" if settings.checkpointing else "none",
        model=ModelConfig(path=settings.model, dtype=settings.dtype, weights=settings.weights),
        lora=LoraConfig(rank=settings.lora_rank, alpha=2 * settings.lora_rank),
        deepspeed=DeepSpeedConfig(stage=settings.stage),
        hardware=HardwareConfig(device=settings.device, threads=settings.threads),
    )
    config.check()
    table = PreparedDataset(settings.dataset).train
    processes = join_processes(config.hardware)
    batch = config.batch(processes.count)
    model = build(config, allocator_for(config, batch, processes.device), device=processes.device)
    if settings.device == "cuda":
        model.to("cuda")
    if settings.compiled:
        del os.environ["TORCHDYNAMO_DISABLE"]  # by quiet_libraries
        for module in model.modules():
            if isinstance(module, MixtralRMSNorm | MixtralRotaryEmbedding):
                module.compile(dynamic=False)
    memory = Memory(model, settings.device)
    frozen = {name: parameter.nbytes for name, parameter in model.named_parameters() if not parameter.requires_grad}
    base = {
        "base_mib": sum(frozen.values()) / 2**20,
        "layers_mib": sum(size for name, size in frozen.items() if ".layers." in name) / 2**20,
    }
    trainer = engine.Engine(MixtralWithLoss(model, with_router_loss=True), config, batch, processes)
    trainer.train()
    turns = Turns(memory, lambda: {"watching_seconds": watching_seconds(trainer, table, batch), **base})
    turns.answer(threads=torch.get_num_threads())
    order = settings.order(len(table))
    number = 0
    while turns.wait():
        number += 1
        first = (number - 1) * settings.rows_per_step
        rows = [order[index % len(order)] for index in range(first, first + settings.rows_per_step)]
        result = step(trainer, [table.batch(rows)], number, 1e-4, config)
        wait(settings.device)
        # with the router loss in it, as in the loss that TRL logs
        loss = result.loss + ROUTER_AUX_LOSS * result.load_balancing_loss
        turns.done(loss=loss, tokens=result.tokens, supervised_tokens=result.supervised_tokens)


def watching_seconds(trainer: Any, table: Any, batch: Any) -> float:
    """Seconds that noting the routers of one step takes: the median of many."""
    import torch

    from train.model.routing import Routing

    config = trainer.module.causal_lm.config
    first = table.batch(list(range(batch.micro_batch))).to(trainer.device)
    flat = [tensor.flatten() for tensor in (first.positions, first.targets, first.is_token)]
    shape = (len(flat[0]), config.num_local_experts)
    logits = tuple(torch.randn(shape, device=trainer.device) for _ in range(config.num_hidden_layers))
    took = []
    for _ in range(50):
        started = time.perf_counter()
        trainer.module.routing = Routing.of(logits, config.num_experts_per_tok, *flat)
        trainer.take_routing().record()
        took.append(time.perf_counter() - started)
    return sorted(took)[len(took) // 2]


def trl(settings: Settings) -> None:
    """TRL's SFTTrainer with PEFT's adapters on the same parameters."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaTokenizerFast, MixtralForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from benchmarks.harness.peak import wait
    from data.prepared.dataset import PreparedDataset
    from train.config.lora import ATTENTION_TARGETS, EXPERT_TARGETS

    torch.set_num_threads(settings.threads)
    table = PreparedDataset(settings.dataset).train
    rows = [table[index] for index in settings.order(len(table))]
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.ids for row in rows],
            "labels": [row.labels for row in rows],
            "seq_lengths": [row.lengths for row in rows],
        }
    )
    model = MixtralForCausalLM.from_pretrained(
        settings.model, dtype=getattr(torch, settings.dtype), trust_remote_code=False
    ).to(settings.device)
    model.config.use_cache = False
    memory = Memory(model, settings.device)
    turns = Turns(memory)

    class OneAtATime(TrainerCallback):
        """Waits before each step and answers after it."""

        step = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not turns.wait():
                os._exit(0)  # the trainer does not decide when it ends
            self.step = state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait(settings.device)
            self.seconds = time.perf_counter() - turns._started

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                first = self.step * settings.rows_per_step
                taken = [rows[(first + index) % len(rows)] for index in range(settings.rows_per_step)]
                turns.answer(
                    seconds=self.seconds,
                    loss=float(logs["loss"]),
                    tokens=sum(len(row.ids) for row in taken),
                    supervised_tokens=sum(label != -100 for row in taken for label in row.labels),
                )

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(Path(settings.dataset).parent / "trl"),
            per_device_train_batch_size=settings.rows_per_step,
            num_train_epochs=1000,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            padding_free=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            gradient_checkpointing=settings.checkpointing,
            bf16=settings.dtype == "bfloat16",
            use_cpu=settings.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=LlamaTokenizerFast(),
        peft_config=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=list(ATTENTION_TARGETS),
            target_parameters=[f"mlp.experts.{name}" for name in EXPERT_TARGETS],
        ),
        callbacks=[OneAtATime()],
    )
    turns.answer(threads=torch.get_num_threads())
    trainer.train()


if __name__ == "__main__":
    quiet_libraries()
    {"ours": ours, "trl": trl}[sys.argv[1]](Settings(**json.loads(sys.argv[2])))
