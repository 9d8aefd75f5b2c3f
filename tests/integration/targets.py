"""Two steps of every combination of what trains and how it is divided; run by the processes of test_targets.py, which
are forked once for all of them.

    python -m tests.integration.targets run_dir=DIRECTORY

writes DIRECTORY/{target}-{division}-{checkpointing}.json from process 0: losses, gradient norms, and what was trained.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from data.prepared.dataset import Batch
from data.schema import IGNORE_INDEX
from train.config.engine import DeepSpeedConfig, HardwareConfig, OptimConfig
from train.config.lora import LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import BatchArithmetic, TrainConfig
from train.engine import engine
from train.engine.processes import Processes, join_processes, leave_processes
from train.engine.shards import allocator_for
from train.loop import step
from train.model import mixtral
from train.model.loss import MixtralWithLoss

ATTENTION, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_up_proj", "down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "all": {},
    "all and routers": {"router": "trained"},
    "attention": {"projections": []},
    "one of attention": {"attention": ["o_proj"], "projections": []},
    "experts": {"attention": []},
    "experts and routers": {"attention": [], "router": "trained"},
    "gate and up": {"attention": [], "projections": ["gate_up_proj"]},
    "down": {"attention": [], "projections": ["down_proj"]},
    "one expert": {"attention": [], "experts": [1]},
    "the last layer's experts": {"attention": [], "experts": "by_load", "by_load": "experts"},
    "routers": {"attention": [], "projections": [], "router": "trained"},
    "everything": {"method": "none"},
}
DIVISIONS = {
    "none": DeepSpeedConfig(stage=0),
    "zero2": DeepSpeedConfig(stage=2),
    # 0: the nano model's parameters are so small that none would be sharded
    "zero3": DeepSpeedConfig(stage=3, persistence_threshold=0),
    "zero3 with offload": DeepSpeedConfig(
        stage=3, persistence_threshold=0, offload_optimizer="cpu", offload_param="cpu"
    ),
}
CHECKPOINTING = ("none", "attention", "full")
"""Values of `activation_checkpointing`."""
CASES = [
    (target, division, checkpointing)
    for target in TARGETS
    for division in DIVISIONS
    for checkpointing in CHECKPOINTING
    if checkpointing != "attention" or division in ("none", "zero3")
]
"""Every target under every division, with all recomputed and with nothing; and attention alone, where nothing is
sharded and where all is."""

ARCHITECTURE = ArchitectureConfig(
    vocab_size=500,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    initializer_range=0.2,
)
STEPS, ACCUMULATION = 2, 2
LEARNING_RATE = 1e-2
COMPILER = "torch._inductor.compile_fx"


def case(target: str, division: str, checkpointing: str) -> str:
    """The name of a combination."""
    return f"{target}-{division}-{checkpointing}"


def settings(target: str, division: str, checkpointing: str, directory: Path) -> TrainConfig:
    """Of one combination."""
    lora = LoraConfig(rank=4, alpha=8, **TARGETS[target])
    if lora.experts == "by_load":
        lora.load, lora.budget = str(directory / "load.json"), 4 * 4 * (32 + 2 * 48 + 48 + 32)
    return TrainConfig(
        model=ModelConfig(path=str(directory / "base"), dtype="float32"),
        lora=lora,
        deepspeed=DIVISIONS[division],
        optim=OptimConfig(clip=1e9),
        activation_checkpointing=checkpointing,
    )


def rows(number: int, rank: int) -> list[Batch]:
    """The micro-batches of a process in a step: two conversations and padding in each."""
    made = []
    for index in range(ACCUMULATION):
        generator = torch.Generator().manual_seed(100 * number + 10 * index + rank)
        ids = F.pad(torch.randint(3, 500, (1, 30), generator=generator), (0, 2))
        positions = torch.cat([torch.arange(18), torch.arange(12), torch.arange(2)])[None]
        targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
        targets[:, ::3] = targets[:, 17] = IGNORE_INDEX
        targets[:, 29:] = IGNORE_INDEX
        made.append(Batch(ids=ids, positions=positions, targets=targets, is_token=torch.arange(32)[None] < 30))
    return made


def trained(config: TrainConfig, processes: Processes) -> dict[str, Any]:
    """Losses, gradient norms and the sum over each trained parameter after STEPS steps."""
    batch = BatchArithmetic(1, ACCUMULATION, processes.count)
    built = mixtral.build(config, allocator_for(config, batch, processes.device), device=processes.device)
    trainer = engine.Engine(MixtralWithLoss(built, with_router_loss=True), config, batch, processes)
    trainer.train()
    results = [step(trainer, rows(number, processes.rank), number, LEARNING_RATE, config) for number in (1, 2)]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.update.gradient_norm for result in results],
        "applied": [result.update.applied for result in results],
        "parameters": {
            name: [float(state["master"].double().sum()), float(state["master"].double().norm())]
            for name, state in trainer.state(moments=False)
            if state
        },
    }


def main(directory: Path) -> None:
    """Trains them all."""
    processes = join_processes(HardwareConfig(device="cpu"))
    if processes.is_main:
        torch.manual_seed(0)
        mixtral.random_base(ModelConfig(architecture=ARCHITECTURE, dtype="float32")).save_pretrained(directory / "base")
        (directory / "load.json").write_text(json.dumps({"tokens_per_expert": [[1] * 4, [9] * 4]}))
    torch.distributed.barrier()
    for which in CASES:
        try:
            found = trained(settings(*which, directory), processes)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        if processes.is_main:
            (directory / f"{case(*which)}.json").write_text(json.dumps(found))
    assert COMPILER not in sys.modules, "importing it takes seconds, and nothing was compiled"
    leave_processes()


if __name__ == "__main__":
    (run_dir,) = (word.removeprefix("run_dir=") for word in sys.argv if word.startswith("run_dir="))
    main(Path(run_dir))
