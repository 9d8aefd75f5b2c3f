"""What a step takes however little there is to compute: DeepSpeed's hooks, the update of many small tensors, and how
long a collective takes that sends next to nothing.

Measured with training's own engine on a Mixtral as narrow as can be, with one layer and with three: the difference is
what a layer adds.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from data.disk.nf4 import UNQUANTISED
from data.prepared.dataset import Batch
from train.config.lora import LoraConfig
from train.config.model import VOCABULARY, ArchitectureConfig
from train.config.train import TrainConfig
from train.engine.engine import Engine
from train.engine.processes import Processes, seed
from train.model import mixtral
from train.model.loss import MixtralWithLoss
from train.planning.given.sizes import Sizes, Tensor, sizes_of

STAGES = (0, 2, 3)
LAYERS = (1, 3)
WIDTH, RANK, TOKENS = 64, 8, 32
"""Of the narrow Mixtral, of its adapters (the least that a GPU's grouped product takes), and of its micro-batch."""
STEPS, NOT_COUNTED = 15, 4
"""Steps, and those of them that come first: ZeRO-3 learns the order of the modules in them."""
Beside = Mapping[str, float]
"""Seconds: of a `micro-step` and of the `update`, and what each layer adds to these, `micro-step of a layer` and
`update of a layer`."""


def seconds_beside(config: TrainConfig, sizes: Sizes, processes: Processes) -> dict[str, Beside]:
    """By ZeRO stage; collective.

    Args:
        config: of the run; its targets, what it computes again and its thresholds count.
        sizes: of the run's base and adapters.
        processes: of the launch.
    """
    return {str(stage): _of_stage(config, stage, sizes, processes) for stage in STAGES}


def _of_stage(config: TrainConfig, stage: int, sizes: Sizes, processes: Processes) -> Beside:
    few, more = (_Narrow(config, stage, sizes, layers, processes).measured() for layers in LAYERS)
    found: dict[str, float] = {}
    for name in few:
        each = max(0.0, (more[name] - few[name]) / (LAYERS[1] - LAYERS[0]))
        found |= {name: max(0.0, few[name] - LAYERS[0] * each), f"{name} of a layer": each}
    return found


@dataclass
class _Narrow:
    """A narrow Mixtral that trains as the run will."""

    config: TrainConfig
    stage: int
    sizes: Sizes
    layers: int
    processes: Processes

    def measured(self) -> dict[str, float]:
        """Medians of a `micro-step`, without what the model takes by itself, and of the `update`."""
        config = narrow_config(self.config, self.stage, self.sizes, self.layers, self.processes.count)
        batch = _batch(self.processes.device)
        module = MixtralWithLoss(mixtral.build(config).to(self.processes.device).train(), with_router_loss=True)
        module.differentiates_input = self.stage == 3

        def by_itself() -> None:
            cross_entropy, balance = module(batch.ids, batch.positions, batch.targets, batch.is_token)
            (cross_entropy + balance).backward()
            module.zero_grad(set_to_none=True)

        model = _median(self._took(by_itself) for _ in range(STEPS))
        engine = Engine(module, config, config.batch(self.processes.count), self.processes)
        engine.train()

        def micro_step() -> None:
            engine.sum_over_processes(1.0)
            seed(config.seed)
            cross_entropy, balance = engine.forward(batch)
            cross_entropy_of_all, _ = engine.sum_over_processes(cross_entropy.item(), balance.item())
            engine.backward((cross_entropy + balance) / max(1.0, cross_entropy_of_all))

        def update() -> None:
            engine.step(0.0)

        took = [(self._took(micro_step), self._took(update)) for _ in range(STEPS)]
        micro_steps, updates = zip(*took, strict=True)
        return {"micro-step": max(0.0, _median(micro_steps) - model), "update": _median(updates)}

    def _took(self, run: Callable[[], None]) -> float:
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()


def narrow_config(run: TrainConfig, stage: int, sizes: Sizes, layers: int, processes: int) -> TrainConfig:
    """Of the run, but narrow. As many of a layer's tensors stay whole on every process as in the run, or fewer if the
    narrow ones are of the same size."""
    config, architecture = copy.deepcopy(run), sizes.config
    config.model.path, config.model.weights = None, UNQUANTISED
    config.model.architecture = ArchitectureConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=architecture.num_local_experts,
        num_experts_per_tok=architecture.num_experts_per_tok,
    )
    given = run.lora
    config.lora = LoraConfig(
        method=given.method,
        rank=RANK,
        attention=given.attention,
        projections=given.projections,
        router=given.router,
    )
    config.global_batch = config.micro_batch * processes
    config.deepspeed.stage = stage
    if stage < 3:
        config.deepspeed.offload_param = "none"
    if stage == 0:
        config.deepspeed.offload_optimizer = "none"
    sharded = sum(t.elements >= config.deepspeed.persistence_threshold for t in of_layer(sizes))
    narrow = sorted((t.elements for t in of_layer(sizes_of(config))), reverse=True)
    config.deepspeed.persistence_threshold = narrow[min(sharded, len(narrow)) - 1] if sharded else narrow[0] + 1
    return config


def _batch(device: torch.device) -> Batch:
    ids = torch.arange(3, 3 + TOKENS)[None]
    return Batch(ids, torch.arange(TOKENS)[None], ids, torch.ones_like(ids, dtype=torch.bool)).to(device)


def of_layer(sizes: Sizes) -> list[Tensor]:
    """The tensors of the first layer."""
    return [tensor for unit in sizes.units if unit.layer == 0 for tensor in unit.tensors]


def _median(took: Iterable[float]) -> float:
    """Without the first."""
    return statistics.median(list(took)[NOT_COUNTED:])
