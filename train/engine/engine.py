"""DeepSpeed's engine: the model run forward, and trained, by all processes together."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.prepared.dataset import Batch
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.optimizer import SkippableAdamW, adamw
from train.engine.processes import Processes
from train.engine.state import Read, TrainedState
from train.engine.zero import deepspeed_config
from train.failures.guard import Guard
from train.model.loss import Extents, MixtralWithLoss
from train.model.routing import Routing


@dataclass(frozen=True, slots=True)
class Update:
    """What became of an optimizer step."""

    gradient_norm: float
    """The 2-norm over all trained parameters, before clipping. NaN if the update was skipped and it isn't known:
    DeepSpeed then says only that a gradient was not finite, not whether one was NaN."""
    applied: bool
    """False if the step was skipped because of a value that is not finite."""


@dataclass(eq=False, repr=False)
class ForwardEngine:
    """The model and its peers, to be run forward alone. Making one is collective: DeepSpeed shards the model."""

    module: MixtralWithLoss
    config: TrainConfig
    batch: BatchArithmetic
    processes: Processes
    guard: Guard | None = None
    """Notes where this process is, to be reported if it is lost."""
    _step: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Nothing in the model trains any more."""
        self.module.requires_grad_(False)
        self._initialize(None)

    def _initialize(self, optimizer: torch.optim.AdamW | None) -> None:
        """Hands the model to DeepSpeed."""
        import deepspeed

        self.at("making the engine")
        with self._read_by_each():
            self._engine, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                config=deepspeed_config(self.config, self.batch, trains=optimizer is not None),
                dist_init_required=False,
            )

    @contextlib.contextmanager
    def _read_by_each(self) -> Iterator[None]:
        """Within it, DeepSpeed sends adapters alone from process 0 to the others: each has read the base itself.

        It leaves out what has this attribute, which marks weights that differ between processes.
        """
        base = [parameter for name, parameter in self.module.named_parameters() if "lora_" not in name]
        for parameter in base:
            parameter.ds_optim_param = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for parameter in base:
                del parameter.ds_optim_param  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    def at(self, phase: str, step: int | None = None) -> None:
        """Notes what the process does from now on, and in which step if that changes, to be reported if it dies."""
        self._step = self._step if step is None else step
        if self.guard is None:
            return
        if self._step is None:
            self.guard.start(phase)
        else:
            self.guard.at(self._step, phase)

    def disk(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Within it, this thread waits for the disk of that path alone; if the disk hangs, the guard ends the run."""
        return contextlib.nullcontext() if self.guard is None else self.guard.disk(path)

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
        extents = Extents.of(batch.positions, batch.targets, batch.is_token, self.device)
        on_device = batch.to(self.device)
        losses: tuple[torch.Tensor, torch.Tensor] = self._engine(
            on_device.ids, on_device.positions, on_device.targets, on_device.is_token, extents
        )
        return losses

    @contextlib.contextmanager
    def watching_routers(self) -> Iterator[None]:
        """Within it, forwards note what the routers do; `take_routing` gives it."""
        self.module.watches_routing = True
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
        return Routing.from_list(self.sum_over_processes(*own.to_list()), shape)

    def sum_over_processes(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64; collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        summed: list[float] = total.tolist()  # in one transfer: the host waits for each
        return summed

    def any_process(self, flag: bool) -> bool:
        """Whether a flag is set on any process; collective."""
        (count,) = self.sum_over_processes(flag)
        return count > 0


class Engine(ForwardEngine):
    """The model, its optimizer and its peers. Losses given to `backward` are summed over processes, not averaged."""

    def __post_init__(self) -> None:
        """Makes the optimizer of what trains.

        Raises:
            UserError: nothing in the model trains.
        """
        stage, causal_lm = self.config.deepspeed.stage, self.module.causal_lm
        self._adamw = adamw(causal_lm, self.config)
        self._state = TrainedState(causal_lm, self._adamw, stage=stage, processes=self.processes, at=self.at)
        self.module.differentiates_input = stage == 3
        self._initialize(self._adamw)
        self._state.start()
        self.shapes = self._state.shapes
        """The whole shape of each trained parameter, by name."""

    def train(self) -> None:
        """Switches to training mode."""
        self._engine.train()

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
        """Clips and updates; collective. If any process has a value that is not finite, nothing changes anywhere."""
        assert self._engine.is_gradient_accumulation_boundary()
        self.at("update")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if isinstance(self._adamw, SkippableAdamW):
            return self._checked_step(self._adamw)
        self._engine.step()
        norm, applied = self._engine.get_global_grad_norm(), self._engine.was_step_applied()
        return Update(float(norm) if applied and norm is not None else math.nan, applied)

    def _checked_step(self, optimizer: SkippableAdamW) -> Update:
        """A step in which DeepSpeed neither reports the norm that it clips by nor checks that it is finite."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))  # before clipping: by an infinite one that leaves zeros
        skipped = self.any_process(not math.isfinite(norm))
        with optimizer.skipping() if skipped else contextlib.nullcontext():
            self._engine.step()
        return Update(norm, not skipped)

    @property
    def optimizer_steps(self) -> int:
        """Updates that were made; skipped ones do not count."""
        return self._state.steps

    def state(self, *, moments: bool = True) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """What training has changed: see `TrainedState.gather`; collective."""
        return self._state.gather(moments=moments)

    def restore(self, read: Read, steps: int, blank: Batch) -> None:
        """Sets every trained parameter and its moments to what `state` gave once; collective.

        Args:
            read: the state of a parameter by its name and what it is; called on the main process alone, which has the
                files.
            steps: `optimizer_steps` at that time.
            blank: a micro-batch without tokens.
        """
        self.at("restoring the checkpoint")
        self._state.set_masters(read)
        self._step_without_tokens(blank)
        self._state.set_moments(read, steps)

    def _step_without_tokens(self, blank: Batch) -> None:
        """Makes the moments, and takes the model's own parameters from the masters, which it does not change."""
        for index in range(self.batch.accumulation):
            cross_entropy, balance = self.forward(blank)
            self.backward((cross_entropy + balance) * 0.0)
            if index < self.batch.accumulation - 1:
                self.micro_step_done()
        self.step(0.0)
