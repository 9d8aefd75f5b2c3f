"""Whether the numbers are still good: updates that were skipped, and losses that jump."""

import statistics
from collections import deque
from typing import Any

from train.config.train import FailureConfig
from train.history import StepRecord


class Health:
    """Follows the steps of a run; the same on every process, because losses are."""

    def __init__(self, config: FailureConfig):
        self._config = config
        self.refused = 0
        """Updates in a row that were skipped, up to the last step."""
        self.gives_up: str | None = None
        """Why the run must stop, as a sentence, once too many updates in a row were skipped; else None."""
        self._recent: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, record: StepRecord) -> str | None:
        """What is wrong with a step, `refused` (its update was skipped) or `spike`; None if nothing is.

        May set `gives_up`.
        """
        if not record.applied:
            self.refused += 1
            if self.refused >= self._config.refused_in_a_row:
                self.gives_up = (
                    f"failures.refused_in_a_row={self._config.refused_in_a_row}: that many updates in a row were "
                    f"skipped, up to step {record.step}, because loss or gradient were not finite (loss {record.loss}, "
                    f"gradient norm {record.gradient_norm}); lower optim.lr, or look at the rows in metrics.jsonl"
                )
            return "refused"
        self.refused = 0
        limit = self._config.spike
        full = len(self._recent) == self._recent.maxlen
        spike = bool(limit) and full and record.loss > limit * statistics.fmean(self._recent)
        self._recent.append(record.loss)
        return "spike" if spike else None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"refused": self.refused, "recent": list(self._recent)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.refused = int(state["refused"])
        self._recent.extend(state["recent"])
