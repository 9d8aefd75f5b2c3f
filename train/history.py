"""What a run found in its steps and evaluations: the same on every process, and part of each checkpoint."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, over all processes."""

    step: int
    loss: float
    """Nats per supervised token."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    applied: bool
    """False if the update was skipped, because loss or gradient were not finite."""
    load_balancing_loss: float
    """The routers' loss before its weight `router_aux_loss`, averaged over tokens."""
    tokens: int
    supervised_tokens: int
    seconds: float
    """From reading the rows to the update, without evaluations and checkpoints."""
    epoch: float = math.nan
    """Epochs done after this step; NaN in checkpoints that were made before it was noted."""
    flops: float = 0.0
    """Floating-point operations that it had to do (`train.model.work`); 0 in checkpoints from before it was noted."""


class History:
    """Decisions that all processes must make alike, such as whether a step is evaluated again, may rest on it."""

    def __init__(self, resumed: dict[str, Any] | None = None):
        """`resumed` is what `state` returned when the checkpoint was made from which the run goes on."""
        resumed = resumed or {}
        self.evaluations = {int(step): loss for step, loss in _floats(resumed.get("evaluations", {})).items()}
        """Evaluation losses by step."""
        self.last = _step_record(resumed["last"]) if resumed.get("last") else None
        """The last step."""
        self.resumed_after = self.last.step if self.last else 0
        """The step after which this launch goes on; 0 at the beginning of the run."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint, fit for JSON."""
        state = {
            "step": self.last.step if self.last else 0,
            "last": asdict(self.last) if self.last else None,
            "evaluations": {str(step): loss for step, loss in self.evaluations.items()},
        }
        return finite(state)


def finite(value: Any) -> Any:
    """The same value fit for JSON, which knows no NaN: a number that is not finite, at any depth, becomes its name."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _step_record(saved: dict[str, Any]) -> StepRecord:
    """The record in a checkpoint. Older ones have another name for the load-balancing loss."""
    return StepRecord(**_floats({"load_balancing_loss" if n == "router_balance" else n: v for n, v in saved.items()}))


def _floats(named: dict[str, Any]) -> dict[str, Any]:
    """The values with the numbers for which `finite` wrote names."""
    return {name: float(value) if isinstance(value, str) else value for name, value in named.items()}
