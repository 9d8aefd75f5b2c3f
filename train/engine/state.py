"""What training changes: float32 masters and Adam's moments, whole and by name, whatever the ZeRO stage."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from train.engine.processes import Processes
from train.engine.zero import whole_shape
from train.lora.attach import trainable

MASTER = "master"
"""The float32 value of a trained parameter, which the optimizer updates; the model's own may be bfloat16."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, by torch's names."""

Read = Callable[[str, str], torch.Tensor]
"""Gives a stored tensor by the parameter's name and by what it is, `MASTER` or one of `MOMENTS`."""


class TrainedState:
    """The one place that knows how ZeRO's stages differ.

    stage   masters and moments are                               they are reached
    0       whole on every process                                in the optimizer
    1, 2    flattened, a partition of each group on each process  by DeepSpeed's functions for whole tensors
    3       a part of each parameter on each process              by those for whole tensors; set part by part
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        *,
        stage: int,
        processes: Processes,
        at: Callable[[str], None],
    ):
        """Must be made before DeepSpeed gets the optimizer, whose groups it fills with tensors of its own.

        Args:
            model: gives the parameters their names.
            optimizer: of the parameters that train.
            stage: the ZeRO stage.
            processes: hold the state together.
            at: called before each parameter with what the process does.
        """
        self._model, self._optimizer, self._stage, self._processes, self._at = model, optimizer, stage, processes, at
        self._groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]

    def start(self) -> None:
        """Undoes what DeepSpeed did to the optimizer when it got it; to be called right after that."""
        if self._stage > 0:
            return
        # Stage 0 took a step to allocate the moments. It counted, and would spoil the bias correction of the real ones.
        # Zeroed and not cleared: DeepSpeed keeps views of the moments.
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()
        for parameter in self._parameters():
            parameter.grad = None
            parameter.grad_dtype = torch.float32  # so that sums over micro-batches lose no bits

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each trained parameter, by name."""
        return {name: whole_shape(parameter) for name, parameter in trainable(self._model)}

    @property
    def steps(self) -> int:
        """Updates that were made; skipped ones do not count."""
        return max((int(state["step"]) for state in self._optimizer.state.values() if "step" in state), default=0)

    def gather(self, *, moments: bool) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The float32 `MASTER` of each trained parameter and, if asked, its `MOMENTS`; collective.

        Whole and on the CPU of the main process; nothing on the others. Gathered one at a time, so a process holds at
        most one tensor beyond its share.
        """
        if moments:
            self._link_moments()
        for name, parameter in trainable(self._model):
            self._at("saving")
            kinds = (MASTER, *MOMENTS) if moments else (MASTER,)
            gathered = {kind: self._gather(name, parameter, kind) for kind in kinds}
            yield name, {kind: tensor for kind, tensor in gathered.items() if tensor is not None}

    def set_masters(self, read: Read) -> None:
        """Sets every master; collective. `read` is called on the main process alone.

        The model's own parameters are taken from them in the next step.
        """
        self._set((MASTER,), read)

    def set_moments(self, read: Read, steps: int) -> None:
        """Sets the moments of every trained parameter, and `steps`; collective. `read` is called on the main process
        alone.

        There must be moments: Adam makes them in its first step.
        """
        self._link_moments()
        self._set(MOMENTS, read)
        for state in self._optimizer.state.values():
            state["step"].fill_(steps)

    def _gather(self, name: str, parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
        """A whole tensor in float32 on the main process's CPU; None on the others."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        is_live = False  # what DeepSpeed gathers is a copy already
        if kind != MASTER and not self.steps:
            tensor = torch.zeros(whole_shape(parameter))
        elif self._stage == 0:
            tensor, is_live = self._held(name, kind), True
        elif kind == MASTER:
            tensor = safe_get_full_fp32_param(parameter)
        else:
            tensor = safe_get_full_optimizer_state(parameter, kind)
        return tensor.detach().to("cpu", torch.float32, copy=is_live) if self._processes.is_main else None

    @torch.no_grad()
    def _set(self, kinds: tuple[str, ...], read: Read) -> None:
        for name, parameter in trainable(self._model):
            self._at("resuming")
            for kind in kinds:
                tensor = torch.empty(whole_shape(parameter), device=self._processes.device)
                if self._processes.is_main:
                    tensor.copy_(read(name, kind))
                torch.distributed.broadcast(tensor, src=0)
                self._set_one(name, parameter, kind, tensor)

    def _set_one(self, name: str, parameter: nn.Parameter, kind: str, tensor: torch.Tensor) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage == 0:
            self._held(name, kind).copy_(tensor)
        elif self._stage == 3 and kind == MASTER:
            safe_set_local_fp32_param(parameter, self._own_part(parameter, tensor))
        elif self._stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, tensor), kind)
        elif kind == MASTER:
            safe_set_full_fp32_param(parameter, tensor)
        else:
            safe_set_full_optimizer_state(parameter, tensor, kind)

    def _held(self, name: str, kind: str) -> torch.Tensor:
        """The tensor itself at stage 0, of which DeepSpeed's functions know nothing."""
        master = self._masters[name]
        tensor: torch.Tensor = master if kind == MASTER else self._optimizer.state[master][kind]
        return tensor

    @functools.cached_property
    def _masters(self) -> dict[str, torch.Tensor]:
        """What the optimizer updates at stage 0, by name."""
        names = {parameter: name for name, parameter in trainable(self._model)}
        masters = [tensor for group in self._optimizer.param_groups for tensor in group["params"]]
        return dict(zip([names[parameter] for parameter in self._parameters()], masters, strict=True))

    def _parameters(self) -> Iterator[nn.Parameter]:
        """The model's own parameters, in the optimizer's order."""
        return (parameter for group in self._groups for parameter in group)

    def _link_moments(self) -> None:
        """Tells DeepSpeed's stages 1 and 2 where the moments are.

        They find out themselves in their first step, but after that of the first group, when other groups have none.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._stage in (1, 2) and self.steps:
            for parameters, group in zip(self._groups, self._optimizer.param_groups, strict=True):
                (partition,) = group["params"]
                lazy_init_hp_params_optimizer_state(parameters, partition, self._optimizer.state)

    def _own_part(self, parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor as ZeRO-3 divides it: equal parts, the last filled up with zeros.

        DeepSpeed's setters of whole tensors (0.19.8) take none that the number of processes does not divide.
        """
        size = parameter.ds_tensor.numel()
        filled = torch.nn.functional.pad(tensor.flatten(), (0, size * self._processes.count - tensor.numel()))
        return filled.narrow(0, size * self._processes.rank, size)
