"""The only file that imports deepspeed: processes, collectives, and one optimizer over all of them."""

import contextlib
import ctypes
import datetime
import io
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from configs import gpus
from configs.errors import UserError, say
from configs.launch import local_processes, local_rank
from data.dataset import Batch
from train import compiling
from train.config import BatchArithmetic, HardwareConfig, TrainConfig
from train.guard import Guard
from train.loss import MixtralWithLoss
from train.model import trainable
from train.routing import Routing

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, by torch's names."""
OPERATOR = "deepspeed_shm_comm"
"""DeepSpeed's collective over the memory that CPU processes of a machine share, by the name that it compiles it as."""


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


def start(config: HardwareConfig, *, timeout: float = 3600.0) -> Processes:
    """Joins the processes of the launch (or makes a group of one), chooses the device and divides the cores.

    `timeout` is how many seconds a process waits for the others at most, at the start and in each collective.

    Raises:
        UserError: CUDA is asked for and there is none, or the port where the processes meet is taken.
    """
    gpus.check(config.device, "hardware.device")
    on_cuda = _on_cuda(config)
    _check_launch()
    if config.device == "auto" and local_rank() == 0 and (why := gpus.unusable()):
        say("train", f"hardware.device=auto: on the CPU, because {why}")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if not on_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # The processes of a machine share its cores; left alone, each would start a thread for every one of them.
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // (local_processes() or 1)))
        keep_freed_memory()
    else:
        torch.cuda.set_device(gpus.take_device())  # before deepspeed is imported, which may touch the current device
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has deprecated, at every gather.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    with contextlib.redirect_stdout(io.StringIO()):  # every process would print that an op was built
        if not on_cuda:
            with compiling.alone() as lock:
                if deepspeed.ops.__compatible_ops__.get(OPERATOR):
                    code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
                    compiling.compile_apart(OPERATOR, code, lock)
                build_shm_op()  # init_distributed would otherwise, behind a process that was killed for ever
        waits = {"timeout": datetime.timedelta(seconds=timeout), "verbose": False}
        try:
            deepspeed.init_distributed(dist_backend="nccl" if on_cuda else "gloo", **waits)
        except torch.distributed.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"MASTER_PORT={os.environ['MASTER_PORT']}: another program listens there, perhaps another run; name a "
                f"port that is free on the first machine (deepspeed --master_port)"
            ) from error
        except torch.distributed.DistBackendError as error:
            if "Duplicate GPU" not in str(error):
                raise
            raise UserError(
                f"LOCAL_RANK={local_rank()}: another process uses the same GPU; start as many processes as there "
                f"are GPUs, or have the scheduler bind another to each"
            ) from error
    if not on_cuda:
        forget_shared_memory()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _check_launch() -> None:
    """Raises `UserError` for variables of the launch that no process could be found by."""
    if "RANK" not in os.environ:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name}: the launcher set RANK without it; launch with deepspeed or torchrun, or set it")
    for name, least, most in (
        ("WORLD_SIZE", 1, 2**31),
        ("RANK", 0, int(os.environ["WORLD_SIZE"]) - 1 if os.environ["WORLD_SIZE"].isdecimal() else 2**31),
        ("LOCAL_RANK", 0, 2**31),
        ("LOCAL_WORLD_SIZE", 1, 2**31),
        ("LOCAL_SIZE", 1, 2**31),
        ("MASTER_PORT", 1, 2**16 - 1),
    ):
        text = os.environ.get(name)
        if text and not (text.isdecimal() and least <= int(text) <= most):
            raise UserError(
                f"{name}={text}: it must be a whole number from {least} to {most}; correct the variable, or leave it "
                f"to the launcher"
            )


def _on_cuda(config: HardwareConfig) -> bool:
    """Whether it will be, where a run is planned on another machine."""
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def nodes(config: TrainConfig) -> dict[str, Any]:
    """What must be the same on all nodes."""
    return {"LOCAL_WORLD_SIZE": local_processes()} if config.deepspeed.node_copy else {}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def forget_shared_memory() -> None:
    """Takes the name from this process's buffer of DeepSpeed's shared-memory collective, which is freed with it then.

    DeepSpeed 0.19 never removes it: 66 MiB of memory stay for each CPU process and port that was ever used, however the
    run ends. Collective, so that every process has opened all buffers by now.
    """
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
        place = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{torch.distributed.get_rank()}"
        Path("/dev/shm", f"deepspeed_allreduce_buffer_{place}").unlink(missing_ok=True)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of giving it back to the kernel.

    Each step frees and asks again for the same large tensors, and by default each time the kernel maps and zeroes the
    pages anew, a good part of a small step. The largest, logits and the like, are left to the kernel: they are few, so
    zeroing them costs little, and the holes that they leave in the heap, where others settle, would make it grow step
    by step. Elsewhere than glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 16 << 20)
        mallopt(trim_threshold, (1 << 31) - 1)


def finish() -> None:
    """Leaves the group, once the guard knows that every process has done its work."""
    torch.distributed.destroy_process_group()


def seed(*numbers: int) -> None:
    """Starts torch's random numbers, on every device, from a sequence of numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def agree(value: Any) -> Any:
    """The main process's value, on every process."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank, on each of them; collective."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def check_same(values: dict[str, Any]) -> None:
    """Compares values across the processes; collective.

    Raises:
        UserError: a process has another one than process 0; it names the first.
    """
    everywhere = gathered(values)
    for rank, theirs in enumerate(everywhere):
        for name in sorted(values.keys() | theirs.keys()):
            if theirs.get(name) != everywhere[0].get(name):
                raise UserError(
                    f"{name}={theirs.get(name)}: that is what process {rank} was given, and process 0 has "
                    f"{everywhere[0].get(name)}; give all processes the same"
                )


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
            "stage3_prefetch_bucket_size": config.deepspeed.prefetch_bucket_size or size,
            "stage3_param_persistence_threshold": config.deepspeed.persistence_threshold,
            "stage3_max_live_parameters": config.deepspeed.max_live_parameters,
        }
        if config.deepspeed.node_copy and (of_node := _processes_of_a_node(batch.processes)) < batch.processes:
            zero["zero_hpz_partition_size"] = of_node
    for name in ("offload_optimizer", "offload_param"):
        if getattr(config.deepspeed, name) != "none":
            zero[name] = {"device": getattr(config.deepspeed, name), "pin_memory": _on_cuda(config.hardware)}
    # Sums of many micro-batches' gradients lose bits in bfloat16; only the shards of what trains pay for this.
    sums: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}} if config.deepspeed.stage > 1 else {}
    if config.deepspeed.stage == 0:
        sums = {"communication_data_type": "fp32"}  # DeepSpeed would round them to bfloat16; `Engine` makes them
    return sums | {
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


def _processes_of_a_node(count: int) -> int:
    """Of `count` processes those on each node, for `deepspeed.node_copy`; all, where no launcher says.

    Raises:
        UserError: nodes differ, or have one each.
    """
    of_node = local_processes() or count
    if count % of_node or of_node == 1 < count:
        raise UserError(
            f"deepspeed.node_copy=true: a node has {of_node} of the {count} processes; it takes nodes with two or more "
            f"each and the same number on all; leave it out"
        )
    return of_node


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

    norm = 0.0
    """Of all gradients, where it is known before the step: clipping by one that is infinite leaves zeros, not
    infinities."""
    refused = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, or none; `refused` says which."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all().float()
        finite *= math.isfinite(self.norm)
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

    def __init__(
        self,
        model: MixtralWithLoss,
        config: TrainConfig,
        batch: BatchArithmetic,
        processes: Processes,
        guard: Guard | None = None,
    ):
        """Hands the model to DeepSpeed, which shards it; collective. `guard` is told where this process is.

        Raises:
            UserError: nothing in the model trains.
        """
        import deepspeed

        self.processes = processes
        self._guard = guard
        self._step = 0
        self._plain = config.model.dtype == "float32" and config.deepspeed.stage == 0
        guarded = config.model.dtype == "float32" and config.deepspeed.stage < 3
        adamw = GuardedAdamW if guarded else torch.optim.AdamW
        groups = _parameter_groups(model, config.optim.weight_decay)
        named = {parameter: name for name, parameter in trainable(model.causal_lm)}
        names = [named[parameter] for group in groups for parameter in group["params"]]
        self._stage = config.deepspeed.stage
        self._given = [list(group["params"]) for group in groups]
        self._adamw = adamw(
            groups,
            lr=0.0,  # each step sets it; until then DeepSpeed's stage 0 takes a step of its own to allocate the moments
            betas=(config.optim.betas[0], config.optim.betas[1]),
            eps=config.optim.eps,
            fused=True,
        )
        model.differentiates_input = config.deepspeed.stage == 3
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=settings(config, batch), dist_init_required=False
        )
        if config.deepspeed.stage == 0:
            # That step counted, and would spoil the bias correction of the real ones. Zeroed and not cleared: DeepSpeed
            # keeps views of the moments.
            for state in self._adamw.state.values():
                for value in state.values():
                    value.zero_()
            for parameter in named:
                parameter.grad = None
                parameter.grad_dtype = torch.float32
        self.module: MixtralWithLoss = self._engine.module
        self._masters: dict[str, torch.Tensor] = {}
        """Where nothing is sharded: what AdamW updates, by name. There DeepSpeed's access functions know nothing."""
        if config.deepspeed.stage == 0:
            masters = [tensor for group in self._adamw.param_groups for tensor in group["params"]]
            self._masters = dict(zip(names, masters, strict=True))
        self._accumulation = batch.accumulation
        self.shapes = {name: whole_shape(parameter) for name, parameter in trainable(self.module.causal_lm)}
        """Of the parameters that train, whole, by name."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    def at(self, phase: str, step: int | None = None) -> None:
        """Says what the process does from now on, and in which step where that changes: what is told if it dies."""
        self._step = self._step if step is None else step
        if self._guard is not None:
            self._guard.at(self._step, phase)

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
        self.at("forward" if self._engine.training else "evaluating")
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
        self.at("backward")
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
        self.at("update")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm: torch.Tensor | float | None = None
        if isinstance(self._adamw, GuardedAdamW) and self._plain:  # here DeepSpeed clips without telling the norm
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = self._adamw.norm = float(torch.nn.utils.get_total_norm(gradients))
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

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is set on any process; collective."""
        return [total > 0 for total in self.sum(*(float(flag) for flag in flags))]

    @property
    def optimizer_steps(self) -> int:
        """Updates that were made; those that were refused do not count."""
        return max((int(state["step"]) for state in self._adamw.state.values() if "step" in state), default=0)

    def state(self, *, moments: bool = True) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Of each trained parameter its float32 `master` and, where wanted, Adam's two `MOMENTS`; collective.

        Whole and on the CPU of the main process; nothing on the others. Gathered one at a time, so a process holds at
        most one tensor beyond its share.
        """
        if moments:
            self._link_moments()
        for name, parameter in trainable(self.module.causal_lm):
            self.at("saving")
            kinds: list[str | None] = [None, *MOMENTS] if moments else [None]
            whole = {kind or "master": self._gather(name, parameter, kind) for kind in kinds}
            yield name, {kind: tensor for kind, tensor in whole.items() if tensor is not None}

    def _gather(self, name: str, parameter: nn.Parameter, kind: str | None) -> torch.Tensor | None:
        """The float32 value of a parameter (None), or a moment of it, whole, on the main process's CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind is not None and not self.optimizer_steps:
            tensor = torch.zeros(whole_shape(parameter))  # Adam makes its moments in its first step
        elif (master := self._masters.get(name)) is not None:
            tensor = master if kind is None else self._adamw.state[master][kind]
        elif kind is None:
            tensor = safe_get_full_fp32_param(parameter)
        else:
            tensor = safe_get_full_optimizer_state(parameter, kind)
        is_live = name in self._masters  # what DeepSpeed gathers is a copy already
        return tensor.detach().to("cpu", torch.float32, copy=is_live) if self.processes.is_main else None

    def _link_moments(self) -> None:
        """Tells DeepSpeed's stages 1 and 2 where the moments are.

        They find out themselves in their first step, but after that of the first group, when other groups have none.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._stage in (1, 2) and self.optimizer_steps:
            for given, group in zip(self._given, self._adamw.param_groups, strict=True):
                (partition,) = group["params"]
                lazy_init_hp_params_optimizer_state(given, partition, self._adamw.state)

    def restore(self, read: Callable[[str, str], torch.Tensor], steps: int, blank: Batch) -> None:
        """Sets every trained parameter and its moments to what `state` gave once; collective.

        Args:
            read: the state of a parameter by its name and what it is; called on the main process alone, which has the
                files.
            steps: `optimizer_steps` of then.
            blank: a micro-batch without tokens.

        DeepSpeed gives access to moments once there are some, and takes the model's own parameters from the masters
        when it steps. So the masters are set, a step is made at rate 0 and without tokens, which changes none of them,
        and then the moments are set.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        def each(kinds: tuple[str, ...]) -> Iterator[tuple[str, nn.Parameter, str, torch.Tensor]]:
            for name, parameter in trainable(self.module.causal_lm):
                self.at("resuming")
                for kind in kinds:
                    whole = torch.empty(whole_shape(parameter), device=self.device)
                    if self.processes.is_main:
                        whole.copy_(read(name, kind))
                    torch.distributed.broadcast(whole, src=0)
                    yield name, parameter, kind, whole

        with torch.no_grad():
            for name, parameter, _, whole in each(("master",)):
                if self._masters:
                    self._masters[name].copy_(whole)
                elif self._stage == 3:
                    safe_set_local_fp32_param(parameter, self._own_part(parameter, whole))
                else:
                    safe_set_full_fp32_param(parameter, whole)
        for place in range(self._accumulation):
            cross_entropy, balance = self.forward(blank)
            self.backward((cross_entropy + balance) * 0.0)
            if place < self._accumulation - 1:
                self.micro_step_done()
        self.step(0.0)
        self._link_moments()
        with torch.no_grad():
            for name, parameter, kind, whole in each(MOMENTS):
                if self._masters:
                    self._adamw.state[self._masters[name]][kind].copy_(whole)
                elif self._stage == 3:
                    safe_set_local_optimizer_state(parameter, self._own_part(parameter, whole), kind)
                else:
                    safe_set_full_optimizer_state(parameter, whole, kind)
        for state in self._adamw.state.values():
            state["step"].fill_(steps)

    def _own_part(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor as ZeRO-3 divides it: equal parts, the last filled up with zeros.

        DeepSpeed's setters of whole tensors (0.19.8) take none that the number of processes does not divide.
        """
        part = parameter.ds_tensor.numel()
        filled = torch.nn.functional.pad(whole.flatten(), (0, part * self.processes.count - whole.numel()))
        return filled.narrow(0, part * self.processes.rank, part)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape; under ZeRO-3 its own is empty, and ds_shape is what it was."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters, those of one dimension (norms) without weight decay."""
    trained = list(trainable(model))
    if not trained:
        raise UserError("lora: nothing in the model trains; name targets in lora.attention or lora.projections")
    is_vector = {name: len(whole_shape(p)) == 1 for name, p in trained}
    groups = [
        {"params": [p for name, p in trained if not is_vector[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if is_vector[name]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
