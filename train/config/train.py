"""The settings of `python -m train`, the checks across fields, and the batch arithmetic."""

import math
from dataclasses import dataclass, field

from configs.program.checks import between, choice, not_negative, positive
from configs.program.errors import UserError
from train.config.cluster import ClusterConfig, PlanConfig
from train.config.engine import DeepSpeedConfig, HardwareConfig, OptimConfig
from train.config.lora import LoraConfig
from train.config.model import ModelConfig

GREATEST_SEED = 2**64 - 1
"""The largest seed that torch takes."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is logged, where, and how often."""

    every: int = 1
    """Steps between lines of metrics.jsonl."""
    routing_every: int = 10
    """Steps between lines about the routers (expert load, entropy, load-balancing loss, unused experts); 0 for none."""
    trace_steps: list[int] = field(default_factory=list)
    """The first and the last step, such as [10,12], of which process 0 writes a trace of torch's profiler to
    trace.json.gz in the run directory (for https://ui.perfetto.dev); empty for none."""
    progress: bool = True
    """A progress bar on process 0."""
    wandb: str = "auto"
    """`auto` logs online if the user is logged in, else offline; `online`, `offline`, `off`."""
    project: str = "openhermes-mixtral"
    """The wandb project."""

    def check(self) -> None:
        positive("logging.every", self.every, "logging.every=1")
        not_negative("logging.routing_every", self.routing_every)
        if self.trace_steps and not (len(self.trace_steps) == 2 and 1 <= self.trace_steps[0] <= self.trace_steps[1]):
            raise UserError(
                f"logging.trace_steps={self.trace_steps}: it is the first and the last step that are traced; give for "
                f"example 'logging.trace_steps=[10,12]'"
            )
        choice("logging.wandb", self.wandb, "auto", "online", "offline", "off")


@dataclass(kw_only=True, slots=True)
class FailureConfig:
    """Which failures a run survives, and how long it waits."""

    grace: float = 120.0
    """Seconds from SIGTERM or SIGINT until a process leaves even if the step and its checkpoint are not done."""
    peer_timeout: float = 120.0
    """Seconds without a sign of life after which a process counts as lost, and the run ends everywhere. A process gives
    none while C code holds Python's global lock, so don't set it too low."""
    start_timeout: float = 1800.0
    """Seconds that the processes of a launch wait for each other when they start, before they read anything."""
    stall_timeout: float = 3600.0
    """Seconds after which the run ends if all processes are alive and none makes progress. Until the first step,
    reading and writing count as progress: a base may take as long to load or download as it needs."""
    disk_timeout: float = 1800.0
    """Seconds after which the run ends if a disk is waited for and nothing was read or written. Each file that is saved
    has to reach the disk within this time."""
    refused_in_a_row: int = 10
    """The run stops after this many updates in a row whose loss or gradient was not finite."""
    spike: float = 3.0
    """A loss of this many times the mean over the `spike_window` before it is logged with its rows; 0 for never."""
    spike_window: int = 50
    """Steps whose mean loss a spike is compared with."""

    def check(self) -> None:
        for name in ("grace", "peer_timeout", "start_timeout", "stall_timeout", "disk_timeout"):
            positive(f"failures.{name}", getattr(self, name), f"failures.{name}={getattr(FailureConfig(), name):g}")
        for name in ("refused_in_a_row", "spike_window"):
            positive(f"failures.{name}", getattr(self, name), f"failures.{name}={getattr(FailureConfig(), name)}")
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
    """`train`; `plan` to say what fits, how long it takes and what it costs; `profile` to measure which experts the
    routers choose for the dataset, without training; `report` to write the page about the run in `run_dir`."""
    name: str = "run"
    """The start of the run directory's name, if `run_dir` is not given."""
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
    """`auto` goes on from the newest complete checkpoint of `run_dir` if there is one, `never` refuses a directory
    that holds a run."""
    resume_despite: list[str] = field(default_factory=list)
    """Settings that may differ from those of the run that is resumed, such as [optim.lr]; `dataset` and `model.path`
    stand for what they hold."""
    seed: int = 0
    """Decides the initial adapters (or the random base) and the order of rows."""
    dry_run: bool = False
    """Plans the run without weights: prints parameters, batch, steps, tokens and DeepSpeed config, trains nothing."""
    best: bool = False
    """For `plan`: prints the settings of the best alternative, to be pasted, and nothing else."""
    answers: bool = True
    """For `report`: puts the prompts to base and tuned model, and shows their answers side by side."""
    prompts: str | None = None
    """For `report`: a file of prompts as `python -m inference task=batch` takes it; unset, ten of the project's."""
    answer_tokens: int = 200
    """For `report`: the most tokens of an answer."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The base."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """What trains."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """How the work is divided."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is logged."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """What it runs on."""
    failures: FailureConfig = field(default_factory=FailureConfig)
    """Which failures it survives."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machine that `task=plan` plans for."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """What a plan assumes, and where it is written."""

    def __post_init__(self) -> None:
        # It used to be true or false, which OmegaConf turns into strings.
        once, given = {"true": "full", "false": "none"}, self.activation_checkpointing
        self.activation_checkpointing = once.get(str(given).lower(), given)

    def check(self) -> None:
        """Raises `UserError` for values that can't be used, alone or together."""
        choice("task", self.task, "train", "plan", "profile", "report")
        choice("activation_checkpointing", self.activation_checkpointing, "none", "attention", "full")
        choice("resume", self.resume, "auto", "never")
        for name in ("epochs", "global_batch", "micro_batch", "keep_last"):
            positive(name, getattr(self, name), f"{name}=1")
        for name in ("max_steps", "eval_every", "save_every", "router_aux_loss", "seed"):
            not_negative(name, getattr(self, name))
        wanted = f"torch takes none above {GREATEST_SEED}; give a whole number from 0 to that"
        between("seed", self.seed, 0, GREATEST_SEED, wanted)
        sections = (self.model, self.lora, self.optim, self.deepspeed, self.logging, self.hardware, self.failures)
        for section in sections:
            section.check()
        self.cluster.check()
        self.plan.check_values()
        if self.deepspeed.stage == 1 and self.model.dtype == "bfloat16" and self.task == "train":
            raise UserError(
                "deepspeed.stage=1: with model.dtype=bfloat16 DeepSpeed would sum gradients in bfloat16 there; use "
                "deepspeed=zero2, which sums them in float32"
            )
        if self.model.weights != "bf16" and self.lora.method == "none" and self.task == "train":
            raise UserError(
                f"model.weights={self.model.weights}: weights in four bits can't train, and lora=none trains "
                f"everything; use lora=experts, or model.weights=bf16"
            )
        positive("answer_tokens", self.answer_tokens, "answer_tokens=200")
        if self.task == "report":
            if self.run_dir is None:
                raise UserError("run_dir: no run is named to report on; give run_dir=runs/…")
            return
        if self.lora.method == "lora" and self.model.path is None and not self.dry_run and self.task != "plan":
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
                f"global_batch={self.global_batch}: it is not a multiple of micro_batch {self.micro_batch} × "
                f"{processes} processes; give for example global_batch={nearest}"
            )
        return BatchArithmetic(self.micro_batch, self.global_batch // at_once, processes)
