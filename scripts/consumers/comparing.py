"""How a program in an environment of others compares its results with ours. Needs numpy and nothing of ours."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-4
"""The largest difference of a logit, as a share of the largest logit, that another order of float32 sums may make."""


@dataclass
class Job:
    """Where everything is, what we make of the prompts, and the points that were compared."""

    model: str
    """The merged model."""
    base: str
    adapter: str
    per_expert: str | None
    """The adapter with a name for each expert's matrices."""
    cases: list[dict[str, Any]]
    logits: dict[str, np.ndarray]
    scratch: Path
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def answered(self) -> list[dict[str, Any]]:
        """The cases with an answer."""
        return [case for case in self.cases if case["answer"] is not None]

    def same(self, what: str, pairs: Iterable[tuple[Any, Any]], *, needed: bool = True) -> None:
        """Notes how many of the pairs (theirs, ours) are equal; a point that isn't `needed` can't fail."""
        equal = [theirs == ours for theirs, ours in pairs]
        self._note(what, cases=len(equal), equal=sum(equal), holds=all(equal) or not needed)

    def near(
        self, what: str, theirs: np.ndarray, ours: np.ndarray, tolerance: float = TOLERANCE, *, needed: bool = True
    ) -> None:
        """Notes how far numbers [cases, …] are apart, as a share of the largest; one not `needed` can't fail."""
        assert theirs.shape == ours.shape, (theirs.shape, ours.shape)
        difference = float(np.abs(theirs - ours).max() / np.abs(ours).max())
        self._note(what, cases=len(ours), difference=difference, holds=difference <= tolerance or not needed)

    def attempt(self, what: str, compare: Callable[[], None]) -> None:
        """Compares, and notes what the library says if it can't."""
        try:
            compare()
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            self._note(what, error=f"{type(error).__name__}: {said[0][:200]}", holds=False)

    def _note(self, what: str, **found: Any) -> None:
        self.points.append({"what": what, **found})
        print(self.points[-1], flush=True)


def run(compare: Callable[[Job], None]) -> None:
    """The program: JOB RESULT, both JSON."""
    given = json.loads(Path(sys.argv[1]).read_text())
    reference = Path(given.pop("reference"))
    job = Job(
        **given | {"scratch": Path(given["scratch"])},
        cases=json.loads((reference / "cases.json").read_text()),
        logits=dict(np.load(reference / "logits.npz")),
    )
    compare(job)
    Path(sys.argv[2]).write_text(json.dumps(job.points))
