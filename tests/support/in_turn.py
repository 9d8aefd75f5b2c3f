"""Which tests a worker of pytest-xdist gets, and in which order."""

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("test_inference.py", "test_resume.py", "test_targets.py", "test_two_hosts.py")
"""Files of tests/integration whose tests share what one worker makes."""
APART = ("tests/unit/train/failures/", "tests/unit/test_benchmark.py", "tests/unit/inference/merging/")
"""Unit tests that mostly wait for processes that they have started, or that take long."""


class InTurn(LoadScopeScheduling):
    """Gives a worker that is through with its own the next test, or the next file of tests that belong together."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, _ = nodeid.partition("::")
        together = path.endswith(TOGETHER) if _is_integration(path) else not path.startswith(APART)
        return path if together else nodeid


def arrange(items: list[pytest.Item]) -> None:
    """Brings all tests into the order in which they are given.

    The first needs the quickstart, and so its worker makes it; what else needs it comes last among those that start
    training, and whole files come first. What waits is spread among them, so that the cores are never idle for long.
    The unit tests that only compute fill what is left.
    """
    training = [item for item in items if _is_integration(item.nodeid)]
    needs = {item: "quickstart" in getattr(item, "fixturenames", ()) for item in training}
    together = {item: item.path.name in TOGETHER for item in training}
    first = next((item for item in training if needs[item] and not together[item]), None)
    training.sort(key=lambda item: (item is not first, needs[item], not together[item]))
    waiting = [item for item in items if item.nodeid.startswith(APART)]
    turns = {item: number / len(of) for of in (training, waiting) for number, item in enumerate(of)}
    items.sort(key=lambda item: turns.get(item, 1.0))


def _is_integration(path: str) -> bool:
    return path.startswith("tests/integration/")
