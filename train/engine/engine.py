"""The only file that imports deepspeed: processes, collectives, and one optimizer over all of them."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.program.errors import UserError
from data.prepared.dataset import Batch
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.processes import Processes
from train.engine.zero import deepspeed_config, whole_shape
from train.failures.guard import Guard
from train.lora.attach import trainable
from train.model.loss import MixtralWithLoss
from train.model.routing import Routing

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, by torch's names."""


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
            model=model, optimizer=self._adamw, config=deepspeed_config(config, batch), dist_init_required=False
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
