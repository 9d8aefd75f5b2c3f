"""The only file that imports deepspeed: processes, collectives, and one optimizer over all of them."""

import contextlib
import ctypes
import io
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from data.dataset import Batch
from train.config import BatchArithmetic, HardwareConfig, TrainConfig
from train.loss import MixtralWithLoss
from train.model import trainable
from train.routing import Routing


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run."""

    rank: int
    """The process rank, from 0; not a LoRA rank."""
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def start(config: HardwareConfig) -> Processes:
    """Joins the processes of the launch (or makes a group of one), chooses the device and divides the cores.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device=cuda: torch finds no CUDA GPU here; use hardware.device=cpu")
    on_cuda = _on_cuda(config)
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        raise UserError("LOCAL_RANK: the launcher set RANK without it; launch with deepspeed or torchrun, or set it")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if not on_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # The processes of a machine share its cores; left alone, each would start a thread for every one of them.
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local_processes))
        keep_freed_memory()
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has deprecated, at every gather.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    import deepspeed

    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with contextlib.redirect_stdout(io.StringIO()):  # every process would print that an op was built
        deepspeed.init_distributed(dist_backend="nccl" if on_cuda else "gloo", verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _on_cuda(config: HardwareConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of giving it back to the kernel.

    Each step frees and asks again for the same large tensors, and by default each time the kernel maps and zeroes the
    pages anew: a quarter of a nano step on two cores. The largest, logits and the like, are left to the kernel: few as
    they are, zeroing them costs no time that could be measured, and the holes that they leave in the heap, where others
    settle, made it grow to twice the size within 40 steps. Elsewhere than glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 16 << 20)
        mallopt(trim_threshold, (1 << 31) - 1)


def finish() -> None:
    """Waits until every process has done its work, then leaves the group; collective.

    Without the wait a process that has nothing to save would end first, and the launcher takes the others down with it
    when leaving goes wrong.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def seed(number: int, processes: Processes) -> None:
    """Starts the random numbers of training (dropout), others on every process."""
    torch.manual_seed(number * processes.count + processes.rank)


def agree(value: Any) -> Any:
    """The main process's value, on every process."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def settings(config: TrainConfig, batch: BatchArithmetic) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    zero: dict[str, Any] = {"stage": config.deepspeed.stage}
    if config.deepspeed.stage > 0:
        size = config.deepspeed.bucket_size
        # Overlapping needs streams, which only CUDA has.
        zero |= {"reduce_bucket_size": size, "overlap_comm": _on_cuda(config.hardware)}
    if config.deepspeed.stage == 3:
        # The MoE block is gathered as one leaf by DeepSpeed's default list: naming leaves here would replace that list.
        zero |= {
            "stage3_prefetch_bucket_size": size,
            "stage3_param_persistence_threshold": config.deepspeed.persistence_threshold,
        }
    for name in ("offload_optimizer", "offload_param"):
        if getattr(config.deepspeed, name) != "none":
            zero[name] = {"device": getattr(config.deepspeed, name), "pin_memory": _on_cuda(config.hardware)}
    accumulation: dict[str, Any] = {}
    if config.deepspeed.stage > 1:
        # Sums of many micro-batches' gradients lose bits in bfloat16; only the shards of what trains pay for this.
        accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
    return accumulation | {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "train_batch_size": batch.rows,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # GuardedAdamW is an AdamW, which DeepSpeed knows by its exact type
        "steps_per_print": 2**31,
    }


@contextlib.contextmanager
def partitioned_loading(config: TrainConfig, batch: BatchArithmetic) -> Iterator[None]:
    """Within it, transformers loads pretrained weights straight into ZeRO-3's shards, where the run has any.

    Process 0 reads the files, into CPU memory, and the others receive their parts; no GPU ever holds the whole model.
    """
    if config.deepspeed.stage != 3 or config.model.path is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(settings(config, batch))  # transformers holds only a weak reference
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def whole(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within it, parameters that ZeRO-3 has sharded are whole, and keep what process 0 writes into them; collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0):
        yield


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that refuses a step, on all processes, when any of them sees a gradient that is not finite.

    DeepSpeed refuses such a step itself in bfloat16 and under ZeRO-3; in float32 at lower stages it calls the
    optimizer.
    """

    refused = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, or none; `refused` says which."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all().float()
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        self.refused = not bool(finite)
        return None if self.refused else super().step(closure)


@dataclass(frozen=True, slots=True)
class Update:
    """What became of an optimizer step."""

    gradient_norm: float
    """The 2-norm over all trained parameters, before clipping."""
    applied: bool
    """False where the step was refused because of a value that is not finite."""


class Engine:
    """The model, its optimizer and its peers. Losses given to `backward` are summed over processes, not averaged."""

    def __init__(self, model: MixtralWithLoss, config: TrainConfig, batch: BatchArithmetic, processes: Processes):
        """Hands the model to DeepSpeed, which shards it; collective.

        Raises:
            UserError: nothing in the model trains.
        """
        import deepspeed

        self.processes = processes
        self._plain = config.model.dtype == "float32" and config.deepspeed.stage == 0
        guarded = config.model.dtype == "float32" and config.deepspeed.stage < 3
        adamw = GuardedAdamW if guarded else torch.optim.AdamW
        self._adamw = adamw(
            _parameter_groups(model, config.optim.weight_decay),
            lr=0.0,  # each step sets it; until then DeepSpeed's stage 0 takes a step of its own to allocate the moments
            betas=(config.optim.betas[0], config.optim.betas[1]),
            eps=config.optim.eps,
            fused=True,
        )
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=settings(config, batch), dist_init_required=False
        )
        if config.deepspeed.stage == 0:
            self._adamw.state.clear()  # that step counted, and would spoil the bias correction of the real ones
        self.module: MixtralWithLoss = self._engine.module

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    def train(self) -> None:
        """Switches to training mode."""
        self._engine.train()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it, no gradients and no dropout."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of `MixtralWithLoss` for this process's micro-batch."""
        on_device = batch.to(self.device)
        return self._engine(on_device.ids, on_device.positions, on_device.targets, on_device.is_token)

    @contextlib.contextmanager
    def watching(self, routing: bool) -> Iterator[None]:
        """Within it, forwards note what the routers do, where that is wanted."""
        self.module.watches_routing = routing
        try:
            yield
        finally:
            self.module.watches_routing = False

    def take_routing(self) -> Routing:
        """What the routers of all processes did since the last time; collective."""
        config = self.module.causal_lm.config
        shape = torch.Size((config.num_hidden_layers, config.num_local_experts))
        own = self.module.routing or Routing.none(shape)
        self.module.routing = None
        return Routing.from_list(self.sum(*own.to_list()), shape)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a share of the step's loss. The shares of all processes and micro-batches are summed."""
        # DeepSpeed averages over processes and divides by the accumulation steps; the first is undone here, the second
        # is switched off.
        self._engine.backward(loss * self.processes.count, scale_wrt_gas=False)

    def micro_step_done(self) -> None:
        """Tells DeepSpeed that a micro-batch before the step's last is finished."""
        assert not self._engine.is_gradient_accumulation_boundary()
        self._engine.step()

    def step(self, learning_rate: float) -> Update:
        """Clips and updates; collective. Where any process has a value that is not finite, nothing changes anywhere."""
        assert self._engine.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm: torch.Tensor | float | None = None
        if self._plain:  # here DeepSpeed clips without telling the norm
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        refused = isinstance(self._adamw, GuardedAdamW) and self._adamw.refused
        applied = self._engine.was_step_applied() and not refused
        return Update(float(norm if norm is not None else float("nan")), applied)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64; collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total]

    def collect(self, chosen: Callable[[str, nn.Parameter], bool]) -> dict[str, torch.Tensor]:
        """The chosen parameters whole, on the CPU of the main process, in the model's dtype; collective.

        Gathered one at a time, so a process holds at most one parameter beyond its share. Empty on other processes.
        """
        import deepspeed

        whole: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.causal_lm.named_parameters():
            if not chosen(name, parameter):
                continue
            sharded = hasattr(parameter, "ds_id")
            gathered = deepspeed.zero.GatheredParameters([parameter]) if sharded else contextlib.nullcontext()
            with gathered:
                if self.processes.is_main:
                    whole[name] = parameter.detach().to("cpu", copy=True)
        return whole


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters, those of one dimension (norms) without weight decay."""
    trained = list(trainable(model))
    if not trained:
        raise UserError("lora: nothing in the model trains; name targets in lora.attention or lora.projections")
    # Under ZeRO-3 a parameter's own shape is empty; ds_shape is what it was.
    is_vector = {name: len(getattr(p, "ds_shape", p.shape)) == 1 for name, p in trained}
    groups = [
        {"params": [p for name, p in trained if not is_vector[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if is_vector[name]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
