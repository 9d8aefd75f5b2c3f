"""Settings of the optimizer, of DeepSpeed and of the hardware."""

from dataclasses import dataclass, field

from configs.program.checks import choice, not_negative, positive, share
from configs.program.errors import UserError


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, a linear warm-up, and a cosine to a share of the peak."""

    lr: float = 2e-4
    """Peak learning rate."""
    warmup_fraction: float = 0.03
    """Share of all steps over which the rate rises from 0."""
    final_fraction: float = 0.1
    """Share of the peak at which the cosine ends."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices and adapters, not on norms."""
    clip: float = 1.0
    """The gradient norm, over all trained parameters, above which gradients are scaled down to it."""

    def check(self) -> None:
        positive("optim.lr", self.lr, "optim.lr=2e-4")
        positive("optim.eps", self.eps, "optim.eps=1e-8")
        not_negative("optim.weight_decay", self.weight_decay)
        positive("optim.clip", self.clip, "optim.clip=1.0")
        share("optim.warmup_fraction", self.warmup_fraction)
        share("optim.final_fraction", self.final_fraction)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas}: give two numbers from 0 to below 1, such as [0.9,0.95]")


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """How DeepSpeed divides the work's state."""

    stage: int = 3
    """ZeRO stage: 0 shares nothing, 2 shards gradients and optimizer state, 3 the parameters as well."""
    offload_optimizer: str = "none"
    """`none` or `cpu`: where the optimizer state lives (stages 1 to 3)."""
    offload_param: str = "none"
    """`none` or `cpu`: where the sharded parameters live between uses (stage 3)."""
    bucket_size: int = 50_000_000
    """Elements that are reduced or gathered at once: more speeds up the network and costs memory."""
    prefetch_bucket_size: int = 0
    """Elements that are gathered ahead of their use at once (stage 3): beyond that many, no further parameter is begun.
    0 takes `bucket_size`."""
    persistence_threshold: int = 10_000
    """Parameters with fewer elements than this stay whole on every process (stage 3)."""
    max_live_parameters: int = 1_000_000_000
    """Gathered elements beyond which nothing more is gathered ahead (stage 3). With fewer than a MoE block has, the
    next block is asked for only when it is needed."""
    node_copy: bool = False
    """Whether each node keeps a copy of the shards, so that gathers stay inside it (stage 3; ZeRO++'s hpZ): for several
    nodes with a slow network between them. It costs each process the model's share of its node in memory."""

    def check(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"deepspeed.stage={self.stage}: ZeRO has the stages 0, 1, 2 and 3; choose one")
        choice("deepspeed.offload_optimizer", self.offload_optimizer, "none", "cpu")
        choice("deepspeed.offload_param", self.offload_param, "none", "cpu")
        positive("deepspeed.bucket_size", self.bucket_size, "deepspeed.bucket_size=50000000")
        positive("deepspeed.max_live_parameters", self.max_live_parameters, "deepspeed.max_live_parameters=1000000000")
        for name in ("prefetch_bucket_size", "persistence_threshold"):
            not_negative(f"deepspeed.{name}", getattr(self, name))
        if self.offload_optimizer == "cpu" and self.stage == 0:
            raise UserError(
                "deepspeed.offload_optimizer=cpu: it takes effect from stage 1 on; set deepspeed.stage=2 or 3 as well"
            )
        if self.offload_param == "cpu" and self.stage != 3:
            raise UserError(
                "deepspeed.offload_param=cpu: only stage 3 shards parameters; set deepspeed.stage=3 as well"
            )
        if self.node_copy and (self.stage != 3 or self.offload_param == "cpu"):
            raise UserError(
                "deepspeed.node_copy=true: it is for parameters that stage 3 shards over GPUs of several nodes; use "
                "deepspeed=zero3 as well, or leave it out"
            )


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """What the processes run on."""

    device: str = "auto"
    """`auto` takes CUDA if there is a GPU; `cuda`, `cpu`."""
    threads: int = 0
    """CPU threads of each process; 0 takes OMP_NUM_THREADS, which torchrun sets to 1 by itself, or else divides the
    machine's cores, or those of the container's quota, among its processes."""
    processes: int = 1
    """Processes that `dry_run` plans for. A real run takes the number that was launched."""

    def check(self) -> None:
        choice("hardware.device", self.device, "auto", "cuda", "cpu")
        not_negative("hardware.threads", self.threads)
        positive("hardware.processes", self.processes, "hardware.processes=8")
