"""What training can be told, the checks across fields, and the batch arithmetic."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from configs.errors import UserError

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear layers of Mixtral's attention."""
EXPERT_TARGETS = ("gate_up_proj", "down_proj")
"""The expert parameters: [E, 2I, H] (gate and up in one) and [E, H, I]."""
VOCABULARY = 32_000
"""Pieces of the Mixtral vocabulary, in which datasets are prepared."""
GREATEST_SEED = 2**64 - 1
"""That torch's random numbers can start from."""


def _positive(name: str, value: float, example: str) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name}={value}: it must be above 0, and finite; give for example {example}")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={value}: it can't be negative; give 0 or more")


def _choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise UserError(f"{name}={value}: there is no such choice; choose one of {', '.join(choices)}")


@dataclass(kw_only=True, slots=True)
class ArchitectureConfig:
    """The sizes of a Mixtral; the defaults are those of Mixtral-8x7B's config.json."""

    vocab_size: int = VOCABULARY
    """Pieces of the vocabulary."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 14336
    """Inner width of each expert."""
    num_hidden_layers: int = 32
    """Layers."""
    num_attention_heads: int = 32
    """Query heads of a layer."""
    num_key_value_heads: int = 8
    """Key and value heads of a layer; they divide the query heads into groups."""
    num_local_experts: int = 8
    """Experts of a layer."""
    num_experts_per_tok: int = 2
    """Experts that the router chooses for a token."""
    max_position_embeddings: int = 32768
    """Longest conversation, in tokens."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary embedding's wavelengths."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""

    def check(self) -> None:
        for item in fields(self):
            _positive(f"model.architecture.{item.name}", getattr(self, item.name), f"{item.name}={item.default}")
        for name, divisor in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise UserError(
                    f"model.architecture.{name}={getattr(self, name)}: it is no multiple of {divisor} "
                    f"{getattr(self, divisor)}; change one of the two"
                )
        if self.num_experts_per_tok > self.num_local_experts:
            raise UserError(
                f"model.architecture.num_experts_per_tok={self.num_experts_per_tok}: there are only "
                f"{self.num_local_experts} experts; give at most as many"
            )
        if self.vocab_size < VOCABULARY:
            raise UserError(
                f"model.architecture.vocab_size={self.vocab_size}: prepared rows hold ids up to {VOCABULARY - 1}; "
                f"give {VOCABULARY}"
            )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model: weights at `path`, or random ones of the given architecture."""

    path: str | None = None
    """A model directory or a hub id. Unset, the base starts random from `architecture`."""
    revision: str | None = None
    """The commit, tag or branch of a hub id."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """The sizes of a random base. Where `path` names weights, theirs count."""
    dtype: str = "bfloat16"
    """`bfloat16` or `float32`: weights, activations and gradients. ZeRO keeps float32 masters either way."""
    attention: str = "packed"
    """`packed` computes what conversations can see and no more: torch's variable-length flash attention on CUDA, blocks
    of queries elsewhere. Or one of transformers' own: `flash_attention_2`, `sdpa`, `eager`."""

    def check(self) -> None:
        _choice("model.dtype", self.dtype, "bfloat16", "float32")
        _choice("model.attention", self.attention, "packed", "flash_attention_2", "sdpa", "eager")
        if self.path is None:
            self.architecture.check()


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Which parameters train: adapters, or everything."""

    method: str = "lora"
    """`lora`, or `none` to train every parameter of the base."""
    rank: int = 16
    """The LoRA rank, the inner size of every adapter that is not told another."""
    alpha: int = 32
    """The adapters' output is scaled by alpha / rank, each expert's by its own rank."""
    rank_stabilised: bool = False
    """Scales by alpha / √rank instead."""
    dropout: float = 0.0
    """Probability with which an adapter's input is dropped; on experts drawn for each token-expert pair."""
    attention: list[str] = field(default_factory=lambda: list(ATTENTION_TARGETS))
    """Attention projections with an adapter."""
    projections: list[str] = field(default_factory=lambda: list(EXPERT_TARGETS))
    """Expert projections with an adapter: `gate_up_proj` (gate and up in one) and `down_proj`."""
    router: str = "frozen"
    """`frozen`, or `trained` to train the routers' own weights."""
    experts: Any = "all"
    """The experts with an adapter: `all`, a list of numbers such as [0,3] (of every layer), or `by_load`: what `budget`
    and the measured load say."""
    expert_ranks: list[int] = field(default_factory=list)
    """A LoRA rank for each expert (0 for none) in place of `rank`, the same in every layer."""
    load: str | None = None
    """For `experts=by_load`: the expert_load.json that `task=profile` wrote."""
    budget: int = 0
    """For `experts=by_load`: trained parameters that the experts' adapters may have, over all layers."""
    by_load: str = "ranks"
    """For `experts=by_load`: `ranks` gives each expert a rank in proportion to its load, `experts` gives the most
    loaded ones `rank`."""
    start: str | None = None
    """An adapter directory of the same shape whose numbers the run starts from, instead of fresh ones."""
    export_per_expert: bool = False
    """Also writes adapter/per_expert/, with a key for each expert's w1, w2 and w3, as some servers ask for."""

    def check(self) -> None:
        _choice("lora.method", self.method, "lora", "none")
        _positive("lora.rank", self.rank, "lora.rank=16")
        _positive("lora.alpha", self.alpha, "lora.alpha=32")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout}: it is a probability; give a number from 0 to below 1")
        for name, known in (("attention", ATTENTION_TARGETS), ("projections", EXPERT_TARGETS)):
            targets = getattr(self, name)
            for target in targets:
                _choice(f"lora.{name}", target, *known)
                if targets.count(target) > 1:
                    raise UserError(f"lora.{name}={targets}: {target} is named twice; name it once")
        _choice("lora.router", self.router, "frozen", "trained")
        _choice("lora.by_load", self.by_load, "ranks", "experts")
        self._check_experts()
        if self.method == "lora" and not self.projections:
            self._check_without_experts()

    def _check_without_experts(self) -> None:
        if not self.attention:
            besides = "" if self.router == "frozen" else ", and a trained router is stored beside one"
            raise UserError(
                f"lora.attention=[]: with lora.projections=[] there would be no adapter{besides}; name a target in one "
                f"of them"
            )
        for name, default in (("experts", "all"), ("expert_ranks", []), ("export_per_expert", False)):
            if (value := getattr(self, name)) != default:
                raise UserError(
                    f"lora.{name}={value}: with lora.projections=[] no expert has an adapter; leave it out, or name "
                    f"gate_up_proj, down_proj, or both"
                )

    def _check_experts(self) -> None:
        numbers = isinstance(self.experts, list) and all(type(expert) is int for expert in self.experts)
        if self.experts not in ("all", "by_load") and not numbers:
            raise UserError(
                f"lora.experts={self.experts}: there is no such choice; choose all, by_load, or numbers as in "
                f"'lora.experts=[0,3]' (what adapters sit on is lora.projections)"
            )
        if any(rank < 0 for rank in self.expert_ranks):
            raise UserError(f"lora.expert_ranks={self.expert_ranks}: a rank can't be negative; give 0 for no adapter")
        for name, is_empty in (
            ("experts", self.experts == []),
            ("expert_ranks", self.expert_ranks and not any(self.expert_ranks)),
        ):
            if is_empty:
                raise UserError(
                    f"lora.{name}={getattr(self, name)}: no expert would have an adapter; use lora=attention for that"
                )
        if numbers and self.expert_ranks:
            # numbers of experts that the model hasn't are refused where the model is known
            known = [expert for expert in self.experts if 0 <= expert < len(self.expert_ranks)]
            if known and not any(self.expert_ranks[expert] for expert in known):
                raise UserError(
                    f"lora.expert_ranks={self.expert_ranks}: with lora.experts={self.experts} no expert would have an "
                    f"adapter; give one of those a rank above 0"
                )
        if self.experts == "by_load":
            if self.load is None:
                raise UserError(
                    "lora.load: experts=by_load needs a measured load; run `python -m train task=profile` and name the "
                    "expert_load.json that it writes"
                )
            _positive("lora.budget", self.budget, "lora.budget=100000000 parameters with lora.experts=by_load")
            if self.expert_ranks:
                raise UserError(
                    f"lora.expert_ranks={self.expert_ranks}: with lora.experts=by_load the load decides; leave it out"
                )
            if not self.projections:
                raise UserError(
                    "lora.projections=[]: with lora.experts=by_load there is nothing to divide; name gate_up_proj, "
                    "down_proj, or both"
                )
        elif self.load is not None or self.budget:
            name = "load" if self.load is not None else "budget"
            raise UserError(
                f"lora.{name}={getattr(self, name)}: it takes effect with lora.experts=by_load alone; give that as well"
            )


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
        _positive("optim.lr", self.lr, "optim.lr=2e-4")
        _positive("optim.eps", self.eps, "optim.eps=1e-8")
        _not_negative("optim.weight_decay", self.weight_decay)
        _positive("optim.clip", self.clip, "optim.clip=1.0")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim.{name}={getattr(self, name)}: it is a share; give a number from 0 to 1")
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
    """Elements that are gathered ahead of their use at once (stage 3): no more parameters are begun beyond so many. 0
    takes `bucket_size`."""
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
        _choice("deepspeed.offload_optimizer", self.offload_optimizer, "none", "cpu")
        _choice("deepspeed.offload_param", self.offload_param, "none", "cpu")
        _positive("deepspeed.bucket_size", self.bucket_size, "deepspeed.bucket_size=50000000")
        _positive("deepspeed.max_live_parameters", self.max_live_parameters, "deepspeed.max_live_parameters=1000000000")
        for name in ("prefetch_bucket_size", "persistence_threshold"):
            _not_negative(f"deepspeed.{name}", getattr(self, name))
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
class LoggingConfig:
    """What is told, where, and how often."""

    every: int = 1
    """Steps between lines of metrics.jsonl."""
    routing_every: int = 10
    """Steps between lines about the routers (expert load, entropy, auxiliary loss, unused experts); 0 for none."""
    progress: bool = True
    """A progress bar on process 0."""
    wandb: str = "auto"
    """`auto` logs online where the user is logged in and offline else; `online`, `offline`, `off`."""
    project: str = "openhermes-mixtral"
    """The wandb project."""

    def check(self) -> None:
        _positive("logging.every", self.every, "logging.every=1")
        _not_negative("logging.routing_every", self.routing_every)
        _choice("logging.wandb", self.wandb, "auto", "online", "offline", "off")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """What the processes run on."""

    device: str = "auto"
    """`auto` takes CUDA where there is a GPU; `cuda`, `cpu`."""
    threads: int = 0
    """CPU threads of each process; 0 divides the machine's cores among its processes."""
    processes: int = 1
    """Processes that `dry_run` plans for. A real run takes the number that was launched."""

    def check(self) -> None:
        _choice("hardware.device", self.device, "auto", "cuda", "cpu")
        _not_negative("hardware.threads", self.threads)
        _positive("hardware.processes", self.processes, "hardware.processes=8")


@dataclass(kw_only=True, slots=True)
class FailureConfig:
    """What a run bears, and how long it waits."""

    grace: float = 120.0
    """Seconds from SIGTERM or SIGINT until a process leaves even if the step and its checkpoint are not done."""
    peer_timeout: float = 120.0
    """Seconds without a sign of life after which a process is given up, and the run ends everywhere. A process gives
    none while foreign code holds Python's lock, so leave it room."""
    stall_timeout: float = 3600.0
    """Seconds after which the run ends where all processes live and none gets on. Loading the base is one such step."""
    refused_in_a_row: int = 10
    """The run stops after so many updates in a row whose loss or gradient was not finite."""
    spike: float = 3.0
    """A loss of this many times the mean of the `spike_window` before is logged with its rows; 0 for never."""
    spike_window: int = 50
    """Steps whose mean loss a spike is measured by."""

    def check(self) -> None:
        for name in ("grace", "peer_timeout", "stall_timeout"):
            _positive(f"failures.{name}", getattr(self, name), f"failures.{name}={getattr(FailureConfig(), name):g}")
        for name in ("refused_in_a_row", "spike_window"):
            _positive(f"failures.{name}", getattr(self, name), f"failures.{name}={getattr(FailureConfig(), name)}")
        if self.spike != 0 and not 1 < self.spike < math.inf:
            raise UserError(f"failures.spike={self.spike}: it is how many times the usual loss; give more than 1, or 0")


@dataclass(frozen=True, slots=True)
class BatchArithmetic:
    """global batch = micro-batch × accumulation × processes, in packed rows."""

    micro_batch: int
    accumulation: int
    processes: int

    @property
    def rows(self) -> int:
        """Packed rows of one optimizer step."""
        return self.micro_batch * self.accumulation * self.processes

    def __str__(self) -> str:
        factors = f"micro-batch {self.micro_batch} × accumulation {self.accumulation} × processes {self.processes}"
        return f"{factors} = {self.rows} rows per step"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Settings of `python -m train`."""

    task: str = "train"
    """`train`, or `profile` to measure which experts the routers choose for the dataset, without training."""
    name: str = "run"
    """The start of the run directory's name, where `run_dir` is not given."""
    run_dir: str | None = None
    """The run directory; unset, `runs/{name}-{date}-{time}`."""
    overwrite: bool = False
    """Whether a run directory that already holds a run may be replaced."""
    dataset: str = "prepared/sample"
    """The prepared dataset (the setting `output` of `python -m data`)."""
    epochs: int = 3
    """How often each row is seen."""
    max_steps: int = 0
    """Stops after this many optimizer steps; 0 means after the epochs. The schedule ends there too."""
    global_batch: int = 8
    """Packed rows of one optimizer step over all processes; the accumulation follows from it."""
    micro_batch: int = 1
    """Packed rows of one forward and backward on one process."""
    router_aux_loss: float = 0.02
    """Weight of the router's load-balancing loss (Mixtral's own default); 0 leaves it out."""
    activation_checkpointing: str = "none"
    """What the backward computes again instead of keeping it: `full`, each layer from its input, least memory and a
    third more work; `attention`, each layer up to its experts, whose half is never computed again; `none`. `true` and
    `false` mean `full` and `none`."""
    eval_every: int = 0
    """Steps between evaluations on the held-out split; 0 evaluates before the first step and after the last."""
    save_every: int = 0
    """Steps between checkpoints; one is made after the last step and when the run is pre-empted in any case."""
    keep_last: int = 2
    """Checkpoints that are kept, the newest ones; the one with the best evaluation loss is kept beside them."""
    resume: str = "auto"
    """`auto` goes on from the newest complete checkpoint of `run_dir` where there is one, `never` refuses a directory
    that holds a run."""
    resume_despite: list[str] = field(default_factory=list)
    """Settings that may differ from those of the run that is resumed, such as [optim.lr]; `dataset` and `model.path`
    stand for what they hold."""
    seed: int = 0
    """Decides the initial adapters (or the random base) and the order of rows."""
    dry_run: bool = False
    """Plans the run on the meta device, prints parameters, batch and DeepSpeed config, and trains nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The base."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """What trains."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """How the work is divided."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is told."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """What it runs on."""
    failures: FailureConfig = field(default_factory=FailureConfig)
    """What it bears."""

    def __post_init__(self) -> None:
        # It was true or false once, and OmegaConf makes strings of those.
        once, given = {"true": "full", "false": "none"}, self.activation_checkpointing
        self.activation_checkpointing = once.get(str(given).lower(), given)

    def check(self) -> None:
        """Raises `UserError` for values that can't be used, alone or together."""
        _choice("task", self.task, "train", "profile")
        _choice("activation_checkpointing", self.activation_checkpointing, "none", "attention", "full")
        _choice("resume", self.resume, "auto", "never")
        for name in ("epochs", "global_batch", "micro_batch", "keep_last"):
            _positive(name, getattr(self, name), f"{name}=1")
        for name in ("max_steps", "eval_every", "save_every", "router_aux_loss", "seed"):
            _not_negative(name, getattr(self, name))
        if self.seed > GREATEST_SEED:
            raise UserError(
                f"seed={self.seed}: torch knows none above {GREATEST_SEED}; give a whole number from 0 to that"
            )
        sections = (self.model, self.lora, self.optim, self.deepspeed, self.logging, self.hardware, self.failures)
        for section in sections:
            section.check()
        if self.lora.method == "lora" and self.model.path is None and not self.dry_run:
            raise UserError(
                "model.path: adapters need a base with weights; name a directory or a hub id, or use lora=none"
            )

    def batch(self, processes: int) -> BatchArithmetic:
        """The batch arithmetic for a number of processes.

        Raises:
            UserError: the global batch can't be divided into whole micro-batches for that many processes.
        """
        at_once = self.micro_batch * processes
        if self.global_batch % at_once:
            nearest = max(1, round(self.global_batch / at_once)) * at_once
            raise UserError(
                f"global_batch={self.global_batch}: it is no multiple of micro_batch {self.micro_batch} × {processes} "
                f"processes; give for example global_batch={nearest}"
            )
        return BatchArithmetic(self.micro_batch, self.global_batch // at_once, processes)
